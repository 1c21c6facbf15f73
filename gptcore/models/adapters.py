"""Adapters on a model: put on, used several at once or not at all, merged into the weights and taken out again.

An adapter is a name and, beside the weights of its layers, low-rank updates (LoRA, DoRA), or tokens before every
sequence (soft prompts, prefixes). The model itself does not change: with its adapters off it gives what it gave
before, bit for bit, so a policy trained by an adapter has its reference in the same memory. What an adapter is not made
of is frozen when it is put on, so optimizer, sharding and checkpoints see only what trains.

Every function takes a ``GPT``, or a module that holds one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from gptcore.errors import UserError, unknown_name
from gptcore.models import adapter_parts as parts
from gptcore.models.adapter_spec import AdapterSpec
from gptcore.models.virtual_tokens import VirtualTokens
from gptcore.nn.lora import AdaptedLinear

if TYPE_CHECKING:
    from typing import TypeGuard

    from gptcore.models.gpt import GPT

__all__ = [
    "AdapterSpec", "absorb", "describe", "gpt_of", "in_use", "merge", "names", "off", "put_on", "put_on_described",
    "put_on_empty", "remove", "state_names", "unmerge", "use",
]  # fmt: skip

Model = TypeVar("Model", bound=nn.Module)


def put_on(model: Model, spec: AdapterSpec, *, name: str = "default", seed: int = 0) -> Model:
    """Put an adapter on ``model``, in place: alone in use and alone trained. The model then gives what it gave before,
    except with virtual tokens, which begin as words.

    Args:
        spec: which, and its settings.
        name: letters, digits, - and _.
        seed: of what it starts from.

    Returns:
        ``model``.

    Raises:
        UserError: a name that is taken, a layer that the model has not, more virtual tokens than its context takes, a
            model cut over ranks or with merged adapters.
    """
    gpt = gpt_of(model)
    generator = torch.Generator().manual_seed(seed)
    if not spec.low_rank:
        _check(gpt, spec, name)
        tokens = parts.add_tokens(gpt, spec, name)
        with off(gpt):
            tokens.initialise(gpt, generator)
        _register(gpt, spec, name)
        return model
    put_on_empty(gpt, spec, parts.parts_of(gpt, spec), name=name)
    for path, updates in parts.updates_of(gpt, name).items():
        for update in updates:
            update.initialise(cast(AdaptedLinear, gpt.get_submodule(path)).weight, generator)
    return model


def put_on_empty(gpt: GPT, spec: AdapterSpec, layers: parts.Parts, *, name: str = "default") -> None:
    """As :func:`put_on`, with values to be filled in, and for LoRA and DoRA with parts of any ranks and scales."""
    _check(gpt, spec, name)
    if spec.low_rank:
        parts.add_low_rank(gpt, spec, name, layers)
    else:
        parts.add_tokens(gpt, spec, name)
    _register(gpt, spec, name)


def names(model: nn.Module) -> list[str]:
    """The adapters that are on, in the order they were put on."""
    return list(gpt_of(model).adapter_specs)


def in_use(model: nn.Module) -> dict[str, float]:
    """The adapters in use, and their strengths."""
    return dict(gpt_of(model).adapters_in_use)


def use(model: nn.Module, strengths: Mapping[str, float] | str) -> None:
    """Use these adapters together, each update times its strength, and no others; a name alone is of strength 1.

    Raises:
        UserError: an unknown name, several with virtual tokens or one of strength other than 1, merged adapters.
    """
    gpt = gpt_of(model)
    strengths = {strengths: 1.0} if isinstance(strengths, str) else dict(strengths)
    for name in strengths:
        if name not in gpt.adapter_specs:
            raise unknown_name("adapter", name, gpt.adapter_specs)
    virtual = [name for name in strengths if not gpt.adapter_specs[name].low_rank and strengths[name]]
    if len(virtual) > 1 or any(strengths[name] != 1.0 for name in virtual):
        raise UserError(
            f"adapters {', '.join(virtual)}: virtual tokens are used one adapter at a time, at strength 1"
        )
    _refuse_merged(gpt)
    gpt.adapters_in_use = {name: float(s) for name, s in strengths.items() if s}
    _apply(gpt, gpt.adapters_in_use)


@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is the one under its adapters: the reference of a policy that they make.

    Raises:
        UserError: merged adapters.
    """
    gpt = gpt_of(model)
    _refuse_merged(gpt)
    _apply(gpt, {})
    try:
        yield
    finally:
        _apply(gpt, gpt.adapters_in_use)


def merge(model: nn.Module) -> None:
    """Add the updates in use to the weights, which costs their memory once more: for :func:`unmerge`.

    Raises:
        UserError: virtual tokens in use, which no weight can take.
    """
    gpt = gpt_of(model)
    virtual = [name for name in gpt.adapters_in_use if not gpt.adapter_specs[name].low_rank]
    if virtual:
        raise UserError(
            f"adapter {virtual[0]}: virtual tokens are no part of a weight; expected lora or dora to merge"
        )
    for _, layer in parts.layers_with_updates(gpt):
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undo :func:`merge`: the weights are what they were, bit for bit."""
    for _, layer in parts.layers_with_updates(gpt_of(model)):
        layer.unmerge()


def absorb(model: Model) -> Model:
    """Merge what is in use for good and take all adapters off: a plain model, all of which trains.

    Raises:
        UserError: virtual tokens in use.
    """
    merge(model)
    gpt = gpt_of(model)
    for path, layer in parts.layers_with_updates(gpt):
        parts.replace(gpt, path, layer.plain())
    gpt.virtual_tokens = None
    gpt.adapter_specs, gpt.adapters_in_use = {}, {}
    gpt.requires_grad_(True)
    return model


def remove(model: nn.Module, name: str) -> None:
    """Take one adapter off.

    Raises:
        UserError: an unknown name, merged adapters.
    """
    gpt = gpt_of(model)
    if name not in gpt.adapter_specs:
        raise unknown_name("adapter", name, gpt.adapter_specs)
    use(gpt, {other: s for other, s in gpt.adapters_in_use.items() if other != name})
    del gpt.adapter_specs[name]
    for _, layer in parts.layers_with_updates(gpt):
        if name in layer.adapters:
            del layer.adapters[name]
    if gpt.virtual_tokens is not None and name in gpt.virtual_tokens.adapters:
        del gpt.virtual_tokens.adapters[name]


def state_names(model: nn.Module) -> set[str]:
    """The names in ``model.state_dict()`` that belong to adapters."""
    found = set()
    for path, module in model.named_modules():
        if isinstance(module, (AdaptedLinear, VirtualTokens)):
            prefix = f"{path}.adapters." if path else "adapters."
            found |= {prefix + name for name in module.adapters.state_dict()}
    return found


def describe(model: nn.Module) -> dict[str, Any]:
    """Plain values for a checkpoint: of each adapter its settings, the parts of its layers and its strength in use."""
    gpt = next((module for module in model.modules() if _is_gpt(module)), None)
    if gpt is None:
        return {}
    return {
        name: {
            "spec": spec.to_dict(),
            "strength": gpt.adapters_in_use.get(name, 0.0),
            "layers": parts.parts_to_plain(gpt, name),
        }
        for name, spec in gpt.adapter_specs.items()
    }


def put_on_described(model: Model, described: Mapping[str, Any]) -> Model:
    """Put on what :func:`describe` told of, to be filled in."""
    for name, entry in described.items():
        spec = AdapterSpec.from_dict(entry["spec"])
        put_on_empty(gpt_of(model), spec, parts.parts_from_plain(entry["layers"]), name=name)
    use(model, {name: entry["strength"] for name, entry in described.items()})
    return model


def gpt_of(model: nn.Module) -> GPT:
    """The ``GPT`` that ``model`` is or holds."""
    found = next((module for module in model.modules() if _is_gpt(module)), None)
    if found is None:
        raise UserError(f"adapters go on a GPT of gptcore.models, got {type(model).__name__}")
    return found


def _is_gpt(module: nn.Module) -> TypeGuard[GPT]:
    from gptcore.models.gpt import GPT

    return isinstance(module, GPT)


def _check(gpt: GPT, spec: AdapterSpec, name: str) -> None:
    if not name or not name.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"adapter name: got {name!r}, expected letters, digits, - and _")
    if name in gpt.adapter_specs:
        raise UserError(
            f"adapter name: the model has an adapter '{name}' already; remove it or choose another name"
        )
    if gpt.tensor is not None:
        raise UserError("adapters: got a model cut over ranks, expected a whole one")
    _refuse_merged(gpt)
    if not spec.low_rank and spec.tokens >= gpt.config.context_length:
        raise UserError(
            f"adapter.tokens: {spec.tokens} virtual tokens leave no place for others in a context of "
            f"{gpt.config.context_length}"
        )


def _register(gpt: GPT, spec: AdapterSpec, name: str) -> None:
    """Count modules that are in place as an adapter: alone in use and alone trained."""
    gpt.adapter_specs[name] = spec
    gpt.requires_grad_(False)
    for module in parts.modules_of(gpt, name):
        module.requires_grad_(True)
    use(gpt, name)


def _apply(gpt: GPT, strengths: Mapping[str, float]) -> None:
    for _, layer in parts.layers_with_updates(gpt):
        layer.use(strengths)
    if gpt.virtual_tokens is not None:
        gpt.virtual_tokens.in_use = next((n for n in strengths if n in gpt.virtual_tokens.adapters), None)


def _refuse_merged(gpt: GPT) -> None:
    if any(layer.merged for _, layer in parts.layers_with_updates(gpt)):
        raise UserError("adapters: the model has adapters merged into its weights; unmerge them first")
