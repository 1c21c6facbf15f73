"""Targets come from loss masks at one place; examples lie end to end."""

from __future__ import annotations

import numpy as np
import pytest

from gptcore.data.examples import Tokenised, lay_out, leaf_weight
from gptcore.data.packing import IGNORE
from gptcore.errors import UserError

A = Tokenised.of([1, 2], [3, 4])
B = Tokenised.of([5], [6, 7, 8])


def test_targets_are_the_masked_tokens_one_earlier() -> None:
    row = lay_out([A, B])
    assert row.tokens.tolist() == [[1, 2, 3, 5, 6, 7]]
    assert row.targets.tolist() == [[IGNORE, 3, 4, 6, 7, 8]]
    assert row.cu_seqlens.tolist() == [0, 3, 6] and row.cu_seqlens.dtype == np.int32
    assert row.weights is None and row.target_count == 5 == A.targets + B.targets


def test_the_last_token_is_kept_where_a_head_reads_it() -> None:
    row = lay_out([A, B], keep_last=True)
    assert row.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert row.targets.tolist() == [[IGNORE, 3, 4, IGNORE, 6, 7, 8, IGNORE]]
    assert row.cu_seqlens.tolist() == [0, 4, 8] and row.target_count == 5


def test_weights_are_laid_over_tokens() -> None:
    row = lay_out([A, B._replace(weight=0.5)])
    assert row.weights is not None and row.weights.tolist() == [[1, 1, 1, 0.5, 0.5, 0.5]]


def test_a_token_that_merely_equals_another_is_never_masked_by_its_id() -> None:
    """PAD equal to EOS: every token of the response counts, whatever its id; there is no padding."""
    end = 0
    row = lay_out([Tokenised.of([0, 5], [0, 6, end])])
    assert row.targets.tolist() == [[IGNORE, 0, 6, 0]]


@pytest.mark.parametrize(
    "examples", [[], [Tokenised.of([], [1])], [Tokenised(np.arange(3), np.ones(2, bool))]]
)
def test_what_is_refused(examples: list[Tokenised]) -> None:
    with pytest.raises(UserError, match="lay_out"):
        lay_out(examples)


def test_weights_of_leaves_have_mean_one() -> None:
    counts = [3, 1, 8]
    weights = [leaf_weight(count, sum(counts), 3) for count in counts]
    assert sum(weights) == pytest.approx(3.0) and weights[2] == pytest.approx(2.0)
    with pytest.raises(UserError, match="got 0 of 12"):
        leaf_weight(0, 12, 3)
