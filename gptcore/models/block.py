"""Attention, feed-forward, the block that joins them, and the stack of blocks.

Shapes: x (B, T, C), or (N, C) where documents are packed; q (..., H, D); k, v (..., Hkv, D). A block takes
and gives the residual stream as a pair (stream, delta) whose sum is meant: the next norm adds them in its own
pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gptcore import ops
from gptcore.models import whole_block
from gptcore.models.checkpointing import Checkpointing
from gptcore.models.config import GPTConfig
from gptcore.models.norm import Norm
from gptcore.models.positions import RotaryTables, alibi_slopes
from gptcore.models.virtual_tokens import Prefix, with_prefix
from gptcore.nn.feed_forward import FeedForward
from gptcore.nn.half_precision import in_f32
from gptcore.nn.linear import Linear
from gptcore.nn.moe import MoE, RoutingStatistics
from gptcore.nn.tensor_parallel import TensorPass

_attention = in_f32(ops.attention, kernel="attention_f16")
_attention_qkv = in_f32(ops.attention_qkv, kernel="attention_f16")
_rotary = in_f32(ops.rotary)


class KeyValueCache(Protocol):
    """What the model asks of a cache of keys and values."""

    @property
    def length(self) -> int:
        """Tokens stored before this forward."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends k and v (B, T, Hkv, D) and returns all of them, (B, S, Hkv, D)."""

    def advance(self, tokens: int) -> None:
        """Counts ``tokens`` more as stored; called once per forward, after every layer's ``update``."""


class PagedCache(KeyValueCache, Protocol):
    """A cache that attends to its keys where they lie; its sequences may differ in length, of which ``length`` is the
    longest. What has an ``attend`` is taken for one."""

    def positions(self, count: int) -> int | Tensor:
        """Where the next ``count`` tokens of each sequence stand: the first one's place, or (B, count) int32."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Appends k and v and returns the attention of q (B, T, H, D) to all of them; options as models have them."""


class Context(NamedTuple):
    """What every layer of one forward shares.

    ``positions`` is the number of tokens before the first, or (N,) int32 places inside packed documents;
    ``seed`` (1,) int64 what attention drops, where it does. Layers of experts append to ``routing``. ``tensor`` is
    there where layers are cut over ranks, ``prefix`` where virtual tokens lie before every sequence.
    """

    cu_seqlens: Tensor | None = None
    positions: int | Tensor = 0
    cache: KeyValueCache | None = None
    rotary: RotaryTables | None = None
    seed: Tensor | None = None
    routing: RoutingStatistics | None = None
    tensor: TensorPass | None = None
    prefix: Prefix | None = None


class Attention(nn.Module):
    """Self-attention: one projection to q, k and v, attention, one projection back."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        spec = config.attention
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.causal = spec.causal
        self.window_size = config.window_size(layer)
        self.softmax_scale = spec.softmax_scale or self.head_dim**-0.5
        self.soft_cap = spec.soft_cap
        self.dropout = spec.dropout
        self.dropout_offset = layer
        self.interleaved = config.position.interleaved
        self.qkv = Linear(config.width, (self.heads + 2 * self.kv_heads) * self.head_dim, spec.qkv_bias)
        self.out = Linear(self.heads * self.head_dim, config.width, spec.out_bias)
        normed = spec.qk_norm != "none"
        self.q_norm = Norm(config.norm, self.head_dim, spec.qk_norm) if normed else None
        self.k_norm = Norm(config.norm, self.head_dim, spec.qk_norm) if normed else None
        self.sinks = nn.Parameter(torch.empty(self.heads)) if spec.sinks else None
        self.slopes = alibi_slopes(self.heads) if config.position.kind == "alibi" else None
        self._sent_slopes: dict[torch.device, Tensor] = {}

    def forward(self, x: Tensor, context: Context) -> Tensor:
        qkv = self.qkv(x if context.tensor is None else context.tensor.enter(x))
        moved = self.q_norm is not None or context.rotary is not None
        if not moved and context.cache is None and context.prefix is None:
            y = _attention_qkv(qkv, self.heads, self.kv_heads, **self._options(qkv, context))
        else:
            y = self._attend(*self._queries_keys_values(qkv, context), context).flatten(-2)
        return self.out(y) if context.tensor is None else context.tensor.leave(y, self.out)

    def _queries_keys_values(self, qkv: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Views into the fused projection as far as neither norm nor rotation moves the data."""
        heads = qkv.unflatten(-1, (self.heads + 2 * self.kv_heads, self.head_dim))
        qk, v = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split([self.heads, self.kv_heads], dim=-2)
            qk = torch.cat([self.q_norm(q.contiguous()), self.k_norm(k.contiguous())], dim=-2)
        if context.rotary is not None:
            cos, sin = context.rotary(self.layer)
            qk = _rotary(qk, cos, sin, interleaved=self.interleaved, position=context.positions)
        q, k = qk.split([self.heads, self.kv_heads], dim=-2)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        options = self._options(q, context)
        cache = context.cache
        if cache is not None and context.prefix is None and hasattr(cache, "attend"):
            del options["cu_seqlens_q"]
            attended: Tensor = cache.attend(self.layer, q, k, v, **options)
            return attended
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        if context.prefix is None:
            return _attention(q, k, v, **options)
        own = _attention(q, k, v, return_lse=True, **options)
        return with_prefix(q, own, self.layer, context.prefix, options)

    def _options(self, x: Tensor, context: Context) -> dict[str, Any]:
        slopes = None if self.slopes is None else self._slopes_on(x)
        options = {
            "causal": self.causal, "window_size": self.window_size, "softmax_scale": self.softmax_scale,
            "soft_cap": self.soft_cap, "alibi_slopes": slopes, "cu_seqlens_q": context.cu_seqlens,
        }  # fmt: skip
        if self.sinks is not None:
            options["sinks"] = self.sinks.float()
        if context.seed is not None:
            options |= {"dropout_p": self.dropout, "seed": context.seed, "offset": self.dropout_offset}
        return options

    def _slopes_on(self, x: Tensor) -> Tensor:
        """The slopes, f32 whatever the parameters are cast to, so that they are no buffer. A GPU's are kept: to send
        them each time would wait for it, and cannot be captured in a graph."""
        if x.device.type == "cpu" or type(x) is not Tensor or torch.compiler.is_compiling():
            return torch.tensor(self.slopes, device=x.device)
        if x.device not in self._sent_slopes:
            self._sent_slopes[x.device] = torch.tensor(self.slopes, device=x.device)
        return self._sent_slopes[x.device]


class Mlp(FeedForward):
    """The feed-forward of a block without experts."""

    def __init__(self, config: GPTConfig) -> None:
        spec = config.mlp
        super().__init__(config.width, config.hidden_size, activation=spec.activation, bias=spec.bias)


# What a layer of experts takes from ``MoESpec`` under the same name.
_MOE_OPTIONS = (
    "num_experts", "top_k", "shared_experts", "renormalise", "capacity_factor", "eval_capacity_factor",
    "capacity_convention", "capacity_minimum", "capacity_rounding", "second_choice", "priority", "balance",
    "w_importance", "w_load", "noise", "jitter", "dropout",
)  # fmt: skip


def experts_of(config: GPTConfig) -> MoE:
    """The layer of experts of a block that has them."""
    options = {name: getattr(config.moe, name) for name in _MOE_OPTIONS}
    mlp = config.mlp
    return MoE(config.width, config.expert_hidden_size, activation=mlp.activation, bias=mlp.bias, **options)


class Block(nn.Module):
    """One layer, in the arrangement that ``NormSpec.placement`` and ``parallel`` name."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        spec = config.norm
        self.placement, self.parallel = spec.placement, spec.parallel
        self.alpha = config.deepnorm_alpha
        self.attention = Attention(config, layer)
        self.mlp = experts_of(config) if config.has_experts(layer) else Mlp(config)
        self.norm1 = Norm(spec, config.width)
        if spec.parallel != "shared":
            self.norm2 = Norm(spec, config.width)
        sandwich = spec.placement == "sandwich"
        self.attention_norm = Norm(spec, config.width) if sandwich else nn.Identity()
        self.mlp_norm = Norm(spec, config.width) if sandwich else nn.Identity()
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        # Whether it is the block of GPT-2: two norms of layers, each before its part, and nothing beside or within.
        self.sequential = (
            spec.placement == "pre" and spec.parallel == "none" and spec.kind == "layer_norm"
            and isinstance(self.mlp, Mlp) and self.attention.q_norm is None and self.attention.sinks is None
            and self.attention.slopes is None
        )  # fmt: skip

    @property
    def gives_delta(self) -> bool:
        """Whether the stream that it gives is a sum of two; post-LN's is whole."""
        return self.placement not in ("post", "deepnorm")

    def forward(self, x: Tensor, delta: Tensor | None, context: Context) -> tuple[Tensor, Tensor | None]:
        if not self.gives_delta:
            return self._normed_after(x, context), None
        if whole_block.serves(self, x, delta, context):
            return whole_block.run(self, x, delta, context)
        y, x = self.norm1.add(x, delta)
        if self.parallel == "none":
            delta = self._drop(self.attention_norm(self.attention(y, context)), context)
            y, x = self.norm2.add(x, delta)
            return x, self._drop(self.mlp_norm(self._feed_forward(y, context)), context)
        z = y if self.parallel == "shared" else self.norm2(x)
        return x, self._drop(self.attention(y, context) + self._feed_forward(z, context), context)

    def _normed_after(self, x: Tensor, context: Context) -> Tensor:
        """norm(alpha * x + f(x)) for attention and then the feed-forward; alpha is 1 for post-LN."""
        x = self._add_after(self.norm1, x, self.attention(x, context), context)
        return self._add_after(self.norm2, x, self._feed_forward(x, context), context)

    def _feed_forward(self, x: Tensor, context: Context) -> Tensor:
        if not isinstance(self.mlp, MoE):
            return self.mlp(x) if context.tensor is None else self.mlp(x, context.tensor)
        if context.tensor is not None:
            x = context.tensor.gather(x)
        # With a cache, a capacity over the few tokens of one step would make a text depend on those beside it.
        y, statistics = self.mlp(x, drop=context.cache is None)
        if context.routing is not None:
            context.routing.append(statistics)
        return y if context.tensor is None else context.tensor.part(y)

    def _add_after(self, norm: Norm, x: Tensor, delta: Tensor, context: Context) -> Tensor:
        residual = self.alpha * x if self.placement == "deepnorm" else x
        return norm.add(self._drop(delta, context), residual)[0]

    def _drop(self, x: Tensor, context: Context) -> Tensor:
        return self.dropout(x) if context.tensor is None else context.tensor.drop(x, self.dropout)


class Stack(nn.Module):
    """L blocks and the final norm, if any: a decoder, or an encoder where attention is not causal."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = Norm(config.norm, config.width) if config.norm.has_final else None
        self.checkpointing = Checkpointing()

    def forward(
        self, x: Tensor, delta: Tensor | None, context: Context, *, last_only: bool = False
    ) -> Tensor:
        """The normed output for the stream x + delta; of the last position alone if ``last_only``."""
        for i, block in enumerate(self.blocks):
            if self.checkpointing.serves(i, context):
                x, delta = self.checkpointing.run(block, x, delta, context)
            else:
                x, delta = block(x, delta, context)
        if last_only:
            x = x[:, -1:].contiguous()
            delta = None if delta is None else delta[:, -1:].contiguous()
        if self.final_norm is not None:
            return self.final_norm.add(x, delta)[0]
        return x if delta is None else x + delta
