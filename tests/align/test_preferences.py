"""DPO and its family over packed pairs: closed forms at the start, second implementations, and runs that learn."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptcore.align import preferences
from gptcore.align.pairs import PairLoader, Preference, batch_of, tokenised, with_others
from gptcore.align.preference_spec import PreferenceSpec
from gptcore.align.preferences import PreferencePolicy, logprobs_of, with_reference
from gptcore.data.characters import CharacterTokenizer
from gptcore.data.chat import Chat
from gptcore.data.examples import Tokenised
from gptcore.data.records import Labelled, Ranking
from gptcore.errors import UserError
from gptcore.infer import load
from gptcore.models import GPT, AdapterSpec, AttentionSpec, GPTConfig, adapters
from gptcore.stats.significance import mcnemar
from gptcore.train import from_table, run
from gptcore.train.evaluation import tensors_of

TOKENIZER = CharacterTokenizer("abcdefghijklmnopqrstuvwxyz")
CONFIG = GPTConfig(
    num_layers=2,
    width=32,
    vocab_size=TOKENIZER.vocab_size,
    context_length=24,
    attention=AttentionSpec(num_heads=2),
)
LOSSES = ("dpo", "ipo", "kto", "orpo", "simpo")


def pairs(count: int, seed: int = 0) -> list[Preference]:
    """Chosen answers have letters of the alphabet's first half, rejected ones of the second."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        prompt = rng.integers(1, 26, 4)
        both = (Tokenised.of(prompt, rng.integers(low, low + 13, 6)) for low in (0, 13))
        found.append(Preference(*both))
    return found


def unpaired(count: int, seed: int = 0) -> list[Preference]:
    """The same as labels: every other answer is a good one."""
    return with_others([
        one._replace(rejected=None) if i % 2 else one._replace(chosen=None) for i, one in enumerate(pairs(count, seed))
    ])  # fmt: skip


def data(loss_type: str, count: int, seed: int = 0) -> list[Preference]:
    return unpaired(count, seed) if loss_type == "kto" else pairs(count, seed)


def policy(loss_type: str, **settings: Any) -> PreferencePolicy:
    return PreferencePolicy.over(GPT(CONFIG, seed=3), PreferenceSpec(loss_type=loss_type, **settings))  # type: ignore[arg-type]


def output(model: PreferencePolicy, some: list[Preference]) -> Any:
    tokens, targets, options = tensors_of(batch_of(some), torch.device("cpu"))
    return model(tokens, targets, **options)


START = {
    "dpo": math.log(2), "ipo": 1 / (4 * 0.1**2), "kto": 0.5,  # each answer's 1 - sigmoid(0)
}  # fmt: skip


@pytest.mark.parametrize("loss_type", START)
def test_at_the_reference_the_loss_is_its_closed_form(loss_type: str):
    model = policy(loss_type)
    some = with_reference(model, data(loss_type, 6))
    found = output(model, some)
    assert abs(found.loss.item() - START[loss_type]) <= 1e-5 * START[loss_type]
    assert float(found.chosen_rewards.abs().max()) <= 1e-5


@pytest.mark.parametrize("loss_type", LOSSES)
def test_packed_pairs_give_what_rows_one_by_one_give(loss_type: str):
    """By log-softmax over logits of every answer alone, and each formula written out."""
    model = policy(loss_type, beta=0.3)
    some = [
        one._replace(ref_chosen=-9.0 - i, ref_rejected=-11.0 + i, ref_other=-20.0)
        for i, one in enumerate(data(loss_type, 4))
    ]

    def alone(answer: Tokenised) -> tuple[float, int]:
        ids = torch.from_numpy(answer.tokens.astype(np.int64))
        logp = model(ids[None])[0].double().log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0]
        chosen = logp[torch.from_numpy(answer.loss_mask[1:])]
        return chosen.sum().item(), len(chosen)

    def log_sigmoid(x: float) -> float:
        return -math.log1p(math.exp(-x))

    each = []
    for one in some:
        if loss_type == "kto":
            continue
        (a, n), (b, m) = alone(one.chosen), alone(one.rejected)  # type: ignore[arg-type]
        h = (a - one.ref_chosen) - (b - one.ref_rejected)
        if loss_type == "dpo":
            each.append(-log_sigmoid(0.3 * h))
        elif loss_type == "ipo":
            each.append((h - 1 / 0.6) ** 2)
        elif loss_type == "simpo":
            each.append(-log_sigmoid(0.3 * (a / n - b / m) - 0.5))
        else:
            odds = [x - math.log(-math.expm1(x)) for x in (a / n, b / m)]
            each.append(-0.3 * log_sigmoid(odds[0] - odds[1]))
    if loss_type == "orpo":
        averages = [alone(one.chosen) for one in some]  # type: ignore[arg-type]
        wanted = (sum(each) - sum(total / n for total, n in averages)) / len(some)
    elif loss_type == "kto":
        point = max(0.0, sum(alone(one.other)[0] + 20.0 for one in some) / len(some))  # type: ignore[arg-type]
        for one in some:
            sign, ref = (1, one.ref_chosen) if one.chosen is not None else (-1, one.ref_rejected)
            ratio = alone(one.answers[0])[0] - ref
            each.append(1 - 1 / (1 + math.exp(-sign * 0.3 * (ratio - point))))
        wanted = sum(each) / len(some)
    else:
        wanted = sum(each) / len(some)
    assert abs(output(model, some).loss.item() - wanted) <= 2e-6 * max(1.0, abs(wanted))


def trained(
    run_dir: Path, spec: PreferenceSpec, *, steps: int = 40, adapter: bool = False, start: Path | None = None
) -> GPT:
    model = GPT(CONFIG, seed=3) if start is None else load(start)[0]
    if adapter:
        adapters.put_on(model, AdapterSpec(rank=4))
    some = data(spec.loss_type, 96)
    held_out = data(spec.loss_type, 40, seed=1)
    if spec.referenced:
        some, held_out = with_reference(model, some), with_reference(model, held_out)
    policy = PreferencePolicy.over(model, spec)
    loader = PairLoader(some, TOKENIZER.fingerprint, TOKENIZER.vocab_size, batch=8)
    TOKENIZER.save(run_dir / "tokenizer")
    table = {
        "run_dir": str(run_dir), "steps": steps, "data": {"batch": 8, "length": 24}, "optimizer": {"lr": 2e-3},
        "schedule": {"name": "constant", "warmup": 0}, "evaluation": {"every": 20}, "checkpoint": {"every": 20},
        "model": CONFIG.to_dict(), "start": None if start is None else str(start),
    }  # fmt: skip
    run(
        from_table({k: v for k, v in table.items() if v is not None}), model=policy, loader=loader,
        evaluate=preferences.evaluation(held_out), tokenizer=TOKENIZER, measure_peak=False, quiet=True,
    )  # fmt: skip
    return policy


def right(model: GPT, some: list[Preference]) -> list[bool]:
    """Of each pair whether the chosen answer is the likelier one."""
    sums = logprobs_of(model, [answer for one in some for answer in one.answers]).view(-1, 2)
    return (sums[:, 0] > sums[:, 1]).tolist()


@pytest.mark.parametrize("loss_type", LOSSES)
def test_each_loss_improves_the_accuracy_on_held_out_pairs(loss_type: str, tmp_path: Path):
    model = trained(tmp_path, PreferenceSpec(loss_type=loss_type))  # type: ignore[arg-type]
    held_out = with_reference(GPT(CONFIG, seed=3), data(loss_type, 60, seed=2))
    after = preferences.evaluation(held_out)(model)
    before = preferences.evaluation(held_out)(policy(loss_type))
    assert after["accuracy"] >= 0.9 and after["val_loss"] < before["val_loss"]
    assert after["margin"] > before["margin"] + 0.01
    unseen = pairs(80, seed=3)
    was, now = right(GPT(CONFIG, seed=3), unseen), right(model, unseen)
    assert sum(now) > sum(was) and mcnemar(was, now) < 0.01
    assert after["chosen_change"] == pytest.approx(
        after["logprobs_chosen"] - before["logprobs_chosen"], abs=1e-3
    )


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "lora"])
def test_a_resumed_run_ends_in_the_same_bits_and_is_a_gpt(adapter: bool, tmp_path: Path):
    spec = PreferenceSpec()
    straight = trained(tmp_path / "straight", spec, adapter=adapter)
    trained(tmp_path / "stopped", spec, steps=20, adapter=adapter)
    resumed = trained(tmp_path / "stopped", spec, adapter=adapter)
    a, b = straight.state_dict(), resumed.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    if not adapter:
        found, _ = load(tmp_path / "stopped")
        tokens = torch.arange(10)[None]
        assert torch.equal(found(tokens), straight.eval()(tokens))


def test_the_reference_of_an_adapted_policy_is_the_adapter_switched_off():
    model = policy("dpo")
    plain = logprobs_of(model, [a for one in pairs(5) for a in one.answers])
    adapters.put_on(model, AdapterSpec(kind="dora"))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1
    some = with_reference(model, pairs(5))
    assert torch.equal(torch.tensor([v for one in some for v in (one.ref_chosen, one.ref_rejected)]), plain)
    assert float(output(model, some).chosen_rewards.abs().max()) > 1e-3


@pytest.mark.parametrize("loss_type", LOSSES)
def test_batches_of_any_cut_have_the_gradient_of_the_whole(loss_type: str):
    """transformers #34191, trl #2604: losses scaled by how an update was accumulated; KTO's reference point is the
    whole update's."""
    model, some = policy(loss_type), with_reference(policy("dpo"), data(loss_type, 6))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01
    if loss_type == "kto":  # a point of each part's own would be others: one of them is not 0
        apart = [float(model.of_update([batch_of(some[i : i + 2])], list)["point"]) for i in (0, 2, 4)]
        assert max(apart) > 1e-3 and max(apart) - min(apart) > 1e-3
    gradients = []
    for cuts in ([6], [2, 2, 2], [3, 3]):
        model.zero_grad()
        bounds = itertools.pairwise(itertools.accumulate(cuts, initial=0))
        batches = [batch_of(some[first:end]) for first, end in bounds]
        shared = model.of_update(batches, list)
        for batch in batches:
            tokens, targets, options = tensors_of(batch, torch.device("cpu"))
            (model(tokens, targets, **options, **shared).loss / len(cuts)).backward()
        gradients.append(model.token_embedding.weight.grad.clone())
    for other in gradients[1:]:  # sums of f32 in another order
        assert (other - gradients[0]).abs().max() <= 2e-6 * max(1.0, float(gradients[0].abs().max()))


def test_records_become_pairs_and_what_teaches_nothing_is_left_out():
    chat = Chat(TOKENIZER, None)
    rankings = [
        Ranking("abc", ("x", "yy", "z"), (2.0, 1.0, 3.0)), Ranking("abc", ("x" * 30, "y"), (1.0, 2.0)),
    ]  # fmt: skip
    found, left_out = tokenised(rankings, chat, length=12)
    assert [TOKENIZER.decode(a.tokens[3:-1]) for a in found[0].answers] == ["yy", "z"]
    assert len(found) == 1 and left_out == {"an answer with more than 12 tokens": 1}
    labelled, _ = tokenised([Labelled("abc", "x", True), Labelled("abd", "y", False)], chat, length=12)
    assert labelled[0].rejected is None and labelled[1].chosen is None
    crossed = with_others(labelled)
    assert TOKENIZER.decode(crossed[0].other.tokens[:-1]) == "abcy" and crossed[0].other.targets == 2  # type: ignore[union-attr]


def test_bad_settings_and_data_are_refused():
    for settings, sentence in (
        ({"loss_type": "ppo"}, "unknown preference.loss_type 'ppo'"), ({"beta": 0.0}, "preference.beta"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "ipo does not have it"), ({"label_smoothing": 0.5}, "below 0.5"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=sentence):
            PreferenceSpec(**settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="expected at least data.batch = 8"):
        PairLoader(pairs(3), "x", 10, batch=8)
    with pytest.raises(UserError, match="at least 2 preferences"):
        with_others(unpaired(4)[:1])
    model = policy("dpo")
    with torch.no_grad():
        model.token_embedding.weight[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        with_reference(model, pairs(2))
