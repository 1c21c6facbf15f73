"""What each of two ranks does under recovery, for test_recovery_ranks.py; each has one of an update's two leaves."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as c10d

from gptcore import checkpoint
from gptcore.models import GPT
from gptcore.train import SpikeError, events, from_table

from ..dist.processes import World
from .spikes import Corrupted, PoisonedGPT, TextLoader, table, train


def _together(world: World, **changes: Any) -> tuple[Path, dict[str, Any]]:
    """One run directory for all, and its settings."""
    told: list[Any] = [tempfile.mkdtemp() if world.rank == 0 else None]
    c10d.broadcast_object_list(told)
    data = {"batch": 8, "length": 32, "accumulate": 2}
    recovery = {"rewind_steps": 20, "skip_batches": 30}
    return Path(told[0]), table(told[0], **{"steps": 90, "data": data, "recovery": recovery, **changes})


def _run(world: World, loader: Any, poisoned: int = 10**9) -> tuple[Any, Any]:
    """Train; every rank's events and weights, in rank order."""
    path, config = _together(world)
    model = PoisonedGPT(from_table(config).model_config(), seed=1337, calls=poisoned)
    train(config, loader, model)
    own = path / "events.jsonl" if world.rank == 0 else path / "ranks" / str(world.rank) / "events.jsonl"
    logs: list[Any] = [None] * world.ranks
    c10d.all_gather_object(logs, events.read(own))
    ends: list[Any] = [None] * world.ranks
    c10d.all_gather_object(ends, {name: p.detach() for name, p in model.named_parameters()})
    saved = checkpoint.load(path / "checkpoints")[0]
    assert all(torch.equal(saved[f"model/{name}"], p) for name, p in model.named_parameters())
    return logs, ends


def bad_data_of_one_rank(world: World) -> None:
    """Only the leaf of rank 1 is of another text; both see the mean, and decide the same."""
    # Updates 60 to 69 have micro-batches 120 to 139, the odd ones rank 1's.
    bad = [micro for micro in range(120, 140) if micro % 2]
    logs, ends = _run(world, Corrupted(bad))
    assert logs[0] == logs[1]
    done = [
        (e["action"], e["from_step"], e["step"], e["skip_batches"]) for e in logs[0] if e["kind"] == "done"
    ]
    assert done == [("rewind", 63, 40, 30)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def nan_of_one_rank(world: World) -> None:
    logs, ends = _run(world, TextLoader(), poisoned=65 if world.rank == 1 else 10**9)
    assert logs[0] == logs[1]
    decided = [(e["detector"], e["step"], e["to_step"]) for e in logs[0] if e["kind"] == "decided"]
    assert decided == [("non_finite", 65, 40)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def ranks_that_part(world: World) -> None:
    """Rank 1 was given a change of the run that rank 0 knows nothing of."""
    changes = [{"step": 3, "lr_factor": 0.5}] if world.rank == 1 else []
    _, config = _together(world, steps=20, changes=changes)
    model = GPT(from_table(config).model_config(), seed=1337)
    with pytest.raises(SpikeError, match="rank 1 has another events than rank 0"):
        train(config, TextLoader(), model)


CASES = {
    "bad data of one rank": bad_data_of_one_rank,
    "NaN of one rank": nan_of_one_rank,
    "ranks that part": ranks_that_part,
}
