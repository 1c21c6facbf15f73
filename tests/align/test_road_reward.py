"""The road's reward model: scores do not depend on company, rankings batch as they should, normalisation is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gptcore.align.losses.reward import ranked
from gptcore.align.road.reward import RankingLoader, RewardModel, pair_accuracy
from gptcore.align.tasks import arithmetic
from gptcore.data.characters import CharacterTokenizer
from gptcore.models import GPT, GPTConfig

TOKENIZER = CharacterTokenizer(arithmetic.ALPHABET)
CONFIG = {"vocab_size": 15, "num_layers": 2, "width": 16, "context_length": 48, "attention": {"num_heads": 2}}


@pytest.fixture
def model():
    made = RewardModel(GPT(GPTConfig.from_dict(CONFIG), seed=1))
    torch.nn.init.normal_(made.weight)
    return made


@pytest.fixture
def rankings():
    return arithmetic.rankings(arithmetic.split(seed=1).train, 20, k=4, noise=0.0, seed=2)


def _sequences(ranking):
    return [
        np.array([*TOKENIZER.encode(ranking.prompt + a), TOKENIZER.eot], np.int32) for a in ranking.answers
    ]


def test_a_score_does_not_depend_on_what_is_scored_with_it(model, rankings):
    sequences = [s for r in rankings[:5] for s in _sequences(r)]
    together = model.scores(sequences)
    alone = np.concatenate([model.scores([s]) for s in sequences])
    assert together.shape == (20,) and np.std(together) > 0.01
    np.testing.assert_allclose(together, alone, atol=2e-6 * np.abs(alone).max())


def test_the_loss_is_that_of_the_scores(model, rankings):
    batch = RankingLoader(rankings, TOKENIZER, 4, seed=0).of([3, 0, 7])
    options = {name: torch.from_numpy(array) for name, array in batch.options.items()}
    out = model(
        torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets),
        cu_seqlens=torch.from_numpy(batch.cu_seqlens), **options,
    )  # fmt: skip
    scores = torch.tensor(np.stack([model.scores(_sequences(rankings[n])) for n in (3, 0, 7)]))
    ranks = torch.tensor([rankings[n].ranks for n in (3, 0, 7)])
    expected = ranked(scores, ranks)
    assert float(out.loss.detach()) == pytest.approx(float(expected.loss), rel=1e-5)
    assert (float(out.pairs), float(out.right)) == (float(expected.pairs), float(expected.right))
    out.loss.backward()
    assert model.weight.grad.abs().sum() > 0 and model.trunk.token_embedding.weight.grad.abs().sum() > 0


def test_rankings_of_fewer_answers_leave_places_empty(rankings):
    short = type(rankings[0])(rankings[0].prompt, rankings[0].answers[:2], (0.0, 1.0))
    batch = RankingLoader([short, rankings[1]], TOKENIZER, 2, seed=0).of([0, 1])
    assert batch.options["places"].tolist() == [[0, 1, -1, -1], [2, 3, 4, 5]]
    assert len(batch.cu_seqlens) == 7 and batch.tokens.shape == (1, batch.cu_seqlens[-1])


def test_an_epoch_sees_each_ranking_once(rankings):
    loader = RankingLoader(rankings, TOKENIZER, 5, seed=3)
    places = [loader.batch_at(i).tokens.tobytes() for i in range(8)]
    assert len(set(places)) == 8
    seen = [loader.batch_at(i).cu_seqlens[-1] for i in range(4)]
    total = sum(len(s) for r in rankings for s in _sequences(r))
    assert sum(seen) == total == sum(loader.batch_at(i).cu_seqlens[-1] for i in range(4, 8))


def test_normalised_scores_have_mean_0_and_deviation_1(model, rankings):
    sequences = [s for r in rankings for s in _sequences(r)]
    before = model.scores(sequences)
    model.normalise(before)
    after = model.scores(sequences)
    assert abs(after.mean()) < 1e-5 and abs(after.std() - 1) < 1e-5
    np.testing.assert_allclose(after, (before - before.mean()) / before.std(), atol=1e-5)


def test_pair_accuracy_counts_untied_pairs(model, rankings):
    loader = RankingLoader(rankings, TOKENIZER, 1, seed=0)
    accuracy, pairs = pair_accuracy(model, loader)
    right = total = 0.0
    for r in rankings:
        scores = model.scores(_sequences(r))
        for i in range(4):
            for j in range(i):
                if r.ranks[i] != r.ranks[j]:
                    total += 1
                    right += (scores[i] > scores[j]) == (r.ranks[i] < r.ranks[j])
    assert pairs == total and accuracy == pytest.approx(right / total, abs=1e-9)
