"""Initialisation, one family at a time.

| family  | matrices               | into the residual stream | tables           | source                |
| ------- | ---------------------- | ------------------------ | ---------------- | --------------------- |
| gpt1    | N(0, 0.02)             | the same                 | N(0, 0.02)       | Radford et al. 2018   |
| gpt2    | N(0, 0.02)             | N(0, 0.02 / sqrt(2L))    | N(0, 0.02)       | Radford et al. 2019   |
| opt     | N(0, 0.006)            | N(0, 0.006 / sqrt(2L))   | N(0, 0.006)      | Zhang et al. 2022     |
| bloom   | N(0, 1 / sqrt(3C))     | that / sqrt(2L)          | as matrices      | BigScience 2022       |
| llama   | N(0, 0.02)             | N(0, 0.02 / sqrt(2L))    | N(0, 0.02)       | unpublished; as GPT-2 |
| palm    | N(0, 1 / sqrt(fan in)) | the same                 | N(0, 1)          | Chowdhery et al. 2022 |
| glm     | Xavier, see below      | Xavier                   | N(0, 1/sqrt(3C)) | Zeng et al. 2022      |
| deepnet | Xavier, see below      | Xavier                   | N(0, 0.02)       | Wang et al. 2022      |

Xavier-normal deviations are scaled by (2L)**-0.5 (glm) or (8L)**-0.25 (deepnet) on value, output and
feed-forward projections, and not on query and key. Each expert is a feed-forward of its own and its router a matrix,
unless ``model.moe.router_init_scale`` says otherwise; the weights of noisy routing are 0. Biases and sinks are 0, gains
1. Values are drawn in f32 from one CPU generator in the order of the parameters and then rounded, so that a seed means
the same model in every dtype, on every device and with every number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gptcore.models.block import Attention
from gptcore.models.config import GPTConfig
from gptcore.models.norm import Norm
from gptcore.nn.feed_forward import GATED, FeedForward
from gptcore.nn.linear import Linear
from gptcore.nn.moe import MoE

# family: (deviation, None for 1 / sqrt(3C); whether projections into the stream are divided by sqrt(2L))
_NORMAL = {
    "gpt1": (0.02, False),
    "gpt2": (0.02, True),
    "opt": (0.006, True),
    "bloom": (None, True),
    "llama": (0.02, True),
}


class Projection(Linear):
    """A linear map outside the blocks (the head, OPT-350M's way in and out), initialised by itself."""


class _Part(NamedTuple):
    """Rows of a matrix initialised alike, and their role, a name that ``deviation`` knows."""

    rows: Tensor
    role: str


def initialise(model: nn.Module, config: GPTConfig, seed: int) -> None:
    """Fills every parameter of ``model`` in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Norm):
                module.weight.fill_(0.0 if module.zero_centred else 1.0)
            for name in ("bias", "sinks"):
                if isinstance(vector := getattr(module, name, None), Tensor):
                    vector.zero_()
            for part in _parts(module):
                _fill(part.rows, deviation(config, part.role, part.rows), generator)


def _parts(module: nn.Module) -> Iterator[_Part]:
    """The parts of the matrices that ``module`` itself is responsible for."""
    if isinstance(module, Attention):
        kv = module.kv_heads * module.head_dim
        q, k, v = module.qkv.weight.split([module.heads * module.head_dim, kv, kv])
        yield from (_Part(q, "query_key"), _Part(k, "query_key"), _Part(v, "value"))
        yield _Part(module.out.weight, "out")
    elif isinstance(module, MoE):
        yield _Part(module.router.weight, "router")
        if module.noise is not None:
            yield _Part(module.noise.weight, "noise")
        halves = 2 if module.activation in GATED else 1
        for up, down in zip(module.up.weight, module.down.weight, strict=True):
            yield from (_Part(rows, "in") for rows in up.chunk(halves))
            yield _Part(down, "out")
    elif isinstance(module, FeedForward):
        yield from (_Part(rows, "in") for rows in module.up.weight.chunk(2 if module.gated else 1))
        yield _Part(module.down.weight, "out")
    elif isinstance(module, nn.Embedding):
        yield _Part(module.weight, "table")
    elif isinstance(module, Projection):
        yield _Part(module.weight, "projection")


def deviation(config: GPTConfig, role: str, rows: Tensor) -> float:
    """Standard deviation of the weights ``rows`` (fan out, fan in) in their role: table, projection, in, query_key,
    value, out, router or noise."""
    if role == "noise":
        return 0.0
    if role == "router" and config.moe is not None and config.moe.router_init_scale is not None:
        return math.sqrt(config.moe.router_init_scale / config.width)
    depth = 2 * config.num_layers
    fan_out, fan_in = rows.shape
    small = (3 * config.width) ** -0.5
    if config.init == "palm":
        return 1.0 if role == "table" else fan_in**-0.5
    if config.init in ("glm", "deepnet"):
        if role in ("table", "projection"):
            return config.init_std or (small if config.init == "glm" else 0.02)
        gain = depth**-0.5 if config.init == "glm" else (4 * depth) ** -0.25
        return math.sqrt(2.0 / (fan_in + fan_out)) * (1.0 if role == "query_key" else gain)
    std, scaled = _NORMAL[config.init]
    std = config.init_std or std or small
    return std / math.sqrt(depth) if scaled and role == "out" else std


def _fill(rows: Tensor, std: float, generator: torch.Generator) -> None:
    """Draws normal values a slice at a time, so that a large bf16 table needs no f32 copy of itself."""
    step = max(1, (1 << 24) // rows.shape[1])
    for begin in range(0, rows.shape[0], step):
        part = rows[begin : begin + step]
        part.copy_(torch.randn(part.shape, generator=generator, dtype=torch.float32) * std)
