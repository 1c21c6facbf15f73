"""A GPT whose experts are spread over processes, trained with torch.distributed.

    torchrun --nproc-per-node 2 examples/experts_over_processes.py

Each process keeps half of the experts and reads half of every batch. The losses are those of

    python examples/experts_over_processes.py

which does the same in one process, up to the rounding of sums.
"""

from __future__ import annotations

import os
import pydoc_data.topics

import torch
import torch.distributed as c10d

from gptcore import dist
from gptcore.data import tokenizer
from gptcore.models import GPT, GPTConfig
from gptcore.optim import AdamW, decay_groups

STEPS, BATCH, LENGTH = 80, 8, 64


def main() -> None:
    if "RANK" in os.environ:  # torchrun says who is who
        c10d.init_process_group("gloo")
    rank, ranks = (c10d.get_rank(), c10d.get_world_size()) if c10d.is_initialized() else (0, 1)

    text = "\n".join(pydoc_data.topics.topics.values())
    letters = tokenizer.train([text], kind="characters", eot=False)
    tokens = torch.tensor(letters.encode(text))

    config = GPTConfig.from_dict({
        "num_layers": 2, "width": 64, "vocab_size": letters.vocab_size, "context_length": LENGTH,
        "attention": {"num_heads": 2}, "mlp": {"activation": "swiglu", "hidden_size": 128},
        "moe": {"num_experts": 8, "top_k": 2, "capacity_factor": 2.5},
    })  # fmt: skip
    model = GPT(config, seed=0)  # the same on every rank
    if ranks > 1:
        dist.expert_parallel(model)  # before the optimizer: each rank's experts are fewer now
    optimizer = AdamW(decay_groups(model, 0.1), lr=1e-3)
    pick = torch.Generator().manual_seed(0)  # every rank draws the whole batch's places and takes its rows

    for step in range(STEPS):
        starts = torch.randint(0, len(tokens) - LENGTH - 1, (BATCH,), generator=pick).chunk(ranks)[rank]
        rows = tokens[starts[:, None] + torch.arange(LENGTH + 1)]
        out = model(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        out.total.backward()
        loss = out.loss.detach()
        if ranks > 1:
            dist.average_gradients(model)
            dist.clip_gradients(model, 1.0)
            c10d.all_reduce(loss)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if rank == 0 and (step % 10 == 0 or step == STEPS - 1):
            dropped = sum(float(layer.drop_rate) for layer in out.routing) / len(out.routing)
            print(f"step {step:3d}  loss {loss.item() / ranks:.5f}  choices dropped {dropped:.1%}")

    state = dist.full_state_dict(model)  # all experts, on every rank: what one process would save
    if rank == 0:
        GPT(config).load_state_dict(state)
        print(f"whole state: {sum(t.numel() for t in state.values()):,} numbers, of which this rank trained "
              f"{sum(p.numel() for p in model.parameters()):,}")  # fmt: skip
    if ranks > 1:
        c10d.destroy_process_group()


if __name__ == "__main__":
    # A function, so that models and what else holds a group of processes are gone before the interpreter ends: gloo's
    # threads keep the tensors of their last exchange until their group goes, and giving them back takes an interpreter.
    main()
