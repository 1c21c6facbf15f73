"""SGD over the fused kernel ``gptcore.ops.sgd_``: one read pass, one update pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from gptcore.optim.fused import Call, FusedOptimizer, Number, plain
from gptcore.optim.slices import Whole


class SGD(FusedOptimizer):
    """Stochastic gradient descent with momentum (Sutskever et al. 2013), clipped by the global norm.

    For each parameter, with g the gradient over ``grad_scale``, times the clip factor, plus
    ``weight_decay p``::

        b = momentum b + (1 - dampening) g        (b = g in the first step)
        p = p - lr b                              (nesterov: p - lr (g + momentum b))

    Stands in for ``torch.optim.SGD``: its arguments, and its ``state_dict``, which either loads from the
    other. Buffers are f32 whatever the parameter is. A bf16 parameter has an f32 master in the state, which
    is what is updated; the parameter is its rounding, written in the same pass. Parameters are contiguous.

    Args:
        params: as for torch's optimizers, named or not; groups may have settings of their own.
        lr: learning rate, >= 0; a number or a tensor of one. Set ``group["lr"]`` for a schedule.
        momentum: >= 0; without one there is no buffer.
        dampening: in [0, 1].
        weight_decay: L2 in the gradient, >= 0.
        nesterov: needs a momentum and no dampening.
        maximize: ascend.
        foreach, fused: taken and kept for torch's sake; the kernel is always fused over all tensors.
        differentiable: only False.
        max_norm: the norm of all gradients together, after unscaling, is clipped to this; None for none.
        check_finite: False leaves out the pass that looks for inf and NaN, where ``max_norm`` is None: as fast
            as the memory lets torch's be, and as blind.

    After ``step``: ``last_grad_norm`` is that norm before clipping (None where nothing took it), and
    ``found_inf`` tells whether a gradient was not finite, in which case nothing was written. On a GPU both are tensors
    of one element, and steps wait for nothing; where the very first step is skipped there, the next one begins buffers
    with ``(1 - dampening) g``.

    Raises:
        ValueError: a setting out of its range, or one that the kernel does not have.
        TypeError: parameters that are neither f32, bf16 nor f16, in ``step``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        check_finite: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, max_norm, check_finite=check_finite)

    def _check(self, group: dict[str, Any]) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            self._check_number(group, name)
        if not 0.0 <= group["dampening"] <= 1.0:
            raise self._bad("dampening", group["dampening"], "a number in [0, 1]")
        if group["nesterov"] and (not group["momentum"] > 0 or group["dampening"] != 0):
            raise self._bad("nesterov", True, "a momentum above 0 and dampening 0 with it")

    def _settings(self, group: dict[str, Any]) -> tuple[Any, ...]:
        numbers = (float(group[name]) for name in ("momentum", "dampening"))
        return (plain(group["lr"]), *numbers, group["nesterov"], group["maximize"])

    def _begin(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any], whole: Whole) -> int:
        self._begin_master(p, state)
        return 0

    def _update(
        self, call: Call, max_norm: float | None, grad_scale: Number, grad_norm: Number | None
    ) -> tuple[Number | None, bool | torch.Tensor]:
        from gptcore.ops.sgd import sgd_

        lr, momentum, dampening, nesterov, maximize = call.settings
        weights, copies = call.weights()
        kept = [state.get("momentum_buffer") for state in call.states] if momentum else []
        # On a GPU nobody knows whether the first step was skipped, so that buffers must hold what begins a second one.
        new = torch.zeros_like if call.on_device else torch.empty_like
        buffers = [
            new(p, dtype=torch.float32, memory_format=torch.contiguous_format) if b is None else b
            for p, b in zip(call.params, kept, strict=False)
        ]
        norm, found_inf = sgd_(
            weights,
            call.grads,
            buffers or None,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            nesterov=nesterov,
            weight_decay=call.weight_decay,
            first=[b is None for b in kept],
            copies=copies,
            maximize=maximize,
            max_norm=max_norm,
            grad_scale=grad_scale,
            grad_norm=grad_norm,
            check_finite=self.check_finite,
        )
        if call.on_device or not found_inf:
            for state, buffer in zip(call.states, buffers, strict=False):
                state["momentum_buffer"] = buffer
        return norm, found_inf

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also takes what older torch saved: groups without the newer keys."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in _ADDED.items():
                group.setdefault(name, value)


# Keys of a group that saved states of older torch versions lack.
_ADDED: dict[str, Any] = {
    "nesterov": False,
    "maximize": False,
    "foreach": None,
    "differentiable": False,
    "fused": None,
}
