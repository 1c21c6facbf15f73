"""The rule that judges both sides' answers; it knows neither of them."""

from __future__ import annotations

import itertools
from typing import Any


def worth(setting: dict[str, Any], ids: list[int]) -> float:
    """Optimality of a walk (see gptcore.align.tasks.random_walks), or the share of different tokens."""
    graph = setting.get("graph")
    if graph is None:
        return len(set(ids[setting["prompt_length"] :])) / setting["response"]
    goal, longest, end = 0, graph["longest"], setting["end"]
    nodes = ids[: ids.index(end)] if end in ids else ids
    if goal not in nodes:
        return 0.0
    nodes = nodes[: nodes.index(goal) + 1]
    if any(b not in graph["successors"][a] for a, b in itertools.pairwise(nodes)):
        return 0.0
    return max(0.0, (longest - len(nodes)) / (longest - graph["distances"][nodes[0]]))
