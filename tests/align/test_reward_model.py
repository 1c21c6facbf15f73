"""Reward models: K forwards for all pairs, against the pairs one by one; where scores are read; what they come to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gptcore.align import reward_model
from gptcore.align.losses import reward as losses
from gptcore.align.rankings import Ranked, RankingLoader, batch_of, fold_of, pairs_of
from gptcore.align.reward_model import Ensemble, RewardModel
from gptcore.data.characters import CharacterTokenizer
from gptcore.data.examples import Tokenised
from gptcore.errors import UserError
from gptcore.models import GPT, AdapterSpec, AttentionSpec, GPTConfig, adapters
from gptcore.train import from_table, run
from gptcore.train.evaluation import tensors_of

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENIZER = CharacterTokenizer(LETTERS)
CONFIG = GPTConfig(
    num_layers=2,
    width=32,
    vocab_size=TOKENIZER.vocab_size,
    context_length=32,
    attention=AttentionSpec(num_heads=2),
)


def model_of(seed: int = 0) -> RewardModel:
    return RewardModel.over(GPT(CONFIG, seed=3), seed=seed)


def answers(count: int, seed: int = 0) -> tuple[Tokenised, ...]:
    """To one prompt, of several lengths."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, 26, 5)
    return tuple(Tokenised.of(prompt, rng.integers(0, 26, rng.integers(1, 9))) for _ in range(count))


def ranking(count: int, seed: int = 0, ties: bool = False) -> Ranked:
    ranks = np.random.default_rng(seed).permutation(count)
    return Ranked(answers(count, seed), tuple(float(r // 2 if ties else r) for r in ranks), 0.25 * seed)


def loss_and_gradients(model: RewardModel, batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    tokens, targets, options = tensors_of(batch, torch.device("cpu"))
    out = model(tokens, targets, **options)
    out.loss.backward()
    return float(out.loss.detach()), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def test_nine_forwards_give_the_loss_and_gradients_of_all_pairs_one_by_one():
    """The mean of 36 pairs, each with forwards of its own (72 of them), within 1e-6 of the largest magnitude."""
    model, one = model_of(), ranking(9)
    loss, gradients = loss_and_gradients(model, batch_of([one]))
    pairs = pairs_of([one])
    assert (
        len(pairs) == 36 and len(batch_of([one]).cu_seqlens) == 10 and len(batch_of(pairs).cu_seqlens) == 73
    )
    expected, expanded = loss_and_gradients(model, batch_of(pairs))
    assert abs(loss - expected) <= 1e-6 * expected
    assert gradients.keys() == expanded.keys() and "stack.blocks.0.attention.qkv.weight" in gradients
    for name, gradient in gradients.items():
        assert (gradient - expanded[name]).abs().max() <= 1e-6 * max(
            1.0, float(expanded[name].abs().max())
        ), name


def test_prompts_count_alike_whatever_their_answers_and_the_batch_is_the_mean():
    model, several = model_of(), [ranking(2, 1), ranking(5, 2, ties=True), ranking(3, 3)]
    loss, gradients = loss_and_gradients(model, batch_of(several))
    each = [loss_and_gradients(model, batch_of([one])) for one in several]
    assert abs(loss - sum(part for part, _ in each) / 3) <= 1e-6
    means = {name: sum(part[name] for _, part in each) / 3 for name in gradients}
    scale = max(float(mean.abs().max()) for mean in means.values())
    assert all((gradients[name] - mean).abs().max() <= 1e-6 * scale for name, mean in means.items())


def test_at_equal_scores_the_loss_is_ln_2_for_every_number_of_answers():
    model = model_of()
    with torch.no_grad():
        model.reward_head.weight.zero_()
    for count in (2, 3, 9):
        one = ranking(count)._replace(margin=0.0)
        assert abs(loss_and_gradients(model, batch_of([one]))[0] - float(np.log(2))) <= 1e-6


def test_scores_are_read_at_the_last_token_whatever_follows():
    """TRL read the score of padded rows at the first PAD after the end (trl #3750, #5338)."""
    model, some = model_of(), answers(4)
    together = model.scores(some)
    for place, answer in enumerate(some):
        hidden = model.hidden(torch.from_numpy(answer.tokens.astype(np.int64))[None])
        alone = model.reward_head(hidden[0, -1])
        assert abs(alone.item() - float(together[place])) <= 1e-6
    longer = some[0]._replace(
        tokens=np.append(some[0].tokens, 3), loss_mask=np.append(some[0].loss_mask, True)
    )
    assert abs(float(model.scores([longer])[0] - together[0])) > 1e-4  # one token more is another answer
    assert torch.equal(model.scores(some), together)


def test_normalisation_makes_references_zero_and_is_in_the_checkpoint(tmp_path: Path):
    model, references = trained(tmp_path), [a for seed in range(6) for a in answers(4, 90 + seed)]
    model.normalise(references)
    scores = model.scores(references)
    assert abs(float(scores.mean())) <= 1e-6 and abs(float(scores.std()) - 1.0) <= 1e-6
    found, tokenizer = reward_model.load(tmp_path)
    assert tokenizer.fingerprint == TOKENIZER.fingerprint
    assert torch.equal(found.scores(references, normalised=False), model.scores(references, normalised=False))
    assert float(found.score_std) != 1.0  # that of the run's own end


def rankings(count: int, seed: int = 0) -> list[Ranked]:
    """Answers with more of the letter a are better: a rule that a small model learns."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        prompt = rng.integers(1, 26, 4)
        texts = rng.integers(1, 26, (4, 6))
        share = rng.integers(0, 7, 4)
        for text, many in zip(texts, share, strict=True):
            text[:many] = 0
        if len(set(share.tolist())) > 1:
            each = tuple(Tokenised.of(prompt, rng.permutation(text)) for text in texts)
            found.append(Ranked(each, tuple(-float(many) for many in share)))
    return found


def trained(
    run_dir: Path, *, steps: int = 60, adapter: bool = False, seed: int = 0, stop: int | None = None
) -> RewardModel:
    model = GPT(CONFIG, seed=3)
    if adapter:
        adapters.put_on(model, AdapterSpec(rank=4))
    model = RewardModel.over(model, seed=seed)
    loader = RankingLoader(rankings(64), TOKENIZER.fingerprint, TOKENIZER.vocab_size, batch=8, seed=seed)
    held_out = rankings(24, seed=1)
    TOKENIZER.save(run_dir / "tokenizer")
    table = {
        "run_dir": str(run_dir), "steps": steps if stop is None else stop, "data": {"batch": 8, "length": 32},
        "optimizer": {"lr": 3e-3}, "schedule": {"name": "constant", "warmup": 0}, "evaluation": {"every": 20},
        "checkpoint": {"every": 20}, "model": CONFIG.to_dict(),
    }  # fmt: skip
    run(
        from_table(table), model=model, loader=loader, evaluate=reward_model.evaluation(held_out), tokenizer=TOKENIZER,
        measure_peak=False, quiet=True,
    )  # fmt: skip
    return model


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "lora"])
def test_training_learns_the_rule_and_resumes_exactly(adapter: bool, tmp_path: Path):
    held_out = rankings(60, seed=2)
    before = model_of().losses_of(held_out)
    straight = trained(tmp_path / "straight", adapter=adapter)
    after = straight.losses_of(held_out)
    assert after.accuracy > max(0.9, before.accuracy + 0.1) and after.loss < before.loss / 2
    trained(tmp_path / "stopped", adapter=adapter, stop=40)
    resumed = trained(tmp_path / "stopped", adapter=adapter)
    a, b = straight.state_dict(), resumed.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert float(straight.score_std) != 1.0


def test_an_ensemble_disagrees_where_its_members_do(tmp_path: Path):
    members = [model_of(seed) for seed in range(3)]
    some = answers(6)
    scored = Ensemble(members).scores(some)
    each = torch.stack([member.scores(some) for member in members])
    assert torch.allclose(scored.mean, each.mean(0)) and torch.allclose(scored.disagreement, each.std(0))
    assert torch.equal(Ensemble([members[0], members[0]]).scores(some).disagreement, torch.zeros(6))
    pairs = Ensemble(members).differences(some[:3], some[3:])
    assert torch.allclose(pairs.mean, (each[:, :3] - each[:, 3:]).mean(0))
    assert torch.allclose(pairs.disagreement, (each[:, :3] - each[:, 3:]).std(0))
    for place, member in enumerate(members):  # the chances are of raw scores, as they were fitted
        member.score_std.fill_(2.0 + place)
    raw = torch.stack([member.scores(some, normalised=False) for member in members])
    chances = Ensemble(members).preferences(some[:3], some[3:])
    expected = (raw[:, :3] - raw[:, 3:]).sigmoid()
    assert torch.allclose(chances.mean, expected.mean(0)) and torch.allclose(
        chances.disagreement, expected.std(0)
    )
    parts = [fold_of(20, 3, member, seed=5) for member in range(3)]
    assert sorted(i for _, left in parts for i in left) == list(range(20))
    assert all(sorted(own + left) == list(range(20)) for own, left in parts)
    assert fold_of(20, 0, 1, seed=5) == (list(range(20)), [])


def test_agreement_tells_calibration_and_lengths(tmp_path: Path):
    model = trained(tmp_path)
    told = reward_model.agreement(model, rankings(60, seed=2))
    assert told.accuracy == model.losses_of(rankings(60, seed=2)).accuracy
    assert sum(part.pairs for part in told.by_length) == told.pairs and 0.0 <= told.calibration_error < 0.2
    assert sum(b.pairs * b.accuracy for b in told.by_length) == pytest.approx(told.accuracy * told.pairs)


def test_bad_input_is_refused():
    model = model_of()
    with pytest.raises(UserError, match="expected at least data.batch = 8"):
        RankingLoader([ranking(3)], "x", 10, batch=8)
    with pytest.raises(UserError, match="at least one token"):
        model.raw_scores(torch.ones(1, 3, dtype=torch.int64), torch.tensor([0, 3, 3], dtype=torch.int32))
    with pytest.raises(UserError, match="same score"):
        model.normalise([answers(1)[0]] * 3)
    with pytest.raises(ValueError, match="K at least 2"):
        losses.ranked(torch.zeros(2, 1), torch.zeros(2, 1))
    with torch.no_grad():
        model.reward_head.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite, to answer 0"):
        model.scores(answers(2))
    with pytest.raises(UserError, match="at least 2 members"):
        Ensemble([model])
