"""Virtual tokens before every sequence: soft prompts, which are embeddings, and prefixes, which are keys and values.

Virtual tokens see themselves alone, so their keys and values are the same for every sequence: they are computed once a
forward, whatever the batch, and each layer's attention meets them beside its own keys. Real tokens are counted from P
on. A KV cache holds real tokens alone, so whoever cuts, forks or reorders one need not know.

Letters: P virtual tokens, L layers, H, Hkv and D heads, key/value heads and their size, N rows.
"""

from __future__ import annotations

import copy
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from gptcore import ops
from gptcore.nn.half_precision import in_f32

if TYPE_CHECKING:
    from gptcore.models.gpt import GPT

_attention = in_f32(ops.attention, kernel="attention_f16")


class Prefix(NamedTuple):
    """Keys and values (P, Hkv, D) of the virtual tokens, by layer, and the place of each query in its sequence.

    ``places``: (N,) int64 of packed documents, (T,) otherwise, counted from the first real token.
    """

    keys: list[Tensor]
    values: list[Tensor]
    places: Tensor

    @property
    def length(self) -> int:
        return self.keys[0].shape[0]


class SoftPrompt(nn.Module):
    """P embeddings that are learned in place of words (Lester et al. 2021, arXiv 2104.08691).

    ``weight``: (P, width of the token embedding).
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.count = count
        self.weight = nn.Parameter(torch.empty(count, width))

    @torch.no_grad()
    def initialise(self, model: GPT, generator: torch.Generator) -> None:
        """As embeddings of words drawn at random, without repetition where there are enough (Lester et al. 2021,
        section 3.2)."""
        table = model.token_embedding.weight
        words = torch.randperm(table.shape[0], generator=generator).repeat(-(-self.count // table.shape[0]))
        self.weight.copy_(table[words[: self.count]])

    def keys_values(self, model: GPT) -> tuple[list[Tensor], list[Tensor]]:
        """(P, Hkv, D) of every layer: the model's own for these embeddings."""
        recorder = _Recorder()
        model.run_embeddings(self.weight[None].to(model.token_embedding.weight.dtype), recorder)
        return [k[0] for k in recorder.keys], [v[0] for v in recorder.values]


class PrefixTokens(nn.Module):
    """P keys and values for every layer, learned as such (Li and Liang 2021, arXiv 2101.00190).

    ``weight``: (P, 2 L Hkv D), for each layer its keys, then its values. With rotary positions they are what the
    rotation would have given.
    """

    def __init__(self, count: int, layers: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.count, self.shape = count, (layers, 2, kv_heads, head_dim)
        self.weight = nn.Parameter(torch.empty(count, 2 * layers * kv_heads * head_dim))

    @torch.no_grad()
    def initialise(self, model: GPT, generator: torch.Generator) -> None:
        """With keys and values that the model has for words drawn at random (Li and Liang 2021, section 7.4: those of
        real words train better than random ones)."""
        prompt = SoftPrompt(self.count, model.config.table_width).to(self.weight)
        prompt.initialise(model, generator)
        keys, values = prompt.keys_values(model)
        both = torch.stack([torch.stack([k, v], 1) for k, v in zip(keys, values, strict=True)], 1)
        self.weight.copy_(both.flatten(1))

    def keys_values(self, model: GPT) -> tuple[list[Tensor], list[Tensor]]:
        """(P, Hkv, D) of every layer."""
        both = self.weight.view(self.count, *self.shape)
        layers = range(self.shape[0])
        return [both[:, i, 0] for i in layers], [both[:, i, 1] for i in layers]


class VirtualTokens(nn.Module):
    """The virtual tokens of a model by the name of their adapter, of which ``in_use`` are before every sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.in_use: str | None = None
        # what was computed for the sequences of a cache stays good as long as the cache
        self._of_cache: weakref.WeakKeyDictionary[Any, tuple[str, tuple[list[Tensor], list[Tensor]]]] = (
            weakref.WeakKeyDictionary()
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> VirtualTokens:
        other = VirtualTokens()
        other.adapters, other.in_use = copy.deepcopy(self.adapters, memo), self.in_use
        return other.train(self.training)

    @property
    def length(self) -> int:
        """P of those in use; 0 where there are none."""
        return 0 if self.in_use is None else self._tokens(self.in_use).count

    def _tokens(self, name: str) -> SoftPrompt | PrefixTokens:
        return cast("SoftPrompt | PrefixTokens", self.adapters[name])

    def prefix(self, model: GPT, places: Tensor, cache: Any) -> Prefix | None:
        """What the layers of one forward need of the tokens in use, for queries at ``places``."""
        if self.in_use is None:
            return None
        known = None if cache is None or torch.is_grad_enabled() else self._of_cache.get(cache)
        if known is None or known[0] != self.in_use:
            pair = self._tokens(self.in_use).keys_values(model)
            known = (self.in_use, pair)
            if cache is not None and not torch.is_grad_enabled():
                self._of_cache[cache] = known
        return Prefix(*known[1], places)


class _Recorder:
    """A cache that only remembers what it is given, with its gradient."""

    length = 0

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.append(k)
        self.values.append(v)
        return k, v

    def advance(self, tokens: int) -> None:
        """Nothing follows."""


def with_prefix(
    q: Tensor, own: tuple[Tensor, Tensor], layer: int, prefix: Prefix, options: dict[str, Any]
) -> Tensor:
    """Attention over virtual and real tokens, from that over the real ones alone.

    Args:
        q: (B, T, H, D), or packed (N, H, D).
        own: attention's out, like q, and lse (B, H, T) or (H, N) over the real tokens.
        options: those that attention over the real tokens had.

    The two softmaxes are joined by their denominators, so neither keys nor values are copied.
    """
    packed = q.dim() == 3
    k, v = (t[layer][None].to(q.dtype) for t in (prefix.keys, prefix.values))
    queries = q[None] if packed else q
    if not packed and queries.shape[0] > 1:
        k, v = (t.expand(queries.shape[0], -1, -1, -1).contiguous() for t in (k, v))
    out, lse = _attention(queries, k, v, return_lse=True, **_options_before(options, prefix, packed))
    if packed:
        out, lse = out[0], lse[0]
    whole = torch.logaddexp(own[1], lse)
    a, b = (torch.exp(part - whole).transpose(-1, -2)[..., None] for part in (own[1], lse))
    return (a * own[0].float() + b * out.float()).to(q.dtype)


def _options_before(options: dict[str, Any], prefix: Prefix, packed: bool) -> dict[str, Any]:
    """Attention's options towards the virtual tokens, which lie before every query at known distances."""
    kept = {name: options[name] for name in ("softmax_scale", "soft_cap")}
    if "seed" in options:
        kept |= {"dropout_p": options["dropout_p"], "seed": options["seed"]}
        kept["offset"] = options["offset"] | 1 << 31  # apart from what is dropped among real tokens
    left, slopes = options["window_size"][0], options["alibi_slopes"]
    if left < 0 and slopes is None:
        return kept
    virtual = torch.arange(prefix.length, device=prefix.places.device)
    distance = prefix.length + prefix.places[:, None] - virtual  # (queries, P)
    if left >= 0:
        kept["attn_mask"] = (distance <= left)[None, None]
    if slopes is not None:
        kept["attn_bias"] = (-slopes[:, None, None] * distance)[None]
    return kept
