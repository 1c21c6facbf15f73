"""``gptcore.replace(model)`` and ``gptcore.restore(model)``: a live model's modules onto the kernels, and back.

A module is swapped by giving it a subclass of its own class that has another ``forward``: the object, its
parameters, buffers, hooks, names and state dict stay what they are. Before that both forwards are run on a small
random input, and a module that would compute something else stays as it is. Nothing outside the model changes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Rule:
    """How modules of one kind are swapped.

    ``kind``: its name in the report. ``matches``: whether a module is of the kind. ``forward``: of the new class.
    ``inputs``: what to try both forwards on, as a function of the module. ``refuses``: why a module of the kind
    stays, or None.
    """

    kind: str
    matches: Callable[[nn.Module], bool]
    forward: Forward
    inputs: Callable[[Any], tuple[Any, ...]]
    refuses: Callable[[Any], str | None] = lambda module: None


@dataclass
class Report:
    """What ``replace`` did: ``swapped`` kind to module names, ``left`` (kind, reason) to module names."""

    swapped: dict[str, list[str]] = field(default_factory=dict)
    left: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        done = [f"  swapped {len(names)} {kind}" for kind, names in sorted(self.swapped.items())]
        left = [
            f"  left {len(names)} {kind}: {reason}" for (kind, reason), names in sorted(self.left.items())
        ]
        return "\n".join(
            ["gptcore.replace:", *done, *left, *([] if done or left else ["  found nothing to swap"])]
        )

    def leave(self, kind: str, reason: str, name: str) -> None:
        self.left.setdefault((kind, reason), []).append(name)


def replace(model: nn.Module, *, verbose: bool = True) -> Report:
    """Swap, in place, every module of ``model`` that a kernel serves better; :func:`restore` undoes it.

    torch's LayerNorm, RMSNorm, GELU, SiLU, Embedding and, for few rows and under autocast, Linear; of transformers'
    models also RMSNorms, activations, gated feed-forwards, GPT-2's Conv1D, and attention where the model lets it be
    chosen. Parameters, state dict, hooks and module names do not change; a copy or a pickle of the model is swapped
    too. What is not supported stays as it is, in the module's class or, for a dtype or device, call by call.

    Args:
        model: any module. Other libraries' subclasses of torch's modules are left alone.
        verbose: print the report.

    Returns:
        :class:`Report`: what was swapped, and what was left and why.
    """
    from gptcore.integrations.huggingface import attention
    from gptcore.integrations.huggingface.apply import RULES

    report = Report()
    swap_modules(model, RULES, report)
    attention.choose(model, report)
    if verbose:
        print(report)
    return report


def swap_modules(model: nn.Module, rules: Sequence[Rule], report: Report, *, trial: bool = True) -> None:
    """Swap by the first of ``rules`` that matches. Without ``trial`` the caller knows what the modules compute."""
    for name, module in model.named_modules():
        rule = None if isinstance(module, _Swapped) else next((r for r in rules if r.matches(module)), None)
        if rule is not None:
            _swap(name or "the model", module, rule, report, trial)


def restore(model: nn.Module) -> None:
    """Give every module that :func:`replace` swapped its own class back, and the model its attention."""
    from gptcore.integrations.huggingface import attention

    for module in model.modules():
        if isinstance(module, _Swapped):
            module.__class__ = module.original
    attention.restore(model)


class _Swapped:
    """What every swapped class also is."""

    original: type
    kernel_forward: Forward


_classes: dict[tuple[type, Forward], type] = {}


def _class_for(original: Any, forward: Forward) -> type:
    """The subclass of ``original`` with ``forward``."""
    key = (original, forward)
    if key not in _classes:

        @functools.wraps(original.forward)  # other libraries read the names of its arguments
        def named_alike(module: nn.Module, *arguments: Any, **keywords: Any) -> Any:
            if not isinstance(module, _Swapped):  # restored, under a wrapper that kept this method
                return original.forward(module, *arguments, **keywords)
            return forward(module, *arguments, **keywords)

        members = {
            "forward": named_alike, "original": original, "kernel_forward": staticmethod(forward),
            "__module__": original.__module__, "__reduce_ex__": _reduce,
        }  # fmt: skip
        _classes[key] = type(original.__name__, (_Swapped, original), members)
    return _classes[key]


def _reduce(module: Any, protocol: Any) -> tuple[Any, ...]:
    """A class made at run time has no name to pickle, so its two parts are."""
    return _rebuild, (module.original, module.kernel_forward), module.__dict__


def _rebuild(original: type, forward: Forward) -> Any:
    return object.__new__(_class_for(original, forward))


def original_forward(module: nn.Module, *arguments: Any, **keywords: Any) -> Any:
    """What a swapped module computed before: for calls that the kernels do not take."""
    return module.original.forward(module, *arguments, **keywords)  # type: ignore[union-attr, operator]


def runs(module: nn.Module, *forwards: Forward) -> bool:
    """Whether the module's class was swapped for one with one of these forwards."""
    return getattr(type(module), "kernel_forward", None) in forwards


def _swap(name: str, module: nn.Module, rule: Rule, report: Report, trial: bool) -> None:
    if "forward" in module.__dict__:  # accelerate's hooks and others wrap it so; a class would not be asked
        reason: str | None = "another library replaced its forward"
    else:
        reason = rule.refuses(module) or (_differs(module, rule) if trial else None)
    if reason:
        report.leave(type(module).__name__, reason, name)
    else:
        module.__class__ = _class_for(type(module), rule.forward)
        report.swapped.setdefault(rule.kind, []).append(name)


def _differs(module: nn.Module, rule: Rule) -> str | None:
    """Why ``rule`` would change what ``module`` computes, or None. Hooks are not run."""
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        return "its parameters are on the meta device"
    with torch.no_grad(), _without_dropout(module):
        inputs = rule.inputs(module)
        wanted = _first(module.forward(*inputs))
        module.__class__ = _class_for(type(module), rule.forward)
        try:
            got = _first(module.forward(*inputs))
        finally:
            module.__class__ = module.original  # type: ignore[assignment]
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return "it returns another shape or dtype"
    # Sixteen roundings of the result, which two orders of the same few steps can differ by, and those of two sums in
    # f32 along the input: a random walk each, whose largest of thousands is some four times the usual.
    terms = inputs[0].shape[-1] if inputs[0].ndim else 1
    roundings = 16 * torch.finfo(got.dtype).eps + 8 * terms**0.5 * torch.finfo(torch.float32).eps
    bound = roundings * wanted.double().abs().max()
    return None if (got.double() - wanted.double()).abs().max() <= bound else "it computes something else"


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result  # type: ignore[no-any-return]


@contextlib.contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """``module`` in evaluation, and each of its parts as it was afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def row(module: Any) -> tuple[Tensor]:
    """Input for what works on numbers one by one."""
    return (random_input(None, 3, 40),)


def random_input(like: Tensor | None, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers of a parameter's dtype and device, drawn without touching torch's default generator."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * scale
    return x if like is None else x.to(like.dtype).to(like.device)
