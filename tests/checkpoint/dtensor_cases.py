"""FSDP2 and torch's DTensors into our checkpoints, out of them, and through torch.distributed.checkpoint: bitwise."""

from __future__ import annotations

import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from gptcore import checkpoint
from gptcore.checkpoint import dtensor
from gptcore.dist import member_of
from gptcore.train import state
from tests.checkpoint.checkpoint_cases import assert_same
from tests.checkpoint.rank_cases import shared_directory
from tests.dist.processes import Case, World


def trained(mesh: DeviceMesh | None, steps: int = 2) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Odd sizes, so that ranks have uneven shares and some none; sharded by FSDP2 where there is a mesh."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3), torch.nn.Linear(3, 1)
    )
    if mesh is not None:
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(steps):
        draws = torch.Generator().manual_seed(step)
        model(torch.randn(8, 6, generator=draws)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def tensors_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = state.collect(model, optimizer)[0]
    return {name: tensor for name, tensor in found.items() if not name.startswith("rng/")}


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def fsdp2(world: World) -> None:
    """Saved by FSDP2's ranks, read in one process; saved by one, filled into FSDP2's shards."""
    member, mesh = member_of("test", world.group), init_device_mesh("cpu", (world.ranks,))
    own = tensors_of(*trained(mesh))
    with shared_directory(member) as place:
        path = checkpoint.save(place, 2, dtensor.slices_of(own, member), {}, member=member)
        assert len(checkpoint.open(path).manifest.shards) == world.ranks
        assert_same(checkpoint.load(path)[0], whole(own))
        other, its = trained(mesh, steps=1)
        before, target = whole(tensors_of(other, its)), tensors_of(other, its)
        assert not torch.equal(before["model/0.weight"], whole(own)["model/0.weight"])
        dtensor.read_into(checkpoint.open(path), target)
        assert_same(whole(target), whole(own))
        assert_same(whole(tensors_of(other, its)), whole(own))
        if world.rank == 0:
            checkpoint.save(place, 3, whole_of_one(), {})
        torch.distributed.barrier(member.group)
        dtensor.read_into(checkpoint.open(checkpoint.path_of(place, 3)), target)
        assert_same(whole(target), whole_of_one())


def whole_of_one() -> dict[str, Tensor]:
    return tensors_of(*trained(None, steps=3))


def through_dcp(world: World) -> None:
    """FSDP2 -> DCP -> ours -> FSDP2, and FSDP2 -> ours -> DCP -> FSDP2."""
    member, mesh = member_of("test", world.group), init_device_mesh("cpu", (world.ranks,))
    model = trained(mesh)[0]
    want = whole(dict(model.state_dict()))
    with shared_directory(member) as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": model.state_dict()}, checkpoint_id=place / "theirs", process_group=member.group)
        if world.rank == 0:
            checkpoint.from_dcp(place / "theirs", place / "ours", step=2, shards=3)
        torch.distributed.barrier(member.group)
        target = trained(mesh, steps=0)[0]
        opened = checkpoint.open(checkpoint.path_of(place / "ours", 2))
        dtensor.read_into(opened, {f"model/{name}": t for name, t in target.state_dict().items()})
        assert_same(whole(dict(target.state_dict())), want)

        own = {f"model/{name}": t for name, t in model.state_dict().items()}
        checkpoint.save(place / "ours", 4, dtensor.slices_of(own, member), {}, member=member)
        if world.rank == 0:
            checkpoint.to_dcp(checkpoint.path_of(place / "ours", 4), place / "back")
        torch.distributed.barrier(member.group)
        target = trained(mesh, steps=0)[0]
        weights = {"model": target.state_dict()}
        dcp.load(weights, checkpoint_id=place / "back", process_group=member.group)
        assert_same(whole(weights["model"]), want)


def any_placement(world: World) -> None:
    """Boxes along any dimension of a (1, n), an (n, 1) and, of four ranks, a (2, 2) mesh, replicas among them."""
    member = member_of("test", world.group)
    meshes = [(1, world.ranks), (world.ranks, 1)] + ([(2, 2)] if world.ranks == 4 else [])
    with shared_directory(member) as place:
        for number, sizes in enumerate(meshes):
            mesh = init_device_mesh("cpu", sizes)
            wholes, spread = placements(mesh)
            path = checkpoint.save(place, number, dtensor.slices_of(spread, member), {}, member=member)
            assert_same(checkpoint.load(path)[0], wholes)
            empty = {name: DTensor.from_local(
                torch.zeros_like(t.to_local()), mesh, t.placements, shape=t.shape, stride=t.stride()
            ) for name, t in spread.items()}  # fmt: skip
            dtensor.read_into(checkpoint.open(path), empty)
            assert_same(whole(empty), wholes)


def placements(mesh: DeviceMesh) -> tuple[dict[str, Tensor], dict[str, DTensor]]:
    wholes, spread = {}, {}
    draws = torch.Generator().manual_seed(0)
    for shape in ((5, 3, 7), (6,), (2, 9)):
        kinds = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
        for first in kinds:
            for second in kinds:
                name = f"{shape} {first} {second}"
                wholes[name] = torch.randn(shape, generator=draws)
                spread[name] = distribute_tensor(wholes[name], mesh, [first, second])
    return wholes, spread


def refused(world: World) -> None:
    member, mesh = member_of("test", world.group), init_device_mesh("cpu", (world.ranks,))
    partial = {"w": DTensor.from_local(torch.ones(2), mesh, [Partial()])}
    sharded = {"w": distribute_tensor(torch.ones(8), mesh, [Shard(0)])}
    with shared_directory(member) as place:
        opened = checkpoint.open(
            checkpoint.save(place, 0, dtensor.slices_of(sharded, member), {}, member=member)
        )
        for sentence, call in {
            r"'w': got placement P\(sum\), expected Shard or Replicate": lambda: dtensor.slices_of(
                partial, member
            ),
            "'w': got DTensor": lambda: checkpoint.save(place / str(world.rank), 0, sharded, {}),
            "has no tensor 'v'": lambda: dtensor.read_into(opened, {"v": torch.zeros(8)}),
            r"'w' is torch.float32 \(8,\), expected torch.float32 \(9,\)": lambda: dtensor.read_into(
                opened, {"w": torch.zeros(9)}
            ),
        }.items():
            assert_raises(sentence, call)


def assert_raises(sentence: str, call: object) -> None:
    import pytest

    with pytest.raises(ValueError, match=sentence):
        call()  # type: ignore[operator]


CASES: dict[str, Case] = {
    "FSDP2's shards": fsdp2,
    "FSDP2 through torch.distributed.checkpoint": through_dcp,
    "DTensors of any placement": any_placement,
    "DTensors that are refused": refused,
}
