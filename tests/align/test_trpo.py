"""The trust region: its curvature against the exact Fisher matrix, its bound kept, its optimum reached."""

import numpy as np
import pytest
import torch

from gptcore.align import trpo
from gptcore.align.losses.kl import exact
from gptcore.errors import UserError
from gptcore.train.metrics import read

from . import reinforcement_cases as world
from .test_ppo import run


def softmax_world():
    """A softmax of 5 arms by a linear map of 3 features, 7 states."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(7, 3, generator=generator)
    weight = torch.nn.Parameter(0.5 * torch.randn(5, 3, generator=generator))
    old = (features @ weight.t()).detach()
    advantages = torch.randn(7, 5, generator=generator)
    advantages -= (old.softmax(-1) * advantages).sum(-1, keepdim=True)

    def surrogate():
        ratio = ((features @ weight.t()).log_softmax(-1) - old.log_softmax(-1)).exp()
        return -(old.softmax(-1) * ratio * advantages).sum(-1).mean()

    return weight, surrogate, lambda: exact(old, features @ weight.t()).mean(), features, old


def test_the_direction_is_the_natural_gradient():
    weight, surrogate, divergence, features, old = softmax_world()
    start = weight.detach().clone()
    probs = old.softmax(-1).double()
    fisher = torch.zeros(15, 15, dtype=torch.float64)
    for p, x in zip(probs, features.double(), strict=True):
        fisher += torch.kron(p.diag() - torch.outer(p, p), torch.outer(x, x)) / 7
    gradient = torch.autograd.grad(surrogate(), weight)[0].double().flatten()
    expected = torch.linalg.solve(fisher + 0.1 * torch.eye(15, dtype=torch.float64), -gradient)
    got = trpo.trust_region_step([weight], surrogate, divergence, 0.01)
    moved = (weight.detach() - start).double().flatten()
    cosine = float(moved @ expected / (moved.norm() * expected.norm()))
    assert got.accepted and got.backtracks == 0
    assert cosine >= 0.9999
    # the quadratic model with its damping says 0.01, the divergence itself is less
    assert 0.004 <= got.divergence <= 0.01 and got.improvement > 0.0


@pytest.mark.parametrize("bound", [1e-4, 0.01, 1.0, 30.0])
def test_the_bound_is_kept(bound):
    weight, surrogate, divergence, _, _ = softmax_world()
    got = trpo.trust_region_step([weight], surrogate, divergence, bound)
    with torch.no_grad():
        assert float(divergence()) == got.divergence <= bound
    assert got.accepted


def test_a_surrogate_that_nothing_improves_leaves_the_weights():
    weight, _, divergence, _, _ = softmax_world()
    start = weight.detach().clone()
    got = trpo.trust_region_step([weight], lambda: (weight * 0.0).sum(), divergence, 0.01)
    assert not got.accepted and torch.equal(weight, start)


def test_bf16_is_refused():
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(UserError, match="must be float32"):
        trpo.trust_region_step([weight], lambda: weight.sum(), lambda: weight.sum(), 0.01)


def test_a_run_climbs_within_its_region(tmp_path):
    gains = [0.0, 0.4, 1.0, 0.2, 0.8, -0.5, 0.6]
    reward = lambda answers: [gains[answer.response_ids[0]] for answer in answers]  # noqa: E731
    options = {
        "episodes": 256,
        "minibatch": 256,
        "max_new_tokens": 1,
        "samples": 8,
        "beta": 0.5,
        "trust_region": 0.02,
    }
    actor, _ = run(tmp_path, "rloo", {"steps": 30}, reward=reward, **options)
    seen = [line for line in read(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert all(line["approx_kl"] <= 0.02 for line in seen) and seen[0]["accepted"] == 1.0
    for prompt in ([0, 1], [2], [3, 4, 5]):
        ref = world.probabilities(world.model_of(), prompt, 1)
        best, _ = world.optimum(ref, lambda response: gains[response[0]], 0.5)
        assert world.total_variation(world.probabilities(actor, prompt, 1), best) <= 0.02


def test_a_critic_learns_beside_it(tmp_path):
    _, result = run(tmp_path, "ppo, critic apart", {"steps": 3}, trust_region=0.01, kl_target=None)
    assert np.isfinite(result.metrics["value_loss"]) and result.metrics["approx_kl"] <= 0.01


def test_settings_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"ppo.critic: a trust region is the policy's alone"):
        run(tmp_path, "ppo", trust_region=0.01)
    with pytest.raises(UserError, match=r"grpo.kl_in: a trust region's step has no second loss"):
        run(tmp_path, "grpo", trust_region=0.01)
