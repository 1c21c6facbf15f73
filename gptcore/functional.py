"""torch.nn.functional's names, signatures and semantics over gptcore's kernels.

``import gptcore.functional as F`` in place of ``import torch.nn.functional as F``: what a kernel covers runs on
it, everything else (other options, dtypes, devices, functions, and invalid input, so that errors are torch's own)
goes to torch. ``gptcore.backend.report()`` tells which calls went there and why.
"""

from __future__ import annotations

import gptcore.torch_required  # noqa: F401 - first, for its sentence where there is none

# isort: split
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as _torch_functional
from torch import Tensor

from gptcore import backend, ops

__all__ = [
    "cross_entropy",
    "embedding",
    "gelu",
    "layer_norm",
    "linear",
    "rms_norm",
    "scaled_dot_product_attention",
    "silu",
]

PLAIN_GEMM = "plain GEMM: torch's product is at the hardware's limit"

_KERNEL_DTYPES = (torch.float32, torch.bfloat16)
# Rows up to which a product without gradients takes gptcore's fixed-order kernel: a row's bits then do not depend
# on how many rows share the call.
_SMALL_ROWS = 64


def __getattr__(name: str) -> Any:
    """Every other function of torch.nn.functional, unchanged."""
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(_torch_functional, name)


def _to_torch(name: str, reason: str, *args: Any, **keywords: Any) -> Any:
    if not torch.compiler.is_compiling():
        backend.note_fallback(name, reason)
    function: Callable[..., Any] = getattr(_torch_functional, name)
    return function(*args, **keywords)


def _uncovered_tensor(x: Any, kernel: str, beside: Tensor | None = None) -> str | None:
    """Why the kernels of ``kernel`` do not take ``x``, which lies with ``beside``, or None if they do."""
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__} instead of a tensor"
    if x.device.type != "cpu" and (reason := backend.why_no_kernels(x.device, kernel)):
        return reason
    if beside is not None and x.device != beside.device:
        return "several devices"
    if x.layout is not torch.strided:
        return f"layout {x.layout}"
    if x.dtype not in _KERNEL_DTYPES and not (kernel == "attention" and backend.takes_half(x)):
        return f"dtype {x.dtype}"
    return None


def _uncovered_norm(kernel: str, x: Any, shape: Any, *vectors: Tensor | None) -> str | None:
    if reason := _uncovered_tensor(x, kernel):
        return reason
    try:
        shape = tuple(shape)
    except TypeError:
        return "normalized_shape"
    if not shape or tuple(x.shape[-len(shape) :]) != shape or 0 in shape:
        return "normalized_shape"
    given = [v for v in vectors if v is not None]
    for v in given:
        if reason := _uncovered_tensor(v, kernel, x):
            return reason
        if tuple(v.shape) != shape:
            return "shape of weight or bias"
        if v.dtype not in (x.dtype, torch.float32) or v.dtype != given[0].dtype:
            return "mixed dtypes of input and weight"
    return None


def _flat(x: Tensor | None, dims: int) -> Tensor | None:
    return x if x is None or dims == 1 else x.flatten(-dims)


def _shifted(call: str, weight: Tensor | None, offset: float) -> Tensor | None:
    """``weight + offset``, for torch's norms, which take no offset."""
    if not offset:
        return weight
    if weight is None:
        raise ValueError(f"{call}: argument 'weight_offset': got {offset} without 'weight', expected 0")
    return weight + offset


def layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
) -> Tensor:
    """As ``torch.nn.functional.layer_norm``; f32 and bf16 run on gptcore's kernel.

    ``weight_offset`` is added to ``weight``: 1 for a zero-centred weight.
    """
    reason = _uncovered_norm("layer_norm", input, normalized_shape, weight, bias) or (
        eps < 0 and "negative eps"
    )
    if reason:
        weight = _shifted("layer_norm", weight, weight_offset)
        return _to_torch("layer_norm", reason, input, normalized_shape, weight, bias, eps)
    dims = len(normalized_shape)
    y = ops.layer_norm(
        _flat(input, dims), _flat(weight, dims), _flat(bias, dims), eps, weight_offset=weight_offset
    )
    return y if dims == 1 else y.view(input.shape)


def rms_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
) -> Tensor:
    """As ``torch.nn.functional.rms_norm``; f32 and bf16 run on gptcore's kernel.

    ``weight_offset`` is added to ``weight``: 1 for a zero-centred weight.
    """
    reason = _uncovered_norm("rms_norm", input, normalized_shape, weight) or (
        eps is not None and eps < 0 and "negative eps"
    )
    if reason:
        weight = _shifted("rms_norm", weight, weight_offset)
        return _to_torch("rms_norm", reason, input, normalized_shape, weight, eps)
    dims = len(normalized_shape)
    # torch's default is the epsilon of the type it computes in, which is f32 for bf16 too.
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    y = ops.rms_norm(_flat(input, dims), _flat(weight, dims), eps, weight_offset=weight_offset)
    return y if dims == 1 else y.view(input.shape)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """As ``torch.nn.functional.gelu``."""
    reason = _uncovered_tensor(input, "gated_activation") or (
        approximate not in ("none", "tanh") and "approximate"
    )
    if not reason and input.ndim == 0:
        reason = "a scalar"
    if reason:
        return _to_torch("gelu", reason, input, approximate=approximate)
    return ops.gelu(input, approximate=approximate)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """As ``torch.nn.functional.silu``."""
    reason = _uncovered_tensor(input, "gated_activation") or (inplace and "inplace")
    if not reason and input.ndim == 0:
        reason = "a scalar"
    if reason:
        return _to_torch("silu", reason, input, inplace)
    return ops.silu(input)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``torch.nn.functional.linear``. Large products are torch's, and all on CUDA; without gradients, few rows run
    on gptcore's fixed-order product, whose bits do not depend on how many rows share the call."""
    if _small_product(input, weight, bias):
        y = ops.matmul(input.reshape(-1, input.shape[-1]), weight, bias=bias, transpose_b=True)
        return y.view(*input.shape[:-1], weight.shape[0])
    return _to_torch("linear", PLAIN_GEMM, input, weight, bias)


def _small_product(x: Any, weight: Any, bias: Any) -> bool:
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    if any(_uncovered_tensor(t, "matmul") for t in (x, weight, *(() if bias is None else (bias,)))):
        return False
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        return False
    if bias is not None and (bias.dtype != x.dtype or tuple(bias.shape) != (weight.shape[0],)):
        return False
    grad = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    rows = math.prod(x.shape[:-1])
    return 0 < rows <= _SMALL_ROWS and weight.numel() > 0 and not (grad and torch.is_grad_enabled())


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """As ``torch.nn.functional.embedding``; the gradient is summed in a fixed order."""
    reason = _uncovered_tensor(weight, "embedding")
    options = {"padding_idx": padding_idx is not None, "max_norm": max_norm is not None}
    options |= {"scale_grad_by_freq": scale_grad_by_freq, "sparse": sparse}
    reason = reason or next((name for name, used in options.items() if used), None)
    if not reason and not (
        isinstance(input, Tensor)
        and input.dtype in (torch.int64, torch.int32)
        and input.device == weight.device
    ):
        reason = "type of the indices"
    if not reason and (weight.ndim != 2 or not _within(input, weight.shape[0])):
        reason = "shape of weight or indices out of range"
    if reason:
        return _to_torch(
            "embedding", reason, input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
    return ops.embedding(input, weight)


def _within(ids: Tensor, size: int) -> bool:
    """Whether all ids are valid, so that torch words the error for those that are not. The kernel checks too; on
    another device, which would have to be waited for, the kernel alone."""
    if torch.compiler.is_compiling() or ids.device.type != "cpu" or ids.numel() == 0:
        return True
    low, high = torch.aminmax(ids)
    return bool(low >= 0) and bool(high < size)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """As ``torch.nn.functional.cross_entropy``; class indices over (N, C) logits run on gptcore's kernel."""
    reason = _uncovered_tensor(input, "cross_entropy")
    if not reason and (weight is not None or size_average is not None or reduce is not None):
        reason = "class weights or legacy reduction arguments"
    if not reason and (input.ndim != 2 or not isinstance(target, Tensor) or target.dtype != torch.int64):
        reason = "shape of the logits or type of the targets"
    if not reason and (
        tuple(target.shape) != (input.shape[0],) or 0 in input.shape or target.device != input.device
    ):
        reason = "shape of the targets"
    if not reason and (reduction not in ("mean", "sum", "none") or not 0.0 <= label_smoothing <= 1.0):
        reason = "reduction or label_smoothing"
    if not reason and input.device.type == "cpu":
        counted = target[target != ignore_index]  # as many as there are: not asked of another device
        reason = None if _within(counted, input.shape[1]) else "targets out of range"
    if reason:
        return _to_torch(
            "cross_entropy",
            reason,
            input,
            target,
            weight,
            size_average,
            ignore_index,
            reduce,
            reduction,
            label_smoothing,
        )
    return ops.cross_entropy(
        input, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
    )


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As ``torch.nn.functional.scaled_dot_product_attention``: layout (B, H, T, D), is_causal aligned top-left.

    Dropout takes one number from torch's default generator, which fixes all that is dropped; not the same as torch's.
    """
    reason = _uncovered_attention(query, key, value, enable_gqa)
    if not reason and attn_mask is not None:
        reason = "attn_mask and is_causal" if is_causal else _uncovered_mask(query, key, attn_mask)
    if not reason and not 0.0 <= dropout_p <= 1.0:
        reason = "dropout_p"
    if reason:
        return _to_torch(
            "scaled_dot_product_attention",
            reason,
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    length = query.shape[-2]
    window = (-1, -1)
    if is_causal and key.shape[-2] > length:
        # Top-left: later keys than the last query's position are attended by nobody.
        key, value = key[..., :length, :], value[..., :length, :]
    elif is_causal and key.shape[-2] < length:
        # The kernel aligns bottom-right; a window that reaches back by the difference is top-left again.
        window, is_causal = (-1, length - key.shape[-2]), False
    heads_second = [_four_dims(x).transpose(1, 2) for x in (query, key, value)]
    seed = torch.randint(2**63 - 1, (1,), device=query.device) if dropout_p else None
    out = ops.attention(
        *heads_second, causal=is_causal, window_size=window, softmax_scale=scale, dropout_p=dropout_p, seed=seed,
        **_mask_options(query, key, attn_mask),
    )  # fmt: skip
    return out.transpose(1, 2).view(query.shape) if query.ndim != 4 else out.transpose(1, 2)


def _four_dims(x: Tensor) -> Tensor:
    return x if x.ndim == 4 else x.unsqueeze(1)


def _uncovered_mask(query: Tensor, key: Tensor, mask: Any) -> str | None:
    if not isinstance(mask, Tensor) or mask.device != query.device or mask.layout is not torch.strided:
        return "kind of attn_mask"
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return "dtype of attn_mask"
    full = (*query.shape[:-1], key.shape[-2])
    shape = (1,) * (len(full) - mask.ndim) + tuple(mask.shape)
    if not 2 <= mask.ndim <= len(full) or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
        return "shape of attn_mask"
    if mask.requires_grad and shape[-2:] != full[-2:]:
        return "gradient of an attn_mask that is broadcast over queries or keys"
    return None


def _mask_options(query: Tensor, key: Tensor, mask: Tensor | None) -> dict[str, Any]:
    """The mask as ``ops.attention`` takes it: heads, then (T, S), with keys of its own."""
    if mask is None:
        return {}
    if query.ndim == 3 and mask.ndim == 3:
        mask = mask.unsqueeze(1)
    if mask.shape[-1] != key.shape[-2]:
        mask = mask.expand(*mask.shape[:-1], key.shape[-2]).contiguous()
    return {"attn_mask" if mask.dtype == torch.bool else "attn_bias": mask}


def _uncovered_attention(query: Any, key: Any, value: Any, enable_gqa: bool) -> str | None:
    for x in (query, key, value):
        if reason := _uncovered_tensor(x, "attention", query):
            return reason
    if not (query.ndim == key.ndim == value.ndim and query.ndim in (3, 4)):
        return "number of dimensions"
    if not query.dtype == key.dtype == value.dtype:
        return "mixed dtypes"
    if key.shape != value.shape or query.shape[0] != key.shape[0] or query.shape[-1] != key.shape[-1]:
        return "shapes of query, key and value"
    if 0 in query.shape or 0 in key.shape or query.shape[-1] > 256:
        return "an empty tensor or a head size above 256"
    if query.ndim == 4 and query.shape[1] != key.shape[1]:
        if not enable_gqa:
            return "shapes of query, key and value"
        if query.shape[1] % key.shape[1]:
            return "number of heads"
    if query.ndim == 3 and enable_gqa:
        return "enable_gqa"
    return None
