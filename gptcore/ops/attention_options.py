"""The options that every form of attention takes, and the order in which kernels take their values."""

from __future__ import annotations

from typing import Any, TypedDict

from gptcore.ops.arrays import Array
from gptcore.ops.attention_dropout import seed_array


class AttentionOptions(TypedDict, total=False):
    """The keyword options of :func:`gptcore.ops.attention`, which says what they mean and their defaults."""

    causal: bool
    window_size: tuple[int, int]
    softmax_scale: float | None
    soft_cap: float | None
    alibi_slopes: Array | None
    attn_mask: Array | None
    attn_bias: Array | None
    sinks: Array | None
    dropout_p: float
    seed: int | Array | None
    offset: int
    prefix_lengths: Array | None
    sparse_stride: int
    sparse_summary: int


# AttentionOptions of attention.h, name and type in torch's schema language, in its order. A new option is a line
# here, in AttentionOptions, a keyword of attention, a parameter of values_of and of dense_attention.
OPTIONS = {
    "softmax_scale": "float",
    "causal": "bool",
    "left": "int",
    "right": "int",
    "soft_cap": "float",
    "alibi_slopes": "Tensor?",
    "attn_mask": "Tensor?",
    "attn_bias": "Tensor?",
    "sinks": "Tensor?",
    "dropout_p": "float",
    "seed": "Tensor?",
    "offset": "int",
    "prefix_lengths": "Tensor?",
    "sparse_stride": "int",
    "sparse_summary": "int",
}
SCHEMA = ", ".join(f"{kind} {name}" for name, kind in OPTIONS.items())
MASK, BIAS, SINKS = (list(OPTIONS).index(name) for name in ("attn_mask", "attn_bias", "sinks"))
TENSOR_OPTIONS = [i for i, kind in enumerate(OPTIONS.values()) if kind == "Tensor?"]


def values_of(
    like: Array,
    head_dim: int,
    causal: bool,
    window_size: tuple[int, int],
    softmax_scale: float | None,
    soft_cap: float | None,
    alibi_slopes: Array | None,
    attn_mask: Array | None,
    attn_bias: Array | None,
    sinks: Array | None,
    dropout_p: float,
    seed: int | Array | None,
    offset: int,
    prefix_lengths: Array | None,
    sparse_stride: int,
    sparse_summary: int,
) -> tuple[Any, ...]:
    """Values for ``OPTIONS`` from the keyword options, in their order: arrays are made like ``like``."""
    return (
        (head_dim**-0.5 if head_dim else 1.0) if softmax_scale is None else softmax_scale,
        causal,
        *window_size,
        0.0 if soft_cap is None else soft_cap,
        alibi_slopes,
        attn_mask,
        attn_bias,
        sinks,
        dropout_p,
        seed_array(like, seed) if dropout_p else None,
        offset,
        prefix_lengths,
        sparse_stride,
        sparse_summary,
    )
