"""Checkpoints that several ranks write and any number reads; each case runs in every process (``test_ranks.py``)."""

from __future__ import annotations

import os
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as c10d
from torch import Tensor

from gptcore import checkpoint
from gptcore.checkpoint import CheckpointError, Slice
from gptcore.dist import Member, member_of
from tests.checkpoint.checkpoint_cases import STATE, assert_same, make_tensors
from tests.dist.processes import Case, World

Values = Mapping[str, Tensor | Slice | list[Slice]]


@contextmanager
def shared_directory(member: Member) -> Iterator[Path]:
    """A temporary directory of all ranks, removed when all are done with it."""
    with tempfile.TemporaryDirectory() as own:
        name = [own]
        c10d.broadcast_object_list(name, group=member.group, group_src=0)
        yield Path(name[0])
        c10d.barrier(member.group)


def group_of(count: int) -> Member | None:
    """The first ``count`` processes; None in the others. All call it."""
    group = c10d.new_group(list(range(count)), timeout=timedelta(seconds=30))
    return member_of("test", group) if c10d.get_rank() < count else None


def cut(tensors: Mapping[str, Tensor], member: Member, seed: int) -> Values:
    """This rank's share where every tensor is cut at random places, ranks in random order, or is whole on one rank."""
    draw = random.Random(seed)
    own: dict[str, Tensor | Slice] = {}
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        bounds = [0, *sorted(draw.randint(0, len(flat)) for _ in range(member.ranks - 1)), len(flat)]
        place = draw.sample(range(member.ranks), member.ranks)[member.rank]
        if draw.random() < 0.3:
            if place == 0:
                own[name] = tensor
            continue
        start, stop = bounds[place : place + 2]
        own[name] = Slice(flat[start:stop], start, tensor.shape)
    return own


def any_number_of_ranks(world: World) -> None:
    """1 to 4 ranks write, 5 times each; every rank reads all of it, and ranges that fall as they like."""
    members = [group_of(count) for count in range(1, world.ranks + 1)]
    for count, member in enumerate(members, start=1):
        if member is None:
            continue
        with shared_directory(member) as place:
            for step in range(5):
                want = make_tensors(step)
                own = cut(want, member, 10 * count + step)
                path = checkpoint.save(place, step, own, {**STATE, "rank": member.rank}, member=member)
                assert path == checkpoint.path_of(place, step)
                opened = checkpoint.open(path)
                assert len(opened.manifest.shards) == count and opened.state["rank"] == 0
                assert_same(checkpoint.load(path)[0], want)
                draw = random.Random(member.rank)
                for name, tensor in want.items():
                    start, stop = sorted(draw.randint(0, tensor.numel()) for _ in range(2))
                    got = {name: opened.read(name, start, stop, verify=True)}
                    assert_same(got, {name: tensor.reshape(-1)[start:stop]})
            assert checkpoint.steps(place) == [2, 3, 4]
            assert sorted(os.listdir(place)) == [f"step-{step:08d}" for step in (2, 3, 4)]


def beside_training(world: World) -> None:
    """A save begun on all ranks is what the tensors were then; the next begin waits for it."""
    member = member_of("test", world.group)
    with shared_directory(member) as place:
        with checkpoint.Writer(place, keep_last=9, keep_every=2, member=member) as writer:
            for step in range(4):
                want = make_tensors(step)
                writer.begin(step, cut(want, member, step), {})
                for tensor in want.values():
                    tensor.zero_()
                assert checkpoint.steps(place)[:step] == list(range(step))
            assert writer.wait() == checkpoint.path_of(place, 3)
        for step in range(4):
            assert_same(checkpoint.load(checkpoint.path_of(place, step))[0], make_tensors(step))


def refusal(
    kind: type[Exception], pattern: Callable[[World], str], values: Callable[[World], Values]
) -> Case:
    """All ranks raise, the last good one stays, nothing else does, and the next save goes well."""

    def case(world: World) -> None:
        member = member_of("test", world.group)
        with shared_directory(member) as place:
            good = {f"w{world.rank}": torch.full((3,), float(world.rank))}
            checkpoint.save(place, 1, good, {}, member=member)
            try:
                checkpoint.save(
                    place, 2 if "step" not in values(world) else world.rank, values(world), {}, member=member
                )
            except kind as error:
                assert re.search(pattern(world), str(error)), str(error)
            else:
                raise AssertionError("nothing was raised")
            c10d.barrier(member.group)
            there = os.listdir(place)
            c10d.barrier(member.group)
            assert there == ["step-00000001"], there
            checkpoint.save(place, 3, good, {}, keep_last=1, member=member)
            assert checkpoint.steps(place) == [3]

    return case


def _half(world: World) -> Values:
    """The last rank's part of 12 elements per rank is missing."""
    if world.rank == world.ranks - 1:
        return {}
    return {"w": Slice(torch.zeros(12), 12 * world.rank, (12 * world.ranks,))}


def _twice(world: World) -> Values:
    return {"w": torch.zeros(5)} if world.rank < 2 else {}


def _two_types(world: World) -> Values:
    dtype = torch.float64 if world.rank == 1 else torch.float32
    return {"w": Slice(torch.zeros(1, dtype=dtype), world.rank, (world.ranks,))}


def _complex(world: World) -> Values:
    return {"w": torch.zeros(2, dtype=torch.complex64 if world.rank == 1 else torch.float32)}


def _own_words(world: World) -> str:
    return "complex64" if world.rank == 1 else "rank 1 of the group refused its arguments"


def two_directories(world: World) -> None:
    """The last rank writes elsewhere: rank 0 waits for it in vain, and all say why."""
    member = member_of("test", world.group)
    with shared_directory(member) as place:
        here = place if world.rank < world.ranks - 1 else place / "elsewhere"
        try:
            checkpoint.save(here, 1, {f"w{world.rank}": torch.zeros(1)}, {}, member=member, patience=0.5)
        except CheckpointError as error:
            assert f"rank 0 of {world.ranks}" in str(error) or f"rank {world.ranks - 1} of" in str(error), (
                str(error)
            )
        else:
            raise AssertionError("nothing was raised")
        c10d.barrier(member.group)
        assert not checkpoint.steps(place)


def an_exception_on_one_rank(world: World) -> None:
    """It leaves the block without a collective, which the other ranks are not in; the save is whole all the same."""
    member = member_of("test", world.group)
    with shared_directory(member) as place:
        writer = checkpoint.Writer(place, member=member)
        try:
            with writer:
                writer.begin(1, cut(make_tensors(), member, 3), {})
                if world.rank == 0:
                    raise KeyError("of one rank")
                c10d.barrier(member.group)
        except KeyError:
            c10d.barrier(member.group)
            writer.wait()
        assert_same(checkpoint.load(place)[0], make_tensors())


CASES: dict[str, Case] = {
    "any number of ranks": any_number_of_ranks,
    "beside training": beside_training,
    "ranks that do not share a directory": two_directories,
    "an exception on one rank": an_exception_on_one_rank,
    "elements that no rank passed": refusal(
        CheckpointError, lambda w: f"'w': elements from {12 * w.ranks - 12} to {12 * w.ranks} were .* no rank", _half
    ),
    "elements that two ranks passed": refusal(
        CheckpointError, lambda _: "'w': elements from 0 to 5 were passed by more than one rank", _twice
    ),
    "two dtypes": refusal(CheckpointError, lambda _: r"'w' is F32 .* on one rank and F64 .* on another", _two_types),
    "a tensor that cannot be saved": refusal(ValueError, _own_words, _complex),
    "two steps": refusal(
        ValueError, lambda _: "got step = 0 on rank 0 and 1 on rank 1", lambda _: {"step": torch.zeros(1)}
    ),
}  # fmt: skip
