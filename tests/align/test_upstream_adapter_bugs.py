"""Bugs of others' adapters, reward models and preference trainers, each as a test that fails where it is made again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gptcore.align import preferences
from gptcore.align.pairs import Preference
from gptcore.align.preference_spec import PreferenceSpec
from gptcore.align.preferences import PreferencePolicy, logprobs_of, with_reference
from gptcore.align.reward_model import RewardModel
from gptcore.data.examples import Tokenised
from gptcore.infer import SamplingParams, rollout
from gptcore.models import GPT, AdapterSpec, AttentionSpec, GPTConfig, adapters

END = 0  # the token that ends a text and that others pad with


def model_of(dropout: float = 0.0) -> GPT:
    config = GPTConfig(
        num_layers=2, width=32, vocab_size=31, context_length=32, attention=AttentionSpec(num_heads=2),
        dropout=dropout,
    )  # fmt: skip
    return GPT(config, seed=3)


def stirred(model: GPT, size: float = 0.3) -> GPT:
    """With what trains away from its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += size * torch.randn(p.shape, generator=generator)
    return model


def answer(length: int, seed: int = 0) -> Tokenised:
    rng = np.random.default_rng(seed)
    return Tokenised.of(rng.integers(1, 31, 4), [*rng.integers(1, 31, length), END])


def test_trl_3750_the_score_is_not_that_of_padding_behind_the_end() -> None:
    """TRL took the first PAD after the end (closed as faithful to the code of 2020); where PAD is the end of text, a
    reader that looks for PAD finds it inside (trl #3750, #5338)."""
    model = RewardModel.over(stirred(model_of()))
    short, long = answer(3), answer(9, seed=1)
    alone = torch.cat([model.scores([short]), model.scores([long])])
    assert (model.scores([short, long]) - alone).abs().max() <= 1e-6
    padded = np.append(short.tokens, [END] * 4).astype(np.int32)
    there = model.scores([Tokenised(padded, np.ones(len(padded), bool))])
    assert abs(float(there[0] - alone[0])) > 1e-3  # so it matters where one reads
    inside = Tokenised.of([5, END, 7], [END, 8, END])
    hidden = model.hidden(torch.from_numpy(inside.tokens.astype(np.int64))[None])
    assert abs(float((model.reward_head(hidden[0, -1]) - model.scores([inside])).detach())) <= 1e-6


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_peft_2123_virtual_tokens_are_there_with_a_cache(kind: str) -> None:
    """PEFT's generation went on without the soft prompt unless the cache was off."""
    model = stirred(model_of())
    adapters.put_on(model, AdapterSpec(kind=kind, tokens=3))  # type: ignore[arg-type]
    stirred(model.eval(), 1.0)
    found = rollout(model, [[3, 4]], max_new_tokens=6, params=SamplingParams(temperature=0.0))
    logits = model(torch.from_numpy(found.tokens.astype(np.int64))[None])[0, 1:-1]
    assert logits.argmax(-1).tolist() == found.tokens[2:].tolist()
    with adapters.off(model):
        plain = model(torch.from_numpy(found.tokens.astype(np.int64))[None])[0, 1:-1]
    assert (logits - plain).abs().max() > 0.05  # the virtual tokens do something


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_peft_869_prefixes_have_gradients_under_recomputed_activations(kind: str) -> None:
    """PEFT's prefixes lost theirs, or raised, with gradient checkpointing (peft #869, #2191)."""
    model = adapters.put_on(model_of(), AdapterSpec(kind=kind, tokens=3)).train()  # type: ignore[arg-type]
    tokens = torch.arange(1, 21)[None]
    gradients = []
    for how in ("none", "block", "selective"):
        model.zero_grad()
        model.checkpoint_activations(how)
        model(tokens, tokens.roll(-1, 1)).loss.backward()
        gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(gradients) == 3 and float(gradients[0].abs().max()) > 0.0
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_leaves_no_drift(dtype: torch.dtype) -> None:
    """An update that is subtracted again leaves its rounding behind, most of all in bf16."""
    model = stirred(adapters.put_on(model_of().to(dtype), AdapterSpec(rank=2)))
    before = {name: p.clone() for name, p in model.named_parameters()}
    for _ in range(5):
        adapters.merge(model)
        adapters.unmerge(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    layer = model.stack.blocks[0].mlp.down
    (update,) = layer.updates("default")
    change = update.weight_change(layer.weight).to(dtype)
    assert not torch.equal((layer.weight + change) - change, layer.weight)  # what subtracting would give


def test_trl_800_chosen_answers_that_become_less_likely_are_told() -> None:
    """DPO widens the margin while both answers fall, which went unseen (trl #800, OpenRLHF #1054)."""
    model = model_of()
    pairs = with_reference(model, [Preference(answer(4, i), answer(5, 50 + i)) for i in range(6)])
    policy = stirred(PreferencePolicy.over(model, PreferenceSpec()), 0.5)
    told = preferences.evaluation(pairs)(policy)
    now = logprobs_of(policy, [one.chosen for one in pairs if one.chosen is not None])
    fell = float(now.mean()) - sum(one.ref_chosen for one in pairs) / 6
    assert told["chosen_change"] == pytest.approx(fell, abs=1e-4) and fell < 0.0
    assert told["logprobs_chosen"] == pytest.approx(float(now.mean()), abs=1e-4)


def test_the_reference_is_read_without_dropout() -> None:
    """Two passes of dropout make a policy differ from a reference that has its weights."""
    model = model_of(dropout=0.5).train()
    answers = [answer(4, i) for i in range(4)]
    first = logprobs_of(model, answers)
    assert torch.equal(first, logprobs_of(model, answers)) and model.training
    scored = RewardModel.over(model)
    assert torch.equal(scored.scores(answers), scored.scores(answers)) and scored.training
