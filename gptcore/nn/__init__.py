"""torch.nn's modules over gptcore's kernels, with the same arguments and state dict, and modules torch has none of."""

import gptcore.torch_required  # noqa: F401 - first, for its sentence where there is none
from gptcore.nn.activation import GELU, SiLU
from gptcore.nn.attention import MultiheadAttention
from gptcore.nn.embedding import Embedding
from gptcore.nn.feed_forward import FeedForward
from gptcore.nn.linear import Linear
from gptcore.nn.moe import GroupedLinear, MoE, MoEOutput, MoEStatistics
from gptcore.nn.norm import LayerNorm, RMSNorm
from gptcore.nn.transformer import TransformerEncoderLayer

__all__ = [
    "GELU", "Embedding", "FeedForward", "GroupedLinear", "LayerNorm", "Linear", "MoE", "MoEOutput", "MoEStatistics",
    "MultiheadAttention", "RMSNorm", "SiLU", "TransformerEncoderLayer",
]  # fmt: skip
