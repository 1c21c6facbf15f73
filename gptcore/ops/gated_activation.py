"""Activations of the feed-forward layer with bias: GELU, SiLU, ReLU and the gated SwiGLU, GEGLU, ReGLU."""

from __future__ import annotations

import math
from typing import Any

from gptcore import backend
from gptcore.ops.arrays import Array, empty_like, is_torch, rows
from gptcore.ops.registration import TorchOp, refuse_out_with_grad

# The kernel's numbers for the activations; PACKED is added where gate and up come in one tensor.
GELU_TANH, GELU_ERF, SILU, RELU = range(4)
PACKED = 4
_GELU = {"tanh": GELU_TANH, "none": GELU_ERF}


def gelu(
    x: Array, bias: Array | None = None, *, approximate: str = "tanh", out: Array | None = None
) -> Array:
    """``a Phi(a)`` with ``a = x + bias``, Phi the normal distribution function.

    Args:
        x: (..., F), f32 or bf16; torch tensor (differentiable), NumPy or CuPy array.
        bias: (F,), f32 or bf16, or None.
        approximate: ``"tanh"``, ``a / (1 + exp(-2 sqrt(2/pi) (a + 0.044715 a^3)))`` as in GPT-2, or
            ``"none"``, by the error function.
        out: where to write the result; shape and dtype of ``x``. Not differentiable.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; nothing is written then.

    Source: Hendrycks, Gimpel 2016, "Gaussian Error Linear Units".
    """
    return _call(x, None, bias, None, _gelu_kind(approximate), out)


def silu(x: Array, bias: Array | None = None, *, out: Array | None = None) -> Array:
    """``a / (1 + exp(-a))`` with ``a = x + bias``. Arguments as for :func:`gelu`."""
    return _call(x, None, bias, None, SILU, out)


def relu(x: Array, bias: Array | None = None, *, out: Array | None = None) -> Array:
    """``max(a, 0)`` with ``a = x + bias``. Arguments as for :func:`gelu`."""
    return _call(x, None, bias, None, RELU, out)


def swiglu(
    gate: Array,
    up: Array,
    gate_bias: Array | None = None,
    up_bias: Array | None = None,
    *,
    out: Array | None = None,
) -> Array:
    """``silu(gate + gate_bias) * (up + up_bias)``.

    Args:
        gate, up: (..., F), f32 or bf16, of one type and shape; slices of one fused projection are read in
            place. Where they are its halves, :func:`swiglu_packed` also writes one gradient for it.
        gate_bias, up_bias: (F,), f32 or bf16 (both of one type), or None.
        out: where to write the result; shape and dtype of ``gate``. Not differentiable.

    Returns:
        Shape and dtype of ``gate``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; nothing is written then.

    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """
    return _call(gate, up, gate_bias, up_bias, SILU, out)


def geglu(
    gate: Array,
    up: Array,
    gate_bias: Array | None = None,
    up_bias: Array | None = None,
    *,
    approximate: str = "none",
    out: Array | None = None,
) -> Array:
    """``gelu(gate + gate_bias) * (up + up_bias)``. Arguments as for :func:`swiglu` and :func:`gelu`."""
    return _call(gate, up, gate_bias, up_bias, _gelu_kind(approximate), out)


def swiglu_packed(gate_up: Array, bias: Array | None = None, *, out: Array | None = None) -> Array:
    """:func:`swiglu` of the two halves of a fused projection's output, the fastest form.

    Its gradient is one tensor like ``gate_up``, so autograd has no halves to join.

    Args:
        gate_up: (..., 2F), the gate in the first half. bias: (2F,) or None.

    Returns:
        (..., F).
    """
    return _call(gate_up, None, bias, None, SILU + PACKED, out)


def geglu_packed(
    gate_up: Array, bias: Array | None = None, *, approximate: str = "none", out: Array | None = None
) -> Array:
    """:func:`geglu` of the two halves of a fused projection's output; see :func:`swiglu_packed`."""
    return _call(gate_up, None, bias, None, _gelu_kind(approximate) + PACKED, out)


def gelu_reference(x: Any, bias: Any = None, *, approximate: str = "tanh") -> Any:
    """:func:`gelu` in plain torch, any floating dtype, differentiable any number of times."""
    a = x if bias is None else x + bias
    if approximate == "tanh":
        return a * (a * (math.sqrt(8 / math.pi) * (1 + 0.044715 * a * a))).sigmoid()
    return a * 0.5 * (1 + (a * math.sqrt(0.5)).erf())


def silu_reference(x: Any, bias: Any = None) -> Any:
    """:func:`silu` in plain torch."""
    a = x if bias is None else x + bias
    return a * a.sigmoid()


def relu_reference(x: Any, bias: Any = None) -> Any:
    """:func:`relu` in plain torch."""
    a = x if bias is None else x + bias
    return a.relu()


def swiglu_reference(gate: Any, up: Any, gate_bias: Any = None, up_bias: Any = None) -> Any:
    """:func:`swiglu` in plain torch."""
    return silu_reference(gate, gate_bias) * (up if up_bias is None else up + up_bias)


def geglu_reference(
    gate: Any, up: Any, gate_bias: Any = None, up_bias: Any = None, *, approximate: str = "none"
) -> Any:
    """:func:`geglu` in plain torch."""
    return gelu_reference(gate, gate_bias, approximate=approximate) * (
        up if up_bias is None else up + up_bias
    )


def _gelu_kind(approximate: str) -> int:
    try:
        return _GELU[approximate]
    except KeyError:
        raise ValueError(
            f"gelu: argument 'approximate': got {approximate!r}, expected 'tanh' or 'none'"
        ) from None


def _call(gate: Array, up: Any, gate_bias: Any, up_bias: Any, kind: int, out: Array | None) -> Array:
    if out is None:
        return _gated_activation(gate, up, gate_bias, up_bias, kind)
    refuse_out_with_grad("gated_activation", gate, up, gate_bias, up_bias)
    return _run(gate, up, gate_bias, up_bias, kind, out)


def _new_output(gate: Array, kind: int) -> Array:
    if kind < PACKED:
        return empty_like(gate)
    shape = (*gate.shape[:-1], gate.shape[-1] // 2)
    return empty_like(gate[..., : shape[-1]]) if not is_torch(gate) else gate.new_empty(shape)


def _run(gate: Array, up: Any, gate_bias: Any, up_bias: Any, kind: int, out: Array | None = None) -> Array:
    y = _new_output(gate, kind) if out is None else out
    backend.extension().gated_activation_forward(kind, rows(gate), rows(up), gate_bias, up_bias, y)
    return y


def gated_activation_backward(
    grad_y: Array, gate: Array, up: Array | None, gate_bias: Array | None, up_bias: Array | None, kind: int
) -> tuple[Array, Array | None, Array | None, Array | None]:
    """Gradients ``(dgate, dup, dgate_bias, dup_bias)`` of any function of this module, None for what was None.

    Functions named after the forward ones, as :func:`swiglu_backward`, need no ``kind``.

    Args:
        grad_y: gradient of the result; the others as given to the forward function.
        kind: ``GELU_TANH``, ``GELU_ERF``, ``SILU`` or ``RELU``, plus ``PACKED`` where ``gate`` has both.
    """
    dgate = empty_like(gate)
    dup = None if up is None else empty_like(up)
    dgate_bias = None if gate_bias is None else empty_like(gate_bias)
    dup_bias = None if up_bias is None else empty_like(up_bias)
    backend.extension().gated_activation_backward(
        kind, rows(grad_y), rows(gate), rows(up), gate_bias, up_bias, dgate, dup, dgate_bias, dup_bias
    )
    return dgate, dup, dgate_bias, dup_bias


def gelu_backward(
    grad_y: Array, x: Array, bias: Array | None = None, *, approximate: str = "tanh"
) -> tuple[Array, Array | None]:
    """Gradients ``(dx, dbias)`` of :func:`gelu`, dbias None without a bias."""
    return _backward_of_one(grad_y, x, bias, _gelu_kind(approximate))


def silu_backward(grad_y: Array, x: Array, bias: Array | None = None) -> tuple[Array, Array | None]:
    """Gradients ``(dx, dbias)`` of :func:`silu`, dbias None without a bias."""
    return _backward_of_one(grad_y, x, bias, SILU)


def relu_backward(grad_y: Array, x: Array, bias: Array | None = None) -> tuple[Array, Array | None]:
    """Gradients ``(dx, dbias)`` of :func:`relu`, dbias None without a bias."""
    return _backward_of_one(grad_y, x, bias, RELU)


def swiglu_backward(
    grad_y: Array, gate: Array, up: Array, gate_bias: Array | None = None, up_bias: Array | None = None
) -> tuple[Array, Array | None, Array | None, Array | None]:
    """Gradients ``(dgate, dup, dgate_bias, dup_bias)`` of :func:`swiglu`, None for what was None."""
    return gated_activation_backward(grad_y, gate, up, gate_bias, up_bias, SILU)


def geglu_backward(
    grad_y: Array,
    gate: Array,
    up: Array,
    gate_bias: Array | None = None,
    up_bias: Array | None = None,
    *,
    approximate: str = "none",
) -> tuple[Array, Array | None, Array | None, Array | None]:
    """Gradients ``(dgate, dup, dgate_bias, dup_bias)`` of :func:`geglu`, None for what was None."""
    return gated_activation_backward(grad_y, gate, up, gate_bias, up_bias, _gelu_kind(approximate))


def swiglu_packed_backward(
    grad_y: Array, gate_up: Array, bias: Array | None = None
) -> tuple[Array, Array | None]:
    """Gradients ``(dgate_up, dbias)`` of :func:`swiglu_packed`, dbias None without a bias."""
    return _backward_of_one(grad_y, gate_up, bias, SILU + PACKED)


def geglu_packed_backward(
    grad_y: Array, gate_up: Array, bias: Array | None = None, *, approximate: str = "none"
) -> tuple[Array, Array | None]:
    """Gradients ``(dgate_up, dbias)`` of :func:`geglu_packed`, dbias None without a bias."""
    return _backward_of_one(grad_y, gate_up, bias, _gelu_kind(approximate) + PACKED)


def _backward_of_one(grad_y: Array, x: Array, bias: Array | None, kind: int) -> tuple[Array, Array | None]:
    dx, _, dbias, _ = gated_activation_backward(grad_y, x, None, bias, None, kind)
    return dx, dbias


# --- torch -------------------------------------------------------------------------------------------------


def _fake(gate: Any, up: Any, gate_bias: Any, up_bias: Any, kind: int) -> Any:
    shape = gate.shape if kind < PACKED else (*gate.shape[:-1], gate.shape[-1] // 2)
    return gate.new_empty(shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    gate, up, gate_bias, up_bias, ctx.options = inputs
    ctx.save_for_backward(gate, up, gate_bias, up_bias)


def _backward(ctx: Any, grad_y: Any) -> tuple[Any, ...]:
    gate, up, gate_bias, up_bias = ctx.saved_tensors
    dgate, dup, dgate_bias, dup_bias = _gradient(grad_y, gate, up, gate_bias, up_bias, ctx.options)
    return (
        dgate,
        None if up is None else dup,
        None if gate_bias is None else dgate_bias,
        None if up_bias is None else dup_bias,
        None,
    )


def _backward_forward(
    grad_y: Any, gate: Any, up: Any, gate_bias: Any, up_bias: Any, kind: int
) -> tuple[Any, ...]:
    gradients = gated_activation_backward(grad_y, gate, up, gate_bias, up_bias, kind)
    return tuple(gate.new_empty((0,)) if g is None else g for g in gradients)


def _backward_fake(
    grad_y: Any, gate: Any, up: Any, gate_bias: Any, up_bias: Any, kind: int
) -> tuple[Any, ...]:
    inputs = (gate, up, gate_bias, up_bias)
    return tuple(gate.new_empty((0,)) if x is None else x.new_empty(x.shape) for x in inputs)


_gradient = TorchOp(
    "gated_activation_backward",
    "(Tensor grad_y, Tensor gate, Tensor? up, Tensor? gate_bias, Tensor? up_bias, int kind)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    forward=_backward_forward,
    fake=_backward_fake,
    inference=gated_activation_backward,
)
_gated_activation = TorchOp(
    "gated_activation",
    "(Tensor gate, Tensor? up, Tensor? gate_bias, Tensor? up_bias, int kind) -> Tensor",
    forward=_run,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    native_hooks=True,
)
