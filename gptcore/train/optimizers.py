"""The optimizer of a run: its table in the config, and the object over a model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from gptcore.errors import UserError
from gptcore.models.schema import Spec, at_least
from gptcore.optim import SGD, Adafactor, Adam, AdamW, AdamW8bit, decay_groups
from gptcore.optim.fused import FusedOptimizer

_CLASSES: dict[str, Callable[..., FusedOptimizer]] = {
    "adamw": AdamW, "adam": Adam, "sgd": SGD, "adafactor": Adafactor, "adamw_8bit": AdamW8bit,
}  # fmt: skip

# What each takes besides lr, weight_decay and max_norm; of Adafactor each variant.
_TAKES: dict[str, tuple[str, ...]] = {
    "adamw": ("betas", "eps", "amsgrad", "split_master"),
    "adam": ("betas", "eps", "amsgrad", "split_master"),
    "adamw_8bit": ("betas", "eps", "master_weights"),
    "sgd": ("momentum", "dampening", "nesterov"),
    "adafactor torch": ("variant", "eps", "beta2_decay", "clip_threshold"),
    "adafactor paper": ("variant", "eps", "beta2_decay", "clip_threshold"),
    "adafactor hf": ("variant", "eps", "beta2_decay", "clip_threshold", "beta1", "scale_parameter"),
    "adafactor palm": ("variant", "eps", "beta2_decay", "clip_threshold", "beta1"),
}

# Where training a GPT wants something else than the optimizer's own default.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.1, "betas": (0.9, 0.95)},
    "adam": {"weight_decay": 0.0, "betas": (0.9, 0.95)},
    "adamw_8bit": {"weight_decay": 0.1, "betas": (0.9, 0.95)},
    "sgd": {"weight_decay": 0.0, "momentum": 0.9},
    "adafactor torch": {"weight_decay": 0.0},
    "adafactor paper": {"weight_decay": 0.0},
    "adafactor hf": {"weight_decay": 0.0, "relative_step": False},
    "adafactor palm": {"weight_decay": 1.0},
}

# Adafactor's implementations have names of their own for these.
_NAMES: dict[str, dict[str, str]] = {
    "adafactor torch": {"clip_threshold": "d"},
    "adafactor paper": {"clip_threshold": "d"},
    "adafactor hf": {"beta2_decay": "decay_rate"},
    "adafactor palm": {"clip_threshold": "d"},
}


@dataclass(frozen=True)
class OptimizerSpec(Spec):
    """Which optimizer, and its settings; what is not set has the default of :meth:`options`.

    All take ``lr``, the peak of the schedule; ``weight_decay``, for matrices and embeddings, not for biases and norms
    (AdamW and its 8-bit form 0.1, Adafactor's ``palm`` 1.0, the others 0); and ``max_norm``, the norm of all gradients
    together to clip to, 0 for none. The others go with the optimizers that have them:

    ``adamw``, ``adam``
        ``betas`` (0.9, 0.95), ``eps`` 1e-8, ``amsgrad``; ``split_master`` keeps of the f32 masters of bf16 weights only
        what the weights lack: 2 bytes a parameter less.
    ``adamw_8bit``
        ``betas``, ``eps``; ``master_weights`` false rounds bf16 weights at random instead of keeping f32 masters.
    ``sgd``
        ``momentum`` 0.9, ``dampening`` 0, ``nesterov``.
    ``adafactor``
        ``variant`` torch, paper, hf or palm (see :class:`gptcore.optim.Adafactor`), ``eps``, two numbers,
        ``beta2_decay`` -0.8, ``clip_threshold``; with hf and palm ``beta1``, with hf ``scale_parameter``. The learning
        rate is the schedule's, so hf's own (``relative_step``) is off.
    """

    section: ClassVar[str] = "optimizer"

    name: Literal["adamw", "adam", "sgd", "adafactor", "adamw_8bit"] = "adamw"
    lr: float = 1e-3
    weight_decay: float | None = None
    max_norm: float = 1.0
    betas: tuple[float, ...] | None = None
    eps: float | tuple[float, ...] | None = None
    amsgrad: bool | None = None
    split_master: bool | None = None
    master_weights: bool | None = None
    momentum: float | None = None
    dampening: float | None = None
    nesterov: bool | None = None
    variant: Literal["torch", "paper", "hf", "palm"] | None = None
    beta1: float | None = None
    beta2_decay: float | None = None
    clip_threshold: float | None = None
    scale_parameter: bool | None = None

    @property
    def kind(self) -> str:
        """What decides the state that a checkpoint holds: the name, of Adafactor with its variant."""
        return f"adafactor {self.variant or 'torch'}" if self.name == "adafactor" else self.name

    def validate(self) -> None:
        at_least("optimizer.", 0.0, lr=self.lr, weight_decay=self.weight_decay, max_norm=self.max_norm)
        for name in sorted({name for names in _TAKES.values() for name in names}):
            if getattr(self, name) is not None and name not in _TAKES[self.kind]:
                takers = ", ".join(kind for kind, names in _TAKES.items() if name in names)
                raise UserError(f"optimizer.{name}: {self.kind} does not have it ({takers}); leave it out")
        for name, length in (("betas", 2), ("eps", 2 if self.name == "adafactor" else 1)):
            value = getattr(self, name)
            if value is not None and (len(value) if isinstance(value, tuple) else 1) != length:
                expected = "two numbers" if length == 2 else "one number"
                got = list(value) if isinstance(value, tuple) else value
                raise UserError(f"optimizer.{name}: expected {expected}, got {got}")
        try:
            self.over([torch.zeros(1)])  # which judges the values
        except ValueError as error:
            raise UserError(f"optimizer: {error}") from error

    def options(self) -> dict[str, Any]:
        """The optimizer's arguments besides ``params``, ``lr`` and ``max_norm``, as far as they are not its own
        defaults."""
        given = {name: getattr(self, name) for name in ("weight_decay", *_TAKES[self.kind])}
        own = _NAMES.get(self.kind, {})
        set_here = {own.get(name, name): value for name, value in given.items() if value is not None}
        return {**_DEFAULTS[self.kind], **set_here}

    def over(self, params: Iterable[Any], **more: Any) -> FusedOptimizer:
        """The optimizer over ``params``, with ``more`` of its arguments."""
        arguments = {**self.options(), **more}
        return _CLASSES[self.name](params, lr=self.lr, max_norm=self.max_norm or None, **arguments)


def build(spec: OptimizerSpec, model: torch.nn.Module, *, seed: int = 0) -> FusedOptimizer:
    """An optimizer over all parameters of ``model``, in groups with and without weight decay.

    ``seed`` is of random rounding, where the optimizer does such.
    """
    random = {"seed": seed} if spec.name == "adamw_8bit" else {}
    return spec.over(decay_groups(model, spec.options()["weight_decay"]), **random)
