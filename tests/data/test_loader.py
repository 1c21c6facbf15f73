"""The loader: batches as a pure function of (seed, step), resumed, split over ranks, mixed by weight."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.data.dataset import TokenDataset
from gptcore.data.loader import Batch, Evaluation, Loader
from gptcore.data.mixture import BLOCK, Mixture
from gptcore.data.packing import IGNORE, cu_seqlens
from gptcore.data.shards import ArrayShard
from gptcore.errors import UserError

EOT = 999


def dataset(*sizes: int, document: int = 13, first: int = 0) -> TokenDataset:
    """Shards of rising ids, so that a row tells where it came from, with an end of text now and then."""
    made = []
    for size in sizes:
        ids = np.arange(first, first + size)
        first += size
        ids[document - 1 :: document] = EOT + 1_000_000
        made.append(
            ArrayShard(
                ids,
                eot=EOT + 1_000_000,
                vocab_size=2_000_000,
                token_bytes=np.full(2_000_000, 2),
                fingerprint="f",
            )
        )
    return TokenDataset(made)


def same(a: Batch, b: Batch) -> bool:
    arrays = all(np.array_equal(x, y) for x, y in zip(a[:2], b[:2], strict=True))
    bounds = np.array_equal(a.cu_seqlens, b.cu_seqlens) if a.cu_seqlens is not None else b.cu_seqlens is None
    return arrays and bounds and a[3:] == b[3:]


def windows_of(batches: list[Batch]) -> list[int]:
    """The first token of every row (no end of text begins one where documents are as long as rows)."""
    return [int(row[0]) for batch in batches for row in batch.tokens]


@pytest.mark.parametrize("mode", ["shuffled", "random", "ordered"])
def test_pure_function_of_seed_and_step(mode: str) -> None:
    data = dataset(500, 300)
    loader = Loader(data, 4, 16, seed=5, mode=mode, documents=True)
    forward = [loader.batch_at(step) for step in range(60)]
    backward = [
        Loader(data, 4, 16, seed=5, mode=mode, documents=True).batch_at(s) for s in reversed(range(60))
    ]
    assert all(same(a, b) for a, b in zip(forward, reversed(backward), strict=True))
    if mode != "ordered":
        assert not np.array_equal(
            loader.batch_at(0).tokens, Loader(data, 4, 16, seed=6, mode=mode).batch_at(0).tokens
        )
    for batch in forward:
        assert batch.tokens.dtype == batch.targets.dtype == np.int64 and batch.tokens.shape == (4, 16)
        assert batch.tokens.flags.c_contiguous and batch.targets.flags.c_contiguous
        assert np.array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        assert batch.target_bytes == 2 * 64 and batch.target_count == 64


@given(
    st.lists(st.integers(0, 120), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(1, 7),
    st.integers(0, 9),
)
@settings(max_examples=80, deadline=None)
def test_an_epoch_visits_every_window_once(sizes: list[int], length: int, batch: int, seed: int) -> None:
    data = TokenDataset([ArrayShard(np.arange(n) + 1000 * i, vocab_size=10_000) for i, n in enumerate(sizes)])
    expected = [1000 * i + w * length for i, n in enumerate(sizes) for w in range(max(0, n - 1) // length)]
    if not expected:
        with pytest.raises(UserError, match="a row of length"):
            Loader(data, batch, length, seed)
        return
    loader = Loader(data, batch, length, seed)
    starts = windows_of([loader.batch_at(step) for step in range(-(-3 * len(expected) // batch))])
    for epoch in range(3):
        assert sorted(starts[epoch * len(expected) : (epoch + 1) * len(expected)]) == expected
    assert loader.steps_per_epoch == len(expected) / batch


def test_epochs_differ_in_order() -> None:
    loader = Loader(dataset(4001, document=10**6), 50, 20, seed=1)
    first, second = (windows_of([loader.batch_at(4 * e + s) for s in range(4)]) for e in range(2))
    assert sorted(first) == sorted(second) and first != second


def test_random_rows_begin_anywhere_and_end_inside() -> None:
    loader = Loader(dataset(50, document=10**6), 64, 8, seed=2, mode="random")
    batches = [loader.batch_at(step) for step in range(20)]
    assert set(windows_of(batches)) == set(range(42))  # 50 tokens show 42 rows of 8 and a target
    assert max(int(batch.targets.max()) for batch in batches) == 49


def test_exact_resume_from_state() -> None:
    data = dataset(700)
    loader = Loader(data, 3, 10, seed=8)
    for _ in range(17):
        next(loader)
    state = json.loads(json.dumps(loader.state()))
    again = Loader.from_state(data, state)
    assert again.step == 17 and all(same(next(loader), next(again)) for _ in range(30))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 4}, "batch was 4, now it is 3"),
        ({"seed": 1}, "seed was 1, now it is 8"),
        ({"tokens": 5}, "tokens was 5, now it is 700"),
        ({"fingerprint": "x"}, "fingerprint was 'x'"),
        ({"step": -1}, "got step -1"),
        ({"step": "a"}, "got step 'a'"),
    ],
)
def test_a_state_of_other_batches_is_refused(change: dict[str, object], message: str) -> None:
    loader = Loader(dataset(700), 3, 10, seed=8)
    with pytest.raises(UserError, match=message):
        loader.restore({**loader.state(), **change})
    assert loader.step == 0


def test_ranks_split_the_batch_and_nothing_else() -> None:
    data = dataset(900)
    whole = Loader(data, 8, 12, seed=3)
    for world in (1, 2, 4, 8):
        parts = [
            Loader(data, 8, 12, seed=3, rank=rank, world_size=world).batch_at(11) for rank in range(world)
        ]
        assert np.array_equal(np.concatenate([part.tokens for part in parts]), whole.batch_at(11).tokens)


def test_samples_do_not_depend_on_the_batch() -> None:
    """A batch ramp asks for samples by number: 6 rows are 2 rows and 4 rows."""
    loader = Loader(dataset(900), 6, 12, seed=3)
    parts = [loader.samples(12, 2).tokens, loader.samples(14, 4).tokens]
    assert np.array_equal(np.concatenate(parts), loader.batch_at(2).tokens)


@pytest.mark.parametrize("mode", ["shuffled", "random"])
def test_documents_are_bounded(mode: str) -> None:
    data = dataset(2000, 700, document=7)
    loader = Loader(data, 5, 16, seed=4, mode=mode, documents=True)
    for step in range(30):
        batch = loader.batch_at(step)
        assert batch.cu_seqlens is not None and batch.cu_seqlens.dtype == np.int32
        assert np.array_equal(batch.cu_seqlens, cu_seqlens(batch.tokens, data.eot or 0))


def test_documents_without_end_of_text_are_bounded_by_the_index() -> None:
    shard = ArrayShard(np.arange(100) % 5, vocab_size=5, document_ends=[30, 33, 71, 100])
    loader = Loader(TokenDataset([shard]), 4, 20, mode="ordered", documents=True)
    assert loader.batch_at(0).cu_seqlens.tolist() == [0, 20, 30, 33, 40, 60, 71, 80]  # type: ignore[union-attr]


def test_prefetching_gives_the_same_and_keeps_the_state_right() -> None:
    data = dataset(600)
    plain, ahead = Loader(data, 4, 10, seed=1), Loader(data, 4, 10, seed=1, step=3)
    with ahead.prefetched(depth=3) as batches:
        for step in range(3, 40):
            assert same(next(batches), plain.batch_at(step))
            assert ahead.state()["step"] == step + 1
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
    with pytest.raises(StopIteration):
        next(batches)


def test_prefetching_hands_on_errors() -> None:
    loader = Loader(dataset(600), 4, 10)

    def fail(step: int) -> Batch:
        raise UserError("damaged token shard")

    loader.batch_at = fail  # type: ignore[method-assign]
    with loader.prefetched() as batches, pytest.raises(UserError, match="damaged token shard"):
        next(batches)


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=4), st.integers(1, 5), st.integers(1, 9), st.booleans()
)
@settings(max_examples=80, deadline=None)
def test_evaluation_scores_every_token_once(
    sizes: list[int], batch: int, length: int, documents: bool
) -> None:
    shards = [ArrayShard(np.arange(n) + 100 * i, vocab_size=500) for i, n in enumerate(sizes)]
    expected = [100 * i + t for i, n in enumerate(sizes) for t in range(1, n)]
    if not expected:
        with pytest.raises(UserError, match="no token to predict"):
            Evaluation(TokenDataset(shards), batch, length)
        return
    evaluation = Evaluation(TokenDataset(shards), batch, length, documents=documents)
    seen = [*evaluation]
    assert len(seen) == len(evaluation)
    targets = np.concatenate([b.targets.ravel() for b in seen])
    tokens = np.concatenate([b.tokens.ravel() for b in seen])
    assert targets[targets != IGNORE].tolist() == expected
    assert np.array_equal(tokens[targets != IGNORE] + 1, targets[targets != IGNORE])
    assert sum(b.target_count for b in seen) == len(expected)
    for b in seen:
        assert b.tokens.shape == (batch, length)
        counted = np.ones((batch, length), bool) if b.mask is None else b.mask
        assert np.array_equal(counted, b.targets != IGNORE) and (b.mask is None or not b.mask.all())
        if documents:
            assert b.cu_seqlens is not None and b.cu_seqlens[0] == 0 and b.cu_seqlens[-1] == batch * length
            assert np.all(np.diff(b.cu_seqlens) > 0)


def test_evaluation_counts_bytes_of_text_only() -> None:
    lengths = np.array([1, 3, 0])
    data = TokenDataset.from_array([0, 1, 1, 2, 0, 1, 2], eot=2, vocab_size=3, token_bytes=lengths)
    evaluation = Evaluation(data, 2, 4)
    assert sum(batch.target_bytes for batch in evaluation) == 3 + 3 + 1 + 3  # all but the first token
    assert len(Evaluation(data, 1, 2, limit=2)) == 2
    with pytest.raises(IndexError, match="got step 1"):
        evaluation.batch_at(1)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_mixture_counts_and_numbers(weights: list[float], seed: int) -> None:
    """Each source is asked for its samples 0, 1, 2, ... once each, in proportion to its weight."""
    mixture = Mixture(weights, seed)
    sources, numbers = mixture.locate(np.arange(2 * BLOCK))
    for source, share in enumerate(mixture.shares):
        mine = numbers[sources == source]
        assert np.array_equal(np.sort(mine), np.arange(len(mine)))
        assert abs(len(mine) - share * 2 * BLOCK) <= len(weights)
    part = mixture.locate(np.arange(BLOCK - 5, BLOCK + 5))
    assert np.array_equal(part[0], sources[BLOCK - 5 : BLOCK + 5])
    assert np.array_equal(part[1], numbers[BLOCK - 5 : BLOCK + 5])


def test_mixture_of_loaders() -> None:
    """A 3:1 mixture: GPT-3's way, by weight and not by size, so the smaller set is repeated more often."""
    big, small = dataset(10_001, document=10**6), dataset(401, document=10**6, first=100_000)
    loader = Loader([big, small], 40, 20, seed=1, weights=[1, 3])
    starts = np.array(windows_of([loader.batch_at(step) for step in range(100)]))
    # 4,000 samples without replacement out of a block of 65,536: at five binomial deviations of 27.
    assert abs(np.count_nonzero(starts >= 100_000) - 3000) < 137
    counts = np.bincount((starts[starts >= 100_000] - 100_000) // 20, minlength=20)
    assert counts.max() - counts.min() <= 1  # epochs of the small set


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "shufled"}, "did you mean 'shuffled'"),
        ({"batch": 0}, "batch: got 0"),
        ({"length": 0}, "length: got 0"),
        ({"length": 700}, "the data has 700 tokens, a row of length 700 needs 701"),
        ({"rank": 2, "world_size": 2}, "rank: got 2"),
        ({"world_size": 3}, "4 rows for 3 ranks"),
        ({"step": -1}, "step: got -1"),
        ({"weights": [1, 2]}, "got 2 for 1 data sets"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Loader(dataset(700), **{"batch": 4, "length": 10, **options})  # type: ignore[arg-type]


def test_bad_mixtures() -> None:
    with pytest.raises(UserError, match="different tokenizers"):
        Loader([dataset(100), TokenDataset.from_array(np.arange(100))], 4, 10)
    with pytest.raises(UserError, match="at least one data set"):
        Loader([], 4, 10)
    for weights in ([0.0, 1.0], [float("nan"), 1.0], []):
        with pytest.raises(UserError, match="one positive number per source"):
            Mixture(weights, 0)
