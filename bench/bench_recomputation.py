"""Activation checkpointing in a training step of GPT-2 124M: peak memory, each participant in a process of its own.

``gptcore`` recomputes whole blocks, as the torch peer does; ``gptcore_selective`` norms and activations alone,
``gptcore_plain`` nothing. Times are those of that short run.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable

from bench.bench_train_step import VOCABULARY
from bench.case import OURS, PLAIN, Target
from bench.peak import peak_case, peak_of

KINDS = {OURS: "block", "gptcore_selective": "selective", PLAIN: "none"}
# Shown, not judged against.
OTHER_KIND = {"gptcore_selective": "keeps more and computes less anew"}


def participants(target: Target, batch: int, length: int) -> dict[str, Callable[[], Callable[[], object]]]:
    """Factories by name: calling one builds the participant and returns its step on one random batch."""
    from bench.peers.torch_gpt2 import GPT2Config, Hyper, TorchTrainer
    from bench.trainer import GptcoreTrainer
    from gptcore.models import presets

    tokens = target.randint(VOCABULARY, batch, length)
    targets = target.randint(VOCABULARY, batch, length)

    def ours(kind: str) -> Callable[[], object]:
        trainer = GptcoreTrainer(presets.get("gpt2"), target.torch_dtype, Hyper())
        trainer.model.checkpoint_activations(kind)
        return lambda: trainer.step(tokens, targets)

    def peer(mode: str) -> Callable[[], object]:
        from torch.utils.checkpoint import checkpoint

        trainer = TorchTrainer(GPT2Config(), mode, Hyper(), compiled=False)
        for block in trainer.model.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        return lambda: trainer.step(tokens, targets)

    modes = ("f32",) if target.dtype == "float32" else ("autocast", "bf16_master")
    return {
        **{name: functools.partial(ours, kind) for name, kind in KINDS.items()},
        **{f"torch_{mode}_block": functools.partial(peer, mode) for mode in modes},
    }


_case = functools.partial(
    peak_case, "bench.bench_recomputation", "recomputation", participants, shown=KINDS, footnotes=OTHER_KIND
)
CASES = [_case(2, 512), _case(4, 1024)]


if __name__ == "__main__":
    chosen, precision, rows, columns = sys.argv[1:]
    print(json.dumps(peak_of(participants(Target(precision), int(rows), int(columns))[chosen])))
