"""One public function per kernel, on torch tensors, NumPy and CuPy arrays.

Layout (B, T, H, D); letters as in ``docs/architecture.md``. Each module holds the function, its plain-torch
reference (any floating dtype, the tests' oracle in float64) and its torch registration. Importing this
package imports neither torch nor NumPy. ``docs/arrays.md`` tells how they serve without autograd: which backward
belongs to which function, and what it needs.

A module and its function share their name: after ``import gptcore.ops``, ``gptcore.ops.layer_norm`` is the
function, and ``from gptcore.ops.grouped_linear import grouped_linear, grouped_linear_backward
from gptcore.ops.layer_norm import ...`` still reaches the module.
"""

from gptcore.ops.adafactor import adafactor_
from gptcore.ops.adamw import adamw_
from gptcore.ops.adamw_8bit import adamw_8bit_
from gptcore.ops.attention import attention, attention_backward, attention_qkv, attention_qkv_backward
from gptcore.ops.attention_paged import attention_paged
from gptcore.ops.crc32c import crc32c
from gptcore.ops.cross_entropy import cross_entropy, cross_entropy_backward
from gptcore.ops.embedding import embedding, embedding_backward
from gptcore.ops.gated_activation import (
    gated_activation_backward,
    geglu,
    geglu_backward,
    geglu_packed,
    geglu_packed_backward,
    gelu,
    gelu_backward,
    relu,
    relu_backward,
    silu,
    silu_backward,
    swiglu,
    swiglu_backward,
    swiglu_packed,
    swiglu_packed_backward,
)
from gptcore.ops.grad_norm import grad_norm, square_sums
from gptcore.ops.grouped_linear import grouped_linear, grouped_linear_backward
from gptcore.ops.layer_norm import layer_norm, layer_norm_backward, layer_norm_stats
from gptcore.ops.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_backward,
    token_logprobs,
    token_logprobs_backward,
)
from gptcore.ops.matmul import matmul
from gptcore.ops.moe_dispatch import (
    moe_combine,
    moe_combine_backward,
    moe_dispatch,
    moe_dispatch_backward,
)
from gptcore.ops.moe_router import expert_capacity, moe_router, moe_router_backward
from gptcore.ops.philox import philox
from gptcore.ops.rms_norm import rms_norm, rms_norm_backward, rms_norm_stats
from gptcore.ops.rotary import rotary, rotary_tables
from gptcore.ops.sgd import sgd_

__all__ = [
    "adafactor_",
    "adamw_",
    "adamw_8bit_",
    "attention",
    "attention_backward",
    "attention_paged",
    "attention_qkv",
    "attention_qkv_backward",
    "crc32c",
    "cross_entropy",
    "cross_entropy_backward",
    "embedding",
    "embedding_backward",
    "expert_capacity",
    "gated_activation_backward",
    "geglu",
    "geglu_backward",
    "geglu_packed",
    "geglu_packed_backward",
    "gelu",
    "gelu_backward",
    "grad_norm",
    "grouped_linear",
    "grouped_linear_backward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_stats",
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
    "matmul",
    "moe_combine",
    "moe_combine_backward",
    "moe_dispatch",
    "moe_dispatch_backward",
    "moe_router",
    "moe_router_backward",
    "philox",
    "relu",
    "relu_backward",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_stats",
    "rotary",
    "rotary_tables",
    "sgd_",
    "silu",
    "silu_backward",
    "square_sums",
    "swiglu",
    "swiglu_backward",
    "swiglu_packed",
    "swiglu_packed_backward",
    "token_logprobs",
    "token_logprobs_backward",
]
