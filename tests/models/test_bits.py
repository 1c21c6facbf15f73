"""A training step's bits don't depend on the number of threads."""

from __future__ import annotations

import subprocess
import sys

# A child process, because MKL reads its setting when torch loads and the test session may have loaded torch
# before gptcore. The first model has products below 64 in every dimension (V 61, head and rows), the second
# only large ones, with a number of rows that no vector width divides.
STEP = """
import gptcore
import hashlib, sys, torch
from gptcore import backend
from gptcore.models import GPT, presets

COMMON = {"num_layers": 2, "attention": {"num_heads": 4}}
SIZES = [
    ({**COMMON, "width": 48, "vocab_size": 61, "context_length": 32}, 3, 7),
    ({**COMMON, "width": 128, "vocab_size": 500, "context_length": 96}, 3, 95),
]

def step(base, size, batch, length, dtype):
    config = presets.get(base).merged({"norm": {"bias": base == "gpt2"}}).to_dict()
    config["attention"].pop("num_kv_heads", None)
    config["mlp"].pop("hidden_size", None)
    model = GPT(presets.GPTConfig.from_dict(config).merged(size), seed=1, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, size["vocab_size"], (batch, length + 1), generator=generator)
    out = model(tokens[:, :-1], tokens[:, 1:].contiguous(), z_loss=1e-4)
    out.total.backward()
    digest = hashlib.sha256()
    for value in (out.loss, out.logprobs, *(p.grad for p in model.parameters())):
        digest.update(value.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

for base in ("gpt2", "llama3-8b", "quickstart-moe"):
    for size, batch, length in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            digests = set()
            for threads in (1, 2, 4, 2):
                torch.set_num_threads(threads)
                backend.set_num_threads(threads)
                digests.add(step(base, size, batch, length, dtype))
            print(base, size["width"], dtype, "one" if len(digests) == 1 else "DIFFERENT", len(digests))
"""


def test_training_step_has_the_same_bits_for_every_thread_count():
    done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 12
    assert all(" one " in line for line in lines), done.stdout
