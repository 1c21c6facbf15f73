"""Shortest paths in a directed graph, learned from walks that did not look for them.

The toy that trlX shipped: a model sees random walks that end at a goal (or give up), one letter a node, and is to
find from any node the shortest way there. A completion is worth its optimality, which is 1 for a shortest path and 0
for what is no path. The graph is all there is to know, so every start node is seen in training; what is measured is
the way, not the recall of a start.
"""

from __future__ import annotations

import itertools
import random
import string
from collections import deque
from dataclasses import dataclass
from functools import cached_property

from gptcore.data.records import Demonstration, Ranking, Task
from gptcore.errors import UserError

_LETTERS = string.ascii_letters
GOAL = 0


@dataclass(frozen=True)
class Graph:
    """A graph in which every node has a way to the goal, node 0, in at most ``longest`` nodes.

    ``successors[n]``: the nodes that an edge leads to from n, rising; the goal has none. A node is written as a letter,
    ``alphabet[n]``. ``longest``: most nodes of a path, start and goal included.
    """

    successors: tuple[tuple[int, ...], ...]
    longest: int

    @property
    def alphabet(self) -> str:
        """The letter of each node; the goal is ``a``."""
        return _LETTERS[: len(self.successors)]

    @cached_property
    def distances(self) -> tuple[int, ...]:
        """Nodes of the shortest path from each node to the goal, both included; the goal's is 1."""
        distances = _distances(self.successors)
        assert all(distance is not None for distance in distances)
        return tuple(distance or 0 for distance in distances)

    def optimality(self, path: str) -> float:
        """How good the path is, from its first letter to the first goal in it, in [0, 1].

        (longest − nodes) / (longest − nodes of the shortest), and 0 for what leaves the graph, does not reach the goal
        or is longer than ``longest``. What follows the goal does not count.
        """
        nodes = [self.alphabet.find(letter) for letter in path]
        if not nodes or nodes[0] < 0:
            return 0.0
        if GOAL not in nodes:
            return 0.0
        nodes = nodes[: nodes.index(GOAL) + 1]
        if any(there not in self.successors[here] for here, there in itertools.pairwise(nodes)):
            return 0.0
        return max(0.0, (self.longest - len(nodes)) / (self.longest - self.distances[nodes[0]]))

    def shortest(self, start: int) -> str:
        """A shortest path from ``start``: among equals the one through the smallest nodes."""
        path = [start]
        while path[-1] != GOAL:
            path.append(min(self.successors[path[-1]], key=lambda node: (self.distances[node], node)))
        return "".join(self.alphabet[node] for node in path)

    def walk(self, start: int, drawn: random.Random) -> str:
        """A path whose every step is drawn evenly, until the goal or ``longest`` nodes."""
        path = [start]
        while path[-1] != GOAL and len(path) < self.longest:
            path.append(drawn.choice(self.successors[path[-1]]))
        return "".join(self.alphabet[node] for node in path)


def graph(nodes: int = 21, edge: float = 0.1, longest: int = 10, seed: int = 1002) -> Graph:
    """A graph whose every edge is there with probability ``edge``, drawn anew until the goal can be reached from all.

    Raises:
        UserError: nodes not 3 to 52, a probability outside (0, 1], ``longest`` under 3, or no such graph in 10,000.
    """
    if not 3 <= nodes <= len(_LETTERS):
        raise UserError(f"random_walks: got {nodes} nodes, expected 3 to {len(_LETTERS)}")
    if not 0.0 < edge <= 1.0 or longest < 3:
        raise UserError(
            f"random_walks: got edge {edge} and longest {longest}, expected 0 < edge <= 1 and 3 or more"
        )
    drawn = random.Random(f"random walks {seed}")
    for _ in range(10_000):
        successors = tuple(
            tuple(there for there in range(nodes) if there != here and here != GOAL and drawn.random() < edge)
            for here in range(nodes)
        )
        distances = _distances(successors)
        if all(distance is not None and distance < longest for distance in distances):
            return Graph(successors, longest)
    raise UserError(
        f"random_walks: no graph of {nodes} nodes with edge {edge} has a way to the goal from every node in under "
        f"{longest} nodes; raise edge or longest"
    )


def _distances(successors: tuple[tuple[int, ...], ...]) -> list[int | None]:
    """Nodes of the shortest path to the goal from each node, breadth first from the goal; None where there is none."""
    distances: list[int | None] = [None] * len(successors)
    distances[GOAL] = 1
    reached = deque([GOAL])
    while reached:
        there = reached.popleft()
        for here, following in enumerate(successors):
            if distances[here] is None and there in following:
                distances[here] = (distances[there] or 0) + 1
                reached.append(here)
    return distances


def tasks(graph: Graph) -> tuple[Task, ...]:
    """One task for each start but the goal: the prompt is its letter, the truth a shortest path."""
    return tuple(
        Task(graph.alphabet[start], truth=graph.shortest(start)) for start in range(1, len(graph.alphabet))
    )


def reward(graph: Graph, task: Task, completion: str) -> float:
    """The optimality of the prompt's letter followed by ``completion``."""
    return graph.optimality(f"{task.prompt}{completion}")


def demonstrations(graph: Graph, count: int = 1000, seed: int = 0) -> list[Demonstration]:
    """``count`` random walks of two nodes and more from random starts, whether or not they reach the goal."""
    drawn = random.Random(f"random walks demonstrations {seed}")
    walks = (graph.walk(drawn.randrange(1, len(graph.alphabet)), drawn) for _ in range(count))
    return [Demonstration(walk[0], walk[1:], task="random_walks") for walk in walks]


def rankings(graph: Graph, count: int, k: int = 4, noise: float = 0.0, seed: int = 0) -> list[Ranking]:
    """``count`` rankings of ``k`` different walks from one start by optimality, equal ones being ties.

    ``noise``: the share of walks that are given the optimality of another of the k. Starts with fewer than ``k``
    walks among 200 drawn, and draws in which nothing is preferred, are passed over.

    Raises:
        UserError: ``k`` under 2, a share that is none, or a graph that yields no ranking.
    """
    if k < 2 or not 0.0 <= noise <= 1.0:
        raise UserError(f"random_walks: got k {k} and noise {noise}, expected at least 2 and 0 to 1")
    drawn = random.Random(f"random walks rankings {seed}")
    made: list[Ranking] = []
    for _ in range(100 * count):
        if len(made) == count:
            return made
        start = drawn.randrange(1, len(graph.alphabet))
        walks: dict[str, None] = {}
        for _ in range(200):
            walks[graph.walk(start, drawn)] = None
            if len(walks) == k:
                break
        worth = [graph.optimality(walk) for walk in walks]
        told = [drawn.choice(worth) if drawn.random() < noise else own for own in worth]
        if len(walks) == k and len(set(told)) > 1:
            prompt = graph.alphabet[start]
            made.append(Ranking(prompt, tuple(walk[1:] for walk in walks), tuple(-value for value in told)))
    raise UserError(f"random_walks: too few starts have {k} walks that differ in worth; take a smaller k")
