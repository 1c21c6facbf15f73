"""A GPT whose matrices are cut over two processes, trained with torch.distributed; with four, two such models side by
side, each reading half of every batch.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py
    torchrun --nproc-per-node 4 examples/tensor_parallel.py
    torchrun --nproc-per-node 2 examples/tensor_parallel.py rows     # norms and residual stream on half the rows each

The losses are those of

    python examples/tensor_parallel.py

which does the same in one process, up to the rounding of sums.
"""

from __future__ import annotations

import os
import pydoc_data.topics
import sys

import torch
import torch.distributed as c10d

from gptcore import dist
from gptcore.data import tokenizer
from gptcore.models import GPT, GPTConfig
from gptcore.optim import AdamW, decay_groups

STEPS, BATCH, LENGTH, TENSOR = 40, 8, 64, 2


def main() -> None:
    mesh = None
    if "RANK" in os.environ:  # torchrun says who is who
        c10d.init_process_group("gloo")
        replicas = c10d.get_world_size() // TENSOR
        mesh = c10d.init_device_mesh("cpu", (replicas, TENSOR), mesh_dim_names=("data", "tensor"))
    part, parts = (mesh.get_local_rank("data"), mesh.size(0)) if mesh else (0, 1)

    text = "\n".join(pydoc_data.topics.topics.values())
    letters = tokenizer.train([text], kind="characters", eot=False)
    tokens = torch.tensor(letters.encode(text))

    config = GPTConfig.from_dict({
        "num_layers": 2, "width": 64, "vocab_size": letters.vocab_size, "context_length": LENGTH,
        "attention": {"num_heads": 4, "num_kv_heads": 2}, "norm": {"kind": "rms_norm"},
        "mlp": {"activation": "swiglu", "hidden_size": 160}, "position": {"kind": "rotary"},
    })  # fmt: skip
    model = GPT(config, seed=0)  # the same on every rank
    whole = model.num_parameters()
    if mesh:
        dist.tensor_parallel(
            model, mesh, sequence_parallel="rows" in sys.argv
        )  # before the optimizer is made
    optimizer = AdamW(decay_groups(model, 0.1), lr=2e-3)
    pick = torch.Generator().manual_seed(
        0
    )  # all ranks draw the same places; those of a model take the same rows of them

    for step in range(STEPS):
        starts = torch.randint(0, len(tokens) - LENGTH - 1, (BATCH,), generator=pick).chunk(parts)[part]
        rows = tokens[starts[:, None] + torch.arange(LENGTH + 1)]
        out = model(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        out.total.backward()
        loss = out.loss.detach()
        if mesh:
            dist.average_gradients(model, mesh.get_group("data"))
            dist.clip_gradients(model, 1.0)
            c10d.all_reduce(loss, group=mesh.get_group("data"))
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (not mesh or mesh.get_rank() == 0) and (step % 10 == 0 or step == STEPS - 1):
            print(f"step {step:3d}  loss {loss.item() / parts:.5f}")

    state = dist.full_state_dict(model)  # whole matrices, on every rank: what one process would save
    if not mesh or mesh.get_rank() == 0:
        GPT(config).load_state_dict(state)
        print(f"whole model: {whole:,} numbers, of which this rank trained {model.num_parameters():,}")
    if mesh:
        c10d.destroy_process_group()


if __name__ == "__main__":
    # A function, so that models and what else holds a group of processes are gone before the interpreter ends: gloo's
    # threads keep the tensors of their last exchange until their group goes, and giving them back takes an interpreter.
    main()
