"""Adafactor over the fused kernel ``gptcore.ops.adafactor_``, under the names of its implementations."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from typing import Any, Literal

import torch

from gptcore.errors import unknown_name
from gptcore.optim.adafactor_phases import check_complete, drive, in_step
from gptcore.optim.fused import Call, FusedOptimizer, Number, count_from_zero, plain
from gptcore.optim.slices import BlockSums, StatePlace, Whole


class Adafactor(FusedOptimizer):
    """Adafactor (Shazeer and Stern 2018): the second moment of a matrix kept as one row and one column.

    A matrix of n x m (the last two dimensions) has n + m numbers of state where Adam has 2 n m. Implementations
    disagree with each other; ``variant`` names whose numbers come out. With t the step, from 1, and
    ``beta2 = 1 - t^beta2_decay``:

    ``"torch"``
        ``torch.optim.Adafactor``: its arguments ``lr=1e-2, beta2_decay=-0.8, eps=(None, 1e-3), d=1.0,
        weight_decay=0.0, foreach=None, maximize=False``, and its ``state_dict``, which either loads from the
        other. The step is ``min(lr, 1/sqrt(t)) max(eps[1], RMS(p))``; eps[0] holds the estimate from below;
        its default is that of f32, in which the kernel computes, for bf16 parameters too.
    ``"paper"``
        Algorithms 4 to 6: the same arguments with ``eps=(1e-30, 1e-3)``, eps[0] being added to the squared
        gradient.
    ``"hf"``
        ``transformers.Adafactor``: ``lr=None, eps=(1e-30, 1e-3), clip_threshold=1.0, decay_rate=-0.8,
        beta1=None, weight_decay=0.0, scale_parameter=True, relative_step=True, warmup_init=False``. With
        relative_step the step is ``min(1e-2, 1/sqrt(t))``, or ``min(1e-6 t, 1/sqrt(t))`` with warmup_init;
        else ``lr``. Weight decay is times the scaled step.
    ``"palm"``
        Chowdhery et al. 2022, section 5, as T5X has it: no factoring, ``lr=1e-2, beta1=0.9, beta2_decay=-0.8,
        eps=(1e-30, 1e-3), weight_decay=1.0, maximize=False``, the step ``lr max(eps[1], RMS(p))``, weight
        decay ``weight_decay lr²``, the global norm clipped to ``max_norm=1.0``, and no clip of each update
        (``d=None``; 1.0 adds the paper's). ``schedule.inverse_sqrt`` is its learning rate.

    Everywhere an update is divided by ``max(1, RMS(update) / d)`` (clip_threshold for hf) before the step, and
    the moments are f32 whatever the parameter is. A bf16 parameter has an f32 master in the state, which is what
    is updated; the parameter is its rounding, written in the same pass. Parameters are contiguous. Where they are
    slices of larger ones (:mod:`gptcore.optim.slices`), sums go by fixed blocks; see :meth:`step_phases`.

    Args:
        params: as for torch's optimizers, named or not; groups may have settings of their own.
        lr: learning rate; None for the variant's default.
        variant: whose Adafactor: "torch", "paper", "hf" or "palm".
        options: of the variant, as above, and for all ``max_norm``: the norm of all gradients together,
            after unscaling, is clipped to this; None for none (the default of all but palm).

    After ``step``: ``last_grad_norm`` is that norm before clipping (nan or inf if a gradient was), and
    ``found_inf`` tells whether a gradient was not finite, in which case nothing was written. On a GPU both are tensors
    of one element, and steps wait for nothing but what owners of slices tell each other.

    Raises:
        ValueError: a setting out of its range, or one that the variant does not have.
        TypeError: parameters that are neither f32, bf16 nor f16, in ``step``.
    """

    _always_in_blocks = False  # whole parameters too, for comparisons

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor | None = None,
        *,
        variant: Literal["torch", "paper", "hf", "palm"] = "torch",
        **options: Any,
    ) -> None:
        if variant not in _DEFAULTS:
            raise unknown_name("variant of Adafactor", str(variant), _DEFAULTS)
        self.variant = variant
        defaults = dict(_DEFAULTS[variant])
        for name, value in options.items():
            if name not in defaults:
                raise self._bad(name, value, f"one of {', '.join(defaults)} with variant '{variant}'")
            defaults[name] = value
        if lr is not None:
            defaults["lr"] = lr
            # As in transformers, a rate of one's own must be asked for: it would be ignored.
            if defaults.get("relative_step"):
                raise self._bad("lr", lr, "None, or relative_step=False")
        max_norm = defaults.pop("max_norm")
        super().__init__(params, defaults, max_norm)

    def _check(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            if group[name] is not None:
                self._check_number(group, name)
        if group["lr"] is None and not group.get("relative_step"):
            raise self._bad("lr", None, "a number, or relative_step=True")
        if group.get("warmup_init") and not group["relative_step"]:
            raise self._bad("warmup_init", True, "False, or relative_step=True")
        eps1, eps2 = group["eps"]
        if eps1 is None and self.variant == "torch":
            eps1 = 0.0
        if eps1 is None or not (0.0 <= eps1 < math.inf and 0.0 <= eps2 < math.inf):
            raise self._bad("eps", group["eps"], "two numbers >= 0")
        decay = "decay_rate" if self.variant == "hf" else "beta2_decay"
        if not -math.inf < group[decay] <= 0.0:
            raise self._bad(decay, group[decay], "a number <= 0")
        clip = "clip_threshold" if self.variant == "hf" else "d"
        least = 1.0 if self.variant == "torch" else 0.0
        if group[clip] is not None and not (group[clip] >= least and group[clip] > 0):
            raise self._bad(clip, group[clip], "a number >= 1" if least else "a number > 0")
        if group.get("beta1") is not None and not 0.0 <= group["beta1"] < 1.0:
            raise self._bad("beta1", group["beta1"], "a number in [0, 1) or None")

    def _settings(self, group: dict[str, Any]) -> tuple[Any, ...]:
        names = [
            name for name in _DEFAULTS[self.variant] if name not in ("weight_decay", "foreach", "max_norm")
        ]
        values = {name: group[name] for name in names}
        if values["lr"] is not None:
            values["lr"] = plain(values["lr"])
        return tuple((name, tuple(v) if name == "eps" else v) for name, v in values.items())

    def _begin(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any], whole: Whole) -> int:
        if "master" not in state:
            self._begin_master(p, state)
        if "step" not in state:
            state["step"] = count_from_zero(p)
            shape = whole.shape
            if len(shape) > 1 and self.variant != "palm":
                rows = shape[:-1] if p.shape == shape else (p.numel() // max(1, shape[-1]),)
                state["row_var"] = _zeros(p, (*rows, 1))
                state["col_var"] = _zeros(p, (*shape[:-2], 1, shape[-1]))
            else:
                state["variance"] = _zeros(p, p.shape)
        if group.get("beta1") is not None and "exp_avg" not in state:
            state["exp_avg"] = _zeros(p, p.shape)
        return 0 if p.is_cuda else int(state["step"]) + 1

    def state_place(self, key: str, shape: tuple[int, ...], start: int, stop: int) -> StatePlace:
        """A number for each row; of the columns' all with every owner."""
        if key == "row_var":
            return StatePlace(start // shape[-1], stop // shape[-1], (*shape[:-1], 1), (-1, 1))
        if key == "col_var":
            whole = (*shape[:-2], 1, shape[-1])
            return StatePlace(0, math.prod(whole), whole, whole, shared=True)
        return super().state_place(key, shape, start, stop)

    def _update(
        self, call: Call, max_norm: float | None, grad_scale: Number, grad_norm: Number | None
    ) -> tuple[Number, bool | torch.Tensor]:
        from gptcore.ops.adafactor import adafactor_
        from gptcore.ops.grad_norm import grad_norm as norm_of

        if not self._in_blocks():
            return adafactor_(
                **self._arguments(call),
                max_norm=max_norm,
                grad_scale=grad_scale,
                grad_norm=grad_norm,
                steps=call.list_of("step"),
            )
        check_complete(call)
        if grad_norm is None:
            grad_norm, found_inf = norm_of(call.grads, grad_scale)
        else:
            found_inf = False
        if found_inf is not True:
            drive(in_step([call], [self._phases(call, grad_scale, grad_norm)]))
            self._count(call, grad_norm)
        return grad_norm, found_inf

    @staticmethod
    def _count(call: Call, grad_norm: Number) -> None:
        """One update more, where its norm was finite."""
        steps = call.list_of("step")
        if isinstance(grad_norm, torch.Tensor):
            torch._foreach_add_(steps, [grad_norm.isfinite().float()] * len(steps))
        else:
            torch._foreach_add_(steps, 1.0)

    def _arguments(self, call: Call) -> dict[str, Any]:
        """The kernel's tensors and numbers but for the clip's."""
        group = dict(call.settings)
        weights, copies = call.weights()
        momentum = group.get("beta1") is not None
        # On a GPU each parameter's own count, of which the host knows nothing.
        step = torch.stack(call.list_of("step")).double() + 1.0 if call.on_device else call.number
        numbers, decay = _numbers(self.variant, group, step)
        factor: dict[str, Any] = {}
        if isinstance(decay, torch.Tensor):
            factor, decay = {"decay_factor": decay}, 1.0
        return {
            **numbers,
            **factor,
            **{name + "s": [s.get(name) for s in call.states] for name in ("row_var", "col_var", "variance")},
            "params": weights,
            "grads": call.grads,
            "weight_decay": [w * decay for w in call.weight_decay],
            "exp_avgs": call.list_of("exp_avg") if momentum else None,
            "beta1": group["beta1"] if momentum else 0.0,
            "maximize": group.get("maximize", False),
            "copies": copies,
        }

    # --- slices --------------------------------------------------------------------------------------------

    def _in_blocks(self) -> bool:
        """Whether sums go by fixed blocks, whose bits no cut changes, as those of slices must."""
        return self._always_in_blocks or any(
            hasattr(p, "whole") for group in self.param_groups for p in group["params"]
        )

    def _phases(
        self, call: Call, grad_scale: Number, grad_norm: Number
    ) -> Generator[list[torch.Tensor], list[torch.Tensor], None]:
        from gptcore.ops.adafactor_blocks import adafactor_blocks_

        wholes = [(whole.shape, whole.start) for whole in call.wholes]
        return adafactor_blocks_(
            **self._arguments(call),
            wholes=wholes,
            max_norm=self.max_norm,
            grad_scale=grad_scale,
            grad_norm=grad_norm,
        )

    @torch.no_grad()
    def step_phases(
        self, *, grad_norm: tuple[float, bool], grad_scale: float = 1.0
    ) -> Generator[list[BlockSums], list[torch.Tensor], None]:
        """One update of slices whose wholes have several owners, which exchange sums twice.

        A generator: it yields what this optimizer's slices (parameters with ``whole``, :mod:`gptcore.optim.slices`)
        have to tell the others, in the same order both times, and is sent for each entry the sums of all blocks of
        its whole, (count, width). Every owner runs it, and all are sent the same; :func:`~slices.join_blocks` makes
        it of all owners' entries. The bits are those of any other cut, and of ``step`` where one optimizer has all
        slices. It yields nothing where found_inf is True.

        Slices of matrices (..., n, m) begin and end with blocks of :func:`~slices.row_block` rows, others at multiples
        of 1,024 elements. Their state is ``row_var``, (rows of the slice, 1), of which all owners' one below the other
        are the whole's (..., n, 1), and ``col_var``, (..., 1, m) of the whole, equal with all owners.

        Args:
            grad_norm: ``(norm, found_inf)`` of all owners' gradients, as for ``step``.
            grad_scale: gradients are divided by it.
        """
        self._check_norm(grad_norm, None)
        self.last_grad_norm, self.found_inf = norm, found_inf = grad_norm
        if found_inf:
            return
        calls = self._calls()
        yield from in_step(calls, [self._phases(call, grad_scale, norm) for call in calls])
        for call in calls:
            torch._foreach_add_(call.list_of("step"), 1.0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base's; refuses what another variant saved."""
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            lacking = [name for name in group if name != "param_names" and name not in saved]
            if lacking:
                raise ValueError(
                    f"Adafactor: argument 'state_dict': got groups without {', '.join(lacking)}, "
                    f"expected those of variant '{self.variant}'"
                )
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "variant": self.variant}


# Each variant's settings, under the names of its source, which are those of its groups.
_TORCH: dict[str, Any] = {
    "lr": 1e-2,
    "beta2_decay": -0.8,
    "eps": (None, 1e-3),
    "d": 1.0,
    "weight_decay": 0.0,
    "foreach": None,
    "maximize": False,
    "max_norm": None,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "torch": _TORCH,
    "paper": {**_TORCH, "eps": (1e-30, 1e-3)},
    "hf": {
        "lr": None,
        "eps": (1e-30, 1e-3),
        "clip_threshold": 1.0,
        "decay_rate": -0.8,
        "beta1": None,
        "weight_decay": 0.0,
        "scale_parameter": True,
        "relative_step": True,
        "warmup_init": False,
        "max_norm": None,
    },
    "palm": {
        "lr": 1e-2,
        "beta1": 0.9,
        "beta2_decay": -0.8,
        "eps": (1e-30, 1e-3),
        "d": None,
        "weight_decay": 1.0,
        "maximize": False,
        "max_norm": 1.0,
    },
}


def _least(a: Number, b: Number) -> Number:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.minimum(a, b)
    if isinstance(a, torch.Tensor):
        return a.clamp(max=b)
    return b.clamp(max=a) if isinstance(b, torch.Tensor) else min(a, b)


def _numbers(variant: str, group: dict[str, Any], t: Number) -> tuple[dict[str, Any], Number]:
    """What the kernel takes at step t, or at steps t, and the factor of the weight decay."""
    lr, (eps1, eps2) = group["lr"], group["eps"]
    if variant == "hf":
        if group["relative_step"]:
            lr = _least(1e-6 * t if group["warmup_init"] else 1e-2, t**-0.5)
        return {
            "step_size": lr,
            "beta2": 1.0 - t ** group["decay_rate"],
            "eps": (eps1, eps2),
            "clip_threshold": group["clip_threshold"],
            "scale_parameter": group["scale_parameter"],
            "scaled_decay": True,
        }, 1.0
    palm = variant == "palm"
    return {
        "step_size": lr if palm else _least(lr, t**-0.5),
        "beta2": 1.0 - t ** group["beta2_decay"],
        "eps": (torch.finfo(torch.float32).eps if eps1 is None else eps1, eps2),
        "eps_added": variant != "torch",
        "clip_threshold": group["d"],
    }, (lr * lr if palm else lr)


def _zeros(p: torch.Tensor, shape: Iterable[int]) -> torch.Tensor:
    return torch.zeros(tuple(shape), dtype=torch.float32, device=p.device)
