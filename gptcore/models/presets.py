"""Published models as configurations, each with the table it comes from.

``get(name)`` gives the ``GPTConfig``, ``describe(name)`` also the source, the published parameter count that
the tests hold it against, and a note where paper and practice differ. Dropout is 0 in all of them: it is a
setting of a training run (GPT-1 and GLM-130B trained with 0.1).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

from gptcore.errors import unknown_name
from gptcore.models.config import AttentionSpec, GPTConfig, MlpSpec, MoESpec, NormSpec, PositionSpec


class Preset(NamedTuple):
    """A named configuration; ``published`` is the parameter count as printed, None for this project's own."""

    name: str
    config: GPTConfig
    source: str
    published: float | None = None
    note: str = ""


def _gpt2(layers: int, width: int, heads: int, **changes: Any) -> GPTConfig:
    attention = changes.pop("attention", AttentionSpec(num_heads=heads))
    return GPTConfig(num_layers=layers, width=width, attention=attention, **changes)


def _gpt() -> list[Preset]:
    gpt1 = _gpt2(
        12, 768, 12, vocab_size=40478, context_length=512, norm=NormSpec(placement="post"), init="gpt1"
    )  # fmt: skip
    source = "Radford et al. 2019, Table 2; counts of the released weights"
    # name, L, C, H, N
    rows = [
        ("gpt2", 12, 768, 12, 124_439_808),
        ("gpt2-medium", 24, 1024, 16, 354_823_168),
        ("gpt2-large", 36, 1280, 20, 774_030_080),
        ("gpt2-xl", 48, 1600, 25, 1_557_611_200),
    ]
    return [
        Preset("gpt1", gpt1, "Radford et al. 2018, section 4.1", 116_534_784, "the paper rounds to 117M"),
        *(Preset(name, _gpt2(layers, c, h), source, n) for name, layers, c, h, n in rows),
    ]


_BAND_NOTE = "the width of the band is not published; 256, with even layers dense, is our choice"
_XL_NOTE = "the paper prints 24 heads of 128, which is not 2048; 16 x 128 is what runs. "
_13B_NOTE = "the paper prints a width of 5140; 5120 = 40 x 128 is what runs. "


def _gpt3() -> list[Preset]:
    source = "Brown et al. 2020, Table 2.1; counts from Table D.1"
    # name, L, C, H, N in Table D.1, what differs from Table 2.1
    rows = [
        ("gpt3-small", 12, 768, 12, 125e6, ""),
        ("gpt3-medium", 24, 1024, 16, 356e6, ""),
        ("gpt3-large", 24, 1536, 16, 760e6, ""),
        ("gpt3-xl", 24, 2048, 16, 1320e6, _XL_NOTE),
        ("gpt3-2.7b", 32, 2560, 32, 2650e6, ""),
        ("gpt3-6.7b", 32, 4096, 32, 6660e6, ""),
        ("gpt3-13b", 40, 5120, 40, 12850e6, _13B_NOTE),
        ("gpt3-175b", 96, 12288, 96, 174600e6, ""),
    ]
    return [
        Preset(
            name,
            _gpt2(
                layers, c, h, context_length=2048,
                attention=AttentionSpec(num_heads=h, pattern=("dense", "banded"), window=256),
            ),
            source, n, note + _BAND_NOTE,
        )
        for name, layers, c, h, n, note in rows
    ]  # fmt: skip


def _opt() -> list[Preset]:
    source = "Zhang et al. 2022, Table 1; counts of the released weights"
    # name, L, C, H, N
    rows = [
        ("opt-125m", 12, 768, 12, 125_239_296),
        ("opt-350m", 24, 1024, 16, 331_196_416),
        ("opt-1.3b", 24, 2048, 32, 1_315_758_080),
        ("opt-2.7b", 32, 2560, 32, 2_651_596_800),
        ("opt-6.7b", 32, 4096, 32, 6_658_473_984),
        ("opt-13b", 40, 5120, 40, 12_853_473_280),
        ("opt-30b", 48, 7168, 56, 30e9),
        ("opt-66b", 64, 9216, 72, 66e9),
        ("opt-175b", 96, 12288, 96, 175e9),
    ]
    presets = []
    for name, layers, c, h, n in rows:
        config = _gpt2(
            layers, c, h, vocab_size=50272, context_length=2048, mlp=MlpSpec(activation="relu"),
            position=PositionSpec(offset=2), init="opt",
        )  # fmt: skip
        note = ""
        if name == "opt-350m":
            config = config.merged({"norm": {"placement": "post"}, "embedding_width": 512})
            note = "as released: post-LN, token embeddings of width 512 projected in and out"
        presets.append(Preset(name, config, source, n, note))
    return presets


def _bloom() -> list[Preset]:
    source = "BigScience 2022, Table 3; counts of the released weights"
    # name, L, C, H, N
    rows = [
        ("bloom-560m", 24, 1024, 16, 559_214_592),
        ("bloom-1.1b", 24, 1536, 16, 1_065_314_304),
        ("bloom-1.7b", 24, 2048, 16, 1_722_408_960),
        ("bloom-3b", 30, 2560, 32, 3_002_557_440),
        ("bloom-7.1b", 30, 4096, 32, 7_069_016_064),
        ("bloom-176b", 70, 14336, 112, 176_247_271_424),
    ]
    return [
        Preset(
            name,
            _gpt2(
                layers, c, h, vocab_size=250880, context_length=2048, embedding_norm=True,
                position=PositionSpec(kind="alibi"), init="bloom",
            ),
            source, n,
        )
        for name, layers, c, h, n in rows
    ]  # fmt: skip


def _palm() -> list[Preset]:
    # name, L, C, H, N; one key/value head, D 256, F 4C
    rows = [
        ("palm-8b", 32, 4096, 16, 8.63e9),
        ("palm-62b", 64, 8192, 32, 62.50e9),
        ("palm-540b", 118, 18432, 48, 540.35e9),
    ]
    return [
        Preset(
            name,
            GPTConfig(
                num_layers=layers, width=c, vocab_size=256_000, context_length=2048,
                attention=AttentionSpec(
                    num_heads=h, num_kv_heads=1, head_dim=256, qkv_bias=False, out_bias=False
                ),
                norm=NormSpec(bias=False, parallel="shared"),
                mlp=MlpSpec(activation="swiglu", bias=False),
                position=PositionSpec(kind="rotary", interleaved=True),
                logit_scale=c**-0.5, init="palm",
            ),
            "Chowdhery et al. 2022, Table 1", n,
        )
        for name, layers, c, h, n in rows
    ]  # fmt: skip


def _glm() -> list[Preset]:
    config = GPTConfig(
        num_layers=70, width=12288, vocab_size=150528, context_length=2048,
        attention=AttentionSpec(num_heads=96),
        norm=NormSpec(placement="deepnorm"),
        mlp=MlpSpec(hidden_size=32768, activation="geglu"),
        position=PositionSpec(kind="rotary"),
        embedding_norm=True, embedding_grad_shrink=0.1, init="glm",
    )  # fmt: skip
    note = "the decoder's weights and initialisation under a causal mask, without the bidirectional prefix"
    return [Preset("glm-130b", config, "Zeng et al. 2022, section 2 and Table 11", 130e9, note)]


def _llama_like(
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    hidden: int,
    *,
    eps: float,
    base: float,
    **changes: Any,
) -> GPTConfig:
    return GPTConfig(
        num_layers=layers, width=width, tied_head=False,
        attention=AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, qkv_bias=False, out_bias=False),
        norm=NormSpec(kind="rms_norm", eps=eps),
        mlp=MlpSpec(hidden_size=hidden, activation="swiglu", bias=False),
        position=PositionSpec(kind="rotary", base=base),
        init="llama", **changes,
    )  # fmt: skip


def _llama() -> list[Preset]:
    one, two = "Touvron et al. 2023a, Table 2", "Touvron et al. 2023b, Table 1"
    three = "Llama Team 2024, Table 3"
    # name, L, C, H, Hkv, F, V, T, base, eps, N, source
    rows = [
        ("llama-7b", 32, 4096, 32, 32, 11008, 32000, 2048, 1e4, 1e-6, 6_738_415_616, one),
        ("llama-13b", 40, 5120, 40, 40, 13824, 32000, 2048, 1e4, 1e-6, 13_015_864_320, one),
        ("llama-33b", 60, 6656, 52, 52, 17920, 32000, 2048, 1e4, 1e-6, 32_528_943_616, one),
        ("llama-65b", 80, 8192, 64, 64, 22016, 32000, 2048, 1e4, 1e-5, 65_285_660_672, one),
        ("llama2-70b", 80, 8192, 64, 8, 28672, 32000, 4096, 1e4, 1e-5, 68_976_648_192, two),
        ("llama3-8b", 32, 4096, 32, 8, 14336, 128256, 8192, 5e5, 1e-5, 8_030_261_248, three),
    ]
    return [
        Preset(
            name, _llama_like(layers, c, h, hkv, f, vocab_size=v, context_length=t, eps=eps, base=base), source, n
        )
        for name, layers, c, h, hkv, f, v, t, base, eps, n, source in rows
    ]  # fmt: skip


_DECODER_NOTE = "published as an encoder-decoder; this is a decoder of its sizes, with rotary positions"


def _experts() -> list[Preset]:
    switch = MoESpec(
        num_experts=64, top_k=1, every=2, capacity_factor=1.25, eval_capacity_factor=2.0, jitter=0.01,
        z_weight=0.0, router_init_scale=0.1,
    )  # fmt: skip
    st_moe = MoESpec(
        num_experts=32, top_k=2, every=4, capacity_factor=1.25, eval_capacity_factor=2.0, second_choice="st_moe",
        router_init_scale=0.1,
    )  # fmt: skip
    st_moe_32b = st_moe.merged({"num_experts": 64})
    mixtral = MoESpec(num_experts=8, top_k=2, balance="all", balance_weight=0.02, z_weight=0.0)
    # name, L, C, H, D, F, activation, experts, source
    rows = [
        (
            "switch-base",
            12,
            768,
            12,
            64,
            3072,
            "relu",
            switch,
            "Fedus et al. 2021; sizes of the released weights",
        ),
        ("st-moe-l", 27, 1024, 16, 64, 2816, "geglu_tanh", st_moe, "Zoph et al. 2022"),
        ("st-moe-32b", 27, 5120, 64, 128, 20480, "geglu_tanh", st_moe_32b, "Zoph et al. 2022"),
    ]
    decoders = [
        Preset(
            name,
            GPTConfig(
                num_layers=layers, width=c, vocab_size=32128, context_length=512,
                attention=AttentionSpec(num_heads=h, head_dim=d, qkv_bias=False, out_bias=False),
                norm=NormSpec(kind="rms_norm", eps=1e-6),
                mlp=MlpSpec(hidden_size=f, activation=activation, bias=False), moe=moe,  # type: ignore[arg-type]
                position=PositionSpec(kind="rotary"),
            ),
            source, note=_DECODER_NOTE,
        )
        for name, layers, c, h, d, f, activation, moe, source in rows
    ]  # fmt: skip
    mixtral_8x7b = _llama_like(
        32, 4096, 32, 8, 14336, vocab_size=32000, context_length=32768, eps=1e-5, base=1e6, moe=mixtral
    )
    source = "Jiang et al. 2024, Table 1; count of the released weights"
    return [*decoders, Preset("mixtral-8x7b", mixtral_8x7b, source, 46_702_792_704)]


def _small() -> list[Preset]:
    character = _gpt2(
        4, 128, 4, vocab_size=65, context_length=64, norm=NormSpec(bias=False), mlp=MlpSpec(bias=False),
        attention=AttentionSpec(num_heads=4, qkv_bias=False, out_bias=False),
    )  # fmt: skip
    quick = _gpt2(
        4, 256, 4, vocab_size=2048, context_length=256, position=PositionSpec(kind="rotary"),
        attention=AttentionSpec(num_heads=4, qkv_bias=False, out_bias=False),
        norm=NormSpec(kind="rms_norm"),
        mlp=MlpSpec(hidden_size=704, activation="swiglu", bias=False),
    )  # fmt: skip
    experts = quick.merged(
        {
            "mlp": {"hidden_size": 352},
            "moe": {
                "num_experts": 8,
                "top_k": 2,
                "capacity_factor": 2.5,
                "eval_capacity_factor": 0.0,
                "router_init_scale": 0.1,
            },
        }
    )
    return [
        Preset("quickstart", quick, "this project", note="trains in about a minute on two CPU cores"),
        Preset(
            "quickstart-moe",
            experts,
            "this project",
            note="quickstart with 8 experts of half the size in every block, two for each token",
        ),
        Preset("shakespeare-char", character, "nanoGPT's CPU recipe, without biases"),
    ]


_FAMILIES: tuple[Callable[[], list[Preset]], ...] = (
    _gpt,
    _gpt3,
    _opt,
    _bloom,
    _palm,
    _glm,
    _llama,
    _experts,
    _small,
)

# Other names for the same thing; the last two carry the values that the GPT-3 paper prints.
_ALIASES = {
    "gpt": "gpt1", "gpt2-small": "gpt2", "gpt2-124m": "gpt2", "gpt2-355m": "gpt2-medium",
    "gpt2-774m": "gpt2-large", "gpt2-1.5b": "gpt2-xl", "gpt3-125m": "gpt3-small", "gpt3-350m": "gpt3-medium",
    "gpt3-760m": "gpt3-large", "gpt3-1.3b": "gpt3-xl", "gpt3": "gpt3-175b", "bloom": "bloom-176b",
    "palm": "palm-540b", "llama-30b": "llama-33b", "st-moe": "st-moe-32b", "mixtral": "mixtral-8x7b",
    "gpt3-13b-5140": "gpt3-13b", "gpt3-xl-24-heads": "gpt3-xl",
}  # fmt: skip

# (preset, path) -> (printed, shipped): overrides with the printed value mean the shipped one
_PRINTED = {
    ("gpt3-13b", ("width",)): (5140, 5120),
    ("gpt3-xl", ("attention", "num_heads")): (24, 16),
}


@cache
def _all() -> dict[str, Preset]:
    return {preset.name: preset for family in _FAMILIES for preset in family()}


def names() -> list[str]:
    """Every preset, family by family, small to large."""
    return list(_all())


def describe(name: str) -> Preset:
    """The preset with its source; an unknown name is refused with the nearest known one."""
    wanted = name.lower().replace("_", "-")
    wanted = _ALIASES.get(wanted, wanted)
    if wanted not in _all():
        raise unknown_name("preset", name, [*_all(), *_ALIASES])
    return _all()[wanted]


def get(name: str, overrides: Mapping[str, Any] | None = None) -> GPTConfig:
    """The configuration of a preset, with nested ``overrides`` such as ``{"norm": {"eps": 1e-6}}`` laid over.

    An override that repeats the GPT-3 paper's 5140 (13B) or 24 heads (XL) is taken as the 5120 and 16 that
    the paper's other numbers need, with a warning.
    """
    preset = describe(name)
    if not overrides:
        return preset.config
    changes = dict(overrides)
    for (of, path), (printed, shipped) in _PRINTED.items():
        if of == preset.name:
            changes = _replace_printed(changes, path, printed, shipped, preset.note)
    return preset.config.merged(changes)


def _replace_printed(
    changes: dict[str, Any], path: tuple[str, ...], printed: int, shipped: int, note: str
) -> dict[str, Any]:
    """``changes`` with ``shipped`` where ``path`` holds ``printed``."""
    key, rest = path[0], path[1:]
    inner = changes.get(key)
    if rest and isinstance(inner, Mapping):
        return {**changes, key: _replace_printed(dict(inner), rest, printed, shipped, note)}
    if rest or inner != printed:
        return changes
    warnings.warn(f"{key} {printed} taken as {shipped}: {note}", stacklevel=4)
    return {**changes, key: shipped}
