"""What the layers of experts do during a run: the fields of its metrics, and a warning where a router collapses."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from gptcore.dist import Member, gather_numbers

COLLAPSED_UPDATES = 100


class _Layer(NamedTuple):
    """Means over the micro-batches of one update; ``share`` is that of every expert among first choices."""

    drop_rate: float
    load: float
    entropy: float
    share: list[float]


class RoutingWatch:
    """Follows the routing of a model whose blocks ``layers`` have experts, update by update.

    ``add`` takes what the model gave for each micro-batch, ``updated`` closes the update.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self._losses: list[list[float]] = []
        self._statistics: list[list[list[float]]] = []  # by micro-batch and layer, one flat list each
        self._last: list[_Layer] = []
        self._last_losses = [0.0, 0.0]
        # By layer: the expert that most tokens go to, and for how many updates in a row.
        self._streaks: list[tuple[int, int]] = [(-1, 0)] * len(self.layers)

    def add(self, out: Any) -> None:
        """One micro-batch: ``balance_loss``, ``router_z_loss`` and ``routing`` of a ``GPTLoss``."""
        losses = torch.stack([out.balance_loss, out.router_z_loss]).detach()
        rows = [torch.cat([torch.stack([s.drop_rate, s.load, s.entropy]), s.share]) for s in out.routing]
        self._losses.append(losses.tolist())
        self._statistics.append(torch.stack(rows).tolist())

    def updated(self, member: Member) -> list[str]:
        """Close the update, whose micro-batches are those of all ranks; a sentence for each layer whose router has now
        collapsed for 100 updates. Every rank calls it, and has the same from then on."""
        self._gather(member)
        count = len(self._statistics)
        self._last_losses = [sum(column) / count for column in zip(*self._losses, strict=True)]
        self._last = []
        for rows in zip(*self._statistics, strict=True):
            drop_rate, load, entropy, *share = (sum(column) / count for column in zip(*rows, strict=True))
            self._last.append(_Layer(drop_rate, load, entropy, share))
        self._losses, self._statistics = [], []
        found = (self._collapsed(place, layer) for place, layer in enumerate(self._last))
        return [sentence for sentence in found if sentence is not None]

    def _gather(self, member: Member) -> None:
        """All ranks' micro-batches in place of one's own, of which each has as many."""
        if member.ranks == 1:
            return
        lengths = [2, *map(len, self._statistics[0])]
        numbers = [
            number
            for losses, rows in zip(self._losses, self._statistics, strict=True)
            for number in itertools.chain(losses, *rows)
        ]
        found = iter(gather_numbers(numbers, member))
        leaves = member.ranks * len(self._losses)
        parts = [[list(itertools.islice(found, length)) for length in lengths] for _ in range(leaves)]
        self._losses = [losses for losses, *_ in parts]
        self._statistics = [rows for _, *rows in parts]

    def _collapsed(self, place: int, layer: _Layer) -> str | None:
        top = max(layer.share)
        expert = layer.share.index(top)
        before, updates = self._streaks[place]
        # Half is what each of two experts gets in balance.
        over = top > (0.75 if len(layer.share) == 2 else 0.5) and len(layer.share) > 1
        updates = (updates + 1 if before == expert else 1) if over else 0
        self._streaks[place] = (expert, updates)
        if updates != COLLAPSED_UPDATES:
            return None
        return (
            f"the router of block {self.layers[place]} has collapsed: expert {expert} was the first choice of "
            f"{100 * top:.0f}% of the tokens, and of most for {COLLAPSED_UPDATES} updates; raise "
            "model.moe.balance_weight or lower optimizer.lr"
        )

    def fields(self) -> dict[str, Any]:
        """Of a metrics line: the losses with their coefficients, and lists over the layers of experts."""
        return {
            "balance_loss": self._last_losses[0],
            "router_z_loss": self._last_losses[1],
            "routing": {
                "layers": list(self.layers),
                "drop_rate": [layer.drop_rate for layer in self._last],
                "load": [layer.load for layer in self._last],
                "entropy": [layer.entropy for layer in self._last],
                "top_share": [max(layer.share) for layer in self._last],
            },
        }
