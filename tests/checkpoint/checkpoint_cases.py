"""Tensors of every kind for checkpoints, their comparison, and ways to damage a file."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

ENVIRONMENT = dict(os.environ)  # where conftest.py has put the package under test
STATE = {"model": {"layers": 2}, "loss": 0.1 + 0.2, "text": "Grüße", "none": None}


def make_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(7, 5, generator=generator)
    return {
        "model/weight": base,
        "model/bf16": torch.randn(33, generator=generator).bfloat16(),
        "model/strided": torch.randn(6, 8, generator=generator)[:, ::2],
        "model/one": torch.randn(2, generator=generator)[::2],
        "optimizer/step": torch.tensor(3),
        "optimizer/f64": torch.randn(2, 3, 4, generator=generator, dtype=torch.float64),
        "rng": torch.randint(0, 256, (17,), generator=generator, dtype=torch.uint8),
        "empty": torch.empty(0, 4),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
        "flags": torch.tensor([True, False]),
    }


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        left, right = (t.contiguous().as_strided((t.numel(),), (1,)) for t in (got[name], tensor))
        assert torch.equal(left.view(torch.uint8), right.view(torch.uint8)), name


def as_format_2(path: Path) -> None:
    """Make the checkpoint at ``path`` one of the format before, whose pieces have SHA-256."""
    body = json.loads((path / "manifest.json").read_bytes())
    del body["sha256"]
    body["format"] = "gptcore-checkpoint-2"
    for shard, facts in enumerate(body["shards"]):
        data = (path / facts["file"]).read_bytes()
        length = 8 + int.from_bytes(data[:8], "little")
        places = json.loads(data[8:length])
        for tensor in body["tensors"].values():
            for piece in tensor["pieces"]:
                if piece["shard"] == shard:
                    begin, end = places[piece["key"]]["data_offsets"]
                    del piece["crc32c"]
                    piece["sha256"] = hashlib.sha256(data[length + begin : length + end]).hexdigest()
    text = json.dumps(body)[1:]
    digest = hashlib.sha256(text.encode()).hexdigest()
    (path / "manifest.json").write_text(f'{{"sha256": "{digest}",{text}')


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
