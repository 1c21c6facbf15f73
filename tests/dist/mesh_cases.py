"""Two ranks to a model and, of four processes, two models side by side on other data: a mesh of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor

from gptcore import dist
from gptcore.models import GPT
from gptcore.optim import AdamW, ZeroOptimizer, decay_groups
from tests.dist.model_cases import raised
from tests.dist.processes import Case, World
from tests.dist.tensor_parallel_cases import (
    GPT2,
    VARIANTS,
    assert_near,
    batch,
    bound,
    largest_gradient,
    model_of,
)

_ROWS = 4  # of one process
LR, EPS = 3e-3, 1e-3


def mesh_of(world: World) -> c10d.DeviceMesh:
    return c10d.init_device_mesh("cpu", (world.ranks // 2, 2), mesh_dim_names=("data", "tensor"))


def optimizer_of(model: GPT, max_norm: float | None = None) -> AdamW:
    return AdamW(decay_groups(model, 0.1), lr=LR, eps=EPS, max_norm=max_norm)


def training(name: str, *, rows: bool, wrapped: bool = False, experts: bool = False) -> Case:
    """Five updates of a model over tensor and data ranks; the loss of one process is the mean over data ranks."""

    def case(world: World) -> None:
        mesh = mesh_of(world)
        data, replicas = mesh.get_group("data"), mesh.size(0)
        # half the rows each, in which equally many targets count
        options: dict[str, Any] = VARIANTS[name]
        one, cut = model_of(options), model_of(options)
        if experts:
            dist.expert_parallel(cut, data)
        dist.tensor_parallel(cut, mesh, sequence_parallel=rows)
        runner: Any = cut
        if wrapped:
            runner = torch.nn.parallel.DistributedDataParallel(cut, process_group=data)
        optimizers = optimizer_of(one), optimizer_of(cut)
        largest = 0.0
        for step in range(5):
            tokens, targets = batch(step, _ROWS)
            targets[targets == -100] = 0
            wanted = one(tokens, targets)
            part = mesh.get_local_rank("data")
            got = runner(tokens.chunk(replicas)[part], targets.chunk(replicas)[part])
            mean = got.loss.detach().double().reshape(1)
            c10d.all_reduce(mean, group=data)
            assert_near(mean[0] / replicas, wanted.loss.double(), f"step {step}, loss")
            wanted.total.backward()
            got.total.backward()
            if not wrapped:
                dist.average_gradients(cut, data)
            largest = max(largest, largest_gradient(one))
            norm = float(torch.nn.utils.clip_grad_norm_(one.parameters(), 0.2))
            clipped = dist.clip_gradients(cut, 0.2, data)
            assert abs(clipped - norm) <= bound(norm), f"norm {clipped}, expected {norm}"
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert_weights(dist.full_state_dict(cut), one, largest)

    return case


def zero(name: str, stage: int, *, rows: bool) -> Case:
    """Five clipped updates with slices divided further over the data ranks, against one process."""

    def case(world: World) -> None:
        mesh = mesh_of(world)
        data, replicas = mesh.get_group("data"), mesh.size(0)
        part = mesh.get_local_rank("data")
        one = model_of(VARIANTS[name])
        cut = dist.tensor_parallel(model_of(VARIANTS[name]), mesh, sequence_parallel=rows)
        alone = optimizer_of(one)
        divided = ZeroOptimizer(optimizer_of(cut, max_norm=0.2), stage=stage, module=cut, group=data)
        largest = 0.0
        for step in range(5):
            tokens, targets = batch(step, _ROWS)
            targets[targets == -100] = 0
            one(tokens, targets).total.backward()
            cut(tokens.chunk(replicas)[part], targets.chunk(replicas)[part]).total.backward()
            largest = max(largest, largest_gradient(one))
            norm = float(torch.nn.utils.clip_grad_norm_(one.parameters(), 0.2))
            for optimizer in (alone, divided):
                optimizer.step()
                optimizer.zero_grad()
            # Sums of squares are exact to f64: what is left is how far the gradients themselves are off.
            found = divided.last_grad_norm or 0.0
            assert norm > 0.2 and abs(found - norm) <= bound(norm), f"norm {found}, expected {norm}"
            of_ranks: list[Any] = [None] * world.ranks
            c10d.all_gather_object(of_ranks, found, group=world.group)
            assert len({*of_ranks}) == 1, of_ranks
        with divided.gathered():
            assert_weights(dist.full_state_dict(cut), one, largest)

    return case


def assert_weights(state: Mapping[str, Tensor], one: GPT, largest: float) -> None:
    """An update of Adam with this epsilon moves by at most 2 lr / epsilon of what a gradient changes."""
    for name, weight in one.state_dict().items():
        error, most = float((state[name] - weight).abs().max()), 5 * LR * 2 / EPS * bound(largest)
        assert error <= most, f"{name}: error {error:.2e}, at most {most:.2e}"


def _meshes_that_do_not_fit(world: World) -> None:
    mesh = c10d.init_device_mesh("cpu", (world.ranks,), mesh_dim_names=("data",))
    raised(
        r"got a mesh with dimensions \('data',\), expected one with 'tensor'",
        dist.tensor_parallel,
        model_of(GPT2),
        mesh,
    )
    unnamed = c10d.init_device_mesh("cpu", (world.ranks,))
    raised(r"got a mesh with dimensions \(\), expected", dist.tensor_parallel, model_of(GPT2), unnamed)
    cut = dist.tensor_parallel(model_of(GPT2), mesh_of(world))
    raised("got one with several ranks among which", dist.average_gradients, cut)
    raised("got one with several ranks among which", ZeroOptimizer, optimizer_of(cut), module=cut)


CASES: dict[str, Case] = {
    "mesh-gpt2": training("gpt2", rows=False),
    "mesh-llama-rows": training("llama", rows=True),
    "mesh-palm-ddp": training("palm", rows=False, wrapped=True),
    "mesh-zero0": zero("gpt2", 0, rows=False),
    "mesh-zero1": zero("palm", 1, rows=False),
    "mesh-zero2-rows": zero("gpt2", 2, rows=True),
    "mesh-zero3": zero("gpt2", 3, rows=False),
    "mesh-zero3-rows": zero("palm", 3, rows=True),
    "mesh-experts": training("experts", rows=False, experts=True),
    "mesh-experts-rows": training("experts", rows=True, experts=True),
    "meshes-that-do-not-fit": _meshes_that_do_not_fit,
}
