"""A GPT written out a second time, in plain torch and any dtype, from a configuration and a state dict.

It shares no code with gptcore: attention is a full score matrix, norms and activations are spelled out,
packed documents are a mask. In float64 it is the oracle; in f32 or bf16 it is what torch would make of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gptcore.models import GPTConfig

Weights = Mapping[str, Tensor]


def norm(config: GPTConfig, w: Weights, name: str, x: Tensor, kind: str | None = None) -> Tensor:
    spec = config.norm
    gain = w[f"{name}.weight"]
    gain = 1 + gain if spec.zero_centred else gain
    if (kind or spec.kind) == "rms_norm":
        return x / (x.pow(2).mean(-1, keepdim=True) + spec.eps).sqrt() * gain
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.pow(2).mean(-1, keepdim=True) + spec.eps).sqrt() * gain
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def affine(w: Weights, name: str, x: Tensor) -> Tensor:
    y = torch.einsum("...c,fc->...f", x, w[f"{name}.weight"])
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def gelu(x: Tensor, tanh: bool) -> Tensor:
    if tanh:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def experts(config: GPTConfig, w: Weights, name: str, x: Tensor) -> Tensor:
    """Every expert on every token, weighted by gates that are 0 for those not chosen."""
    logits = torch.einsum("...c,ec->...e", x, w[f"{name}.router.weight"])
    chosen = logits >= logits.topk(config.moe.top_k, -1).values[..., -1:]
    gates = logits.masked_fill(~chosen, -math.inf).softmax(-1)
    if config.moe.top_k == 1:
        gates = logits.softmax(-1).masked_fill(~chosen, 0.0)
    y = feed_forward(config, w, f"{name}.shared", x) if f"{name}.shared.up.weight" in w else 0.0
    for e in range(config.moe.num_experts):
        one = {key: w[f"{name}.{key}"][e] for key in EXPERT if f"{name}.{key}" in w}
        y = y + gates[..., e : e + 1] * feed_forward(
            config, {f"e.{key}": v for key, v in one.items()}, "e", x
        )
    return y


EXPERT = ("up.weight", "up.bias", "down.weight", "down.bias")


def feed_forward(config: GPTConfig, w: Weights, name: str, x: Tensor) -> Tensor:
    if f"{name}.router.weight" in w:
        return experts(config, w, name, x)
    a = affine(w, f"{name}.up", x)
    kind = config.mlp.activation
    if kind == "relu":
        a = a.clamp(min=0)
    elif kind == "silu":
        a = a * torch.sigmoid(a)
    elif kind in ("gelu", "gelu_erf"):
        a = gelu(a, kind == "gelu")
    else:
        gate, up = a.chunk(2, -1)
        gate = gate * torch.sigmoid(gate) if kind == "swiglu" else gelu(gate, kind == "geglu_tanh")
        a = gate * up
    return affine(w, f"{name}.down", a)


def rotate(config: GPTConfig, layer: int, x: Tensor, places: Tensor) -> Tensor:
    """Pairs as complex numbers, multiplied by exp(i · place · frequency); x (B, T, heads, D), places (T,)."""
    r = config.rotary_dim
    frequency = config.rotary_base(layer) ** (-torch.arange(0, r, 2, dtype=torch.float64) / r)
    scaled = (
        config.position.scaled if isinstance(config.position.scaled, tuple) else (config.position.scaled,)
    )
    if config.position.scaling.kind == "linear" and scaled[layer % len(scaled)]:
        frequency = frequency / config.position.scaling.factor
    angle = (places.double()[:, None] * frequency)[:, None, :].to(x.dtype)
    if config.position.interleaved:
        a, b = x[..., 0:r:2], x[..., 1:r:2]
    else:
        a, b = x[..., : r // 2], x[..., r // 2 : r]
    a, b = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    pairs = torch.stack([a, b], -1).flatten(-2) if config.position.interleaved else torch.cat([a, b], -1)
    return torch.cat([pairs, x[..., r:]], -1)


def slope(head: int, heads: int) -> float:
    """ALiBi: for a power of two 2^(-8/H), 2^(-16/H)...; then every second one of the next power."""
    power = 2 ** int(math.log2(heads))
    if head < power:
        return 2 ** (-8 * (head + 1) / power)
    return 2 ** (-8 * (2 * (head - power) + 1) / (2 * power))


def attention(
    config: GPTConfig, w: Weights, name: str, layer: int, x: Tensor, places: Tensor, document: Tensor
) -> Tensor:
    h, g, d = config.num_heads, config.num_kv_heads, config.head_dim
    spec = config.attention
    qkv = affine(w, f"{name}.qkv", x)
    q = qkv[..., : h * d].unflatten(-1, (h, d))
    k = qkv[..., h * d : (h + g) * d].unflatten(-1, (g, d))
    v = qkv[..., (h + g) * d :].unflatten(-1, (g, d))
    if spec.qk_norm != "none":
        q, k = (norm(config, w, f"{name}.{n}_norm", t, spec.qk_norm) for n, t in (("q", q), ("k", k)))
    if config.position.kind == "rotary":
        q, k = rotate(config, layer, q, places), rotate(config, layer, k, places)
    t = x.shape[1]
    distance = torch.arange(t)[:, None] - torch.arange(t)[None, :]
    allowed = document[:, None] == document[None, :]
    if spec.causal:
        allowed = allowed & (distance >= 0)
    if spec.pattern[layer % len(spec.pattern)] == "banded":
        allowed = allowed & (distance.abs() < spec.window)
    heads = []
    for i in range(h):
        j = i // (h // g)
        score = q[:, :, i] @ k[:, :, j].transpose(1, 2) * (spec.softmax_scale or d**-0.5)
        if spec.soft_cap is not None:
            score = spec.soft_cap * torch.tanh(score / spec.soft_cap)
        if config.position.kind == "alibi":
            score = score - slope(i, h) * distance.abs().to(x.dtype)
        score = score.masked_fill(~allowed, -math.inf)
        if spec.sinks:
            sink = w[f"{name}.sinks"][i].expand(*score.shape[:2], 1)
            score = torch.cat([score, sink], -1)
        heads.append(score.softmax(-1)[..., :t] @ v[:, :, j])
    return affine(w, f"{name}.out", torch.cat(heads, -1))


def block(config: GPTConfig, w: Weights, layer: int, x: Tensor, places: Tensor, document: Tensor) -> Tensor:
    at = f"stack.blocks.{layer}"

    def f(y: Tensor) -> Tensor:
        return attention(config, w, f"{at}.attention", layer, y, places, document)

    def m(y: Tensor) -> Tensor:
        return feed_forward(config, w, f"{at}.mlp", y)

    def n(name: str, y: Tensor) -> Tensor:
        return norm(config, w, f"{at}.{name}", y)

    place = config.norm.placement
    if config.norm.parallel != "none":
        second = "norm1" if config.norm.parallel == "shared" else "norm2"
        return x + f(n("norm1", x)) + m(n(second, x))
    if place == "pre":
        x = x + f(n("norm1", x))
        return x + m(n("norm2", x))
    if place == "sandwich":
        x = x + n("attention_norm", f(n("norm1", x)))
        return x + n("mlp_norm", m(n("norm2", x)))
    alpha = 1.0 if place == "post" else config.norm.alpha or math.sqrt(2 * config.num_layers)
    x = n("norm1", alpha * x + f(x))
    return n("norm2", alpha * x + m(x))


def logits(config: GPTConfig, w: Weights, tokens: Tensor, lengths: list[int] | None = None) -> Tensor:
    """(B, T, V); with ``lengths`` the B·T tokens are documents of these lengths, end to end."""
    shape = tokens.shape
    if lengths is not None:
        tokens = tokens.reshape(1, -1)
    lengths = lengths or [tokens.shape[1]]
    places = torch.cat([torch.arange(n) for n in lengths])
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    x = w["token_embedding.weight"][tokens] * config.embedding_scale
    if "project_in.weight" in w:
        x = affine(w, "project_in", x)
    if config.position.kind == "learned":
        x = x + w["position_embedding.weight"][places + config.position.offset]
    if config.embedding_norm:
        x = norm(config, w, "embedding_norm", x)
    for layer in range(config.num_layers):
        x = block(config, w, layer, x, places, document)
    if "stack.final_norm.weight" in w:
        x = norm(config, w, "stack.final_norm", x)
    if "project_out.weight" in w:
        x = affine(w, "project_out", x)
    y = x @ w.get("head.weight", w["token_embedding.weight"]).T
    y = (y + w["head.bias"] if config.head_bias else y) * config.logit_scale
    if config.logit_soft_cap is not None:
        y = config.logit_soft_cap * torch.tanh(y / config.logit_soft_cap)
    return y.reshape(*shape, -1)


def losses(y: Tensor, targets: Tensor, smoothing: float, z: float) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy with label smoothing, and mean z · log²Z, over targets that are not -100."""
    kept = targets != -100
    y, targets = y[kept], targets[kept]
    lse = y.logsumexp(-1)
    wanted = torch.nn.functional.one_hot(targets, y.shape[-1]).to(y.dtype)
    wanted = (1 - smoothing) * wanted + smoothing / y.shape[-1]
    return (lse - (wanted * y).sum(-1)).mean(), z * lse.pow(2).mean()
