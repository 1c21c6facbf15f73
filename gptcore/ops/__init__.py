"""One public function per kernel, on torch tensors, NumPy and CuPy arrays.

Layout (B, T, H, D); letters as in ``docs/architecture.md``. Each module holds the function, its plain-torch
reference (any floating dtype, the tests' oracle in float64) and its torch registration. Importing this package
imports neither torch nor NumPy.

A module and its function share their name: after ``import gptcore.ops``, ``gptcore.ops.layer_norm`` is the
function, and ``from gptcore.ops.layer_norm import ...`` still reaches the module.
"""

from gptcore.ops.attention import attention, attention_backward, attention_qkv
from gptcore.ops.layer_norm import layer_norm, layer_norm_backward, layer_norm_stats
from gptcore.ops.matmul import matmul

__all__ = [
    "attention",
    "attention_backward",
    "attention_qkv",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_stats",
    "matmul",
]
