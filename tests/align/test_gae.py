"""GAE and discounting on masks and packed rows against a loop over one sequence at a time."""

from __future__ import annotations

import pytest
import torch

from gptcore.align.losses import advantages


def one_by_one(
    rewards: list[float], values: list[float], gamma: float, lam: float, after: float = 0.0
) -> tuple[list[float], list[float]]:
    """The recursion of Schulman et al. 2016 as it stands in the paper, for one sequence."""
    estimate, following, found = 0.0, after, []
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        estimate = reward + gamma * following - value + gamma * lam * estimate
        found.append(estimate)
        following = value
    found.reverse()
    return found, [a + v for a, v in zip(found, values, strict=True)]


LENGTHS = [1, 7, 3, 64, 2, 33]
settings = pytest.mark.parametrize(
    ("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9), (0.5, 1.0), (1.0, 1.0), (0.0, 0.7)]
)


def sequences() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(n, dtype=torch.float64), torch.randn(n, dtype=torch.float64)) for n in LENGTHS]


def expected(gamma: float, lam: float, data, after=None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    after = [0.0] * len(data) if after is None else after
    return [
        tuple(torch.tensor(x, dtype=torch.float64) for x in one_by_one(r.tolist(), v.tolist(), gamma, lam, a))
        for (r, v), a in zip(data, after, strict=True)
    ]


def scattered(data, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each sequence at random places of a row, in order; NaN and infinity everywhere else."""
    mask = torch.zeros(len(data), width, dtype=torch.bool)
    rewards = torch.full((len(data), width), float("nan"), dtype=torch.float64)
    values = torch.full((len(data), width), float("inf"), dtype=torch.float64)
    for row, (r, v) in enumerate(data):
        places = torch.randperm(width)[: len(r)].sort().values
        mask[row, places], rewards[row, places], values[row, places] = True, r, v
    return rewards, values, mask


@settings
def test_padding_holes_and_what_follows_the_end_change_nothing(gamma: float, lam: float) -> None:
    data = sequences()
    rewards, values, mask = scattered(data, 100)
    got = advantages.gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, (advantage, ret) in enumerate(expected(gamma, lam, data)):
        torch.testing.assert_close(got.advantages[row][mask[row]], advantage, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(got.returns[row][mask[row]], ret, rtol=1e-10, atol=1e-10)
    assert not got.advantages[~mask].any() and not got.returns[~mask].any()


@settings
@pytest.mark.parametrize("leading", [False, True], ids=["(N,)", "(1, N)"])
def test_packed_equals_unpacked(gamma: float, lam: float, leading: bool) -> None:
    data = sequences()
    prompts = [4, 0, 9, 1, 2, 5]  # tokens outside the mask before each response
    bounds = [0]
    rewards, values, mask = [], [], []
    for n, (r, v) in zip(prompts, data, strict=True):
        nothing = torch.full((n,), float("nan"), dtype=torch.float64)
        rewards += [nothing, r]
        values += [nothing, v]
        mask += [torch.zeros(n, dtype=torch.bool), torch.ones(len(r), dtype=torch.bool)]
        bounds.append(bounds[-1] + n + len(r))
    packed = [torch.cat(x)[None] if leading else torch.cat(x) for x in (rewards, values, mask)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    after = torch.randn(len(data), dtype=torch.float64)
    got = advantages.gae(*packed, gamma=gamma, lam=lam, bootstrap=after, cu_seqlens=cu_seqlens)
    padded = advantages.gae(*scattered(data, 70), gamma=gamma, lam=lam, bootstrap=after)
    want = expected(gamma, lam, data, after.tolist())
    flat = torch.cat([a for a, _ in want]), torch.cat([r for _, r in want])
    for found, truth in zip(got, flat, strict=True):
        torch.testing.assert_close(found[packed[2]], truth, rtol=1e-10, atol=1e-10)
    for found, truth in zip(padded, flat, strict=True):
        torch.testing.assert_close(found[found != 0], truth[truth != 0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_reward_to_go(gamma: float) -> None:
    data = sequences()
    rewards, _, mask = scattered(data, 80)
    got = advantages.discounted(rewards, mask, gamma)
    for row, (r, _) in enumerate(data):
        truth = [float(sum(gamma ** (s - t) * r[s] for s in range(t, len(r)))) for t in range(len(r))]
        torch.testing.assert_close(
            got[row][mask[row]], torch.tensor(truth, dtype=torch.float64), rtol=1e-10, atol=1e-10
        )


def test_f32_is_as_good_as_the_sums_allow() -> None:
    # 4,096 steps without decay: the doubling adds in a tree, so errors grow with log T and not with T
    rewards, mask = torch.rand(1, 4096), torch.ones(1, 4096, dtype=torch.bool)
    got = advantages.discounted(rewards, mask)
    truth = rewards.double().flip(-1).cumsum(-1).flip(-1)
    assert float(((got.double() - truth) / truth).abs().max()) <= 12 * 2.0**-24


def test_an_empty_row_has_no_advantage_and_an_empty_packed_sequence_is_skipped() -> None:
    mask = torch.tensor([[False, False], [True, True]])
    got = advantages.gae(torch.ones(2, 2), torch.zeros(2, 2), mask)
    assert got.returns.tolist()[0] == [0.0, 0.0]
    bounds = torch.tensor([0, 0, 2, 2], dtype=torch.int32)
    packed = advantages.discounted(torch.ones(2), torch.ones(2, dtype=torch.bool), cu_seqlens=bounds)
    assert packed.tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"values": torch.zeros(2, 4)}, ValueError, "gae: values has shape \\(2, 4\\), mask has \\(2, 3\\)"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask has dtype torch.float32"),
        ({"gamma": 1.5}, ValueError, "gamma is 1.5"),
        ({"lam": -0.1}, ValueError, "lam is -0.1"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "packed tensors are"),
    ],
)
def test_bad_arguments_are_named(arguments, error, words) -> None:  # type: ignore[no-untyped-def]
    good = {
        "rewards": torch.zeros(2, 3),
        "values": torch.zeros(2, 3),
        "mask": torch.ones(2, 3, dtype=torch.bool),
    }
    with pytest.raises(error, match=words):
        advantages.gae(**{**good, **arguments})


@pytest.mark.parametrize(
    ("bounds", "words"), [([0, 2], "from 0 to 3"), ([0, 2, 1, 3], "falls"), ([1, 3], "from 0")]
)
def test_bad_cu_seqlens_are_named(bounds: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        advantages.discounted(torch.ones(3), torch.ones(3, dtype=torch.bool), cu_seqlens=torch.tensor(bounds))
