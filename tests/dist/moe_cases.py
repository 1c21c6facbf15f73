"""One layer of experts over ranks against the same layer in one process, which every rank computes for itself."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor

from gptcore import dist, nn
from gptcore.nn import expert_parallel
from tests.dist.processes import Case, World
from tests.tolerance import assert_close_to_exact, same_bits

WIDTH, HIDDEN, EXPERTS = 24, 40, 6

# name: options of the layer; each in training mode, with tokens of every rank as `sizes` says
OPTIONS: dict[str, dict[str, Any]] = {
    "dropless": {},
    "gelu-bias-shared": {"activation": "gelu", "bias": True, "shared_experts": 1},
    "capacity": {"capacity_factor": 1.0},
    "capacity-assignment": {"capacity_factor": 0.7, "capacity_convention": "per_assignment"},
    "switch": {"top_k": 1, "capacity_factor": 0.5},
    "by-gate": {"capacity_factor": 0.8, "priority": "gate"},
    "at-random": {"capacity_factor": 0.8, "priority": "random"},
    "gshard": {"capacity_factor": 1.2, "second_choice": "gshard"},
    "st-moe-random": {"capacity_factor": 0.9, "second_choice": "st_moe", "priority": "random"},
    "three-all": {"top_k": 3, "balance": "all"},
    "shazeer": {"noise": True, "balance": "shazeer", "capacity_factor": 0.9},
}  # fmt: skip


def sizes(ranks: int, even: bool) -> list[int]:
    """Tokens of every rank; uneven ones include a rank without any, and of even ones a rank has so few that plain
    products of its tokens would be made another way than those of all."""
    return [33] * ranks if even else [0, 33, 7, 1][:ranks]


class Whole:
    """The layer in one process on all ranks' tokens, the weights of its loss, and what came of it."""

    def __init__(self, options: dict[str, Any], tokens: list[int], dtype: torch.dtype, masked: bool) -> None:
        generator = torch.Generator().manual_seed(3)
        count = sum(tokens)
        self.x = torch.randn(count, WIDTH, generator=generator).to(dtype)
        self.weights = torch.randn(count, WIDTH, generator=generator).to(dtype)
        self.mask = torch.rand(count, generator=generator) < 0.7 if masked else None
        torch.manual_seed(1)
        self.layer = nn.MoE(WIDTH, HIDDEN, EXPERTS, **options)
        with torch.no_grad():  # far enough from each other that some experts are full
            self.layer.router.weight.mul_(3)
            if self.layer.noise is not None:
                self.layer.noise.weight.normal_()
        self.layer.to(dtype)

    def run(self, dtype: torch.dtype | None = None) -> tuple[nn.MoEOutput, dict[str, Tensor]]:
        """Output and gradients by name, "x" among them, in ``dtype``."""
        layer = copy.deepcopy(self.layer)
        x, weights = self.x, self.weights
        if dtype is not None:
            layer, x, weights = layer.to(dtype), x.to(dtype), weights.to(dtype)
            layer.route = functools.partial(layer.route, drawn=drawn_in_f32)
        x = x.clone().requires_grad_()
        torch.manual_seed(5)
        out = layer(x, self.mask)
        loss_of(out, weights).backward()
        return out, {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def drawn_in_f32(numbers: Tensor) -> Tensor:
    """The first normal numbers of an f32 run from seed 5, which in float64 are others."""
    if numbers.dtype != torch.float64:
        return numbers
    return torch.randn(numbers.shape, generator=torch.Generator().manual_seed(5)).double()


def loss_of(out: nn.MoEOutput, weights: Tensor) -> Tensor:
    return (
        (out.output * weights).float().sum() + 0.7 * out.statistics.balance_loss + 0.3 * out.statistics.z_loss
    )


def split(x: Tensor, tokens: list[int], rank: int) -> Tensor:
    return x.split(tokens)[rank]


def layer_case(name: str, dtype: torch.dtype, *, even: bool, masked: bool) -> Case:
    def case(world: World) -> None:
        tokens = sizes(world.ranks, even)
        whole = Whole(OPTIONS[name], tokens, dtype, masked)
        one, wanted = whole.run()
        _, exact = whole.run(torch.float64)
        layer = dist.expert_parallel(copy.deepcopy(whole.layer), world.group)
        x = split(whole.x, tokens, world.rank).clone().requires_grad_()
        mask = None if whole.mask is None else split(whole.mask, tokens, world.rank)
        torch.manual_seed(5)
        out = layer(x, mask)
        for got, value in zip(out.statistics, one.statistics, strict=True):
            assert same_bits(got.detach(), value.detach())
        if "shared_experts" not in OPTIONS[name]:  # whose plain products may depend on the batch
            assert same_bits(out.output.detach(), split(one.output.detach(), tokens, world.rank))
        member = dist.member_of("test", world.group)
        # Each rank's loss has the routers' losses whole, and the sum of outputs is over ranks: with the mean over
        # ranks of P times its own outputs' part, that is one process's loss.
        weights = split(whole.weights, tokens, world.rank) * world.ranks
        loss_of(out, weights).backward()
        dist.average_gradients(layer, world.group)
        got = {f"{name}": p.grad for name, p in layer.named_parameters()}
        for key, shard in dist.shard.sharded_parameters(layer).items():
            got[key] = dist.gather_rows(got[key], shard.sizes, member)
        got["x"] = x.grad / world.ranks
        for gradients in (exact, wanted):
            gradients["x"] = split(gradients["x"], tokens, world.rank)
        assert got.keys() == wanted.keys()
        for key, gradient in got.items():
            assert_close_to_exact(gradient, exact[key], wanted[key], terms=4 * sum(tokens), what=key)

    return case


def _places(world: World) -> None:
    """Whose row goes where, by hand: the routing that the ranks used is one process's to the last row and drop."""
    for name, options in OPTIONS.items():
        tokens = sizes(world.ranks, even=False)
        whole = Whole(options, tokens, torch.float32, masked=True)
        torch.manual_seed(5)
        layer = whole.layer
        engine = layer.engine(whole.x)
        one = layer.route(engine, *layer.scores(engine, whole.x), whole.mask, True)
        layer = dist.expert_parallel(copy.deepcopy(layer), world.group)
        torch.manual_seed(5)
        own = split(whole.x, tokens, world.rank), split(whole.mask, tokens, world.rank)
        _, routing = expert_parallel.forward(layer, *own, True, dist.member_of("test", world.group))
        for key, got, value in zip(one._fields, routing, one, strict=True):
            assert same_bits(got.detach(), value.detach()), f"{name}: {key}"
        if "capacity_factor" in options:
            assert float(one.drop_rate) > 0, f"{name} drops nothing"


def _an_expert_without_tokens(world: World) -> None:
    """All tokens to the first experts: the last rank computes nothing and still takes part."""
    tokens = [5] * world.ranks
    whole = Whole({}, tokens, torch.float32, masked=False)
    with torch.no_grad():
        whole.layer.router.weight.zero_()  # equal logits: of those the experts of lowest index
    one, wanted = whole.run()
    assert not wanted["up.weight"][2:].any()
    layer = dist.expert_parallel(copy.deepcopy(whole.layer), world.group)
    x = split(whole.x, tokens, world.rank).clone().requires_grad_()
    out = layer(x)
    assert same_bits(out.output.detach(), split(one.output.detach(), tokens, world.rank))
    loss_of(out, split(whole.weights, tokens, world.rank)).backward()
    torch.testing.assert_close(x.grad, split(wanted["x"], tokens, world.rank))
    if world.rank == world.ranks - 1:
        assert layer.up.weight.grad is not None and not layer.up.weight.grad.any()


def _no_tokens_anywhere(world: World) -> None:
    layer = dist.expert_parallel(nn.MoE(WIDTH, HIDDEN, EXPERTS, capacity_factor=1.0), world.group)
    out = layer(torch.empty(2, 0, WIDTH))
    assert out.output.shape == (2, 0, WIDTH) and float(out.statistics.balance_loss.detach()) == 0.0
    out.output.sum().backward()


def _no_capacity_where_the_caller_says_so(world: World) -> None:
    tokens = sizes(world.ranks, even=True)
    whole = Whole({"capacity_factor": 0.5, "eval_capacity_factor": 0.4}, tokens, torch.bfloat16, masked=False)
    layer = dist.expert_parallel(copy.deepcopy(whole.layer), world.group)
    x = split(whole.x, tokens, world.rank)
    with torch.no_grad():
        for mode in (True, False):
            for drop in (True, False):
                one = whole.layer.train(mode)(whole.x, drop=drop)
                out = layer.train(mode)(x, drop=drop)
                assert (float(one.statistics.drop_rate) > 0) is drop
                assert same_bits(out.statistics.drop_rate, one.statistics.drop_rate)
                assert same_bits(out.output, split(one.output, tokens, world.rank))


def _float64(world: World) -> None:
    """The references' route: no rounding hides a wrong sum over ranks."""
    tokens = sizes(world.ranks, even=False)
    whole = Whole(OPTIONS["capacity"], tokens, torch.float64, masked=False)
    _, wanted = whole.run()
    layer = dist.expert_parallel(copy.deepcopy(whole.layer), world.group)
    x = split(whole.x, tokens, world.rank).clone().requires_grad_()
    out = layer(x)
    loss_of(out, split(whole.weights, tokens, world.rank) * world.ranks).backward()
    dist.average_gradients(layer, world.group)
    torch.testing.assert_close(
        x.grad / world.ranks, split(wanted["x"], tokens, world.rank), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(layer.router.weight.grad, wanted["router.weight"], rtol=1e-12, atol=1e-12)
    shard = layer.up.shard
    torch.testing.assert_close(
        layer.up.weight.grad, wanted["up.weight"][shard.start : shard.stop], rtol=1e-12, atol=1e-12
    )


def _padding_on_one_rank(world: World) -> None:
    tokens = [6] * world.ranks
    whole = Whole(OPTIONS["capacity"], tokens, torch.float32, masked=False)
    mask = torch.ones(sum(tokens), dtype=torch.bool)
    mask[-4:] = False
    one = whole.layer(whole.x, mask)
    layer = dist.expert_parallel(copy.deepcopy(whole.layer), world.group)
    padded = world.rank == world.ranks - 1
    out = layer(split(whole.x, tokens, world.rank), split(mask, tokens, world.rank) if padded else None)
    assert same_bits(out.output.detach(), split(one.output.detach(), tokens, world.rank))
    assert same_bits(out.statistics.z_loss.detach(), one.statistics.z_loss.detach())


def _everything_random(world: World) -> None:
    """Ranks of different seeds agree on the choices all the same, and gradients flow."""
    options = {"noise": True, "jitter": 0.1, "dropout": 0.2, "priority": "random", "second_choice": "st_moe"}
    torch.manual_seed(1)
    layer = nn.MoE(WIDTH, HIDDEN, EXPERTS, capacity_factor=1.0, **options)
    torch.nn.init.normal_(layer.noise.weight)
    dist.expert_parallel(layer, world.group)
    torch.manual_seed(world.rank)
    out = layer(torch.randn(9, WIDTH))
    loss_of(out, torch.ones(9, WIDTH)).backward()
    member = dist.member_of("test", world.group)
    mine = torch.stack(list(out.statistics[:5]))[None].detach()
    everyone = dist.gather_rows(mine, [1] * world.ranks, member)
    assert (everyone == everyone[0]).all()
    assert layer.noise.weight.grad.any() and layer.up.weight.grad.any()


CASES: dict[str, Case] = {
    **{
        f"layer-{name}-{'f32' if dtype == torch.float32 else 'bf16'}-{'even' if even else 'uneven-masked'}":
        layer_case(name, dtype, even=even, masked=not even)
        for name in OPTIONS
        for dtype in (torch.float32, torch.bfloat16)
        for even in (True, False)
    },
    "places": _places,
    "expert-without-tokens": _an_expert_without_tokens,
    "no-tokens-anywhere": _no_tokens_anywhere,
    "no-capacity-where-said": _no_capacity_where_the_caller_says_so,
    "float64": _float64,
    "padding-on-one-rank": _padding_on_one_rank,
    "everything-random": _everything_random,
}  # fmt: skip
