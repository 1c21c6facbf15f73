"""Cases of what sharded optimizers keep, run by ``processes.py``: saved whole, held in host memory, left by a skipped
update, it is what one process has."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor

from gptcore.models import GPT
from gptcore.optim import AdamW, LossScaler, ZeroOptimizer, decay_groups
from tests.dist.processes import World
from tests.dist.zero_cases import (
    CONFIG,
    OPTIMIZERS,
    alone,
    batches,
    loss_of,
    of_one_process,
    same,
    train,
    trained,
    weights_of,
)


def overflows(world: World) -> None:
    """float16: every rank skips the updates that one process skips, and has its scale and bits in the end."""
    leaves, results = 2 * world.ranks, []

    def run(group: Any, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        model = GPT(CONFIG, seed=3, dtype=torch.float16)
        each = leaves // c10d.get_world_size(group)
        optimizer = ZeroOptimizer(
            AdamW(decay_groups(model, 0.1), lr=1e-2, max_norm=0.5),
            module=model, group=group, accumulation=each, bucket=12000, **options,
        )  # fmt: skip
        scaler = LossScaler(init_scale=2.0**20, growth_interval=2)
        for number, update in enumerate(batches(leaves, 8)):
            for leaf in optimizer.leaves():
                # of the fifth update one leaf, which one rank has, is far larger
                large = 2.0**16 if (number, leaf) == (4, 1) else 1.0
                scaler.scale(loss_of(model, update[leaf]) * large).backward()
            before = weights_of(model, optimizer)
            if not scaler.step(optimizer, micro_batches=each):
                same(weights_of(model, optimizer), before)
            optimizer.zero_grad()
        return weights_of(model, optimizer), scaler.state_dict()

    weights, scale = run(alone(world))
    assert 2 <= scale["skipped"] < 7, scale
    for stage in range(4):
        results.append(run(world.group, stage=stage))
        same(results[-1][0], weights)
        assert results[-1][1] == scale, stage


def saved(name: str, dtype: torch.dtype) -> Callable[[World], None]:
    """States saved at stage 3 go on, with one process's bits, at every stage, on one rank, on two, and without ZeRO."""

    def case(world: World) -> None:
        make, tokens = OPTIMIZERS[name], batches(world.ranks, 6)
        groups = {"all": world.group, "one": alone(world)}
        pairs = [c10d.new_group([rank, rank + 1]) for rank in range(0, world.ranks, 2)]
        groups["two"] = pairs[world.rank // 2]
        straight = weights_of(*trained(make, groups["one"], world.ranks, dtype, 6))
        model, optimizer = trained(make, world.group, world.ranks, dtype, 3, stage=3)
        file = io.BytesIO()
        states = optimizer.state_dict()
        with optimizer.gathered():
            torch.save({"model": model.state_dict(), "optimizer": states}, file)
        for of, stage in (("all", 0), ("all", 1), ("all", 3), ("one", 0), ("two", 2)):
            file.seek(0)
            loaded = torch.load(file)
            model = GPT(CONFIG, seed=9, dtype=dtype)
            model.load_state_dict(loaded["model"])
            optimizer = ZeroOptimizer(
                make(model), module=model, group=groups[of], stage=stage, bucket=12000,
                accumulation=world.ranks // c10d.get_world_size(groups[of]),
            )  # fmt: skip
            optimizer.load_state_dict(loaded["optimizer"])
            train(model, optimizer, tokens[3:])
            same(weights_of(model, optimizer), straight)
        plain = make(GPT(CONFIG, seed=9, dtype=dtype))
        plain.load_state_dict(states)
        again = plain.state_dict()
        assert again["state"].keys() == states["state"].keys()
        for number, of_parameter in states["state"].items():
            same(again["state"][number], of_parameter)
        wrong = {number: {"exp_avg": torch.zeros(3)} for number in states["state"]}
        try:
            optimizer.load_state_dict({**states, "state": wrong})
            raise AssertionError("a state of another shape was taken")
        except ValueError as error:
            assert "argument 'state_dict': got 'exp_avg' of shape (3,) for '" in str(error)

    return case


def offloaded(world: World) -> None:
    """States and masters apart from the model's memory, with the same bits, saved and loaded too."""
    for name, dtype in (
        ("adamw", torch.float32),
        ("adafactor", torch.bfloat16),
        ("adamw8bit", torch.bfloat16),
    ):
        make, leaves = OPTIMIZERS[name], 2 * world.ranks
        expected = of_one_process(world, make, leaves, dtype, 6)
        for stage in range(4):
            options = {"stage": stage, "offload": True}
            model, optimizer = trained(make, world.group, leaves, dtype, 6, **options)
            same(weights_of(model, optimizer), expected)
            model, optimizer = trained(make, world.group, leaves, dtype, 3, **options)
            states, middle = optimizer.state_dict(), weights_of(model, optimizer)
            device = {unit.flat.untyped_storage().data_ptr() for unit in optimizer.units}
            device |= {unit.own.untyped_storage().data_ptr() for unit in optimizer.units}
            host = [owned.part for owned in optimizer.owned(whole_parts=True)]
            host += [t for s in optimizer.optimizer.state.values() for t in s.values()]
            assert device.isdisjoint(t.untyped_storage().data_ptr() for t in host)
            model = GPT(CONFIG, seed=9, dtype=dtype)
            model.load_state_dict(middle, strict=False)  # the tied head is the embedding
            optimizer = ZeroOptimizer(make(model), module=model, group=world.group, accumulation=2, **options)
            optimizer.load_state_dict(states)
            train(model, optimizer, batches(leaves, 6)[3:])
            same(weights_of(model, optimizer), expected)


CASES: dict[str, Callable[[World], None]] = {
    "overflows": overflows,
    "offloaded": offloaded,
    **{
        f"saved_{name}_{str(dtype).removeprefix('torch.')}": saved(name, dtype)
        for name, dtype in (
            ("adamw", torch.float32), ("adamw_split_master", torch.bfloat16), ("adamw8bit", torch.bfloat16),
            ("adafactor", torch.float32), ("sgd", torch.float32),
        )
    },
}  # fmt: skip
