"""Rows of whole examples: packing, epochs, shares of tasks, and weights that make cuts of an update equal."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcore.data.best_fit import best_fit_decreasing
from gptcore.data.example_loader import (
    ExampleEvaluation,
    ExampleLoader,
    Served,
    digest,
    examples_proportional,
)
from gptcore.data.examples import Tokenised
from gptcore.data.packing import IGNORE
from gptcore.errors import UserError

SERVED = Served("f", 1000, np.ones(1000, np.uint16))


def examples(count: int, start: int = 0, longest: int = 9) -> list[Tokenised]:
    """Each begins with a token of its own."""
    rng = np.random.default_rng(start)
    lengths = rng.integers(1, longest - 1, count)
    return [Tokenised.of([start + i, 0], [1] * int(n)) for i, n in enumerate(lengths)]


def seen(loader: ExampleLoader, rows: range) -> list[int]:
    found = []
    for row in rows:
        batch = loader.samples(row, 1)
        found += batch.tokens[0, batch.cu_seqlens[:-1]].tolist()
    return found


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_best_fit_decreasing_packs_every_item_once(lengths: list[int], capacity: int) -> None:
    rows = best_fit_decreasing(np.array(lengths, np.int64), capacity)
    assert sorted(item for row in rows for item in row.tolist()) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert all(total <= capacity for total in sums)
    fewest = -(-sum(lengths) // capacity)
    assert len(rows) <= 11 * fewest / 9 + 6 / 9 or len(rows) <= 1 or min(sums) + sorted(sums)[1] > capacity


def test_best_fit_decreasing_is_what_the_definition_gives() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 200)
    rooms: list[int] = []
    content: list[list[int]] = []
    for item in sorted(range(200), key=lambda i: (-lengths[i], i)):
        fitting = [row for row, room in enumerate(rooms) if room >= lengths[item]]
        if not fitting:
            rooms.append(32)
            content.append([])
            fitting = [len(rooms) - 1]
        best = min(fitting, key=lambda row: rooms[row])
        rooms[best] -= int(lengths[item])
        content[best].append(item)
    found = best_fit_decreasing(lengths, 32)
    # ties between rows equally full may go either way; how full rows become may not
    fill = lambda rows: sorted(sum(int(lengths[i]) for i in row) for row in rows)  # noqa: E731
    assert fill(found) == fill(content)


def test_rows_of_a_worked_example() -> None:
    """Lengths 3, 4 and 1 into rows of 4, as TRL's own test of its "bfd" strategy has them."""
    assert [row.tolist() for row in best_fit_decreasing(np.array([3, 4, 1]), 4)] == [[1], [0, 2]]


def test_an_item_that_fits_nowhere() -> None:
    with pytest.raises(UserError, match="packing: item 1 has length 9, expected 1 to 8"):
        best_fit_decreasing(np.array([8, 9]), 8)


@pytest.mark.parametrize("packing", [True, False])
def test_each_epoch_has_every_example_once_in_another_order(packing: bool) -> None:
    loader = ExampleLoader({"": examples(50)}, SERVED, batch=2, length=16, seed=3, packing=packing)
    size = loader.rows_per_epoch
    assert size == 50 if not packing else size < 25
    first, second = seen(loader, range(size)), seen(loader, range(size, 2 * size))
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
    other = ExampleLoader({"": examples(50)}, SERVED, batch=2, length=16, seed=3, packing=packing)
    assert seen(other, range(size, 2 * size)) == second, "any row, without those before it"
    assert seen(ExampleLoader({"": examples(50)}, SERVED, batch=2, length=16, seed=4), range(3)) != first[:3]


def test_a_batch_is_rows_end_to_end_without_padding() -> None:
    loader = ExampleLoader({"": examples(50)}, SERVED, batch=4, length=16)
    batch = loader.batch_at(2)
    lengths = np.diff(batch.cu_seqlens)
    assert batch.tokens.shape == (1, lengths.sum()) and lengths.sum() <= 64
    assert batch.target_count == (batch.targets != IGNORE).sum() == batch.target_bytes
    assert [row for row in range(8, 12) for _ in loader.row(row)].__len__() == len(lengths)


def test_shares_are_kept_in_every_epoch() -> None:
    tasks = {"a": examples(40), "b": examples(40, 100), "c": examples(20, 200)}
    shares = {"a": 0.5, "b": 0.2, "c": 0.3}
    loader = ExampleLoader(tasks, SERVED, batch=1, length=32, shares=shares)
    assert loader.quotas == {"a": 50, "b": 20, "c": 30}
    counts: collections.Counter[int] = collections.Counter()
    for epoch in range(4):
        start = loader._start(epoch)
        tokens = seen(loader, range(start, loader._start(epoch + 1)))
        by_task = collections.Counter(token // 100 for token in tokens)
        assert by_task == {1: 20, 2: 30, 0: 50}
        counts.update(tokens)
    # four epochs: 200 of a's 40, 80 of b's 40, 120 of c's 20, all as often as the others of their task
    assert {counts[token] for token in range(40)} == {5}
    assert {counts[token] for token in range(100, 140)} == {2}
    assert {counts[token] for token in range(200, 220)} == {6}


def test_examples_proportional_mixing_with_flan_s_cap() -> None:
    assert examples_proportional({"a": 1000, "b": 3000}) == {"a": 0.25, "b": 0.75}
    shares = examples_proportional({"a": 1000, "b": 3000, "c": 500_000}, cap=3000)
    assert shares == pytest.approx({"a": 1 / 7, "b": 3 / 7, "c": 3 / 7})


def test_weights_of_leaves_are_by_their_targets() -> None:
    weighted = [one._replace(weight=0.5 if i % 3 else 2.0) for i, one in enumerate(examples(60))]
    loader = ExampleLoader({"": weighted}, SERVED, batch=2, length=16, accumulate=3)
    for update in range(3):
        leaves = [loader.batch_at(3 * update + i) for i in range(3)]
        assert sum(leaf.weight for leaf in leaves) == pytest.approx(3.0)
        sums = [float(((leaf.targets != IGNORE) * leaf.options["weights"]).sum()) for leaf in leaves]
        assert [leaf.weight for leaf in leaves] == pytest.approx([3 * one / sum(sums) for one in sums])
        whole = loader.samples(6 * update, 6)
        assert loader.tokens_of_update(update) == whole.tokens.size
        assert whole.weight == pytest.approx(1.0) and whole.target_count == sum(
            x.target_count for x in leaves
        )


def test_evaluation_sees_each_example_once() -> None:
    some = examples(30)
    evaluation = ExampleEvaluation(some, SERVED, tokens=40)
    batches = [evaluation.batch_at(i) for i in range(len(evaluation))]
    assert sum(batch.target_count for batch in batches) == sum(example.targets for example in some)
    assert max(batch.tokens.shape[1] for batch in batches) <= 40
    assert len(ExampleEvaluation(some, SERVED, tokens=40, limit=2)) == 2


@pytest.mark.parametrize(
    ("tasks", "options", "sentence"),
    [
        ({}, {}, "needs at least one example"),
        ({"a": []}, {}, "needs at least one example"),
        ({"a": [Tokenised.of([1], [2] * 20)]}, {}, "example 0 of a has 21 tokens, expected at most 17"),
        ({"a": [Tokenised(np.arange(4), np.zeros(4, bool))]}, {}, "example 0 has no token to learn"),
        ({"a": examples(3)}, {"shares": {"b": 1.0}}, "shares: got {'b': 1.0}"),
        ({"a": examples(3)}, {"shares": {"a": 0.0}}, "expected one positive number"),
    ],
)
def test_what_is_refused(tasks: Any, options: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ExampleLoader(tasks, SERVED, batch=1, length=16, **options)
    with pytest.raises(UserError, match="no held-out example"):
        ExampleEvaluation([], SERVED, tokens=8)


def test_other_examples_have_another_digest() -> None:
    one = digest({"a": examples(5)})
    assert (
        one == digest({"a": examples(5)})
        and len({one, digest({"b": examples(5)}), digest({"a": examples(6)})}) == 3
    )
    changed = examples(5)
    changed[2] = changed[2]._replace(loss_mask=~changed[2].loss_mask)
    assert digest({"a": changed}) != one
