"""The critic: zero at first, or the reward model it begins as."""

import numpy as np
import torch

from gptcore.align.critic import Critic
from gptcore.align.policy import packed
from gptcore.align.reward_model import RewardModel
from gptcore.data.examples import Tokenised
from gptcore.infer import SamplingParams, rollout

from . import reinforcement_cases as world


def sampled():
    prompts = world.prompts_of("ab", "c", "def").ids
    return rollout(
        world.model_of(), prompts, max_new_tokens=5, params=SamplingParams(1.0, 0, 1.0, 1), num_samples=4
    )


def test_a_new_critic_says_zero_and_can_learn():
    critic, got = Critic(16, world.model_of()), sampled()
    assert not critic.evaluated(got, 1000).any()
    critic.values(packed(got), None).sum().backward()
    assert critic.weight.grad is not None and float(critic.weight.grad.abs().max()) > 0.0
    assert float(critic.bias.grad) == len(got.logprobs)


def test_a_critic_begins_as_its_reward_model():
    model, got = RewardModel.over(world.model_of(seed=2), seed=3), sampled()
    model.normalise([Tokenised.of([0, 1], [2]), Tokenised.of([3], [4, 5, 6])])
    # the value of a state is the score of what has been said so far
    said = [
        Tokenised.of(got.prompt(i)[:-1].tolist() or [0], got.prompt(i)[-1:].tolist()) for i in range(len(got))
    ]
    first = got.response_offsets[:-1]
    expected = [Tokenised.of(got.prompt(i).tolist(), got.response(i)[:-1].tolist()) for i in range(len(got))]
    whole, begun = model.scores(expected).numpy(), model.scores(said).numpy()
    values = Critic.of_reward_model(model).evaluated(got, 40)
    assert np.abs(values[got.response_offsets[1:] - 1] - whole).max() <= 1e-5
    long = np.array([len(got.prompt(i)) > 1 for i in range(len(got))])
    assert np.abs(values[first] - begun)[long].max() <= 1e-5
    assert torch.isfinite(torch.from_numpy(values)).all() and np.ptp(values) > 0.1
