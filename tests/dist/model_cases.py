"""Models with experts over ranks: training, state, gradients, and mistakes."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor

from gptcore import dist, nn
from gptcore.models import GPT, GPTConfig
from gptcore.optim import AdamW, decay_groups
from tests.dist.processes import Case, World
from tests.tolerance import same_bits

BATCH, LENGTH, VOCABULARY = 2, 40, 61


def model_of(dtype: torch.dtype = torch.float32, **moe: Any) -> GPT:
    options = {"num_experts": 5, "top_k": 2, "capacity_factor": 1.25, "shared_experts": 1, **moe}
    return GPT(
        GPTConfig.from_dict({
            "num_layers": 2, "width": 32, "vocab_size": VOCABULARY, "context_length": LENGTH,
            "attention": {"num_heads": 2}, "mlp": {"activation": "swiglu", "bias": True, "hidden_size": 48},
            "moe": options,
        }),
        seed=1,
        dtype=dtype,
    )  # fmt: skip


def batch(step: int, ranks: int) -> Tensor:
    """All ranks' rows for one step; skewed, so that there is something to learn."""
    draws = torch.rand(ranks * BATCH, LENGTH + 1, generator=torch.Generator().manual_seed(step))
    return (draws.square() * VOCABULARY).long()


def own(rows: Tensor, world: World) -> Tensor:
    return rows[world.rank * BATCH : (world.rank + 1) * BATCH]


def optimizer_of(model: GPT) -> AdamW:
    return AdamW(decay_groups(model, 0.1), lr=3e-3)


def mean_over_ranks(value: Tensor, world: World) -> float:
    total = value.detach().double().reshape(1)
    c10d.all_reduce(total, group=world.group)
    return float(total) / world.ranks


def training(wrapped: bool) -> Case:
    """Twelve updates, clipped, with drops: each loss within 1e-6 of one process's."""

    def case(world: World) -> None:
        one = model_of()
        spread = dist.expert_parallel(model_of(), world.group)
        runner = spread
        if wrapped:
            runner = torch.nn.parallel.DistributedDataParallel(spread, process_group=world.group)
        optimizers = optimizer_of(one), optimizer_of(spread)
        for step in range(12):
            rows = batch(step, world.ranks)
            whole, out = (
                one(rows[:, :-1], rows[:, 1:]),
                runner(own(rows, world)[:, :-1], own(rows, world)[:, 1:]),
            )
            assert all(float(layer.drop_rate) > 0 for layer in whole.routing)
            for a, b in zip(whole.routing, out.routing, strict=True):
                assert same_bits(a.drop_rate, b.drop_rate) and same_bits(a.share, b.share), f"step {step}"
            for field in ("loss", "total", "balance_loss", "router_z_loss"):
                wanted, got = (
                    float(getattr(whole, field).detach()),
                    mean_over_ranks(getattr(out, field), world),
                )
                assert abs(got - wanted) <= 1e-6 * abs(wanted), (
                    f"step {step}, {field}: {got}, expected {wanted}"
                )
            whole.total.backward()
            out.total.backward()
            if not wrapped:
                dist.average_gradients(spread, world.group)
            norm = float(torch.nn.utils.clip_grad_norm_(one.parameters(), 0.2))
            got = dist.clip_gradients(spread, 0.2, world.group)
            assert norm > 0.2 and abs(got - norm) <= 1e-5 * norm, f"step {step}: norm {got}, expected {norm}"
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert not same_bits(one.head_weight, model_of().head_weight)

    return case


def _bf16_forward(world: World) -> None:
    """Without drops a token's logits have one process's bits in every layer."""
    one = model_of(torch.bfloat16, capacity_factor=0.0)
    spread = dist.expert_parallel(copy.deepcopy(one), world.group)
    rows = batch(0, world.ranks)
    with torch.no_grad():
        wanted, got = one(rows[:, :-1]), spread(own(rows, world)[:, :-1])
    assert same_bits(got, own(wanted, world))


def _checkpointing(world: World) -> None:
    """Blocks computed anew in backward, their exchanges of rows with them, give the same bits."""
    found = []
    for kind in ("none", "block", "selective"):
        spread = dist.expert_parallel(model_of(), world.group).checkpoint_activations(kind)
        torch.manual_seed(1)
        rows = own(batch(0, world.ranks), world)
        out = spread(rows[:, :-1], rows[:, 1:])
        out.total.backward()
        found.append([out.total.detach(), *(p.grad for p in spread.parameters())])
    plain = found[0]
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(plain, other, strict=True))


def _state(world: World) -> None:
    """Whole state is the model's before it was spread, and goes into models of any number of ranks."""
    whole = model_of().state_dict()
    spread = dist.expert_parallel(model_of(), world.group)
    assert spread.state_dict()["stack.blocks.0.mlp.up.weight"].shape[0] < 5
    gathered = dist.full_state_dict(spread)
    assert gathered.keys() == whole.keys()
    assert all(same_bits(gathered[name], tensor) for name, tensor in whole.items())
    other = {name: tensor * 2 for name, tensor in whole.items()}
    dist.load_full_state_dict(spread, other)
    model_of().load_state_dict(gathered)
    assert all(same_bits(dist.full_state_dict(spread)[name], tensor) for name, tensor in other.items())
    try:
        dist.load_full_state_dict(spread, {**other, "stack.blocks.1.mlp.down.weight": torch.zeros(4, 32, 48)})
        raise AssertionError("another number of experts was taken")
    except ValueError as error:
        assert "got shape (4, 32, 48), expected the whole of 5" in str(error)


def _built_without_memory(world: World) -> None:
    whole = model_of()
    spread = dist.expert_parallel(GPT(whole.config, device="meta"), world.group)
    spread.to_empty(device="cpu")
    dist.load_full_state_dict(spread, whole.state_dict())
    gathered = dist.full_state_dict(spread)
    assert all(same_bits(gathered[name], tensor) for name, tensor in whole.state_dict().items())


def _gradients(world: World) -> None:
    """Means over ranks, ranks without one counting as zero, none where nobody has one, bf16 rounded once."""
    module = torch.nn.ParameterDict({
        name: torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16 if name == "bf16" else torch.float32))
        for name in ("all", "bf16", "last", "none")
    })  # fmt: skip
    module["all"].grad = torch.full((3,), float(world.rank))
    module["bf16"].grad = torch.full((3,), 1.0 + world.rank / 128, dtype=torch.bfloat16)
    if world.rank == world.ranks - 1:
        module["last"].grad = torch.ones(3)
    dist.average_gradients(module, world.group)
    mean = (world.ranks - 1) / 2
    assert module["all"].grad.tolist() == [mean] * 3
    assert same_bits(module["bf16"].grad, torch.full((3,), 1 + mean / 128).bfloat16())
    assert module["last"].grad.tolist() == [1 / world.ranks] * 3 and module["none"].grad is None


def raised(sentence: str, call: Any, *arguments: Any, **options: Any) -> None:
    try:
        call(*arguments, **options)
    except (ValueError, RuntimeError, TypeError) as error:
        assert re.search(sentence, str(error)), f"'{error}' is not '{sentence}'"
    else:
        raise AssertionError(f"nothing was raised, expected '{sentence}'")


def _modules_that_do_not_fit(world: World) -> None:
    """Every rank raises, and none waits for another."""
    spread, last = dist.expert_parallel, world.ranks - 1
    raised("got Linear without a layer of experts", spread, torch.nn.Linear(2, 2), world.group)
    raised(
        f"got 1 experts, expected at least one for each of {world.ranks} ranks",
        spread, nn.MoE(8, 12, 1, top_k=1), world.group,
    )  # fmt: skip
    torch.manual_seed(1)
    layer = nn.MoE(8, 12, 4)
    raised("spread already", spread, spread(copy.deepcopy(layer), world.group), world.group)
    other = nn.MoE(8, 12, 4, priority="gate" if world.rank == last else "position")
    raised(f"priority = position on rank 0 and gate on rank {last}", spread, other, world.group)
    more = nn.MoE(8, 12, 4 + (world.rank == last))
    raised(f"num_experts = 4 on rank 0 and 5 on rank {last}", spread, more, world.group)
    with torch.no_grad():
        layer.down.weight[0, 0, 0] += world.rank == last
    raised(
        rf"contents of down.weight \(CRC-32\) = \d+ on rank 0 and \d+ on rank {last}",
        spread,
        layer,
        world.group,
    )
    one_layer = torch.nn.Linear(2, 2) if world.rank == last else nn.MoE(8, 12, 4)
    raised(rf"got Linear without a layer of experts.* \(rank {last}\)", spread, one_layer, world.group)
    alone = c10d.new_group([0])
    if world.rank:
        raised("expected a process group that this process is in", spread, nn.MoE(8, 12, 4), alone)
        raised("expected a process group that this process is in", spread, nn.MoE(8, 12, 4), "world")
    torch.manual_seed(2)
    layer = spread(nn.MoE(8, 12, 4), world.group)
    raised("got another group than that of 'up.weight'", dist.average_gradients, layer, c10d.new_group())


def _calls_that_do_not_fit(world: World) -> None:
    """One rank's mistake is an error on every rank, and the next call works."""
    torch.manual_seed(1)
    layer = dist.expert_parallel(nn.MoE(8, 12, 4, capacity_factor=1.0), world.group)
    x, last = torch.randn(6, 8), world.rank == world.ranks - 1
    elsewhere = "" if last else f"MoE: rank {world.ranks - 1} of the group refused its arguments"
    raised(
        elsewhere or r"argument 'mask': got torch.bool of shape \(3,\)",
        layer,
        x,
        torch.ones(3 if last else 6) > 0,
    )
    raised(elsewhere or "got a tensor on meta, expected one on the CPU", layer, x.to("meta") if last else x)
    raised(elsewhere or "grouped_linear", layer, x[:, :5] if last else x)
    where = f"0 on rank 0 and 1 on rank {world.ranks - 1}"
    raised(f"got drop = {where}", layer, x, drop=last)
    layer.train(last)
    raised(f"got training mode = {where}", layer, x)
    layer.train()
    with torch.set_grad_enabled(last):
        raised(f"got gradients of the router = {where}", layer, x)
    assert layer(x).output.shape == (6, 8)


CASES: dict[str, Case] = {
    "training": training(wrapped=False),
    "training-ddp": training(wrapped=True),
    "bf16-forward": _bf16_forward,
    "checkpointing": _checkpointing,
    "state": _state,
    "built-without-memory": _built_without_memory,
    "gradients": _gradients,
    "modules-that-do-not-fit": _modules_that_do_not_fit,
    "calls-that-do-not-fit": _calls_that_do_not_fit,
}
