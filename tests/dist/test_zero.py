"""Sharded optimizers: the cases of ``zero_cases.py`` on 2 and 4 processes, and what one process can tell."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptcore.dist import Member
from gptcore.dist.flat_unit import BLOCK, FlatUnit
from gptcore.dist.leaf_sums import LeafSums, Node, maximal_nodes
from gptcore.optim import AdamW, ZeroOptimizer
from tests.dist.processes import cases_of, shared_verdicts

MODULES = ("tests.dist.zero_cases", "tests.dist.zero_state_cases")


@pytest.fixture(scope="module", params=[2, 4], ids=["2-ranks", "4-ranks"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return shared_verdicts(MODULES, request.param, tmp_path_factory, limit=300.0)


@pytest.mark.parametrize("name", cases_of(MODULES))
def test_ranks_give_what_one_process_gives(found: dict[str, list[str]], name: str) -> None:
    failed = {rank: text for rank, text in enumerate(found[name]) if text}
    assert not failed, "\n".join(f"rank {rank}:\n{text}" for rank, text in failed.items())


def tree_sum(values: list[float], level: int, index: int) -> float | None:
    """The tree as its docstring has it: the sum of both halves, or what there is."""
    if index << level >= len(values):
        return None
    if level == 0:
        return values[index]
    left, right = tree_sum(values, level - 1, 2 * index), tree_sum(values, level - 1, 2 * index + 1)
    return left if right is None else torch.tensor(left).add(torch.tensor(right)).item()


@given(st.integers(1, 40), st.data())
def test_sums_do_not_depend_on_who_has_which_leaves(leaves: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(leaves)
    values = (torch.rand(leaves, generator=generator) * 1e3).tolist()
    ranks = data.draw(st.sampled_from([n for n in range(1, leaves + 1) if leaves % n == 0]))
    each = leaves // ranks
    owner = LeafSums()
    for rank in range(ranks):
        own = LeafSums()
        most = 0
        for leaf in range(rank * each, (rank + 1) * each):
            own.add(Node(0, leaf), torch.tensor([values[leaf]]))
            most = max(most, len(own))
        assert most <= math.ceil(math.log2(leaves)) + 1 if leaves > 1 else most == 1
        nodes = maximal_nodes(rank * each, (rank + 1) * each)
        for node, value in zip(nodes, own.take(), strict=True):
            owner.add(node, value)
    root = (leaves - 1).bit_length()
    assert owner.total(leaves).item() == tree_sum(values, root, 0)


def test_a_missing_leaf_is_an_error() -> None:
    sums = LeafSums()
    sums.add(Node(0, 0), torch.ones(1))
    with pytest.raises(RuntimeError, match="no gradient of leaf 1"):
        sums.total(2)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=6), st.integers(1, 5))
def test_slices_cover_every_element_once_and_end_at_blocks(sizes: list[int], ranks: int) -> None:
    parameters = [torch.nn.Parameter(torch.full((size,), float(i))) for i, size in enumerate(sizes)]
    unit = FlatUnit(parameters, Member(None, 0, ranks))
    seen = [torch.zeros(size, dtype=torch.int32) for size in sizes]
    for rank in range(ranks):
        assert unit.bounds[rank] % BLOCK == 0
        for piece in unit.pieces(rank):
            assert piece.start % BLOCK == 0
            seen[piece.number][piece.start : piece.stop] += 1
            assert unit.flat[piece.at].item() == piece.number
    assert all(bool((count == 1).all()) for count in seen)
    assert [p.shape for p in parameters] == [(size,) for size in sizes]


def test_weights_that_numpy_has_seen_are_freed_too() -> None:
    """NumPy's share keeps a storage from being resized: it stays NumPy's, and the unit takes another."""
    parameter = torch.nn.Parameter(torch.arange(5.0))
    unit = FlatUnit([parameter], Member(None, 0, 1))
    seen = parameter.detach().numpy()
    unit.free()
    assert unit.freed and seen.tolist() == [0, 1, 2, 3, 4]
    unit.gather()
    assert parameter.tolist() == [0, 1, 2, 3, 4]


def test_bad_arguments_are_named() -> None:
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="'optimizer': got AdamW, expected one of gptcore.optim"):
        ZeroOptimizer(torch.optim.AdamW(layer.parameters()))
    with pytest.raises(ValueError, match="'stage': got 4, expected 0, 1, 2 or 3"):
        ZeroOptimizer(AdamW(layer.parameters()), stage=4)
    with pytest.raises(ValueError, match="'module': got None"):
        ZeroOptimizer(AdamW(layer.parameters()), stage=3)
    with pytest.raises(ValueError, match="'accumulation': got 0, expected 1 or more"):
        ZeroOptimizer(AdamW(layer.parameters()), accumulation=0)
    stepped = AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    stepped.step()
    with pytest.raises(ValueError, match="got one that has stepped"):
        ZeroOptimizer(stepped)
