"""The settings of an adapter: the ``[adapter]`` table that stages of alignment share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from gptcore.errors import UserError, unknown_name
from gptcore.models.schema import Spec, at_least

WHOLE = ("qkv", "out", "up", "down")
_PART_OF = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "up", "value": "up"}
# What others call these layers.
_ALIASES = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out", "out_proj": "out", "gate_proj": "gate",
    "down_proj": "down", "c_attn": "qkv", "query_key_value": "qkv", "qkv_proj": "qkv", "lm_head": "head",
    "all-linear": "all",
}  # fmt: skip


@dataclass(frozen=True)
class AdapterSpec(Spec):
    """What is trained in place of the weights.

    ``lora``, ``dora``
        ``rank`` R; ``alpha``, by which the update is scaled as alpha / R (None: R, a scale of 1), or with ``rslora``
        as alpha / √R (Kalajdzievski 2023, arXiv 2312.03732); ``dropout`` of what goes into the update; ``targets``:
        "all" linear layers of the blocks, or some of: qkv (of it q, k, v), out, up (of a gated one gate and
        value), down, head.
    ``prompt``, ``prefix``
        ``tokens``: virtual tokens before every sequence, as embeddings or as keys and values of every layer.
    """

    section: ClassVar[str] = "adapter"

    kind: Literal["lora", "dora", "prompt", "prefix"] = "lora"
    rank: int = 8
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all",)
    tokens: int = 20

    def validate(self) -> None:
        at_least("adapter.", 1, rank=self.rank, tokens=self.tokens)
        at_least("adapter.", 0.0, alpha=self.alpha)
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"adapter.dropout: expected at least 0 and below 1, got {self.dropout}")
        if not self.targets:
            raise UserError("adapter.targets: got none, expected at least one layer, or all")
        for target in self.layers:
            if target in _PART_OF and _PART_OF[target] in self.layers:
                raise UserError(f"adapter.targets: {target} is part of {_PART_OF[target]}; leave one out")
        if "head" in self.layers and self.dropout:
            raise UserError(
                "adapter.dropout: the head is one matrix with its update; expected 0 with target head"
            )

    @property
    def low_rank(self) -> bool:
        """Whether it is beside weights, rather than before sequences."""
        return self.kind in ("lora", "dora")

    @property
    def layers(self) -> tuple[str, ...]:
        """``targets`` by our names.

        Raises:
            UserError: an unknown one.
        """
        known = ("all", *WHOLE, *_PART_OF, "head")
        found: list[str] = []
        for target in self.targets:
            name = _ALIASES.get(target, target)
            if name not in known:
                raise unknown_name("layer in adapter.targets", target, [*known, *_ALIASES])
            found.extend(WHOLE if name == "all" else (name,))
        return tuple(dict.fromkeys(found))

    def scale(self, rank: int | None = None) -> float:
        """What B·A of ``rank`` (default R) is multiplied by."""
        rank = self.rank if rank is None else rank
        alpha = float(rank) if self.alpha is None else self.alpha
        return alpha / (rank**0.5 if self.rslora else rank)
