"""Shortest paths: the graph against an independent search, optimality by hand, walks that are walks."""

from __future__ import annotations

import itertools
import random

import pytest

from gptcore.align.tasks import random_walks
from gptcore.align.tasks.random_walks import Graph
from gptcore.errors import UserError

# a goal; b → a, c; c → a; d → b; e → d
SMALL = Graph(((), (0, 2), (0,), (1,), (3,)), longest=6)


def test_optimality_by_hand():
    assert SMALL.distances == (1, 2, 2, 3, 4)
    assert SMALL.optimality("ba") == 1.0
    assert SMALL.optimality("bca") == (6 - 3) / (6 - 2)
    assert SMALL.optimality("dba") == SMALL.optimality("edba") == 1.0
    assert SMALL.optimality("dbca") == (6 - 4) / (6 - 3)
    assert SMALL.optimality("edbca") == (6 - 5) / (6 - 4)
    assert SMALL.optimality("bab") == 1.0  # what follows the goal
    for nothing in ("", "b", "bc", "cb", "da", "b?a", "?a", "bb", "bba"):
        assert SMALL.optimality(nothing) == 0.0
    assert SMALL.optimality("a") == 1.0


def test_a_path_longer_than_the_longest_is_worth_nothing():
    loop = Graph(((), (0, 2), (1,)), longest=4)
    assert loop.optimality("bcba") == 0.0  # 4 of 4 nodes
    assert loop.optimality("bcbcba") == 0.0
    assert loop.optimality("cba") == 1.0


def test_shortest_paths_equal_those_of_an_exhaustive_search():
    graph = random_walks.graph(nodes=7, edge=0.3, longest=7, seed=5)
    for start in range(1, 7):
        ways = [
            way
            for length in range(2, 8)
            for way in itertools.product(range(7), repeat=length)
            if way[0] == start and way[-1] == 0
            and all(there in graph.successors[here] for here, there in itertools.pairwise(way))
        ] if start < 3 else []  # fmt: skip
        if ways:
            assert min(map(len, ways)) == graph.distances[start]
        assert graph.optimality(graph.shortest(start)) == 1.0
        assert len(graph.shortest(start)) == graph.distances[start]


def test_every_seed_gives_a_graph_with_a_way_from_everywhere():
    for seed in range(20):
        graph = random_walks.graph(seed=seed)
        assert len(graph.successors) == 21 and graph.successors[0] == ()
        assert max(graph.distances) < graph.longest == 10
    assert random_walks.graph(seed=3) == random_walks.graph(seed=3) != random_walks.graph(seed=4)


def test_demonstrations_are_walks_and_not_all_good():
    graph = random_walks.graph()
    made = random_walks.demonstrations(graph, 1000, seed=1)
    assert made == random_walks.demonstrations(graph, 1000, seed=1)
    worth = []
    for d in made:
        path = [graph.alphabet.index(letter) for letter in d.prompt + d.completion]
        assert 2 <= len(path) <= 10
        assert all(there in graph.successors[here] for here, there in itertools.pairwise(path))
        worth.append(graph.optimality(d.prompt + d.completion))
    assert 0.1 < sum(worth) / len(worth) < 0.8
    assert {d.prompt for d in made} == set(graph.alphabet[1:])


def test_rewards_and_rankings():
    graph = random_walks.graph()
    for task in random_walks.tasks(graph):
        assert random_walks.reward(graph, task, task.truth[1:]) == 1.0
        assert random_walks.reward(graph, task, "") == 0.0
    made = random_walks.rankings(graph, 50, k=4, seed=2)
    assert len(made) == 50
    for r in made:
        worth = [graph.optimality(r.prompt + a) for a in r.answers]
        assert r.ranks == tuple(-w for w in worth) and len(set(worth)) > 1
        assert graph.optimality(r.prompt + r.chosen) == max(worth)
    assert random_walks.rankings(graph, 50, noise=0.5, seed=2) != made


def test_what_cannot_be_is_refused():
    for wrong in ({"nodes": 2}, {"nodes": 53}, {"edge": 0.0}, {"longest": 2}):
        with pytest.raises(UserError, match="random_walks: got"):
            random_walks.graph(**wrong)
    with pytest.raises(UserError, match="no graph of 50 nodes"):
        random_walks.graph(nodes=50, edge=0.001)
    with pytest.raises(UserError, match="k 1"):
        random_walks.rankings(SMALL, 1, k=1)
    with pytest.raises(UserError, match="smaller k"):
        random_walks.rankings(Graph(((), (0,), (0,)), longest=4), 1, k=2)
    assert SMALL.walk(4, random.Random(0))[0] == "e"
