"""What each of two ranks does under recovery, for test_recovery_ranks.py: plain data parallelism around the loop."""

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
from .spikes import Corrupted, TextLoader, table, train


class Averaged(GPT):
    """Gradients and the reported loss are means over all ranks; ``poisoned``: the forward that gives NaN here."""

    def __init__(self, *arguments: Any, poisoned: int = -1, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.left = poisoned
        for p in self.parameters():
            p.register_post_accumulate_grad_hook(self._average)

    @staticmethod
    def _average(p: torch.Tensor) -> None:
        assert p.grad is not None
        c10d.all_reduce(p.grad)
        p.grad /= c10d.get_world_size()

    def forward(self, *arguments: Any, **options: Any) -> Any:
        out = super().forward(*arguments, **options)
        if not self.training:
            return out
        self.left -= 1
        loss = out.loss * float("nan") if self.left == 0 else out.loss
        mean = loss.detach().clone()
        c10d.all_reduce(mean)
        return out._replace(loss=loss + (mean / c10d.get_world_size() - loss).detach())


def _run(world: World, loader: Any, poisoned: int = -1, **changes: Any) -> tuple[Any, Any]:
    """Train; every rank's events and weights, in rank order."""
    path = Path(tempfile.mkdtemp())
    config = table(path, **{"steps": 90, "recovery": {"rewind_steps": 20, "skip_batches": 30}, **changes})
    model = Averaged(from_table(config).model_config(), seed=1337, poisoned=poisoned)
    train(config, loader, model)
    logs: list[Any] = [None] * world.ranks
    c10d.all_gather_object(logs, events.read(path / "events.jsonl"))
    ends: list[Any] = [None] * world.ranks
    saved = checkpoint.load(path / "checkpoints")[0]
    c10d.all_gather_object(ends, {name: t for name, t in saved.items() if name.startswith("model/")})
    return logs, ends


def bad_data_of_one_rank(world: World) -> None:
    """Only rank 1 is served another text; both see the mean, and decide the same."""
    bad = range(60, 70) if world.rank == 1 else range(0)
    logs, ends = _run(world, Corrupted(bad, seed=world.rank))
    assert logs[0] == logs[1]
    done = [
        (e["action"], e["from_step"], e["step"], e["skip_batches"]) for e in logs[0] if e["kind"] == "done"
    ]
    assert done == [("rewind", 63, 40, 30)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def nan_of_one_rank(world: World) -> None:
    logs, ends = _run(world, TextLoader(seed=world.rank), poisoned=65 if world.rank == 1 else -1)
    assert logs[0] == logs[1]
    decided = [(e["detector"], e["step"], e["to_step"]) for e in logs[0] if e["kind"] == "decided"]
    assert decided == [("non_finite", 65, 40)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def ranks_that_part(world: World) -> None:
    """Rank 1 sees another loss from the third update on, as it would where gradients are not summed."""

    class Parted(Averaged):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            out = super().forward(*arguments, **options)
            return out._replace(loss=out.loss + 1e-6) if world.rank == 1 and self.left < -3 else out

    config = table(Path(tempfile.mkdtemp()), steps=20)
    model = Parted(from_table(config).model_config(), seed=1337)
    with pytest.raises(SpikeError, match="step 3: rank 1 has another loss than rank 0"):
        train(config, TextLoader(seed=world.rank), model)


CASES = {
    "bad data of one rank": bad_data_of_one_rank,
    "NaN of one rank": nan_of_one_rank,
    "ranks that part": ranks_that_part,
}
