"""A mixture of experts in place of a feed-forward layer: router, experts, and what is worth watching of both."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptcore import ops
from gptcore.dist import Shard
from gptcore.errors import unknown_name
from gptcore.nn import expert_parallel, noisy_top_k
from gptcore.nn.feed_forward import GATED, FeedForward, activate, activate_reference, known_activation
from gptcore.nn.half_precision import in_f32, is_half
from gptcore.nn.linear import Linear
from gptcore.nn.noisy_top_k import NoisyLogits
from gptcore.nn.support import covered, served
from gptcore.ops.grouped_linear import grouped_linear_reference
from gptcore.ops.moe_dispatch import moe_combine_reference, moe_dispatch_reference
from gptcore.ops.moe_router import MOST_CHOICES, MOST_EXPERTS, moe_router_reference

PRIORITIES = ("position", "gate", "random")
BALANCES = ("first", "all", "shazeer")


class MoEStatistics(NamedTuple):
    """How the tokens of one call were spread over E experts; every field is f32.

    balance_loss, z_loss: (), differentiable, without coefficients.
    drop_rate: (), share of the choices that found their expert full.
    load: (), requests of the most wanted expert over the mean.
    entropy: (), of the router's probabilities, nats, mean over tokens; ln E is undecided, 0 is certain.
    share: (E,), share of the tokens whose first choice an expert is.
    """

    balance_loss: Tensor
    z_loss: Tensor
    drop_rate: Tensor
    load: Tensor
    entropy: Tensor
    share: Tensor


class RoutingStatistics:
    """What layers of experts append to in a forward pass: no list, of which FSDP2's hooks pass on a copy."""

    def __init__(self) -> None:
        self.layers: list[MoEStatistics] = []

    def append(self, layer: MoEStatistics) -> None:
        """The next layer's."""
        self.layers.append(layer)


class MoEOutput(NamedTuple):
    """``output`` like the input, and the statistics of the call."""

    output: Tensor
    statistics: MoEStatistics


class GroupedLinear(torch.nn.Module):
    """``num_experts`` linear maps over rows sorted by expert: ``weight`` (E, out, in), ``bias`` (E, out) or None.

    With a ``shard`` it has the experts of that slice alone, ``num_experts`` in number.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        empty = torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype)
        self.weight = torch.nn.Parameter(empty)
        self.bias = torch.nn.Parameter(empty.new_empty(num_experts, out_features)) if bias else None
        self.shard: Shard | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert as ``torch.nn.Linear`` starts: uniform within 1 / sqrt(in_features)."""
        bound = self.in_features**-0.5
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """(M, out) for x (M, in); rows offsets[e] to offsets[e + 1] - 1 by expert e, zeros after the last.

        offsets: (E + 1,) int32.
        """
        return ops.grouped_linear(x, self.weight, offsets, bias=self.bias)

    def keep(self, shard: Shard) -> None:
        """Only the experts of ``shard``, in parameters of their own."""
        for name, whole in list(self.named_parameters()):
            own = whole.detach()[shard.start : shard.stop].clone()
            setattr(self, name, torch.nn.Parameter(own, requires_grad=whole.requires_grad))
        self.num_experts, self.shard = shard.stop - shard.start, shard

    def extra_repr(self) -> str:
        return f"{self.num_experts}, {self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Engine(NamedTuple):
    """Who computes the steps of a layer."""

    router: Callable[..., Any]
    dispatch: Callable[..., Tensor]
    grouped_linear: Callable[..., Tensor]
    by_row: Callable[..., Tensor]  # the same, a row's bits not depending on the batch
    activate: Callable[..., Tensor]
    combine: Callable[..., Tensor]


_KERNELS = Engine(
    ops.moe_router, ops.moe_dispatch, ops.grouped_linear,
    functools.partial(ops.grouped_linear, batch_invariant=True), activate, ops.moe_combine,
)  # fmt: skip
_KERNELS_IN_F32 = Engine(*map(in_f32, _KERNELS))
_REFERENCES = Engine(
    moe_router_reference, moe_dispatch_reference, grouped_linear_reference, grouped_linear_reference,
    activate_reference, moe_combine_reference,
)  # fmt: skip


def _check_sizes(num_experts: int, top_k: int) -> None:
    if not 1 <= num_experts <= MOST_EXPERTS:
        raise ValueError(f"MoE: argument 'num_experts': got {num_experts}, expected 1 to {MOST_EXPERTS}")
    most = min(num_experts, MOST_CHOICES)
    if not 1 <= top_k <= most:
        raise ValueError(f"MoE: argument 'top_k': got {top_k} of {num_experts} experts, expected 1 to {most}")


def _as_drawn(numbers: Tensor) -> Tensor:
    return numbers


class MoE(torch.nn.Module):
    """``top_k`` of ``num_experts`` feed-forward layers for each token, chosen by a learned router.

    Parameters: ``router.weight`` (E, C), ``up.weight`` (E, F, C) or, for gated activations, (E, 2F, C) with the
    gate's rows first, ``down.weight`` (E, C, F), with ``bias`` also (E, F or 2F) and (E, C); ``shared`` is a
    :class:`FeedForward`, ``noise.weight`` (E, C). The router computes in f32 whatever the dtype.

    Args:
        width, hidden: C, and F of one expert.
        top_k: experts of a token, K.
        activation: as :class:`FeedForward` takes it. ``bias``: of the experts; the router has none.
        shared_experts: so many more experts, which every token passes: one layer of hidden size
            ``shared_experts * hidden``, added without a gate (DeepSeekMoE).
        renormalise: gates sum to 1 over the chosen; None: where ``top_k`` is above 1. A single choice keeps its
            probability, without which the router would get no gradient (Switch).
        capacity_factor: in training, see :func:`gptcore.ops.expert_capacity`; 0 drops none.
        eval_capacity_factor: in evaluation mode; None: ``capacity_factor``.
        capacity_convention, capacity_minimum, capacity_rounding: as ``expert_capacity`` takes them.
        second_choice: "always", or at random in training: "gshard", "st_moe".
        priority: who is placed first at an expert: by "position", by "gate", or in training at "random".
        balance: whose share the balance loss takes, that of "first" choices or of "all"; or "shazeer", the losses of
            noisy top-K: ``w_importance`` * CV(importance)^2 + ``w_load`` * CV(load)^2. Needs ``noise``.
        noise: noisy top-K (Shazeer et al. 2017): in training, logits get normal noise times softplus(x W), W learned
            from 0.
        jitter: in training, the router's input is multiplied by uniform numbers within 1 - jitter and 1 + jitter
            (Switch: 0.01).
        dropout: of the experts' hidden values, in training (Switch's expert dropout).

    Raises:
        ValueError: sizes or names that do not fit.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int,
        top_k: int = 2,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        shared_experts: int = 0,
        renormalise: bool | None = None,
        capacity_factor: float = 0.0,
        eval_capacity_factor: float | None = None,
        capacity_convention: str = "per_token",
        capacity_minimum: int = 1,
        capacity_rounding: str = "up",
        second_choice: str = "always",
        priority: str = "position",
        balance: str = "first",
        w_importance: float = 1.0,
        w_load: float = 1.0,
        noise: bool = False,
        jitter: float = 0.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(num_experts, top_k)
        for name, value, known in (("priority", priority, PRIORITIES), ("balance", balance, BALANCES)):
            if value not in known:
                raise unknown_name(name, value, known)
        if balance == "shazeer" and not noise:
            raise ValueError(
                "MoE: argument 'balance': got 'shazeer' without noise, expected noise=True beside it"
            )
        self.num_experts, self.top_k = num_experts, top_k
        self.balance, self.w_importance, self.w_load = balance, w_importance, w_load
        self.renormalise = top_k > 1 if renormalise is None else renormalise
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = capacity_factor if eval_capacity_factor is None else eval_capacity_factor
        self.capacity_options: dict[str, Any] = {
            "top_k": top_k, "convention": capacity_convention, "minimum": capacity_minimum,
            "rounding": capacity_rounding,
        }  # fmt: skip
        self.second_choice, self.priority = second_choice, priority
        self.jitter, self.dropout = jitter, dropout
        self.activation = known_activation(activation)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        rows = 2 * hidden if activation in GATED else hidden
        self.router = Linear(width, num_experts, bias=False, **factory)
        self.up = GroupedLinear(num_experts, width, rows, bias, **factory)
        self.down = GroupedLinear(num_experts, hidden, width, bias, **factory)
        shared = {"activation": activation, "bias": bias, **factory}
        self.shared = FeedForward(width, shared_experts * hidden, **shared) if shared_experts else None
        self.noise = Linear(width, num_experts, bias=False, **factory) if noise else None
        if self.noise is not None:
            torch.nn.init.zeros_(self.noise.weight)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, drop: bool = True) -> MoEOutput:
        """Each token through its experts.

        Args:
            x: (..., C), f32 or bf16.
            mask: x's leading shape, bool, False for padding: it takes no place, counts in no loss, and gets only
                what the shared experts give.
            drop: False leaves the capacity out of this call, as generating a token at a time needs.

        Returns:
            :class:`MoEOutput`; 0 beside the shared experts for a token whose choices were all dropped.

        Raises:
            ValueError: a mask that does not fit, a device that the kernels are not for.
        """
        if self.up.shard is not None:
            y, routing = expert_parallel.forward(self, x, mask, drop, self.up.shard.member)
        else:
            flat, mask = self.checked(x, mask)
            engine = self.engine(flat)
            routing = self.route(engine, *self.scores(engine, flat), mask, drop)
            rows = engine.dispatch(flat, routing.rows, routing.offsets)
            rows = self.apply_experts(engine, rows, routing.offsets)
            y = engine.combine(rows, routing.rows, routing.offsets, routing.gates)
        if self.shared is not None:
            y = y + self.shared(x.reshape(-1, x.shape[-1]))
        return MoEOutput(y.view(x.shape), self._statistics(routing))

    @property
    def draws(self) -> bool:
        """Whether training takes random numbers here."""
        random = self.jitter or self.dropout or self.noise is not None or self.priority == "random"
        return bool(random) or self.second_choice != "always"

    # --- the steps, which expert_parallel takes over ranks -----------------------------------------------------

    def checked(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x as (N, C) and the mask as (N,)."""
        if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
            raise ValueError(
                f"MoE: argument 'mask': got {mask.dtype} of shape {tuple(mask.shape)}, expected torch.bool of "
                f"{tuple(x.shape[:-1])}"
            )
        # The references' loops over tokens are no way to use another device.
        if x.device.type != "cpu" and not (is_half(x) or served("moe", x)):
            raise ValueError(f"MoE: argument 'x': got a tensor on {x.device}, expected one on the CPU")
        return x.reshape(-1, x.shape[-1]), None if mask is None else mask.reshape(-1)

    def engine(self, x: Tensor) -> Engine:
        """Who computes for x."""
        if is_half(x):
            return _KERNELS_IN_F32
        return _KERNELS if covered("moe", x, self.up.weight) else _REFERENCES

    def scores(self, engine: Engine, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N, E) the router's logits for x (N, C), and what softplus makes the deviation of their noise, if any; f32
        (f64 for f64), under autocast too: a rounded logit changes choices.

        A token's have the same bits whatever other tokens there are, and so in whichever process it is.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if self.jitter and self.training:
                x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
            noise = self.noise if self.training else None
            # Products of one expert, since those of ``linear`` depend on the batch.
            rows = torch.arange(2, dtype=torch.int32, device=x.device) * x.shape[0]  # made where it is read
            clean = engine.by_row(x, self.router.weight.to(x.dtype).unsqueeze(0), rows)
            return clean, None if noise is None else engine.by_row(
                x, noise.weight.to(x.dtype).unsqueeze(0), rows
            )

    def route(
        self,
        engine: Engine,
        clean: Tensor,
        raw_scale: Tensor | None,
        mask: Tensor | None,
        drop: bool,
        drawn: Callable[[Tensor], Tensor] = _as_drawn,
    ) -> Any:
        """What ``ops.moe_router`` gives for the scores (N, E); ``drawn`` takes random numbers and gives those that
        count."""
        tokens = clean.shape[0]
        random = self.training and self.second_choice != "always"
        priority: Any = "gate" if self.priority == "gate" else None
        if self.training and self.priority == "random":
            priority = drawn(torch.rand(tokens, device=clean.device))
        logits = NoisyLogits(clean, clean)
        if raw_scale is not None:
            with torch.autocast(clean.device.type, enabled=False):
                logits = NoisyLogits.drawn(clean, raw_scale, drawn(torch.randn_like(clean)))
        shazeer = self.balance == "shazeer"
        routing = engine.router(
            logits.noisy,
            top_k=self.top_k,
            capacity=self.capacity(tokens) if drop else None,
            renormalise=self.renormalise,
            mask=mask,
            priority=priority,
            second_choice=self.second_choice if random else "always",
            uniforms=drawn(torch.rand(tokens, device=clean.device)) if random else None,
            balance="first" if shazeer else self.balance,
        )
        return routing._replace(balance_loss=self._shazeer(logits, routing, mask)) if shazeer else routing

    def _shazeer(self, logits: NoisyLogits, routing: Any, mask: Tensor | None) -> Tensor:
        with torch.autocast(logits.noisy.device.type, enabled=False):
            return noisy_top_k.balance_loss(
                logits, routing.experts, renormalise=self.renormalise, mask=mask,
                w_importance=self.w_importance, w_load=self.w_load,
            )  # fmt: skip

    def apply_experts(self, engine: Engine, rows: Tensor, offsets: Tensor) -> Tensor:
        """Each row through its expert: expert e has rows offsets[e] to offsets[e + 1] - 1."""
        inner = engine.grouped_linear(rows, self.up.weight, offsets, bias=self.up.bias)
        inner = engine.activate(self.activation, inner)
        if self.dropout and self.training:
            inner = torch.nn.functional.dropout(inner, self.dropout)
        return engine.grouped_linear(inner, self.down.weight, offsets, bias=self.down.bias)

    def shard_experts(self, shard: Shard) -> None:
        """Keep the experts of ``shard`` alone: what :func:`gptcore.dist.expert_parallel` does to a layer."""
        self.up.keep(shard)
        self.down.keep(shard)

    def capacity(self, tokens: int) -> int | None:
        """Most tokens that an expert takes of ``tokens``, in the present mode; None is all."""
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if not factor:
            return None
        return ops.expert_capacity(tokens, self.num_experts, factor=factor, **self.capacity_options)

    def _statistics(self, routing: Any) -> MoEStatistics:
        with torch.no_grad():
            share = routing.share
            if self.balance == "all":  # counted over all choices there
                first = routing.experts[:, :1]
                wanted = first == torch.arange(self.num_experts, device=first.device)
                share = wanted.sum(0) / (first >= 0).sum().clamp(min=1)
            drop_rate, load = routing.drop_rate.float(), routing.load.float()
        return MoEStatistics(
            routing.balance_loss, routing.z_loss, drop_rate, load, routing.entropy.float(), share.float()
        )

    def extra_repr(self) -> str:
        factors = f"capacity_factor={self.capacity_factor}, eval_capacity_factor={self.eval_capacity_factor}"
        return f"top_k={self.top_k}, activation={self.activation}, {factors}"
