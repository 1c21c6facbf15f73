"""Bugs of others' reinforcement learning, each as a test that fails where it is made again; the docstring says whose.

Those of data, masks and losses are in ``test_upstream_bugs.py``.
"""

import tracemalloc

import numpy as np
import pytest
import torch

from gptcore.align import policy
from gptcore.align.best_of_n import best_of_n
from gptcore.align.experience import Collector
from gptcore.align.reinforcement_parts import new_critic
from gptcore.align.reinforcement_spec import PPOSpec
from gptcore.errors import UserError
from gptcore.infer import SamplingParams, rollout
from gptcore.models import GPT, GPTConfig

from . import reinforcement_cases as world

TASKS = ("ab", "c", "def")


def collected(reward=world.letters, **own):
    _, spec = world.settings_of("unused", PPOSpec, **{**world.SMALL, **own})
    actor = world.model_of()
    prompts = world.prompts_of(*TASKS)
    critic = new_critic(actor, spec)
    return Collector(actor, critic, world.model_of(seed=1), prompts, reward, None, spec, [6], 0).collect(
        0, spec.beta
    )


def test_the_score_is_on_the_last_token_and_not_behind_it():
    """trl #3750, #5338: the score stood on the first PAD after the end of text."""
    got = collected(lambda answers: [100.0] * len(answers), beta=0.0, lam=0.0, whiten_advantages=False)
    ends = got.rollouts.response_offsets[1:] - 1
    # with lambda 0 and values of 0 the advantage is the reward of that token alone
    assert torch.equal(got.advantages[ends], torch.full((32,), 100.0))
    assert float(got.advantages.sum()) == 3200.0
    stopped = got.rollouts.stopped
    assert (
        got.rollouts.tokens[got.rollouts.cu_seqlens[1:] - 1][stopped] == 6
    ).all() and 0 < stopped.sum() < 32


def test_entropy_is_a_mean_over_response_tokens():
    """trl #2022, #6121: summed over padding too, it went negative."""
    got = collected()
    with torch.no_grad():
        rows = []
        for i in range(32):
            ids = torch.from_numpy(
                np.concatenate([got.rollouts.prompt(i), got.rollouts.response(i)]).astype(np.int64)
            )
            whole = world.model_of()(ids[None])[0].log_softmax(-1)
            rows.append(-(whole.exp() * whole).sum(-1)[len(got.rollouts.prompt(i)) - 1 : -1])
    assert got.metrics["entropy"] == pytest.approx(float(torch.cat(rows).mean()), abs=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_temperature_is_in_every_logprob(temperature):
    """trl #4159: log-probabilities of a sampler at temperature 1 against a policy at another."""
    got = collected(temperature=temperature)
    assert np.abs(got.old_logprobs.numpy() - got.rollouts.logprobs).max() <= 1e-5
    plain = policy.evaluated(world.model_of(), got.rollouts).logprobs
    assert np.abs(plain - got.rollouts.logprobs).max() > 0.1


@pytest.mark.parametrize("truncation", [{"top_p": 0.6}, {"top_k": 3}])
def test_truncation_does_not_bias_the_ratio(truncation):
    """trl #6789: the sampler's log-probabilities are of the kept tokens, the trainer's were of all."""
    got = collected(**truncation)
    assert np.abs(got.old_logprobs.numpy() - got.rollouts.logprobs).max() <= 1e-5
    whole = policy.packed(got.rollouts)._replace(kept=None)
    biased = policy.scores(world.model_of(), whole).logprobs.detach().numpy()
    assert (got.rollouts.logprobs - biased).min() >= -1e-5 and (got.rollouts.logprobs - biased).mean() > 0.1


def test_the_reference_is_read_as_the_policy_is():
    """A reference at temperature 1, or over the whole vocabulary, is at a distance from itself."""
    _, spec = world.settings_of("unused", PPOSpec, **world.SMALL, temperature=0.7, top_p=0.8)
    actor = world.model_of()
    collector = Collector(
        actor,
        new_critic(actor, spec),
        world.model_of(),
        world.prompts_of(*TASKS),
        world.letters,
        None,
        spec,
        [6],
        0,
    )
    assert collector.collect(0, 0.1).kl == 0.0


def test_returns_are_not_rewards():
    """rlhf-book #216: rewards stood where returns were meant."""
    got = collected(lambda answers: [1.0] * len(answers), beta=0.0, lam=1.0, whiten_advantages=False)
    assert torch.equal(got.returns, torch.ones(len(got.returns)))  # of every token, not of the last alone


def test_scores_of_the_whole_vocabulary_are_not_kept():
    """trl #963, #3664: the logits of every generated token, B x T x V, were stacked before training began."""
    config = {
        "num_layers": 1,
        "width": 16,
        "vocab_size": 5000,
        "context_length": 64,
        "attention": {"num_heads": 2},
    }
    model = GPT(GPTConfig.from_dict(config), seed=0)
    options = {"max_new_tokens": 48, "params": SamplingParams(1.0, 0, 1.0, 0)}
    rollout(model, [[1, 2]] * 66, **options)  # what is loaded on first use
    tracemalloc.start()
    got = rollout(model, [[1, 2]] * 128, **options)
    peak = tracemalloc.get_traced_memory()[1]  # NumPy's; torch's own are one step's logits and the cache
    tracemalloc.stop()
    assert len(got.logprobs) == 128 * 48
    everything = 128 * 48 * 5000 * 4
    assert peak < 0.6 * everything  # float64 scratch of one step, 40 MB of 123
    kept = sum(getattr(got, name).nbytes for name in ("tokens", "logprobs", "entropies", "response_offsets"))
    assert kept < 100 * 1024


def test_a_prompt_and_its_samples_stay_together():
    """A sampler that repeats prompts in another order than it groups rewards compares strangers."""
    prompts = world.prompts_of(*TASKS)
    got = best_of_n(
        world.model_of(), prompts, world.letters, 4, max_new_tokens=5, params=SamplingParams(1.0, 0, 1.0, 0)
    )
    assert [answer.prompt_ids.tolist() for answer in got.best] == [prompts.ids[i].tolist() for i in range(3)]


def test_dropout_is_off_where_log_probabilities_are_compared():
    """With dropout two passes over the same tokens give ratios other than 1 (Huang et al. 2024, detail 5)."""
    config = world.CONFIG.merged({"dropout": 0.5})
    model = GPT(config, seed=0)
    got = rollout(model, [[1, 2]] * 8, max_new_tokens=4, params=SamplingParams(1.0, 0, 1.0, 0))
    assert model.training  # as it was
    model.eval()
    assert np.abs(policy.evaluated(model, got).logprobs - got.logprobs).max() <= 1e-5


def test_a_prompt_that_does_not_fit_is_not_cut_in_silence():
    """A prompt truncated to the context answers another question (trl's max_prompt_length)."""
    with pytest.raises(UserError, match="the prompt has 8 tokens, the context leaves room for 7; shorten it"):
        world.prompts_of("abcdefab")
