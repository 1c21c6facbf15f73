"""Where a token stands: places inside packed documents, rotary tables, ALiBi's slopes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy
import torch
from torch import Tensor, nn

from gptcore.models.config import GPTConfig, ScalingSpec


def document_positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """(total,) int32: each token's place in its own document; documents end at ``cu_seqlens[1:]``."""
    index = torch.arange(total, dtype=torch.int32, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, index, right=True) - 1
    return index - cu_seqlens[document]


def rotary_frequencies(dim: int, base: float, scaling: ScalingSpec) -> numpy.ndarray:
    """(dim / 2,) float64 radians per position, stretched as ``scaling`` says."""
    plain = base ** -(numpy.arange(0, dim, 2, dtype=numpy.float64) / dim)
    if scaling.kind == "none" or scaling.factor == 1.0:
        return plain
    stretched = plain / scaling.factor
    if scaling.kind == "linear":
        return stretched
    rotations = scaling.original_context * plain / (2 * math.pi)  # turns within the original context
    if scaling.kind == "llama3":
        # 1 keeps a frequency, 0 stretches it; between low_factor and high_factor turns it is a line
        keep = (rotations - scaling.low_factor) / (scaling.high_factor - scaling.low_factor)
    else:
        # YaRN draws the line over the index of the frequency, between those that make beta_slow and
        # beta_fast turns, to whole indices outwards
        def index(turns: float) -> float:
            return dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

        first = max(math.floor(index(scaling.beta_fast)), 0)
        last = min(math.ceil(index(scaling.beta_slow)), dim - 1)
        keep = 1.0 - (numpy.arange(dim // 2) - first) / max(last - first, 0.001)
    keep = numpy.clip(keep, 0.0, 1.0)
    return keep * plain + (1.0 - keep) * stretched


def rotary_tables(length: int, dim: int, base: float, scaling: ScalingSpec) -> tuple[Tensor, Tensor]:
    """cos and sin (length, dim / 2) f32, rounded from float64 so that no library's threads touch them."""
    angles = numpy.outer(numpy.arange(length), rotary_frequencies(dim, base, scaling))
    magnitude = 0.1 * math.log(scaling.factor) + 1.0 if scaling.kind == "yarn" else 1.0
    cos, sin = magnitude * numpy.cos(angles), magnitude * numpy.sin(angles)
    return torch.from_numpy(cos.astype(numpy.float32)), torch.from_numpy(sin.astype(numpy.float32))


class RotaryTables(nn.Module):
    """The tables of a model, a pair for each kind of layer; they stay f32 whatever the parameters are cast to."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        kinds = [
            (config.rotary_base(layer), config.position.scaling_of(layer))
            for layer in range(config.num_layers)
        ]
        self._distinct = list(dict.fromkeys(kinds))
        self._table_of = [self._distinct.index(kind) for kind in kinds]
        self._fill(torch.device("cpu"))

    def _fill(self, device: torch.device) -> None:
        config = self.config
        for i, (base, scaling) in enumerate(self._distinct):
            if device.type == "meta":
                shape = (config.context_length, config.rotary_dim // 2)
                cos, sin = torch.empty(shape, device=device), torch.empty(shape, device=device)
            else:
                cos, sin = rotary_tables(config.context_length, config.rotary_dim, base, scaling)
            self.register_buffer(f"cos{i}", cos.to(device), persistent=False)
            self.register_buffer(f"sin{i}", sin.to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryTables:
        self._fill(fn(torch.empty(0, device=self(0)[0].device)).device)
        return self

    def forward(self, layer: int) -> tuple[Tensor, Tensor]:
        """cos and sin for ``layer``."""
        i = self._table_of[layer]
        return getattr(self, f"cos{i}"), getattr(self, f"sin{i}")


def alibi_slopes(num_heads: int) -> list[float]:
    """Slopes of Press et al. 2022: 2**(-8h/H), and for other H every second one of the next power of two."""
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    between = [2.0 ** (-4.0 * (h + 1) / power) for h in range(0, 2 * power, 2)]
    return slopes + between[: num_heads - power]
