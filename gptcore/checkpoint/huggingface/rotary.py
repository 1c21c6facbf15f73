"""Rotary settings of ``config.json``: ``rope_parameters`` of transformers 5, or the older loose keys."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gptcore.errors import UserError
from gptcore.models import GPTConfig, PositionSpec, ScalingSpec

# Our names of what stretches frequencies, and theirs.
_KEYS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor", "low_factor": "low_freq_factor", "high_factor": "high_freq_factor",
        "original_context": "original_max_position_embeddings",
    },
    "yarn": {
        "factor": "factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow",
        "original_context": "original_max_position_embeddings",
    },
}  # fmt: skip


def read(
    hf: Mapping[str, Any],
    *,
    theta_key: str = "rope_theta",
    fraction_key: str = "partial_rotary_factor",
    fraction: float = 1.0,
    interleaved: bool = False,
) -> PositionSpec:
    """The rotary positions of a model whose layers are alike. ``*_key``: the family's older names."""
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    fraction = float(rope.get("partial_rotary_factor", hf.get(fraction_key, fraction)))
    head = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    if int(head * fraction) % 2:
        raise UserError(
            f"config.json: rotates {int(head * fraction)} of {head} dimensions, expected an even number"
        )
    return PositionSpec(
        kind="rotary", interleaved=interleaved, rotary_fraction=fraction,
        base=float(rope.get("rope_theta", hf.get(theta_key, 10000.0))),
        scaling=_read_scaling(rope, hf.get("max_position_embeddings")),
    )  # fmt: skip


def write(config: GPTConfig) -> dict[str, Any]:
    """``rope_parameters`` of a model whose layers are alike."""
    if config.position.kind != "rotary":
        return {}
    fraction = config.rotary_dim / config.head_dim
    return {"rope_parameters": _write_layer(config, 0) | {"partial_rotary_factor": fraction}}


def read_by_layer(hf: Mapping[str, Any]) -> PositionSpec:
    """Gemma 3's positions: settings for windowed layers and others for the global ones, which alone are stretched."""
    rope = hf.get("rope_parameters") or {}
    local = {"rope_theta": hf.get("rope_local_base_freq", 1e4), **rope.get("sliding_attention", {})}
    everywhere = {
        "rope_theta": hf.get("rope_theta", 1e6), **(hf.get("rope_scaling") or {}), **rope.get("full_attention", {})
    }  # fmt: skip
    if _kind(local) != "none":
        raise UserError("config.json: rope_parameters: got scaled windowed layers, expected plain ones")
    full = [kind == "full_attention" for kind in hf["layer_types"]]
    bases = tuple(float((everywhere if one else local)["rope_theta"]) for one in full)
    scaling = _read_scaling(everywhere, hf.get("max_position_embeddings"))
    return PositionSpec(
        kind="rotary", base=bases, scaling=scaling, scaled=True if scaling.kind == "none" else tuple(full)
    )


def write_by_layer(config: GPTConfig, kinds: Sequence[str]) -> dict[str, Any]:
    """Gemma 3's ``rope_parameters``, from the first layer of each kind."""
    if config.position.kind != "rotary":
        return {}
    return {
        "rope_parameters": {kind: _write_layer(config, kinds.index(kind)) for kind in dict.fromkeys(kinds)}
    }


def _kind(rope: Mapping[str, Any]) -> str:
    kind = rope.get("rope_type", rope.get("type", "default"))
    return "none" if kind == "default" else str(kind)


def _read_scaling(rope: Mapping[str, Any], context: int | None) -> ScalingSpec:
    kind = _kind(rope)
    if kind == "none":
        return ScalingSpec()
    if kind not in _KEYS:
        raise UserError(f"config.json: rope_type = {kind!r}: expected one of default, {', '.join(_KEYS)}")
    values = {ours: rope[theirs] for ours, theirs in _KEYS[kind].items() if rope.get(theirs) is not None}
    if kind == "yarn":
        _refuse_other_yarn(rope)
        values.setdefault("original_context", context)
    typed = {name: int(v) if name == "original_context" else float(v) for name, v in values.items()}
    return ScalingSpec(kind=kind, **typed)  # type: ignore[arg-type]


def _refuse_other_yarn(rope: Mapping[str, Any]) -> None:
    usual = 0.1 * math.log(rope["factor"]) + 1.0
    expected = {"attention_factor": usual, "mscale": None, "mscale_all_dim": None, "truncate": True}
    for key, value in expected.items():
        found = rope.get(key)
        if found is not None and found != value:
            raise UserError(f"config.json: rope_parameters: {key} = {found!r}: GPT computes {value!r} only")


def _write_layer(config: GPTConfig, layer: int) -> dict[str, Any]:
    scaling = config.position.scaling_of(layer)
    rope: dict[str, Any] = {"rope_theta": config.rotary_base(layer), "rope_type": "default"}
    if scaling.kind != "none":
        rope["rope_type"] = scaling.kind
        rope |= {theirs: getattr(scaling, ours) for ours, theirs in _KEYS[scaling.kind].items()}
    return rope
