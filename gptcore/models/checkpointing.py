"""Activation checkpointing: a block's intermediate values are computed anew in backward instead of kept.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 3, for whole blocks; Korthikanti et al. 2022,
"Reducing Activation Recomputation in Large Transformer Models", section 5, for the idea of keeping what is dear to
compute and dropping what is large and cheap. Both go by ``torch.utils.checkpoint``, so that torch.compile knows them.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gptcore.errors import unknown_name
from gptcore.nn.moe import MoE, MoEStatistics, RoutingStatistics

if TYPE_CHECKING:
    from gptcore.models.block import Context

KINDS = ("none", "selective", "block")
Kind = Literal["none", "selective", "block"]

# What selective checkpointing keeps: results of products and of attention, and the choices of a router. Recomputed are
# norms, activations, rotations, copies and dropout.
_KEPT = frozenset((
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear",
    "gptcore::matmul", "gptcore::attention", "gptcore::attention_qkv", "gptcore::grouped_linear",
    "gptcore::moe_router",
))  # fmt: skip


class Checkpointing(NamedTuple):
    """Which blocks keep what: ``kind`` for every ``every``-th block from the first, "none" for the others."""

    kind: Kind = "none"
    every: int = 1

    @classmethod
    def checked(cls, kind: str, every: int) -> Checkpointing:
        """Raises:
        ValueError: an unknown kind, or ``every`` below 1.
        """
        if kind not in KINDS:
            raise unknown_name("activation checkpointing", str(kind), KINDS)
        if every < 1:
            raise ValueError(f"checkpoint_activations: argument 'every': got {every}, expected 1 or more")
        return cls(kind, every)  # type: ignore[arg-type]

    def serves(self, index: int, context: Context) -> bool:
        """Whether block ``index`` is to be checkpointed in this forward: where there is a backward to spare for."""
        return (
            self.kind != "none"
            and index % self.every == 0
            and torch.is_grad_enabled()
            and context.cache is None
            # torch.func differentiates without saved-tensor hooks
            and (torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None)
        )

    def run(
        self, block: Any, x: Tensor, delta: Tensor | None, context: Context
    ) -> tuple[Tensor, Tensor | None]:
        """``block(x, delta, context)`` for a ``Block``. In backward random numbers come again from the same state."""

        def forward(x: Tensor, delta: Tensor | None) -> tuple[Tensor, ...]:
            # A list of its own: backward runs this a second time, whose statistics nobody wants.
            routing = RoutingStatistics()
            y, after = block(x, delta, context._replace(routing=routing))
            return (y, *(() if after is None else (after,)), *(t for one in routing.layers for t in one))

        options: dict[str, Any] = {"context_fn": _selective} if self.kind == "selective" else {}
        y, *rest = checkpoint(
            forward, x, delta, use_reentrant=False, preserve_rng_state=_draws(block), **options
        )
        after = rest.pop(0) if block.gives_delta else None
        if context.routing is not None and isinstance(block.mlp, MoE):
            context.routing.append(MoEStatistics(*rest))
        return y, after


def _draws(block: nn.Module) -> bool:
    """Whether a pass through it takes random numbers, so that their state must be kept: reading it waits for a device,
    and cannot be captured in a graph. What attention drops is by its seed."""
    return any(
        (isinstance(part, nn.Dropout) and part.p > 0) or (isinstance(part, MoE) and part.draws)
        for part in block.modules()
    )


def _policy(_: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    return (
        CheckpointPolicy.MUST_SAVE if op.name().split(".")[0] in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
    )


_selective = functools.partial(create_selective_checkpoint_contexts, _policy)
