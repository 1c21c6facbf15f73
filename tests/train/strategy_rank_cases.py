"""What two ranks do under each strategy, for test_strategies.py.

ZeRO's runs, whose bits are those of one process (``tests/dist/test_zero.py``), stand for that process.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as c10d

from gptcore import checkpoint
from gptcore.dist import Member, member_of
from gptcore.models import GPTLoss
from gptcore.nn.moe import MoEStatistics
from gptcore.train import events, from_table, held_out, run
from gptcore.train.metrics import read
from gptcore.train.routing import RoutingWatch

from ..dist.processes import World
from .sharded_program import LEAVES, settings
from .spikes import PoisonedGPT, TextLoader

TORCHS = ("ddp", "fsdp2")
UPDATES = 8
# Sums of gradients in another order: up to a rounding of f32 for each of an update's leaves, in each update.
ROUNDING = LEAVES * UPDATES * 2.0**-24
EXPERTS = {"num_experts": 4, "top_k": 2, "balance_weight": 0.01, "z_weight": 0.001}


class Made(NamedTuple):
    """A run: metrics of each update by step, the last checkpoint, and the directory."""

    lines: dict[int, dict[str, Any]]
    tensors: dict[str, torch.Tensor]
    path: Path

    def losses(self) -> list[float]:
        return [line["loss"] for line in self.lines.values()]


def made(world: World, strategy: str, *, start: Path | None = None, **changes: Any) -> Made:
    """A run of all ranks from the beginning, or on from what ``start`` holds, of which a copy is taken."""
    told: list[Any] = [tempfile.mkdtemp() if world.rank == 0 else None]
    c10d.broadcast_object_list(told)
    path = Path(told[0]) / "run"
    if start is not None and world.rank == 0:
        shutil.copytree(start, path)
    c10d.barrier()
    parallel = {"strategy": strategy, **changes.pop("parallel", {})}
    options = {"evaluate": changes.pop("evaluate", None), "sample": changes.pop("sample", None)}
    calls, frozen = changes.pop("poisoned", 10**9), changes.pop("frozen", lambda model: ())
    config = from_table(settings(path, **{"parallel": parallel, **changes}))
    model = PoisonedGPT(config.model_config(), seed=config.seed, calls=calls)
    for p in frozen(model):
        p.requires_grad_(False)
    loader = TextLoader(batch=1, length=16)
    run(config, model=model, loader=loader, measure_peak=False, quiet=True, **options)
    lines = {line["step"]: line for line in read(path / "metrics.jsonl") if line["kind"] == "train"}
    return Made(lines, checkpoint.load(path / "checkpoints")[0], path)


def near(got: Made, expected: Made, tolerance: float = ROUNDING) -> None:
    assert got.lines.keys() == expected.lines.keys()
    assert got.losses() == pytest.approx(expected.losses(), rel=tolerance)
    norms = [[line["grad_norm"] for line in each.lines.values()] for each in (got, expected)]
    # The norm's own gradients have no such cancellation as losses of nearly equal sums do.
    assert norms[0] == pytest.approx(norms[1], rel=10 * tolerance)
    masters = {name for name in got.tensors if name.endswith("/master")}
    assert got.tensors.keys() - masters == expected.tensors.keys()


def same(got: Made, expected: Made) -> None:
    assert got.losses() == expected.losses()
    assert got.tensors.keys() == expected.tensors.keys()
    assert [n for n, value in expected.tensors.items() if not torch.equal(got.tensors[n], value)] == []


def losses_are_those_of_one_process(world: World) -> None:
    expected = made(world, "zero")
    assert expected.losses()[-1] < 0.75 * expected.losses()[0]
    for strategy in TORCHS:
        near(made(world, strategy), expected)


def checkpoints_go_from_each_to_each(world: World) -> None:
    """The update after a resume has the bits of the weights that were saved; later ones need the moments too."""
    for first in ("zero", *TORCHS):
        saved = made(world, first, steps=4, parallel={"zero": 2} if first == "zero" else {})
        straight = made(world, first, start=saved.path)
        for second, stage in (("zero", 3), ("ddp", 0), ("fsdp2", 0)):
            resumed = made(world, second, start=saved.path, parallel={"zero": stage})
            assert resumed.losses()[4] == straight.losses()[4]
            near(resumed, straight)


def a_stop_changes_no_bit(world: World) -> None:
    for strategy in TORCHS:
        saved = made(world, strategy, steps=4)
        same(made(world, strategy, start=saved.path), made(world, strategy))


def sixteen_bits(world: World) -> None:
    """Within one rounding of bf16, or of f16's ten bits, and whatever it magnifies: losses within 2^-8 of f32's."""
    single = made(world, "zero")
    for strategy in TORCHS:
        for dtype in ("bfloat16", "float16"):
            got = made(world, strategy, dtype=dtype, loss_scale={"init_scale": 1024.0})
            near(got, single, 2.0**-8)
            assert got.tensors["optimizer/stack.blocks.0.mlp.up.weight/master"].dtype == torch.float32


def overflows_are_skipped_by_all(world: World) -> None:
    """A scale at which gradients overflow falls on every rank alike until they fit."""
    for strategy in TORCHS:
        got = made(world, strategy, dtype="float16", loss_scale={"init_scale": 2.0**20})
        last = got.lines[UPDATES]
        assert 1 <= last["skipped_updates"] < UPDATES
        assert math.log2(last["loss_scale"]) == 20 - last["skipped_updates"]
        counts: list[Any] = [None] * world.ranks
        own = got.path / ("metrics.jsonl" if world.rank == 0 else f"ranks/{world.rank}/metrics.jsonl")
        c10d.all_gather_object(counts, [line.get("loss_scale") for line in read(own)])
        assert counts[0] == counts[1]


def experts_and_checkpointed_activations(world: World) -> None:
    """Losses of the routers reach the routers: with their weights at 0 the run is another."""
    model = {"moe": EXPERTS}
    expected = made(world, "zero", model=model)
    without = made(world, "zero", model={"moe": {**EXPERTS, "balance_weight": 0.0, "z_weight": 0.0}})
    assert without.losses()[-1] != pytest.approx(expected.losses()[-1], rel=10 * ROUNDING)
    for strategy in TORCHS:
        for kind in ("none", "block", "selective"):
            memory = {"activation_checkpointing": kind}
            got = made(world, strategy, model=model, memory=memory)
            near(got, expected)
            assert got.lines[8]["balance_loss"] == pytest.approx(expected.lines[8]["balance_loss"], rel=1e-4)


def routing_is_told_of_all_ranks(world: World) -> None:
    """What one process tells that has had every rank's micro-batches, on every rank."""
    of_rank, of_all = RoutingWatch((1, 3)), RoutingWatch((1, 3))
    draws = torch.Generator().manual_seed(3)

    def out(_: int) -> GPTLoss:
        def drawn(*shape: int) -> torch.Tensor:
            return torch.rand(shape, generator=draws)

        layers = tuple(MoEStatistics(*(drawn() for _ in range(5)), drawn(4)) for _ in range(2))
        return GPTLoss(drawn(), drawn(), drawn(), drawn(), drawn(), layers)

    leaves = [out(leaf) for leaf in range(6)]
    for number, leaf in enumerate(leaves):
        of_all.add(leaf)
        if number // 3 == world.rank:
            of_rank.add(leaf)
    assert of_rank.updated(member_of("test", world.group)) == of_all.updated(Member(None, 0, 1)) == []
    assert of_rank.fields() == of_all.fields()


def frozen_weights_stay(world: World) -> None:
    """Those of the embedding, which is the head too: whole on every rank, saved once, and not trained."""
    options = {"frozen": lambda model: model.token_embedding.parameters()}
    name, expected = "model/token_embedding.weight", made(world, "zero", **options)
    assert torch.equal(expected.tensors[name], made(world, "zero", steps=1, **options).tensors[name])
    for strategy in TORCHS:
        got = made(world, strategy, **options)
        near(got, expected)
        assert torch.equal(got.tensors[name], expected.tensors[name])
        assert not any(key.startswith("optimizer/token_embedding") for key in got.tensors)


def changes_under_way(world: World) -> None:
    changes = [{"step": 2, "optimizer": "sgd", "lr": 0.03}, {"step": 5, "optimizer": "adamw", "lr": 0.001},
               {"step": 6, "drop_update": True}]  # fmt: skip
    expected = made(world, "zero", changes=changes, optimizer={"max_norm": 0.2})
    for strategy in TORCHS:
        near(made(world, strategy, changes=changes, optimizer={"max_norm": 0.2}), expected)
        skipping = made(world, strategy, recovery={"loss": "skip", "threshold": 1.0, "least": 8, "window": 8})
        near(skipping, made(world, "zero"))


def gone_back_after_a_spike(world: World) -> None:
    """A NaN of rank 1 in its seventh update: all go back two or more to a checkpoint, and on past three batches."""
    leaves = LEAVES // world.ranks
    options = {
        "recovery": {"rewind_steps": 2, "skip_batches": 3},
        "poisoned": 6 * leaves + 2 if world.rank == 1 else 10**9,
    }
    expected = made(world, "zero", **options)
    for strategy in TORCHS:
        got = made(world, strategy, **options)
        done = [event for event in events.read(got.path / "events.jsonl") if event["kind"] == "done"]
        assert [(event["action"], event["from_step"], event["step"]) for event in done] == [("rewind", 7, 4)]
        near(got, expected)


def weights_are_read_whole_for_evaluation_and_samples(world: World) -> None:
    """Between updates, with the weights of the moment; neither changes the run."""

    def sample(model: Any) -> str:
        model.eval()
        return str(model(torch.zeros(1, 4, dtype=torch.int64))[0, -1].argmax().item())

    options = {
        "evaluate": held_out(TextLoader(seed=5, batch=4, length=16, held_out=True), 2), "sample": sample,
        "evaluation": {"every": 2},
    }  # fmt: skip
    plain = {strategy: made(world, strategy) for strategy in TORCHS}
    expected = [e["val_loss"] for e in _evaluations(made(world, "zero", **options))]
    assert len(expected) == 5
    for strategy in TORCHS:
        got = made(world, strategy, **options)
        same(got, plain[strategy])
        assert [e["val_loss"] for e in _evaluations(got)] == pytest.approx(expected, rel=ROUNDING)


def _evaluations(made: Made) -> list[dict[str, Any]]:
    return [line for line in read(made.path / "metrics.jsonl") if line["kind"] == "evaluation"]


CASES = {
    case.__name__.replace("_", " "): case
    for case in (
        losses_are_those_of_one_process, checkpoints_go_from_each_to_each, a_stop_changes_no_bit, sixteen_bits,
        overflows_are_skipped_by_all, experts_and_checkpointed_activations, routing_is_told_of_all_ranks,
        frozen_weights_stay, changes_under_way, gone_back_after_a_spike,
        weights_are_read_whole_for_evaluation_and_samples,
    )
}  # fmt: skip
