"""torch.nn's modules over gptcore's kernels: the same arguments, the same state dict, another engine."""

import gptcore.torch_required  # noqa: F401 - first, for its sentence where there is none
from gptcore.nn.activation import GELU, SiLU
from gptcore.nn.attention import MultiheadAttention
from gptcore.nn.embedding import Embedding
from gptcore.nn.linear import Linear
from gptcore.nn.norm import LayerNorm, RMSNorm
from gptcore.nn.transformer import TransformerEncoderLayer

__all__ = [
    "GELU", "Embedding", "LayerNorm", "Linear", "MultiheadAttention", "RMSNorm", "SiLU", "TransformerEncoderLayer",
]  # fmt: skip
