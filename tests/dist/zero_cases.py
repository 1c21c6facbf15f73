"""Cases of sharded optimizers, run by ``processes.py``: what N ranks make of their leaves is what one process makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor, nn

from gptcore.models import GPT
from gptcore.models.config import GPTConfig
from gptcore.optim import SGD, Adafactor, AdamW, AdamW8bit, ZeroOptimizer, decay_groups
from tests.dist.processes import World

STEPS = 20
VOCABULARY, LENGTH = 37, 8

# Odd sizes, tied weights; 8-bit moments have blocks in matrices and plain moments in vectors.
CONFIG = GPTConfig.from_dict(
    {
        "vocab_size": VOCABULARY, "context_length": LENGTH, "num_layers": 2, "width": 36,
        "attention": {"num_heads": 3}, "dropout": 0.0,
    }
)  # fmt: skip

# Updates of the cases in which slow drift would show; the others have six.
LONG = {"adamw": STEPS, "adamw8bit": STEPS, "adafactor": STEPS}

Make = Callable[[nn.Module], Any]
OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda m: AdamW(decay_groups(m, 0.1), lr=1e-2, max_norm=0.5),
    "sgd": lambda m: SGD(decay_groups(m, 0.1), lr=0.1, momentum=0.9),
    "adamw8bit": lambda m: AdamW8bit(decay_groups(m, 0.1), lr=1e-2, max_norm=0.5),
    "adamw_8bit_without_masters": lambda m: AdamW8bit(m.parameters(), lr=1e-2, master_weights=False),
    "adafactor": lambda m: Adafactor(m.parameters(), lr=1e-2, variant="torch", max_norm=0.5),
    "adafactor_hf": lambda m: Adafactor(
        m.parameters(), lr=1e-2, variant="hf", relative_step=False, beta1=0.9, weight_decay=0.1
    ),
    "adafactor_palm": lambda m: Adafactor(m.parameters(), variant="palm"),
    "adamw_split_master": lambda m: AdamW(m.parameters(), lr=1e-2, split_master=True),
}


def alone(world: World) -> Any:
    """A group of this process only; every rank calls it."""
    return [c10d.new_group([rank]) for rank in range(world.ranks)][world.rank]


def batches(leaves: int, steps: int = STEPS) -> Tensor:
    """(steps, leaves, 2, T + 1) tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (steps, leaves, 2, LENGTH + 1), generator=generator)


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    return model(rows[:, :-1], rows[:, 1:]).loss


def train(
    model: nn.Module, optimizer: ZeroOptimizer, tokens: Tensor, loss: Callable[..., Tensor] = loss_of
) -> None:
    """Every update's leaves that are this rank's."""
    for update in tokens:
        for leaf in optimizer.leaves():
            loss(model, update[leaf]).backward()
        optimizer.step(grad_scale=optimizer.accumulation)
        optimizer.zero_grad()


def weights_of(model: nn.Module, optimizer: ZeroOptimizer) -> dict[str, Tensor]:
    with optimizer.gathered():
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(got[name], value), f"{name}: {(got[name].float() - value.float()).abs().max()}"


def trained(
    make: Make, group: Any, leaves: int, dtype: torch.dtype, steps: int = STEPS, **options: Any
) -> tuple[nn.Module, ZeroOptimizer]:
    model = GPT(CONFIG, seed=3, dtype=dtype)
    ranks = c10d.get_world_size(group)
    optimizer = ZeroOptimizer(
        make(model), module=model, group=group, accumulation=leaves // ranks, bucket=12000, **options
    )
    train(model, optimizer, batches(leaves, steps))
    return model, optimizer


def of_one_process(
    world: World, make: Make, leaves: int, dtype: torch.dtype, steps: int
) -> dict[str, Tensor]:
    """Rank 0's weights after training alone, on every rank."""
    group = alone(world)
    told: list[Any] = [None]
    if world.rank == 0:
        told = [weights_of(*trained(make, group, leaves, dtype, steps))]
    c10d.broadcast_object_list(told, c10d.get_global_rank(world.group, 0), group=world.group)
    return told[0]


def bits(make: Make, dtype: torch.dtype, accumulation: int, steps: int) -> Callable[[World], None]:
    """One process's bits at every stage."""

    def case(world: World) -> None:
        leaves = world.ranks * accumulation
        expected = of_one_process(world, make, leaves, dtype, steps)
        for stage in range(4):
            same(weights_of(*trained(make, world.group, leaves, dtype, steps, stage=stage)), expected)

    return case


def against_ddp(world: World) -> None:
    """Torch's DistributedDataParallel with the plain optimizer, but for f32's rounding of sums in another order."""
    tokens = batches(world.ranks, 5)
    model = GPT(CONFIG, seed=3)
    optimizer = AdamW(decay_groups(model, 0.1), lr=1e-3, max_norm=0.5)
    parallel = nn.parallel.DistributedDataParallel(model, process_group=world.group)
    for update in tokens:
        rows = update[world.rank]
        parallel(rows[:, :-1], rows[:, 1:]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ours = GPT(CONFIG, seed=3)
    zero = ZeroOptimizer(
        AdamW(decay_groups(ours, 0.1), lr=1e-3, max_norm=0.5), stage=2, module=ours, group=world.group
    )
    train(ours, zero, tokens)
    got = weights_of(ours, zero)
    for name, value in model.named_parameters():
        # Adam turns a relative error of a gradient g into at most that of its step lr where g >> eps; near zero
        # gradients a step can differ by lr as a whole, which happens to few elements.
        far = (got[name] - value).abs() > 1e-5
        assert far.float().mean() < 0.01, f"{name}: {far.sum()} of {far.numel()}"
        assert (got[name] - value).abs().max() <= 5 * 2e-3


class Uneven(nn.Module):
    """Parameters smaller than the world, frozen, unused by some leaves, unused by all."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.blocks = nn.ModuleList(nn.Linear(7, 7) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.rand(7, 7, generator=generator), requires_grad=False)
        self.sometimes = nn.Parameter(torch.rand(7, generator=generator))
        self.never = nn.Parameter(torch.rand(2000, generator=generator))
        for p in self.blocks.parameters():
            nn.init.uniform_(p, -0.3, 0.3, generator=generator)

    def forward(self, x: Tensor, uses: bool) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x @ self.frozen))
        return (x * self.scale + (self.sometimes if uses else 0)).square().mean()


def uneven(world: World) -> None:
    """Only some leaves use a parameter, none another: as one process has it, whose weight decay spares the latter."""
    leaves = 2 * world.ranks
    inputs = torch.rand(6, leaves, 5, 7, generator=torch.Generator().manual_seed(2))

    def run(group: Any, **options: Any) -> dict[str, Tensor]:
        model = Uneven()
        each = leaves // c10d.get_world_size(group)
        optimizer = ZeroOptimizer(
            AdamW(model.parameters(), lr=1e-2, weight_decay=0.5),
            module=model, group=group, accumulation=each, bucket=60, **options,
        )  # fmt: skip
        for number, update in enumerate(inputs):
            for leaf in optimizer.leaves():
                model(update[leaf], uses=number % 2 == 0 and leaf == 1).backward()
            optimizer.step(grad_scale=each)
        return weights_of(model, optimizer)

    expected = run(alone(world))
    fresh = Uneven()
    assert torch.equal(expected["never"], fresh.never) and torch.equal(expected["frozen"], fresh.frozen)
    assert not torch.equal(expected["sometimes"], fresh.sometimes)
    for stage in range(4):
        same(run(world.group, stage=stage), expected)


def infinite_on_one_rank(world: World) -> None:
    """No rank's weights move, and the next update is as if this one had not been."""
    for stage in range(4):
        model = GPT(CONFIG, seed=3)
        optimizer = ZeroOptimizer(AdamW(model.parameters()), stage=stage, module=model, group=world.group)
        before = weights_of(model, optimizer)
        rows = batches(world.ranks, 1)[0][world.rank]
        (loss_of(model, rows) * (float("inf") if world.rank == world.ranks - 1 else 1.0)).backward()
        optimizer.step()
        assert optimizer.found_inf
        same(weights_of(model, optimizer), before)
        loss_of(model, rows).backward()
        optimizer.step()
        assert not optimizer.found_inf
        assert not torch.equal(
            weights_of(model, optimizer)["token_embedding.weight"], before["token_embedding.weight"]
        )


def bytes_held(world: World) -> None:
    """Tensors that a rank keeps between steps, f32 under AdamW, within 5% of ZeRO's formulas."""
    config = GPTConfig.from_dict(
        {
            "vocab_size": 1000,
            "context_length": 8,
            "num_layers": 6,
            "width": 192,
            "attention": {"num_heads": 3},
        }
    )
    n = world.ranks
    formulas = {0: 12.0, 1: 4 + 8 / n, 2: 4 + 8 / n, 3: 12 / n}
    for stage, each in formulas.items():
        model = GPT(config, seed=0)
        count = sum(p.numel() for p in model.parameters())
        optimizer = ZeroOptimizer(AdamW(model.parameters()), stage=stage, module=model, group=world.group)
        loss_of(model, batches(n, 1)[0][world.rank] % 37).backward()
        optimizer.step()
        held = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in (
                *model.parameters(),
                *(owned.part for owned in optimizer.owned(whole_parts=True)),
                *(t for s in optimizer.optimizer.state.values() for t in s.values() if t.dim()),
            )
        }
        got = sum(held.values()) / count
        # All ranks together, since a rank's share of a small model may be off by a block.
        mean = torch.tensor(got)
        c10d.all_reduce(mean, group=world.group)
        assert abs(float(mean) / n / each - 1) < 0.05, (
            f"stage {stage}: {float(mean) / n} bytes, formula {each}"
        )


def loose_order(world: World) -> None:
    """Without the fixed tree the same but for rounding; from stage 2 on what one process without it has."""
    make = OPTIMIZERS["sgd"]
    settings = (make, alone(world), 3 * world.ranks, torch.float32, 4)
    in_a_row = weights_of(*trained(*settings, fixed_tree=False))
    expected = weights_of(*trained(*settings))
    for stage in (1, 2, 3):
        got = weights_of(
            *trained(make, world.group, 3 * world.ranks, torch.float32, 4, stage=stage, fixed_tree=False)
        )
        if stage > 1:
            same(got, in_a_row)
        for name, value in expected.items():
            # Sums of at most 12 numbers, each update's off by 12 roundings of a gradient of order 1, times lr.
            assert (got[name] - value).abs().max() <= 4 * 12 * 2**-24 * 0.1 * 10, name


def under_way(world: World) -> None:
    """From stage 2 on at most two messages, few partial sums, and in stage 3 the weights of two blocks."""
    each = 4
    for stage in (2, 3):
        model = GPT(CONFIG.merged({"num_layers": 5}), seed=3)
        optimizer = ZeroOptimizer(
            AdamW(decay_groups(model, 0.1)), stage=stage, module=model, group=world.group, accumulation=each,
            bucket=3000,
        )  # fmt: skip
        assert len(optimizer.units) > 4
        messages, sums, blocks = [0], [0], [0]
        of_blocks = [unit for unit in optimizer.units if optimizer.stage == 3 and unit.freed]

        def look(p: nn.Parameter, seen: Any = (optimizer, of_blocks, messages, sums, blocks)) -> None:
            optimizer, of_blocks, messages, sums, blocks = seen
            gradients = optimizer._backward._gradients
            messages.append(len(gradients[0]._messages))
            sums.append(max(len(g._owned) for g in gradients))
            blocks.append(sum(not unit.freed for unit in of_blocks))

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(look)
        for leaf in optimizer.leaves():
            loss_of(model, batches(each * world.ranks, 1)[0][leaf]).backward()
        optimizer.step(grad_scale=each)
        # Leaves come in the order of their numbers: after 2 N of 4 N one sum, after 3 N two.
        assert (max(messages), max(sums)) == (2, 2)
        assert stage == 2 or max(blocks) <= 2 + len(optimizer._layout.weights.root)


def mistakes(world: World) -> None:
    """Errors on all ranks."""
    model = GPT(CONFIG, seed=3)
    try:
        ZeroOptimizer(AdamW(model.parameters()), group=world.group, accumulation=1 + world.rank % 2)
        raise AssertionError("other accumulations went unnoticed")
    except ValueError as error:
        assert "accumulation = 1 on rank 0 and 2 on rank 1" in str(error)
    optimizer = ZeroOptimizer(AdamW(model.parameters()), group=world.group, accumulation=2)
    rows = batches(world.ranks, 1)[0][world.rank]
    loss_of(model, rows).backward()
    try:
        optimizer.step()
        raise AssertionError("a missing backward pass went unnoticed")
    except RuntimeError as error:
        assert "got 1 backward passes since the last step, expected 2" in str(error)
    loss_of(model, rows).backward()
    try:
        loss_of(model, rows).backward()
        raise AssertionError("a third backward pass went unnoticed")
    except RuntimeError as error:
        assert "got backward pass 3 of a step, expected 2" in str(error)


CASES: dict[str, Callable[[World], None]] = {
    **{
        f"{name}_{str(dtype).removeprefix('torch.')}_{accumulation}_leaves": bits(
            make, dtype, accumulation, LONG.get(name, 6)
        )
        for name, make in OPTIMIZERS.items()
        for dtype in ((torch.bfloat16,) if "_" in name else (torch.float32, torch.bfloat16))
        for accumulation in (1, 3)
    },
    "against_ddp": against_ddp,
    "uneven": uneven,
    "infinite_on_one_rank": infinite_on_one_rank,
    "bytes_held": bytes_held,
    "loose_order": loose_order,
    "under_way": under_way,
    "mistakes": mistakes,
}
