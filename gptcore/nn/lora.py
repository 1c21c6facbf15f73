"""Linear layers with low-rank updates beside their weight: LoRA and DoRA.

Letters: K and M inputs and outputs of the layer, R rank, W (M, K) its weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from gptcore.nn.linear import Linear, linear, product


class Rows(NamedTuple):
    """Which outputs of a layer an update is of: ``size`` of them from ``start``; q of a fused projection, say."""

    start: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.size


class LowRank(nn.Module):
    """scale · B·A for some outputs of a layer, after dropout of its input; in DoRA's form with a magnitude.

    LoRA (Hu et al. 2021, arXiv 2106.09685, section 4.1): W + scale · B·A, ``a`` (R, K), ``b`` (rows, R).
    DoRA (Liu et al. 2024, arXiv 2402.09353, equations 5 and 11): m · (W + scale · B·A) / ‖W + scale · B·A‖, the norm
    that of each row and without gradient, ``magnitude`` m (rows,).
    """

    def __init__(
        self, rows: Rows, inputs: int, rank: int, *, scale: float, dropout: float = 0.0, dora: bool = False
    ) -> None:
        super().__init__()
        self.rows, self.scale, self.dropout = rows, scale, dropout
        self.a = nn.Parameter(torch.empty(rank, inputs))
        self.b = nn.Parameter(torch.empty(rows.size, rank))
        self.magnitude = nn.Parameter(torch.empty(rows.size)) if dora else None

    @torch.no_grad()
    def initialise(self, weight: Tensor, generator: torch.Generator) -> None:
        """A uniform within ±1/√K, B zero and m the rows' norms: the layer with ``weight`` (M, K) is what it was."""
        bound = self.a.shape[1] ** -0.5
        self.a.copy_(torch.empty(self.a.shape).uniform_(-bound, bound, generator=generator))
        self.b.zero_()
        if self.magnitude is not None:
            self.magnitude.copy_(torch.linalg.vector_norm(self._own(weight).float(), dim=1))

    def change(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """(..., rows): what is added to the outputs for x (..., K), whose x @ W.T is y (..., M).

        Computed in the dtype of ``a``, which may be wider than the weight's.
        """
        x, kind = x.to(self.a.dtype), y.dtype
        dropped = self.training and self.dropout > 0
        if dropped:
            x = functional.dropout(x, self.dropout)
        delta = linear(linear(x, self.a) * self.scale, self.b)
        if self.magnitude is None:
            return delta.to(kind)
        base = linear(x.to(kind), self._own(weight)) if dropped else y[..., self.rows.start : self.rows.stop]
        gain = self._gain(weight).to(x.dtype)
        return ((gain - 1) * base + gain * delta).to(kind)

    @torch.no_grad()
    def weight_change(self, weight: Tensor) -> Tensor:
        """(rows, K) f32: what is added to these rows of ``weight`` (M, K) so that the layer alone does the same."""
        own, delta = self._own(weight).float(), self.scale * product(self.b.float(), self.a.float())
        return delta if self.magnitude is None else self._gain(weight)[:, None] * (own + delta) - own

    def _gain(self, weight: Tensor) -> Tensor:
        """(rows,) f32: m over the norm of each row."""
        assert self.magnitude is not None
        with torch.no_grad():
            moved = self._own(weight).float() + self.scale * product(self.b.float(), self.a.float())
            norm = torch.linalg.vector_norm(moved, dim=1)
        return self.magnitude.float() / norm

    def _own(self, weight: Tensor) -> Tensor:
        return weight[self.rows.start : self.rows.stop]


class AdaptedLinear(Linear):
    """A :class:`Linear` and updates by adapter: y + Σ strength · change over the adapters ``in_use``.

    ``adapters`` has for each name a list of :class:`LowRank`, no two of which share an output. With none in use it is
    the layer it was, bit for bit.
    """

    @classmethod
    def over(cls, base: Linear) -> AdaptedLinear:
        """The layer that takes ``base``'s place, with its parameters."""
        layer = cls(base.in_features, base.out_features, base.bias is not None, device="meta")
        layer.weight, layer.bias = base.weight, base.bias
        return layer.train(base.training)

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: torch.device | str | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device)
        self.adapters = nn.ModuleDict()
        self.in_use: dict[str, float] = {}
        self._original: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        y = linear(input, self.weight, self.bias)
        return self._changed(input, y, self.bias) if self._active else y

    def product(self, input: Tensor) -> Tensor:
        """(..., M): :meth:`forward` without the bias."""
        y = linear(input, self.weight)
        return self._changed(input, y, None) if self._active else y

    @property
    def merged(self) -> bool:
        """Whether the weight has the updates in it."""
        return self._original is not None

    def use(self, strengths: Mapping[str, float]) -> None:
        """Put these adapters in use, as far as the layer has them, each with its strength, and no others."""
        self.in_use = {name: strengths[name] for name in self.adapters if strengths.get(name)}

    def whole_weight(self) -> Tensor:
        """(M, K): the weight with the updates in use, differentiable in theirs; for what reads a weight as such."""
        if not self._active:
            return self.weight
        return self.weight + self._changed_eye().t()

    @torch.no_grad()
    def merge(self) -> None:
        """Add the updates in use to the weight, of which the original is kept. Merged ones stay."""
        if self._original is not None or not self.in_use:
            return
        total = self.weight.detach().to(torch.float32, copy=True)
        for part, strength in self._parts():
            total[part.rows.start : part.rows.stop] += strength * part.weight_change(self.weight)
        self._original = self.weight.detach().clone()
        self.weight.copy_(total)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        if self._original is not None:
            self.weight.copy_(self._original)
            self._original = None

    def plain(self) -> Linear:
        """A :class:`Linear` with this layer's parameters as they are, merged or not."""
        layer = Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight, layer.bias = self.weight, self.bias
        return layer.train(self.training)

    @property
    def _active(self) -> bool:
        return bool(self.in_use) and self._original is None

    def _parts(self) -> list[tuple[LowRank, float]]:
        return [(part, s) for name, s in self.in_use.items() for part in self.updates(name)]

    def updates(self, name: str) -> list[LowRank]:
        """Those of one adapter."""
        return list(cast("Iterable[LowRank]", self.adapters[name]))

    def _changed(self, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        plain = y if bias is None else y - bias  # DoRA scales what the weight gives, not the bias
        for name, strength in self.in_use.items():
            changes = [(part.rows, part.change(x, plain, self.weight)) for part in self.updates(name)]
            change = _placed(changes, self.out_features)
            y = y + change if strength == 1.0 else y + strength * change
        return y

    def _changed_eye(self) -> Tensor:
        """(K, M): the updates of the identity."""
        eye = torch.eye(self.in_features, dtype=self.weight.dtype, device=self.weight.device)
        plain = self.weight.t()
        return self._changed(eye, plain, None) - plain


def _placed(changes: list[tuple[Rows, Tensor]], outputs: int) -> Tensor:
    """(..., outputs): every change at its rows, zeros where there is none."""
    changes = sorted(changes, key=lambda pair: pair[0].start)
    pieces, at = [], 0
    for rows, change in changes:
        if rows.start > at:
            pieces.append(change.new_zeros(*change.shape[:-1], rows.start - at))
        pieces.append(change)
        at = rows.stop
    if at < outputs:
        pieces.append(pieces[-1].new_zeros(*pieces[-1].shape[:-1], outputs - at))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
