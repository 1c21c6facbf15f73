"""The entropy bonus: its slopes are those of whole logits, and no vocabulary of numbers is kept for each token."""

from __future__ import annotations

import math

import pytest
import torch

from gptcore.align import sampled_entropy
from gptcore.align.kept_logits import KeptSets, Logits, kept_logprobs
from gptcore.align.losses import distribution
from gptcore.align.policy import packed
from gptcore.align.policy_update import Learner
from gptcore.align.reinforcement_spec import GRPOSpec, PPOSpec, settings
from gptcore.align.sampled_entropy import entropies
from gptcore.align.shares import ALONE
from gptcore.align.trl_names import ours
from gptcore.align.trpo import whole_logits
from gptcore.errors import UserError
from tests.align import reinforcement_cases as toy
from tests.align.rank_cases import RATE, close, learnt, short

R, C, V = 7, 5, 11
TEMPERATURE = 0.7


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((R, C), (V, C), (V,)))  # type: ignore[return-value]


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("block", [1 << 22, 2 * V])
def test_slopes_by_differences(
    cap: float | None, biased: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampled_entropy, "_BLOCK", block)  # two tokens at a time, too
    x, weight, bias = inputs()

    def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return entropies(x, weight, Logits(1.3, cap, bias if biased else None), TEMPERATURE)

    assert torch.autograd.gradcheck(function, (x, weight, bias))


def test_they_are_those_of_whole_logits() -> None:
    x, weight, bias = inputs()
    got = entropies(x, weight, Logits(1.0, None, bias), TEMPERATURE)
    expected = distribution.entropy(x @ weight.t() + bias, temperature=TEMPERATURE)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    slopes = torch.randn(R, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(got, (x, weight, bias), slopes),
        torch.autograd.grad(expected, (x, weight, bias), slopes), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_barred_token_adds_nothing() -> None:
    x, weight, _ = inputs()
    bias = torch.zeros(V, dtype=torch.float64)
    bias[4] = -torch.inf
    got = entropies(x, weight, Logits(1.0, None, bias), 1.0)
    left = [i for i in range(V) if i != 4]
    expected = distribution.entropy(x @ weight[left].t())
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    a, b = torch.autograd.grad(got.sum(), (x, weight))
    c, d = torch.autograd.grad(expected.sum(), (x, weight))
    torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(b, d, rtol=1e-10, atol=1e-12)


def test_of_the_kept_sets_alone() -> None:
    x, weight, bias = inputs()
    sets = [[0, 3, 4], [7], [1, 2, 5, 10]] * 2 + [[6, 8]]
    kept = KeptSets(
        torch.tensor([i for ids in sets for i in ids]), torch.tensor([r for r, ids in enumerate(sets) for _ in ids]),
        torch.tensor([sum(map(len, sets[:r])) for r in range(R)]),
    )  # fmt: skip
    x32, weight32, bias32 = (t.detach().float().requires_grad_() for t in (x, weight, bias))
    got = kept_logprobs(x32, weight32, kept, Logits(1.0, None, bias32), TEMPERATURE, entropy_slopes=True)[1]
    logits = x @ weight.t() + bias
    cut = torch.ones_like(logits, dtype=torch.bool)
    cut[kept.rows, kept.ids] = False
    expected = distribution.entropy(logits.masked_fill(cut, -torch.inf), temperature=TEMPERATURE)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(got.sum(), (x32, weight32, bias32)),
        torch.autograd.grad(expected.sum(), (x, weight, bias)), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_for_every_word_of_every_token() -> None:
    tokens, width, words = 300, 8, 500
    x = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(words, width, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        entropies(x, weight, Logits(1.0, None, None), 1.0)
    assert kept and max(kept) <= max(tokens, words) * width < tokens * words


@pytest.mark.parametrize("kind", [PPOSpec, GRPOSpec])
@pytest.mark.parametrize("own", [{}, {"temperature": 0.8}, {"top_k": 4}])
def test_an_update_climbs_the_entropy_of_what_was_sampled(kind: type[PPOSpec], own: dict) -> None:
    """What the bonus adds to an update's gradient, against whole logits."""
    own = short({"beta": 0.0, "micro_tokens": 24, **({"samples": 4} if kind is GRPOSpec else {}), **own})
    experience, seen, with_bonus = learnt(kind, Learner, {**own, "entropy_coefficient": 0.3}, ALONE, RATE)
    _, _, without = learnt(kind, Learner, own, ALONE, RATE)
    actor = toy.model_of().eval()
    logits = whole_logits(
        actor, packed(experience.rollouts), own.get("temperature", 1.0), toy.CONFIG.vocab_size
    )
    mean = distribution.entropy(logits).mean()
    assert seen["entropy_bonus"] == pytest.approx(float(mean.detach()), rel=1e-5)
    assert seen["entropy_bonus"] == pytest.approx(experience.metrics["entropy"], rel=1e-5)
    mean.backward()
    expected = {f"actor.{name}": -0.3 * p.grad for name, p in actor.named_parameters() if p.grad is not None}
    added = {name: (with_bonus[name] - without[name]) / RATE for name in expected}
    close(added, expected, 1e-5)  # a difference of two gradients


def test_alone_it_makes_every_token_as_likely(tmp_path) -> None:
    from gptcore.align import ppo
    from gptcore.align.answers import by_answer

    config, spec = toy.settings_of(
        tmp_path, GRPOSpec, {"steps": 12, "optimizer": {"lr": 2e-2}, "checkpoint": {"every": 12}},
        **{**toy.SMALL, "samples": 4, "beta": 0.0, "entropy_coefficient": 1.0, "temperature": 1.3},
    )  # fmt: skip
    result = ppo.run(
        config,
        spec,
        actor=toy.model_of(),
        prompts=toy.prompts_of("ab", "c"),
        reward=by_answer(lambda *_: 0.0),
        quiet=True,
    )
    assert result.metrics["entropy"] > math.log(toy.CONFIG.vocab_size) - 0.02


def test_settings() -> None:
    config = toy.CONFIG
    assert (
        settings(GRPOSpec, ours({"entropy_coef": 0.01}, "grpo", ["steps"]), config)[1].entropy_coefficient
        == 0.01
    )
    with pytest.raises(
        UserError, match="use_adaptive_entropy: got True: the weight of the entropy is not adapted"
    ):
        ours({"use_adaptive_entropy": True}, "grpo", ["steps"])
    with pytest.raises(UserError, match="entropy_coefficient"):
        settings(PPOSpec, {"ppo": {"entropy_coefficient": -1.0}}, config)
    with pytest.raises(
        UserError, match=r"ppo\.entropy_coefficient: a trust region's step has no second loss"
    ):
        own = {"trust_region": 0.01, "critic": "separate", "entropy_coefficient": 0.1}
        settings(PPOSpec, {"ppo": own}, config)
