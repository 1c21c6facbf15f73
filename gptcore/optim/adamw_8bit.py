"""AdamW with 8-bit moments over the fused kernel ``gptcore.ops.adamw_8bit_``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from gptcore.optim.fused import Call, FusedOptimizer, Number, count_from_zero, plain
from gptcore.optim.slices import StatePlace, Whole

# Smaller tensors (biases, gains of norms) keep f32 moments: Dettmers et al. 2022 and bitsandbytes do so.
_QUANTISED_FROM = 4096
_BLOCK = 256


class AdamW8bit(FusedOptimizer):
    """AdamW whose moments take one byte each, with a scale for every 256 (Dettmers et al. 2022).

    The update is that of :class:`gptcore.optim.AdamW`; between steps m and v are the nearest values of a dynamic map
    of 256, times the largest magnitude of their block. State is 2 + 8/256 bytes a parameter where AdamW has 8, and
    beside it for bf16 parameters either an f32 master (4 bytes), or with ``master_weights=False`` nothing: then the
    new value is rounded to bf16 up or down, with odds by its distance to either, so that small steps add up.
    Tensors of fewer than 4,096 elements keep f32 moments and masters.

    A slice of a larger parameter (:mod:`gptcore.optim.slices`) that begins with a block of 256 gets the bits that it
    would have in the whole.

    Args:
        params: as for torch's optimizers, named or not; groups may have settings of their own.
        lr: learning rate, >= 0; a number or a tensor of one. Set ``group["lr"]`` for a schedule.
        betas: decay of the moments, each in [0, 1).
        eps: added to the denominator after the root, >= 0.
        weight_decay: decoupled, >= 0; :func:`gptcore.optim.decay_groups` makes the usual two groups.
        maximize: ascend.
        master_weights: keep f32 masters of bf16 parameters. f32 parameters have none in either case.
        seed: of the random rounding without masters, 0 to 2^64 - 1. The bits depend on it, on the step and on the
            element's place (the parameter's in the list of all, its own in the parameter), so a resumed run goes on
            as it would have.
        max_norm: the norm of all gradients together, after unscaling, is clipped to this; None for none.

    After ``step``: ``last_grad_norm`` is that norm before clipping (nan or inf if a gradient was), and
    ``found_inf`` tells whether a gradient was not finite, in which case nothing was written. On a GPU both are tensors
    of one element, and steps wait for nothing.

    Raises:
        ValueError: a setting out of its range.
        TypeError: parameters that are neither f32, bf16 nor f16, in ``step``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        master_weights: bool = True,
        seed: int = 0,
        max_norm: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "master_weights": master_weights,
            "seed": seed,
        }
        super().__init__(params, defaults, max_norm)

    def _check(self, group: dict[str, Any]) -> None:
        self._check_adam(group)
        if not 0 <= group["seed"] < 2**64:
            raise self._bad("seed", group["seed"], "a number from 0 to 2^64 - 1")

    def _settings(self, group: dict[str, Any]) -> tuple[Any, ...]:
        beta1, beta2 = group["betas"]
        numbers = (float(value) for value in (beta1, beta2, group["eps"]))
        return (plain(group["lr"]), *numbers, group["maximize"], group["master_weights"], group["seed"])

    def _begin(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any], whole: Whole) -> int:
        small = whole.numel < _QUANTISED_FROM
        if "step" not in state:
            if small or group["master_weights"] or p.dtype != torch.bfloat16:
                self._begin_master(p, state)
            if not small:
                _check_slice(p, whole)
            state["step"] = count_from_zero(p)
            for name in ("exp_avg", "exp_avg_sq"):
                if small:
                    state[name] = torch.zeros(p.shape, device=p.device)
                else:
                    state[name] = torch.zeros(p.shape, dtype=torch.uint8, device=p.device)
                    state[name + "_scale"] = torch.zeros(-(-p.numel() // _BLOCK), device=p.device)
        return small if p.is_cuda else 2 * (int(state["step"]) + 1) + small

    def state_place(self, key: str, shape: tuple[int, ...], start: int, stop: int) -> StatePlace:
        """One scale for each block of codes."""
        if key.endswith("_scale"):
            return StatePlace(start // _BLOCK, -(-stop // _BLOCK), (-(-math.prod(shape) // _BLOCK),))
        return super().state_place(key, shape, start, stop)

    def _update(
        self, call: Call, max_norm: float | None, grad_scale: Number, grad_norm: Number | None
    ) -> tuple[Number, bool | torch.Tensor]:
        step, small = divmod(call.number, 2)
        lr, beta1, beta2, eps, maximize, _, seed = call.settings
        shared: dict[str, Any] = {
            "step": None if call.on_device else step,
            "steps": call.list_of("step"),
            "lr": lr,
            "beta1": beta1,
            "beta2": beta2,
            "eps": eps,
            "weight_decay": call.weight_decay,
            "maximize": maximize,
            "max_norm": max_norm,
            "grad_scale": grad_scale,
            "grad_norm": grad_norm,
        }
        return self._update_small(call, shared) if small else self._update_codes(call, shared, seed)

    @staticmethod
    def _update_small(call: Call, shared: dict[str, Any]) -> tuple[Number, bool | torch.Tensor]:
        from gptcore.ops.adamw import adamw_

        weights, copies = call.weights()
        moments = [call.list_of(name) for name in ("exp_avg", "exp_avg_sq")]
        return adamw_(weights, call.grads, *moments, copies=copies, **shared)

    @staticmethod
    def _update_codes(call: Call, shared: dict[str, Any], seed: int) -> tuple[Number, bool | torch.Tensor]:
        from gptcore.ops.adamw_8bit import adamw_8bit_

        weights, copies = call.weights() if "master" in call.states[0] else (call.params, None)
        names = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
        moments = [call.list_of(name) for name in names]
        places = [(whole.number, whole.start) for whole in call.wholes]
        return adamw_8bit_(weights, call.grads, *moments, copies=copies, seed=seed, places=places, **shared)


def _check_slice(p: torch.Tensor, whole: Whole) -> None:
    """A slice has the codes of the whole if both have the same blocks."""
    stop = whole.start + p.numel()
    if whole.start % _BLOCK or (stop % _BLOCK and stop != whole.numel):
        raise ValueError(
            f"AdamW8bit: argument 'params': got the slice [{whole.start}, {stop}) of a parameter of {whole.numel} "
            f"elements, expected multiples of {_BLOCK}, or the end"
        )
