"""The feed-forward layer of a transformer, and the activations it knows by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptcore import ops
from gptcore.errors import unknown_name
from gptcore.nn.half_precision import in_f32, is_half
from gptcore.nn.linear import Linear
from gptcore.nn.support import covered
from gptcore.nn.tensor_parallel import TensorPass
from gptcore.ops.gated_activation import GELU_ERF, GELU_TANH, PACKED, RELU, SILU

# What makes two halves of one projection, the gate first, into one; the others act on each value alone.
GATED = ("swiglu", "geglu", "geglu_tanh")
ACTIVATIONS = ("gelu", "gelu_erf", "relu", "silu", *GATED)
# The kernel's number for each.
KINDS = {
    "gelu": GELU_TANH, "gelu_erf": GELU_ERF, "relu": RELU, "silu": SILU,
    "swiglu": SILU + PACKED, "geglu": GELU_ERF + PACKED, "geglu_tanh": GELU_TANH + PACKED,
}  # fmt: skip


def activate(kind: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The activation ``kind`` of x + bias: (..., F), for gated ones of the halves [gate | up] of (..., 2F).

    ``gelu`` and ``geglu_tanh`` use the tanh form, ``gelu_erf`` and ``geglu`` the error function.
    """
    if kind == "swiglu":
        return ops.swiglu_packed(x, bias)
    if kind in GATED:
        return ops.geglu_packed(x, bias, approximate="tanh" if kind == "geglu_tanh" else "none")
    if kind == "relu":
        return ops.relu(x, bias)
    if kind == "silu":
        return ops.silu(x, bias)
    return ops.gelu(x, bias, approximate="tanh" if kind == "gelu" else "none")


def activate_reference(kind: str, x: Tensor) -> Tensor:
    """The same by torch, on any device and in any floating dtype."""
    functional = torch.nn.functional
    if kind == "relu":
        return functional.relu(x)
    gate, up = x.chunk(2, dim=-1) if kind in GATED else (x, None)
    if kind in ("silu", "swiglu"):
        y = functional.silu(gate)
    else:
        y = functional.gelu(gate, approximate="tanh" if kind in ("gelu", "geglu_tanh") else "none")
    return y if up is None else y * up


class FeedForward(torch.nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) for the gated activations; x (..., width).

    ``up`` is (hidden, width), for gated ones (2 hidden, width) with the gate's rows first, ``down`` (width, hidden).
    The bias of the first projection is added inside the activation.
    """

    def __init__(
        self, width: int, hidden: int, *, activation: str = "gelu", bias: bool = True, **factory: Any
    ) -> None:
        super().__init__()
        self.activation = known_activation(activation)
        self.gated = activation in GATED
        self.up = Linear(width, 2 * hidden if self.gated else hidden, bias, **factory)
        self.down = Linear(hidden, width, bias, **factory)

    def forward(self, x: Tensor, tensor: TensorPass | None = None) -> Tensor:
        """``tensor``: where this rank has but some of the hidden units."""
        if tensor is not None:
            x = tensor.enter(x)
        if is_half(x):
            hidden = in_f32(activate)(self.activation, self.up.product(x), self.up.bias)
        elif covered("feed_forward", x, self.up.weight):
            hidden = activate(self.activation, self.up.product(x), self.up.bias)
        else:
            hidden = activate_reference(self.activation, self.up(x))
        return self.down(hidden) if tensor is None else tensor.leave(hidden, self.down)


def known_activation(name: str) -> str:
    """``name``, or the nearest known one in an error."""
    if name not in ACTIVATIONS:
        raise unknown_name("activation", name, ACTIVATIONS)
    return name
