"""Cases of planned memory, run by ``tests/dist/processes.py``: what a rank holds is what the plan says."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from gptcore.models import GPT, presets, whole_block
from gptcore.optim import AdamW, ZeroOptimizer, decay_groups
from gptcore.train.optimizers import OptimizerSpec
from gptcore.train.plan import memory
from gptcore.train.planned_run import Run
from tests.allocations import allocations, held
from tests.dist.processes import Case, World

CONFIG = presets.get("gpt2").merged(
    {"num_layers": 6, "width": 192, "vocab_size": 1000, "context_length": 256, "attention": {"num_heads": 4}}
)
BUCKET = 200_000


def what_a_rank_holds(
    world: World, *, element_bytes: int, stage: int, each: int, fixed_tree: bool, offload: bool = False
) -> None:
    whole_block.LARGEST = 0  # plans are for large streams, which go by the modules
    before = held()
    model = GPT(CONFIG, dtype=torch.float32 if element_bytes == 4 else torch.bfloat16)
    optimizer = ZeroOptimizer(
        AdamW(decay_groups(model, 0.1)), stage=stage, module=model, group=world.group, accumulation=each,
        fixed_tree=fixed_tree, bucket=BUCKET, offload=offload,
    )  # fmt: skip
    tokens = torch.randint(1000, (1, 257))

    def update() -> None:
        for _ in range(each):
            model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    update()
    kept = held() - before
    most = kept + allocations(update).peak
    run = Run(
        CONFIG, OptimizerSpec(), element_bytes, sequences=each * world.ranks, length=256, grain=1,
        fixed_tree=fixed_tree, bucket=BUCKET, offload="optimizer" if offload else "none",
    )  # fmt: skip
    planned = memory(run, world.ranks, stage)
    # Here the device's memory is the host's too.
    between = planned.weights + planned.masters + planned.moments + planned.host
    if stage < 2:  # whose leaves leave their places
        between += planned.gradient + planned.partial_sums
    assert between == pytest.approx(kept, rel=0.05)
    # Torch does not see the kernels' scratch.
    assert planned.total + planned.host - planned.workspace == pytest.approx(
        most, rel=0.055 if stage == 3 else 0.05
    )


CASES: dict[str, Case] = {
    f"stage {stage}, {element_bytes} bytes, {each} leaves, {'tree' if tree else 'sum'}{', offload' * offload}": partial(
        what_a_rank_holds,
        element_bytes=element_bytes, stage=stage, each=each, fixed_tree=tree, offload=offload,
    )
    for stage in (0, 1, 2, 3)
    for element_bytes in (4, 2)
    for each, tree, offload in ((1, True, False), (4, True, False), (4, False, False), (1, True, True))
}  # fmt: skip
