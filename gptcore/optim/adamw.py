"""Adam and AdamW over the fused kernel ``gptcore.ops.adamw_``: one read pass, one update pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from gptcore.ops.adamw import join_master, split_master
from gptcore.optim.fused import MASTERED, Call, FusedOptimizer, Number, count_from_zero, plain, step_device
from gptcore.optim.slices import Whole


class Adam(FusedOptimizer):
    """Adam (Kingma and Ba 2015), weight decay as L2 in the gradient, clipped by the global norm.

    For each parameter, with g the gradient over ``grad_scale``, times the clip factor, plus
    ``weight_decay p``::

        m = beta1 m + (1 - beta1) g           v = beta2 v + (1 - beta2) g²
        p = p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Stands in for ``torch.optim.Adam``: its arguments, and its ``state_dict``, which either loads from the
    other. The moments are f32 whatever the parameter is. A bf16 parameter has an f32 master in the state, which
    is what is updated; the parameter is its rounding, written in the same pass. Parameters are contiguous.

    Args:
        params: as for torch's optimizers, named or not; groups may have settings of their own.
        lr: learning rate, >= 0; a number or a tensor of one. Set ``group["lr"]`` for a schedule.
        betas: decay of the moments, each in [0, 1).
        eps: added to the denominator after the root, >= 0.
        weight_decay: >= 0; :func:`gptcore.optim.decay_groups` makes the usual two groups.
        amsgrad: the largest v so far in the denominator (Reddi et al. 2018); 4 bytes a parameter more.
        maximize: ascend.
        foreach, fused: taken and kept for torch's sake; the kernel is always fused over all tensors.
        capturable: on a GPU steps always are; True asks for parameters there.
        differentiable: only False.
        decoupled_weight_decay: True makes it AdamW.
        max_norm: the norm of all gradients together, after unscaling, is clipped to this; None for none.
        split_master: of bf16 parameters keep only the 16 bits of the master that the parameter lacks: 2 bytes a
            parameter less and the same masters, bit for bit, under the same gradients. The parameter is its
            master's rounding with ties away from zero instead of to even. A parameter that is written
            between steps takes effect; with whole masters it does not. ``state_dict`` has whole masters either
            way, so either kind loads what the other saved.

    After ``step``: ``last_grad_norm`` is that norm before clipping (nan or inf if a gradient was), and
    ``found_inf`` tells whether a gradient was not finite, in which case nothing was written: no
    parameter, no moment, no step count. (torch writes NaN.) On a GPU both are tensors of one element, and steps wait
    for nothing.

    Raises:
        ValueError: a setting out of its range, or one that the kernel does not have.
        TypeError: parameters that are neither f32, bf16 nor f16, in ``step``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_norm: float | None = None,
        split_master: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        self.split_master = split_master
        super().__init__(params, defaults, max_norm)

    def _check(self, group: dict[str, Any]) -> None:
        self._check_adam(group)

    def _settings(self, group: dict[str, Any]) -> tuple[Any, ...]:
        beta1, beta2 = group["betas"]
        return (
            plain(group["lr"]),
            *(float(value) for value in (beta1, beta2, group["eps"])),
            group["decoupled_weight_decay"],
            group["maximize"],
            group["amsgrad"],
        )

    def _begin(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any], whole: Whole) -> int:
        if not state:
            self._begin_master(p, state)
            state["step"] = count_from_zero(p)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = _zeros(p)
        elif p.dtype in MASTERED:
            self._begin_master(p, state)  # loaded state may have none, or one of the other kind
        if group["amsgrad"] and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = _zeros(p)
        return 0 if p.is_cuda else int(state["step"].item()) + 1

    def _begin_master(self, p: torch.Tensor, state: dict[str, Any]) -> None:
        """Whole or split as this optimizer wants it, whatever was loaded; torch's state has none."""
        if p.dtype == torch.bfloat16 and self.split_master:
            if "master" in state:
                weight, state["master_low"] = split_master(state.pop("master"))
                p.copy_(weight)
            elif "master_low" not in state:
                state["master_low"] = torch.zeros_like(
                    p, dtype=torch.int16, memory_format=torch.contiguous_format
                )
        else:
            if "master_low" in state:
                state["master"] = join_master(p, state.pop("master_low"))
            super()._begin_master(p, state)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the f32 ``master`` of bf16 parameters, whole even where this optimizer splits it."""
        saved = super().state_dict()
        if self.split_master:
            for group, packed in zip(self.param_groups, saved["param_groups"], strict=True):
                for p, i in zip(group["params"], packed["params"], strict=True):
                    state = dict(saved["state"].get(i, {}))
                    if "master_low" in state:
                        state["master"] = join_master(p, state.pop("master_low"))
                        saved["state"][i] = state
        return saved

    def _update(
        self, call: Call, max_norm: float | None, grad_scale: Number, grad_norm: Number | None
    ) -> tuple[Number, bool | torch.Tensor]:
        from gptcore.ops.adamw import adamw_

        lr, beta1, beta2, eps, decoupled, maximize, amsgrad = call.settings
        split = call.mastered and self.split_master and not call.half
        weights, copies = (call.params, None) if split else call.weights()
        return adamw_(
            weights,
            call.grads,
            call.list_of("exp_avg"),
            call.list_of("exp_avg_sq"),
            step=None if call.on_device else call.number,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=call.weight_decay,
            copies=copies,
            max_norm=max_norm,
            grad_scale=grad_scale,
            max_exp_avg_sqs=call.list_of("max_exp_avg_sq") if amsgrad else None,
            lows=call.list_of("master_low") if split else None,
            decoupled=decoupled,
            maximize=maximize,
            grad_norm=grad_norm,
            steps=call.list_of("step"),
        )

    def __getstate__(self) -> dict[str, Any]:
        """With what torch's own leaves out."""
        return {**super().__getstate__(), "split_master": self.split_master}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also takes what older versions and older torch saved: groups without the newer keys, a plain step."""
        self.__dict__.setdefault("split_master", False)
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in _ADDED.items():
                group.setdefault(name, value)
            for p in group["params"]:
                own = self.state.get(p, {})
                if own and not isinstance(own["step"], torch.Tensor):
                    own["step"] = torch.tensor(float(own["step"]), device=step_device(p))


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), clipped by the global norm.

    For each parameter, with g the gradient over ``grad_scale`` and times the clip factor::

        m = beta1 m + (1 - beta1) g           v = beta2 v + (1 - beta2) g²
        p = p (1 - lr weight_decay) - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Stands in for ``torch.optim.AdamW``. Arguments, state and errors are those of :class:`Adam`;
    ``weight_decay`` is 0.01 by default.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        split_master: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            max_norm=max_norm,
            split_master=split_master,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The decay stays decoupled, whatever was loaded."""
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True


# Keys of a group that saved states of older versions lack.
_ADDED: dict[str, Any] = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": False,
}


def _zeros(p: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format)
