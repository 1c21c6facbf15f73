"""transformers' GPT-2 124M trained under bf16 autocast: the user's program, with and without one line of gptcore's.

Forward, backward, clip and torch's fused AdamW are the same for all; weights are random, of the published shape. The
second case is their peak memory, each participant in a process of its own, with the times of that short run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from bench.bench_train_step import VOCABULARY, step_flops
from bench.case import OURS, Case, Cost, Measured, Target
from bench.peak import STEPS, measure, peak_of

BATCH, LENGTH = 2, 512


def gpt2(attention: str) -> Any:
    """A GPT-2 124M of transformers without dropout, with the weights of one seed."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, set_seed

    torch.set_grad_enabled(True)
    set_seed(1)
    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation=attention)
    return GPT2LMHeadModel(config)


def _steps(model: Any, tokens: Any, dtype: str, *, compiled: bool) -> Callable[[], object]:
    """One training step of the program that a user of transformers writes."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    call = torch.compile(model) if compiled else model

    def step() -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = call(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def participants(target: Target) -> dict[str, Callable[[], Callable[[], object]]]:
    """Factories by name: calling one builds the model and returns its step on one random batch."""
    tokens = target.randint(VOCABULARY, BATCH, LENGTH)

    def ours() -> Callable[[], object]:
        from gptcore.integrations import huggingface

        model = gpt2("sdpa")
        huggingface.apply_gptcore_to_gpt2(model=model)
        return _steps(model, tokens, target.dtype, compiled=False)

    def peer(attention: str, *, compiled: bool) -> Callable[[], Callable[[], object]]:
        return lambda: _steps(gpt2(attention), tokens, target.dtype, compiled=compiled)

    return {
        "gptcore": ours,
        "transformers_sdpa_eager": peer("sdpa", compiled=False),
        "transformers_eager_eager": peer("eager", compiled=False),
        "transformers_sdpa_compiled": peer("sdpa", compiled=True),
    }


def _memory(target: Target, note: Callable[[str], None]) -> Measured:
    """Peaks of all participants, the compiled one's with what compiling takes."""
    samples, peaks = measure("bench.bench_hf_train_step", participants(target), [target.dtype], note)
    peers = {name: mib for name, mib in peaks.items() if name != OURS}
    eager = min(mib for name, mib in peers.items() if "compiled" not in name)
    ratios = {
        "memory_ratio": round(peaks[OURS] / min(peers.values()), 4),
        "memory_over_eager": round(peaks[OURS] / eager, 4),
    }
    return Measured(samples, {"peak_mib": peaks, **ratios})


_SHAPE = f"hf_train_step/gpt2_124m_B{BATCH}_T{LENGTH}"


def _cost(_element: int) -> Cost:
    return Cost(step_flops(BATCH * LENGTH, LENGTH))


CASES = [
    Case(
        f"{_SHAPE}/step", participants, _cost, repeats=5, heavy=True, quick=False, tokens=BATCH * LENGTH
    ),
    Case(
        f"{_SHAPE}/memory", cost=_cost, repeats=STEPS - 1, quick=False, once=True, tokens=BATCH * LENGTH,
        measure=_memory, dtypes=("bfloat16",),
    ),
]  # fmt: skip


if __name__ == "__main__":
    from transformers import GPT2LMHeadModel  # noqa: F401, what importing takes is not the step's

    chosen, precision = sys.argv[1:]
    print(json.dumps(peak_of(participants(Target(precision))[chosen])))
