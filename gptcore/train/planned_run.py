"""What ``gptcore plan`` plans: a model, its optimizer, and how an update is cut up."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

from gptcore.errors import UserError
from gptcore.models import accounting
from gptcore.models.activations import CHECKPOINTING, Activations, Checkpointing, activations
from gptcore.models.config import GPTConfig
from gptcore.train.optimizers import OptimizerSpec
from gptcore.train.state_size import StateSize, state_size

Offload = Literal["none", "optimizer", "parameters"]
OFFLOAD: tuple[Offload, ...] = ("none", "optimizer", "parameters")


@dataclass(frozen=True)
class Run:
    """What is planned. An update has ``sequences`` of ``length`` tokens, in leaves of ``grain`` sequences.

    ``element_bytes``: of weights and activations, 4 (f32) or 2 (bf16). ``offload``: what is in host memory between its
    uses, "optimizer" its states, "parameters" in stage 3 each rank's weights as well. ``fixed_tree`` false adds leaves
    as they come, in one running sum. ``bucket``: elements of gradient that are sent together, about.
    """

    model: GPTConfig
    optimizer: OptimizerSpec
    element_bytes: int = 2
    sequences: int = 512
    length: int = 1024
    grain: int = 1
    checkpointing: Checkpointing = "none"
    offload: Offload = "none"
    fixed_tree: bool = True
    bucket: int = 8 << 20

    def __post_init__(self) -> None:
        for name in ("sequences", "length", "grain", "bucket"):
            if getattr(self, name) < 1:
                raise UserError(f"plan: {name}: expected 1 or more, got {getattr(self, name)}")
        if self.sequences % self.grain:
            raise UserError(
                f"plan: grain: {self.grain} sequences do not divide the {self.sequences} of an update"
            )
        for name, known in (("checkpointing", CHECKPOINTING), ("offload", OFFLOAD)):
            if getattr(self, name) not in known:
                raise UserError(
                    f"plan: {name}: expected one of {', '.join(known)}, got '{getattr(self, name)}'"
                )
        positions = self.model.position.kind
        if self.length > self.model.context_length and positions in ("learned", "rotary"):
            raise UserError(
                f"plan: length: {self.length} is more than the context length {self.model.context_length}"
            )

    @property
    def leaves(self) -> int:
        """Of an update."""
        return self.sequences // self.grain

    @property
    def tokens(self) -> int:
        """Of an update."""
        return self.sequences * self.length

    def each(self, ranks: int) -> int:
        """Leaves of a rank.

        Raises:
            UserError: fewer than 1 rank, or ranks that do not divide the leaves.
        """
        if ranks < 1:
            raise UserError(f"plan: ranks: expected 1 or more, got {ranks}")
        if self.leaves % ranks:
            raise UserError(
                f"plan: {ranks} ranks do not divide the {self.leaves} leaves of an update; change their number, "
                "the batch or the grain"
            )
        return self.leaves // ranks

    @functools.cached_property
    def parameters(self) -> int:
        return accounting.parameter_counts(self.model).total

    @functools.cached_property
    def state(self) -> StateSize:
        return state_size(self.optimizer, accounting.parameter_shapes(self.model), self.element_bytes)

    @functools.cached_property
    def activations(self) -> Activations:
        """Of one leaf."""
        return activations(
            self.model,
            self.grain * self.length,
            element_bytes=self.element_bytes,
            checkpointing=self.checkpointing,
        )

    @functools.cached_property
    def root(self) -> int:
        """Parameters outside the blocks."""
        return sum(map(math.prod, accounting.root_shapes(self.model)))

    @functools.cached_property
    def largest_block(self) -> int:
        """Parameters of the largest block."""
        kinds = {self.model.has_experts(layer) for layer in range(self.model.num_layers)}
        return max(sum(map(math.prod, accounting.block_shapes(self.model, kind))) for kind in kinds)
