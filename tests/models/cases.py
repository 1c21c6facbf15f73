"""Every family shrunk to a size that an oracle runs in milliseconds, and combinations no preset has."""

from __future__ import annotations

from typing import Any

import torch

from gptcore.models import GPT, GPTConfig, presets

_TINY: dict[str, Any] = {
    "num_layers": 3, "width": 48, "vocab_size": 61, "context_length": 24, "attention": {"num_heads": 4},
}  # fmt: skip


def _shrunk(name: str, changes: dict[str, Any] | None = None) -> GPTConfig:
    small = presets.get("gpt2", _TINY).to_dict()
    base = presets.get(name).to_dict()
    base.update({key: small[key] for key in ("num_layers", "width", "vocab_size", "context_length")})
    base["attention"].update(num_heads=4)
    if "num_kv_heads" in base["attention"]:
        base["attention"]["num_kv_heads"] = {64: 4, 48: 1, 32: 2, 16: 1}.get(
            base["attention"]["num_kv_heads"], 1
        )
    base["mlp"].pop("hidden_size", None)
    return GPTConfig.from_dict(base).merged(changes or {})


CASES: dict[str, GPTConfig] = {
    "gpt1": _shrunk("gpt1"),
    "gpt2": _shrunk("gpt2"),
    "gpt3": _shrunk("gpt3-small", {"attention": {"window": 5}}),
    "opt": _shrunk("opt-125m"),
    "opt-350m": _shrunk("opt-350m", {"embedding_width": 32}),
    "bloom": _shrunk("bloom-560m", {"attention": {"num_heads": 6}}),
    "palm": _shrunk("palm-8b", {"attention": {"head_dim": 16}, "logit_scale": 48**-0.5}),
    "glm": _shrunk("glm-130b", {"mlp": {"hidden_size": 80}}),
    "llama": _shrunk("llama-7b", {"attention": {"num_kv_heads": 4}, "mlp": {"hidden_size": 72}}),
    "llama3": _shrunk("llama3-8b", {"attention": {"num_kv_heads": 2}, "mlp": {"hidden_size": 72}}),
    "shakespeare": _shrunk("shakespeare-char"),
    "deepnet": _shrunk("gpt2", {"norm": {"placement": "deepnorm", "alpha": 6**0.25}, "init": "deepnet"}),
    # Gemma's ideas in one: sandwich norms, zero-centred gains, scaled embeddings, capped logits, QK-norm
    "gemma": _shrunk(
        "llama-7b",
        {
            "attention": {"num_kv_heads": 1, "head_dim": 16, "qk_norm": "rms_norm", "softmax_scale": 0.2,
                          "pattern": ["banded", "dense"], "window": 4},
            "norm": {"placement": "sandwich", "zero_centred": True},
            "mlp": {"activation": "geglu_tanh"},
            "position": {"base": [10000.0, 1000000.0], "scaled": [False, True],
                         "scaling": {"kind": "linear", "factor": 4.0}},
            "embedding_scale": 48**0.5, "logit_soft_cap": 5.0, "tied_head": True,
        },
    ),
    "gptj": _shrunk(
        "gpt2",
        {
            "attention": {"qkv_bias": False, "out_bias": False}, "norm": {"parallel": "shared"},
            "tied_head": False, "head_bias": True, "logit_scale": 0.7,
            "position": {"kind": "rotary", "rotary_dim": 6, "interleaved": True},
        },
    ),
    "neox": _shrunk(
        "gpt2",
        {
            "norm": {"parallel": "separate"}, "mlp": {"activation": "gelu_erf"}, "tied_head": False,
            "position": {"kind": "rotary", "rotary_fraction": 0.5},
        },
    ),
    "encoder": _shrunk(
        "gpt2",
        {
            "attention": {
                "causal": False, "pattern": ["dense", "banded"], "window": 3, "qk_norm": "layer_norm",
            },
            "norm": {"placement": "post"}, "mlp": {"activation": "silu"}, "embedding_norm": True,
        },
    ),
    "sinks": _shrunk("gpt2", {"attention": {"sinks": True, "pattern": ["banded", "dense"], "window": 4}}),
    "zero-centred": _shrunk("gpt2", {"norm": {"zero_centred": True}}),
    "no-positions": _shrunk("gpt2", {"position": {"kind": "none"}, "mlp": {"bias": False}}),
    "alibi-gqa-banded": _shrunk(
        "bloom-560m", {"attention": {"num_kv_heads": 2, "pattern": ["banded"], "window": 7}}
    ),
    # All experts for each token: with a choice, bf16 roundings of the stream would decide some tokens otherwise.
    "experts": _shrunk(
        "llama-7b",
        {
            "attention": {"num_kv_heads": 4},
            "moe": {"num_experts": 3, "top_k": 3, "every": 2, "hidden_size": 40, "shared_experts": 2},
        },
    ),
    "experts-bias": _shrunk(
        "gpt2", {"norm": {"parallel": "shared"}, "moe": {"num_experts": 2, "top_k": 2, "every": 2, "offset": 0}}
    ),
    "soft-cap": _shrunk("gpt2", {"attention": {"soft_cap": 0.5}}),
}  # fmt: skip


def model_of(config: GPTConfig, dtype: torch.dtype = torch.float32) -> GPT:
    """A model whose biases and gains are not at their trivial start, so that each matters."""
    model = GPT(config, seed=1, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def tokens_of(config: GPTConfig, batch: int = 2, length: int = 17) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets (B, T), some targets not counted."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, config.vocab_size, (batch, length + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, 3:6] = -100
    return tokens[:, :-1].contiguous(), targets
