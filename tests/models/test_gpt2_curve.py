"""GPT-2 124M trained on real text: bf16 on our kernels follows torch's f32 loss as closely as torch's own bf16.

Both kinds of bf16 have bf16 weights and activations and f32 masters; torch's autocast, whose residual stream and
weights stay f32, is another thing and closer to f32 than either.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.peers.torch_gpt2 import GPT2Config, Hyper, TorchTrainer
from bench.trainer import GptcoreTrainer, copy_weights
from gptcore.data import tokenizer
from gptcore.models import presets

STEPS, BATCH, LENGTH = 50, 2, 256
HYPER = Hyper(lr=3e-4)


def _batches(text: Path, bpe: Path) -> list[tuple[Tensor, Tensor]]:
    """STEPS batches of the text's first tokens, one after another: (BATCH, LENGTH) tokens and their successors."""
    encode = tokenizer.load(bpe).encode
    need = STEPS * BATCH * LENGTH + 1
    tokens = torch.tensor(encode(text.read_text(encoding="utf-8")[: need * 6])[:need])
    assert len(tokens) == need
    inputs = tokens[:-1].view(STEPS, BATCH, LENGTH)
    return list(zip(inputs, tokens[1:].view(STEPS, BATCH, LENGTH), strict=True))


def _curve(trainer: GptcoreTrainer | TorchTrainer, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Loss of each step, with a warm-up over the first ten, without which GPT-2's first steps overshoot."""
    losses = []
    for i, (tokens, targets) in enumerate(batches):
        lr = HYPER.lr * min(1.0, (i + 1) / 10)
        losses.append(float(trainer.step(tokens, targets, lr)))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.long
def test_bf16_follows_torch_f32_within_the_noise_of_torch_bf16(shared_data: Path):
    batches = _batches(shared_data / "tinyshakespeare.txt", shared_data / "gpt2_bpe")
    reference = TorchTrainer(GPT2Config(), "f32", HYPER, compiled=False)
    ours = GptcoreTrainer(presets.get("gpt2"), torch.float32, HYPER)
    theirs = TorchTrainer(GPT2Config(), "bf16_master", HYPER, compiled=False)
    copy_weights(reference.model, ours.model)
    ours.model.bfloat16()
    f32 = _curve(reference, batches)
    away, noise = _curve(ours, batches) - f32, _curve(theirs, batches) - f32
    rms, largest = (
        (away.norm() / STEPS**0.5, noise.norm() / STEPS**0.5),
        (away.abs().max(), noise.abs().max()),
    )
    print(f"loss {f32[0]:.3f} to {f32[-5:].mean():.3f}; away from it, ours and torch's bf16:")
    print("rms {:.4f} and {:.4f}, largest {:.4f} and {:.4f}".format(*rms, *largest))
    assert f32[-5:].mean() < f32[0] - 3
    assert rms[0] <= 1.25 * rms[1]
    assert largest[0] <= 1.25 * largest[1]
