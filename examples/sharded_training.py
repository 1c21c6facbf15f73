"""A GPT trained by several processes that divide its optimizer, gradients and weights.

    torchrun --nproc-per-node 2 examples/sharded_training.py
    torchrun --nproc-per-node 2 examples/sharded_training.py 3      # the stage of ZeRO, 0 to 3; 2 by default

The losses, and the weights to the last bit, are those of

    python examples/sharded_training.py
"""

from __future__ import annotations

import hashlib
import os
import pydoc_data.topics
import sys

import torch
import torch.distributed as c10d

from gptcore.data import tokenizer
from gptcore.models import GPT, GPTConfig
from gptcore.optim import AdamW, ZeroOptimizer, decay_groups

STEPS, LEAVES, GRAIN, LENGTH = 60, 4, 2, 64  # an update has 4 leaves of 2 sequences


def main() -> None:
    if "RANK" in os.environ:  # torchrun says who is who
        c10d.init_process_group("gloo")
    rank, ranks = (c10d.get_rank(), c10d.get_world_size()) if c10d.is_initialized() else (0, 1)

    text = "\n".join(pydoc_data.topics.topics.values())
    letters = tokenizer.train([text], kind="characters", eot=False)
    tokens = torch.tensor(letters.encode(text))

    config = GPTConfig.from_dict({
        "num_layers": 2, "width": 64, "vocab_size": letters.vocab_size, "context_length": LENGTH,
        "attention": {"num_heads": 2},
    })  # fmt: skip
    model = GPT(config, seed=0)  # the same on every rank
    optimizer = ZeroOptimizer(
        AdamW(decay_groups(model, 0.1), lr=1e-3, max_norm=1.0),
        stage=int(sys.argv[1]) if len(sys.argv) > 1 else 2,
        module=model,
        accumulation=LEAVES // ranks,
    )
    pick = torch.Generator().manual_seed(0)  # every rank draws all places and takes those of its leaves

    for step in range(STEPS):
        starts = torch.randint(0, len(tokens) - LENGTH - 1, (LEAVES, GRAIN), generator=pick)
        loss = torch.zeros(())
        for leaf in starts[list(optimizer.leaves())]:
            rows = tokens[leaf[:, None] + torch.arange(LENGTH + 1)]
            out = model(rows[:, :-1], rows[:, 1:])
            out.loss.backward()
            loss += out.loss.detach() / LEAVES
        optimizer.step(grad_scale=LEAVES // ranks)
        optimizer.zero_grad()
        if ranks > 1:
            c10d.all_reduce(loss)
        if rank == 0 and (step % 10 == 0 or step == STEPS - 1):
            print(f"step {step}  loss {loss:.4f}  gradient norm {optimizer.last_grad_norm:.4f}")

    digest = hashlib.sha256()
    with optimizer.gathered():  # stage 3 has but a slice of them otherwise
        for parameter in model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
    if rank == 0:
        print(f"SHA-256 of the weights: {digest.hexdigest()}")
    if c10d.is_initialized():
        c10d.destroy_process_group()


if __name__ == "__main__":
    # A function, so that models and what else holds a group of processes are gone before the interpreter ends: gloo's
    # threads keep the tensors of their last exchange until their group goes, and giving them back takes an interpreter.
    main()
