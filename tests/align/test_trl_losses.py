"""Each loss, GAE and whitening against TRL's, where that is installed: its functions, its trainers' methods with so
much of a trainer as they read, and of PPO, which is one long method, the lines themselves."""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptcore.align.losses import advantages, kl, policy_gradient, preference, reward, values
from tests.align.test_second_implementations import B, T, close, published, rollout

__all__ = ["rollout"]  # a fixture


class _Alone:
    """What TRL's trainers ask of accelerate, of one process."""

    device, num_processes, sync_gradients = torch.device("cpu"), 1, True

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def reduce(self, x: torch.Tensor, reduction: str) -> torch.Tensor:
        return x

    gather_for_metrics = gather


def trainer(**settings: Any) -> SimpleNamespace:
    """So much of a TRL trainer as its loss reads, in training."""
    common = {
        "accelerator": _Alone(), "model": SimpleNamespace(training=True), "aux_loss_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)), "_total_train_tokens": 0,
    }  # fmt: skip
    return SimpleNamespace(**{**common, **settings})


@pytest.mark.parametrize("form", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grpo_of_trl(rollout: dict[str, torch.Tensor], form: str, level: str) -> None:
    (their,) = published("trl.trainer.grpo_trainer", "GRPOTrainer")
    mask, a, entropies = rollout["mask"], rollout["advantages"][:, 0], torch.rand(B, T, dtype=torch.float64)
    new = rollout["new"].clone().requires_grad_()
    ours = policy_gradient.grpo(
        new, rollout["old"], a, mask, kl=kl.k3(new, rollout["reference"]), beta=0.04, aggregation=form,
        clip=0.2, clip_high=0.28, level=level, length=20,
    ).loss - 0.01 * policy_gradient.entropy_bonus(entropies, mask)  # fmt: skip
    args = SimpleNamespace(
        delta=None,
        use_bias_correction_kl=False,
        steps_per_generation=1,
        num_generations=B,
        max_completion_length=20,
    )
    stand_in = trainer(
        args=args, beta=0.04, loss_type=form, importance_sampling_level=level, epsilon_low=0.2, epsilon_high=0.28,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, max_completion_length=20,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=True, use_adaptive_entropy=False,
        entropy_coef=0.01, _get_per_token_logps_and_entropies=lambda *_, **__: (new, entropies, None),
    )  # fmt: skip
    ids, ones = torch.zeros(B, T, dtype=torch.long), torch.ones(B, 1, dtype=torch.long)
    inputs = {
        "prompt_ids": ones, "prompt_mask": ones, "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": a, "old_per_token_logps": rollout["old"], "ref_per_token_logps": rollout["reference"],
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    theirs = their._compute_loss(stand_in, None, inputs)
    close(ours.detach(), theirs.detach(), 1e-12)
    close(torch.autograd.grad(ours, new)[0], torch.autograd.grad(theirs, new)[0], 1e-12)


def lines_of(function: Any, first: str, last: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run ``function``'s source from the line that begins with ``first`` to the one that begins with ``last`` in its
    module, with ``names``; gives all names afterwards. Skips where another version has no such lines."""
    source = inspect.getsource(function).splitlines()
    begins = [i for i, line in enumerate(source) if line.strip().startswith(first)]
    ends = [i for i, line in enumerate(source) if line.strip().startswith(last)]
    if len(begins) != 1 or len(ends) != 1 or begins > ends:
        pytest.skip(f"{function.__qualname__} has no lines from '{first}' to '{last}'")
    found = {**vars(importlib.import_module(function.__module__)), **names}
    exec(textwrap.dedent("\n".join(source[begins[0] : ends[0] + 1])), found)
    return found


def test_gae_of_trl(rollout: dict[str, torch.Tensor]) -> None:
    (their,) = published("trl.experimental.ppo.ppo_trainer", "PPOTrainer")
    mask = rollout["mask"]
    rewards, state_values = (rollout[name].masked_fill(~mask, 0.0) for name in ("rewards", "values"))
    found = lines_of(
        their.train, "lastgaelam = 0", "advantages = torch.masked_fill",
        {
            "rewards": rewards, "values": state_values, "padding_mask": ~mask, "responses": rewards,
            "args": SimpleNamespace(gamma=0.99, lam=0.95),
        },
    )  # fmt: skip
    ours = advantages.gae(rewards, state_values, mask, gamma=0.99, lam=0.95)
    close(ours.returns[mask], found["returns"][mask])
    whitened = advantages.whiten(ours.advantages, mask)
    close(
        whitened.masked_fill(~mask, 0.0), found["advantages"], 1e-7
    )  # their n / (n - 1), of integers, is in f32


def test_ppo_and_value_losses_of_trl(rollout: dict[str, torch.Tensor]) -> None:
    (their,) = published("trl.experimental.ppo.ppo_trainer", "PPOTrainer")
    mask, everything = rollout["mask"], torch.arange(B)
    new, state_values = (rollout[name].clone().requires_grad_() for name in ("new", "values"))
    old_values = rollout["values"] + 0.4 * torch.randn(B, T, dtype=torch.float64)
    found = lines_of(
        their.train, "vpredclipped = torch.clamp(", "loss = pg_loss +",
        {
            "vpred": state_values, "mb_values": old_values, "mb_return": rollout["rewards"], "new_logprobs": new,
            "mb_logprobs": rollout["old"], "mb_advantage": rollout["advantages"], "padding_mask": ~mask,
            "padding_mask_p1": ~mask, "micro_batch_inds": everything,
            "args": SimpleNamespace(cliprange=0.2, cliprange_value=0.2, vf_coef=0.1),
        },
    )  # fmt: skip
    policy = policy_gradient.ppo(new, rollout["old"], rollout["advantages"], mask)
    critic = values.value_loss(state_values, rollout["rewards"], mask, old_values=old_values, clip=0.2)
    close(policy.loss.detach(), found["pg_loss"].detach())
    close(critic.loss.detach(), found["vf_loss"].detach())
    close(critic.clip_share, found["vf_clipfrac"], 1e-6)
    ours = torch.autograd.grad(policy.loss + 0.1 * critic.loss, (new, state_values))
    for a, b in zip(ours, torch.autograd.grad(found["loss"], (new, state_values)), strict=True):
        close(a, b)


def test_kto_of_trl() -> None:
    (their,) = published("trl.trainer.kto_trainer", "KTOTrainer")
    words, ids, mask = 13, torch.randint(13, (8, T)), torch.ones(8, T, dtype=torch.long)
    mask[:, :3] = 0
    good = torch.tensor([True, False, True, True, False, False, True, True])
    logits = torch.randn(8, T, words, dtype=torch.float64)
    reference, mismatched, ref_mismatched = -8 * torch.rand(3, 8, dtype=torch.float64)
    settings = trainer(
        precompute_ref_logps=True, calculate_KL=True, loss_type="kto", beta=0.3, desirable_weight=1.2,
        undesirable_weight=0.7, _compute_kl_logps=lambda *_: mismatched,
    )  # fmt: skip
    inputs = {
        "input_ids": ids, "completion_mask": mask, "attention_mask": torch.ones_like(ids), "label": good,
        "ref_logps": reference, "ref_KL_logps": ref_mismatched,
    }  # fmt: skip
    theirs = their._compute_loss(settings, lambda **_: SimpleNamespace(logits=logits), inputs, False)
    of_answers = preference.answer_logprobs(
        logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0], mask[:, 1:].bool()
    )
    point = preference.kto_reference_point(mismatched, ref_mismatched)
    ours = preference.kto(
        of_answers, reference, good, point, beta=0.3, desirable_weight=1.2, undesirable_weight=0.7
    )
    close(ours.loss, theirs)


def test_rloo_of_trl(rollout: dict[str, torch.Tensor]) -> None:
    """Its ratios are those of whole answers: ours, which are means over tokens, on sums spread over the tokens."""
    (their,) = published("trl.trainer.rloo_trainer", "RLOOTrainer")
    a = advantages.rloo(torch.randn(1, B, dtype=torch.float64))[0]
    sums = [rollout[name].masked_fill(~rollout["mask"], 0.0).sum(1, keepdim=True) for name in ("new", "old")]
    one = torch.ones(B, 1, dtype=torch.bool)
    ours = policy_gradient.ppo(*sums, a, one, clip=0.2, aggregation="sequence_mean").loss
    settings = trainer(
        epsilon_low=0.2, epsilon_high=0.2,
        _get_per_token_logps_and_entropies=lambda *_, **__: (rollout["new"], rollout["values"].abs(), None),
    )  # fmt: skip
    ids, ones = torch.zeros(B, T, dtype=torch.long), torch.ones(B, 1, dtype=torch.long)
    inputs = {
        "prompt_ids": ones, "prompt_mask": ones, "completion_ids": ids, "completion_mask": rollout["mask"].long(),
        "advantages": a, "old_logps": sums[1][:, 0],
    }  # fmt: skip
    close(ours, their._compute_loss(settings, None, inputs))


def test_simpo_and_orpo_of_trl() -> None:
    (cpo,) = published("trl.experimental.cpo.cpo_trainer", "CPOTrainer")
    (orpo,) = published("trl.experimental.orpo.orpo_trainer", "ORPOTrainer")
    c, r = -5 * torch.rand(2, 6, dtype=torch.float64) - 0.01
    settings = trainer(alpha=0.0, beta=2.0, loss_type="simpo", simpo_gamma=0.6, label_smoothing=0.1)
    theirs = cpo.cpo_loss(settings, c, r)[0].mean()
    close(preference.simpo(c, r, beta=2.0, gamma=0.6, label_smoothing=0.1).loss, theirs)
    odds = orpo.odds_ratio_loss(trainer(beta=0.3), c, r)[0].mean()  # in f32, and the share that is added
    nothing = torch.zeros((), dtype=torch.float64)
    close(preference.orpo(c, r, nothing, beta=0.3).loss, -odds, 1e-6)


def test_pairwise_reward_loss_of_trl() -> None:
    (their,) = published("trl.trainer.reward_trainer", "RewardTrainer")
    scores, margin = torch.randn(12, 1, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    inputs = {"margin": margin, "attention_mask": torch.ones(12, 3)}
    settings = trainer(args=SimpleNamespace(center_rewards_coefficient=0.05))
    theirs = their.compute_loss(settings, lambda **_: SimpleNamespace(logits=scores), inputs)
    chosen, rejected = scores[:, 0].chunk(2)
    close(reward.pairwise(chosen, rejected, margin=margin, centring=0.05).loss, theirs)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_dpo_of_trl(loss: str) -> None:
    (their,) = published("trl.trainer.dpo_trainer", "DPOTrainer")
    words, ids = 13, torch.randint(13, (8, T))
    mask = torch.zeros(8, T, dtype=torch.long)
    for row, (first, last) in enumerate([(2, 9), (1, 4), (5, 6), (3, 8)] * 2):
        mask[row, first:last] = 1
    logits = torch.randn(8, T, words, dtype=torch.float64)
    reference = -8 * torch.rand(8, dtype=torch.float64)
    of_answers = preference.answer_logprobs(
        logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0], mask[:, 1:].bool()
    )
    lengths = mask.sum(1) if loss == "ipo" else torch.ones(8)  # theirs takes means over tokens
    parts = [*(of_answers / lengths).chunk(2), *(reference / lengths).chunk(2)]
    ours = (preference.ipo if loss == "ipo" else preference.dpo)(*parts, beta=0.3).loss
    settings = trainer(
        args=SimpleNamespace(), ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
        loss_types=[loss], loss_weights=[1.0], beta=0.3, use_weighting=False, label_smoothing=0.0,
    )  # fmt: skip
    inputs = {
        "input_ids": ids, "completion_mask": mask, "attention_mask": torch.ones_like(ids),
        "ref_chosen_logps": reference[:4], "ref_rejected_logps": reference[4:],
    }  # fmt: skip
    theirs = their._compute_loss(
        settings, lambda **_: SimpleNamespace(logits=logits, loss=None), inputs, False
    )
    close(ours, theirs)


def test_masked_whitening_of_trl(rollout: dict[str, torch.Tensor]) -> None:
    (whiten,) = published("trl.experimental.ppo.ppo_trainer", "masked_whiten")
    for shift in (True, False):
        theirs = whiten(rollout["rewards"], rollout["mask"], shift_mean=shift)[rollout["mask"]]
        ours = advantages.whiten(rollout["rewards"], rollout["mask"], shift_mean=shift)[rollout["mask"]]
        close(ours, theirs, 1e-6)


def test_selected_log_probabilities_and_entropy_of_trl() -> None:
    from gptcore.align.losses import distribution

    select, entropy = published("trl.trainer.utils", "selective_log_softmax", "entropy_from_logits")
    logits, index = torch.randn(4, 6, 50), torch.randint(50, (4, 6))
    close(distribution.sampled_logprobs(logits, index), select(logits, index), 1e-6)
    close(distribution.entropy(logits), entropy(logits), 1e-6)
