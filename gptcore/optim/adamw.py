"""AdamW over the fused kernel ``gptcore.ops.adamw.adamw_``: one read pass, one update pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), clipped by the global norm.

    For each parameter, with g the gradient over ``grad_scale`` and times the clip factor::

        m = beta1 m + (1 - beta1) g           v = beta2 v + (1 - beta2) g²
        p = p (1 - lr weight_decay) - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    The moments are f32 whatever the parameter is. A bf16 parameter has an f32 master in the state, which
    is what is updated; the parameter is its rounding, written in the same pass.

    Args:
        params: as for torch's optimizers, named or not; groups may differ in lr, betas, eps, weight_decay.
        lr: learning rate, >= 0. Set ``group["lr"]`` for a schedule.
        betas: decay of the moments, each in [0, 1).
        eps: added to the denominator after the root, >= 0.
        weight_decay: >= 0; :func:`gptcore.optim.decay_groups` makes the usual two groups.
        max_norm: the norm of all gradients together, after unscaling, is clipped to this; None for none.

    After ``step``: ``last_grad_norm`` is that norm before clipping (nan or inf if a gradient was), and
    ``found_inf`` tells whether a gradient was not finite, in which case nothing was written: no
    parameter, no moment, no step count.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_norm: float | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not 0.0 <= value < math.inf:
                raise ValueError(f"AdamW: argument '{name}': got {value}, expected a finite number >= 0")
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"AdamW: argument 'betas': got {betas}, expected two numbers in [0, 1)")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"AdamW: argument 'max_norm': got {max_norm}, expected a number > 0 or None")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.max_norm = max_norm
        self.last_grad_norm = 0.0
        self.found_inf = False
        self._sums: dict[torch.Tensor, torch.Tensor] = {}
        self._summed: set[torch.Tensor] = set()

    def accumulate(self) -> None:
        """Add the gradients of one micro-batch to f32 sums, which the next ``step`` uses.

        Only bf16 parameters need it (their gradients are freed here): autograd itself adds up
        f32 gradients, in the order of the calls, and those are left where they are.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or p.dtype != torch.bfloat16:
                    continue
                if p not in self._sums:
                    self._sums[p] = torch.empty_like(p, dtype=torch.float32)
                # The buffers are kept over steps; the first micro-batch overwrites what is left in them.
                if p in self._summed:
                    self._sums[p].add_(p.grad)
                else:
                    self._sums[p].copy_(p.grad)
                self._summed.add(p)
                p.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients and f32 sums."""
        super().zero_grad(set_to_none)
        self._summed.clear()

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, grad_scale: float = 1.0
    ) -> float | None:
        """One update. Gradients are divided by ``grad_scale`` first (micro-batches, or a loss scale)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        calls = self._calls()
        self.found_inf = False
        self.last_grad_norm = 0.0
        max_norm = self.max_norm
        if len(calls) > 1:
            # Groups that differ in lr, betas or eps need one call each, but share one norm.
            self.last_grad_norm = _global_norm([g for call in calls for g in call.grads]) / grad_scale
            if not math.isfinite(self.last_grad_norm):
                self.found_inf = True
                return loss
            if max_norm is not None:
                grad_scale /= min(1.0, max_norm / (self.last_grad_norm + 1e-6))
                max_norm = None
        for call in calls:
            norm, self.found_inf = call.run(self.state, max_norm, grad_scale)
            if len(calls) == 1:
                self.last_grad_norm = norm
        return loss

    def _calls(self) -> list[_Call]:
        calls: dict[tuple[Any, ...], _Call] = {}
        for group in self.param_groups:
            for p in group["params"]:
                grad = self._sums[p] if p in self._summed else p.grad
                if grad is None:
                    continue
                state = self.state[p]
                if not state:
                    self._start(p, state)
                settings = (state["step"] + 1, float(group["lr"]), *group["betas"], group["eps"])
                key = (*settings, p.dtype == torch.bfloat16, p.device)
                call = calls.setdefault(key, _Call(settings))
                call.params.append(p)
                call.grads.append(grad.contiguous())  # as torch's own gradients of contiguous parameters are
                call.weight_decay.append(group["weight_decay"])
        return list(calls.values())

    def _start(self, p: torch.Tensor, state: dict[str, Any]) -> None:
        if p.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"AdamW: argument 'params': got {p.dtype}, expected float32 or bfloat16")
        state["step"] = 0
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format)
        if p.dtype == torch.bfloat16:
            state["master"] = p.detach().float().contiguous()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, bit for bit.

        torch's own version casts state to the parameter's dtype, which would round masters and moments
        of bf16 parameters; it is undone here.
        """
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, torch.Tensor):
                    self.state[p][name] = value.detach().to(p.device, copy=True)


class _Call:
    """The tensors of one kernel call: same step, lr, betas, eps, kind and device."""

    def __init__(self, settings: tuple[Any, ...]) -> None:
        self.settings = settings
        self.params: list[torch.Tensor] = []
        self.grads: list[torch.Tensor] = []
        self.weight_decay: list[float] = []

    def run(self, state: Any, max_norm: float | None, grad_scale: float) -> tuple[float, bool]:
        """Returns the norm before clipping and whether a gradient was not finite (then nothing changed)."""
        from gptcore.ops.adamw import adamw_

        step, lr, beta1, beta2, eps = self.settings
        states = [state[p] for p in self.params]
        mastered = self.params[0].dtype == torch.bfloat16
        norm, found_inf = adamw_(
            [s["master"] for s in states] if mastered else [p.detach() for p in self.params],
            self.grads,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            step=step,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=self.weight_decay,
            copies=[p.detach() for p in self.params] if mastered else None,
            max_norm=max_norm,
            grad_scale=grad_scale,
        )
        if not found_inf:
            for s in states:
                s["step"] = step
        return float(norm), bool(found_inf)


def _global_norm(grads: list[torch.Tensor]) -> float:
    """Euclidean norm over all tensors, the same bits for every thread count: NumPy sums on one thread."""
    total = 0.0
    for grad in grads:
        values = grad.detach().float().cpu().numpy()
        total += float(np.square(values, dtype=np.float64).sum())
    return math.sqrt(total)
