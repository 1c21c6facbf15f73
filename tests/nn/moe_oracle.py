"""A mixture of experts written out token by token, sharing no code with gptcore: in float64 the oracle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

F = torch.nn.functional


class Run(NamedTuple):
    output: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    dropped: int
    requested: list[int]


def act(kind: str, x: Tensor) -> Tensor:
    if kind in ("swiglu", "geglu", "geglu_tanh"):
        gate, up = x[: len(x) // 2], x[len(x) // 2 :]
        return act({"swiglu": "silu", "geglu": "gelu_erf", "geglu_tanh": "gelu"}[kind], gate) * up
    if kind == "relu":
        return x.clamp(min=0)
    if kind == "silu":
        return x * torch.sigmoid(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu" else "none")


def expert(w: Mapping[str, Tensor], kind: str, x: Tensor, index: int | None, name: str = "") -> Tensor:
    """One token x (C,) through one expert, or through the shared layer."""

    def affine(layer: str, x: Tensor) -> Tensor:
        weight, bias = w[f"{name}{layer}.weight"], w.get(f"{name}{layer}.bias")
        if index is not None:
            weight, bias = weight[index], None if bias is None else bias[index]
        y = weight @ x
        return y if bias is None else y + bias

    return affine("down", act(kind, affine("up", x)))


def run(
    w: Mapping[str, Tensor],
    x: Tensor,
    *,
    top_k: int,
    kind: str,
    capacity: int | None = None,
    renormalise: bool = True,
    mask: list[bool] | None = None,
    order: list[int] | None = None,
    balance: str = "first",
    router_input: Tensor | None = None,
    noise: Tensor | None = None,
) -> Run:
    """x (N, C); the router in f32 at least, as it is specified; ``order``: who is placed first."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = (x if router_input is None else router_input).to(wide) @ w["router.weight"].to(wide).T
    if noise is not None:
        logits = logits + noise * F.softplus(x.to(wide) @ w["noise.weight"].to(wide).T)
    number = logits.shape[1]
    counted = [n for n in (order or range(len(x))) if mask is None or mask[n]]
    values = logits.detach().tolist()
    chosen = {n: sorted(range(number), key=lambda e: (-values[n][e], e))[:top_k] for n in counted}
    requested = [0] * number
    outputs = [torch.zeros_like(row) for row in x]
    if any(name.startswith("shared") for name in w):
        outputs = [expert(w, kind, row, None, "shared.") for row in x]
    dropped = 0
    for k in range(top_k):
        for n in counted:
            e = chosen[n][k]
            requested[e] += 1
            if capacity is not None and requested[e] > capacity:
                dropped += 1
                continue
            among = logits[n, chosen[n]] if renormalise else logits[n]
            gate = (logits[n, e] - among.logsumexp(0)).exp()
            outputs[n] = outputs[n] + gate.to(x.dtype) * expert(w, kind, x[n], e)
    voters = [e for n in counted for e in (chosen[n] if balance == "all" else chosen[n][:1])]
    total = max(len(counted), 1)
    share = torch.tensor([voters.count(e) / total for e in range(number)], dtype=wide)
    kept = logits[sorted(counted)]
    balance_loss = number * (share * kept.softmax(-1).sum(0)).sum() / total
    z_loss = kept.logsumexp(-1).square().sum() / total
    return Run(torch.stack(outputs), balance_loss, z_loss, dropped, requested)
