"""Each loss against one written a second time: loops over single tokens from the papers' formulas, always; and the
functions of verl, torchtune and OpenRLHF where those are installed (TRL's are in ``test_trl_losses.py``)."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch

from gptcore.align.losses import advantages, kl, policy_gradient, preference, reward, values

B, T = 5, 9


@pytest.fixture
def rollout() -> dict[str, torch.Tensor]:
    """float64 (B, T): right-padded, as the other trainers want it."""
    lengths = torch.tensor([9, 1, 4, 7, 3])
    new = -3 * torch.rand(B, T, dtype=torch.float64)
    return {
        "new": new,
        "old": new + 0.4 * torch.randn(B, T, dtype=torch.float64),
        "reference": new + 0.4 * torch.randn(B, T, dtype=torch.float64),
        "advantages": torch.randn(B, T, dtype=torch.float64),
        "values": torch.randn(B, T, dtype=torch.float64),
        "rewards": torch.randn(B, T, dtype=torch.float64),
        "mask": torch.arange(T) < lengths[:, None],
    }


def close(got: torch.Tensor | float, truth: torch.Tensor | float, tolerance: float = 1e-12) -> None:
    got, truth = torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(truth, dtype=torch.float64)
    assert float((got - truth).abs().max()) <= tolerance * max(1.0, float(truth.abs().max())), (got, truth)


def tokens(data: dict[str, torch.Tensor], *names: str) -> list[list[tuple[float, ...]]]:
    """For each sequence its tokens, and for each token the named numbers."""
    return [
        [tuple(float(data[name][b, t]) for name in names) for t in range(T) if data["mask"][b, t]]
        for b in range(B)
    ]


# --- loops from the papers ----------------------------------------------------------------------------------------


def _clipped(new: float, old: float, a: float, low: float, high: float) -> float:
    ratio = math.exp(new - old)
    return min(ratio * a, min(max(ratio, low), high) * a)


@pytest.mark.parametrize(("clip", "high"), [(0.2, None), (0.1, 0.4), (10.0, None)])
def test_ppo_by_loop(rollout: dict[str, torch.Tensor], clip: float, high: float | None) -> None:
    got = policy_gradient.ppo(
        rollout["new"], rollout["old"], rollout["advantages"], rollout["mask"], clip=clip, clip_high=high
    )
    each = [token for sequence in tokens(rollout, "new", "old", "advantages") for token in sequence]
    upper = 1 + (clip if high is None else high)
    close(got.loss, -sum(_clipped(*token, 1 - clip, upper) for token in each) / len(each))
    ratios = [math.exp(new - old) for new, old, _ in each]
    close(got.ratio, sum(ratios) / len(each))
    flat = [
        (r > upper and a > 0) or (r < 1 - clip and a < 0) for r, (_, _, a) in zip(ratios, each, strict=True)
    ]
    close(got.clip_share, sum(flat) / len(each), 1e-6)
    close(got.approx_kl, sum(r - 1 - math.log(r) for r in ratios) / len(each))


@pytest.mark.parametrize("form", ["grpo", "dapo", "dr_grpo"])
def test_grpo_by_loop(rollout: dict[str, torch.Tensor], form: str) -> None:
    group = torch.randn(1, B, dtype=torch.float64)
    scale = form != "dr_grpo"
    a = advantages.group_relative(group, scale=scale)[0]
    got = policy_gradient.grpo(
        rollout["new"], rollout["old"], a, rollout["mask"], kl=kl.k3(rollout["new"], rollout["reference"]), beta=0.04,
        aggregation=form, length=20,
    )  # fmt: skip
    rewards = group[0].tolist()
    mean = sum(rewards) / B
    deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (B - 1)) if scale else 1.0
    sums, lengths = [], []
    for sequence, r in zip(tokens(rollout, "new", "old", "reference"), rewards, strict=True):
        terms = [
            _clipped(new, old, (r - mean) / deviation, 0.8, 1.2)
            - 0.04 * (math.exp(ref - new) - (ref - new) - 1)
            for new, old, ref in sequence
        ]
        sums.append(sum(terms))
        lengths.append(len(terms))
    truth = {
        "grpo": sum(s / n for s, n in zip(sums, lengths, strict=True)) / B,
        "dapo": sum(sums) / sum(lengths),
        "dr_grpo": sum(sums) / (B * 20),
    }
    close(got.loss, -truth[form])


def test_gspo_by_loop(rollout: dict[str, torch.Tensor]) -> None:
    a = torch.randn(B, dtype=torch.float64)
    got = policy_gradient.ppo(
        rollout["new"],
        rollout["old"],
        a,
        rollout["mask"],
        level="sequence",
        clip=0.1,
        aggregation="sequence_mean",
    )
    terms = []
    for sequence, weight in zip(tokens(rollout, "new", "old"), a.tolist(), strict=True):
        ratio = math.prod(math.exp(new - old) for new, old in sequence) ** (1 / len(sequence))
        terms.append(min(ratio * weight, min(max(ratio, 0.9), 1.1) * weight))
    close(got.loss, -sum(terms) / B)


def test_value_loss_by_loop(rollout: dict[str, torch.Tensor]) -> None:
    old = rollout["values"] + 0.4 * torch.randn(B, T, dtype=torch.float64)
    got = values.value_loss(rollout["values"], rollout["rewards"], rollout["mask"], old_values=old)
    each = [t for s in tokens({**rollout, "before": old}, "values", "rewards", "before") for t in s]
    truth = [max((v - r) ** 2, (min(max(v, o - 0.2), o + 0.2) - r) ** 2) for v, r, o in each]
    close(got.loss, 0.5 * sum(truth) / len(each))


def test_reinforce_by_loop(rollout: dict[str, torch.Tensor]) -> None:
    rewards = torch.randn(1, B, dtype=torch.float64)
    a = advantages.rloo(rewards)[0]
    got = policy_gradient.reinforce(rollout["new"], a, rollout["mask"])
    total = 0.0
    for i, sequence in enumerate(tokens(rollout, "new")):
        others = [float(rewards[0, j]) for j in range(B) if j != i]
        total += (float(rewards[0, i]) - sum(others) / len(others)) * sum(new for (new,) in sequence)
    close(got, -total / B)


def test_whitening_by_loop(rollout: dict[str, torch.Tensor]) -> None:
    flat = [x for s in tokens(rollout, "rewards") for (x,) in s]
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in flat) / (len(flat) - 1) + 1e-8)
    for shift in (True, False):
        got = advantages.whiten(rollout["rewards"], rollout["mask"], shift_mean=shift)[rollout["mask"]]
        close(
            got,
            torch.tensor(
                [(x - mean) / deviation + (0 if shift else mean) for x in flat], dtype=torch.float64
            ),
        )


def _log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_preferences_by_loop() -> None:
    c, r, rc, rr = -5 * torch.rand(4, 6, dtype=torch.float64)
    rows = list(zip(*(x.tolist() for x in (c, r, rc, rr)), strict=True))
    h = [(a - p) - (b - q) for a, b, p, q in rows]
    truth = {
        "dpo": [-0.9 * _log_sigmoid(0.4 * x) - 0.1 * _log_sigmoid(-0.4 * x) for x in h],
        "ipo": [(x - 1 / 0.8) ** 2 for x in h],
        "simpo": [-_log_sigmoid(2 * (a - b) - 0.6) for a, b, _, _ in rows],
        "orpo": [
            -_log_sigmoid(
                math.log(math.exp(a) / (1 - math.exp(a))) - math.log(math.exp(b) / (1 - math.exp(b)))
            )
            for a, b, _, _ in rows
        ],
    }
    got = {
        "dpo": preference.dpo(c, r, rc, rr, beta=0.4, label_smoothing=0.1).loss,
        "ipo": preference.ipo(c, r, rc, rr, beta=0.4).loss,
        "simpo": preference.simpo(c, r, beta=2.0, gamma=0.6).loss,
        "orpo": preference.orpo(c, r, torch.zeros((), dtype=torch.float64), beta=1.0).loss,
    }
    for name, losses in truth.items():
        close(got[name], sum(losses) / len(losses))


def test_kto_by_loop() -> None:
    policy, reference, mismatched, ref_mismatched = -5 * torch.rand(4, 8, dtype=torch.float64)
    desirable = torch.tensor([True, False, True, True, False, False, True, True])
    point = preference.kto_reference_point(mismatched, ref_mismatched)
    z0 = max(0.0, sum((mismatched - ref_mismatched).tolist()) / 8)
    close(point, z0)
    got = preference.kto(
        policy, reference, desirable, point, beta=0.3, desirable_weight=1.2, undesirable_weight=0.7
    )
    truth = [
        1.2 * (1 - 1 / (1 + math.exp(-0.3 * (x - z0))))
        if good
        else 0.7 * (1 - 1 / (1 + math.exp(-0.3 * (z0 - x))))
        for x, good in zip((policy - reference).tolist(), desirable.tolist(), strict=True)
    ]
    close(got.loss, sum(truth) / 8)


@pytest.mark.parametrize("k", [2, 4, 9])
def test_ranked_by_loop_over_pairs(k: int) -> None:
    scores = torch.randn(3, k, dtype=torch.float64, requires_grad=True)
    ranks = torch.stack([torch.randperm(k) for _ in range(3)])
    got = reward.ranked(scores, ranks)
    prompts = []
    for p in range(3):
        pairs = [(i, j) for i in range(k) for j in range(k) if ranks[p, i] < ranks[p, j]]
        assert len(pairs) == k * (k - 1) // 2
        losses = [-torch.nn.functional.logsigmoid(scores[p, i] - scores[p, j]) for i, j in pairs]
        prompts.append(sum(losses) / len(losses))
    truth = sum(prompts) / 3
    close(got.loss.detach(), truth.detach())
    close(torch.autograd.grad(got.loss, scores)[0], torch.autograd.grad(truth, scores)[0])


# --- other trainers' functions ------------------------------------------------------------------------------------


def published(module: str, *names: str) -> list[Any]:
    """Functions of another trainer, or a skip that says which is missing."""
    try:
        found = importlib.import_module(module)
    except Exception as error:  # such packages fail to import in many ways: a GPU, a driver, a sibling
        pytest.skip(f"{module} cannot be imported: {error}")
    missing = [name for name in names if not hasattr(found, name)]
    if missing:
        pytest.skip(f"{module} has no {', '.join(missing)}")
    return [getattr(found, name) for name in names]


def test_gae_and_losses_of_verl(rollout: dict[str, torch.Tensor]) -> None:
    their_gae, their_policy, their_values = published(
        "verl.trainer.ppo.core_algos",
        "compute_gae_advantage_return",
        "compute_policy_loss",
        "compute_value_loss",
    )
    mask = rollout["mask"].double()
    rewards, state_values = rollout["rewards"] * mask, rollout["values"] * mask
    theirs = their_gae(rewards, state_values, mask, 0.99, 0.95)
    ours = advantages.gae(rewards, state_values, rollout["mask"], gamma=0.99, lam=0.95)
    close(advantages.whiten(ours.advantages, rollout["mask"]), theirs[0] * mask, 1e-6)
    close(ours.returns, theirs[1] * mask, 1e-6)
    loss = their_policy(rollout["old"], rollout["new"], rollout["advantages"], mask, 0.2, 0.2, 0.2, 1e9)[0]
    close(
        policy_gradient.ppo(rollout["new"], rollout["old"], rollout["advantages"], rollout["mask"]).loss,
        loss,
        1e-6,
    )
    theirs = their_values(rollout["new"], rollout["rewards"], rollout["values"], mask, 0.2)[0]
    ours_values = values.value_loss(
        rollout["new"], rollout["rewards"], rollout["mask"], old_values=rollout["values"]
    )
    close(ours_values.loss, theirs, 1e-6)


def test_kl_estimators_of_verl(rollout: dict[str, torch.Tensor]) -> None:
    (penalty,) = published("verl.trainer.ppo.core_algos", "kl_penalty")
    for ours, theirs in (("k1", "kl"), ("k2", "mse"), ("k3", "low_var_kl")):
        close(
            kl.estimate(ours, rollout["new"], rollout["reference"]),
            penalty(rollout["new"], rollout["reference"], theirs), 1e-6,
        )  # fmt: skip


def test_dpo_and_advantages_of_torchtune(rollout: dict[str, torch.Tensor]) -> None:
    (their_dpo,) = published("torchtune.rlhf.loss", "DPOLoss")
    estimate, whiten = published("torchtune.rlhf", "estimate_advantages", "whiten")
    c, r, rc, rr = -5 * torch.rand(4, 6, dtype=torch.float64)
    close(preference.dpo(c, r, rc, rr, beta=0.1).loss, their_dpo(beta=0.1)(c, r, rc, rr)[0].mean(), 1e-6)
    full = torch.ones_like(rollout["mask"])
    theirs = estimate(rollout["values"], rollout["rewards"], 0.99, 0.95)
    ours = advantages.gae(rollout["rewards"], rollout["values"], full, gamma=0.99, lam=0.95)
    close(advantages.whiten(ours.advantages, full), theirs[0], 1e-5)
    close(advantages.whiten(rollout["rewards"], full), whiten(rollout["rewards"]), 1e-5)


def test_losses_of_openrlhf(rollout: dict[str, torch.Tensor]) -> None:
    policy, critic, pairs, their_dpo = published(
        "openrlhf.models.loss", "PolicyLoss", "ValueLoss", "PairWiseLoss", "DPOLoss"
    )
    mask = rollout["mask"]
    theirs = policy()(rollout["new"], rollout["old"], rollout["advantages"], mask.double())
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    close(policy_gradient.ppo(rollout["new"], rollout["old"], rollout["advantages"], mask).loss, theirs, 1e-6)
    theirs = critic(0.2)(rollout["new"], rollout["values"], rollout["rewards"], mask.double())
    ours = values.value_loss(rollout["new"], rollout["rewards"], mask, old_values=rollout["values"]).loss
    close(ours, theirs, 1e-6)
    c, r, rc, rr = -5 * torch.rand(4, 6, dtype=torch.float64)
    close(reward.pairwise(c, r).loss, pairs()(c, r), 1e-6)
    close(preference.dpo(c, r, rc, rr, beta=0.1).loss, their_dpo(0.1)(c, r, rc, rr)[0], 1e-6)
