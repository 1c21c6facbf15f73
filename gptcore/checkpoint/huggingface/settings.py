"""What the families' readers and writers of ``config.json`` share: refusals, activations, dropout."""

from __future__ import annotations

from typing import Any

from gptcore.errors import UserError

Config = dict[str, Any]

# Their names of activations; the first of a kind is the one we write.
_ACTIVATIONS = {
    "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu_accurate": "gelu",
    "gelu_python_tanh": "gelu", "gelu": "gelu_erf", "gelu_python": "gelu_erf",
    "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip
_GATED = {"silu": "swiglu", "gelu": "geglu_tanh", "gelu_erf": "geglu"}


def refuse(hf: Config, **expected: Any) -> None:
    """Refuse every key that is there with another value than the expected one."""
    for key, value in expected.items():
        if hf.get(key, value) not in (value, None):
            raise UserError(f"config.json: {key} = {hf[key]!r}: GPT computes {value!r} only")


def activation(hf: Config, key: str, default: str) -> Any:
    name = hf.get(key) or default
    if name not in _ACTIVATIONS:
        raise UserError(f"config.json: {key} = {name!r}: expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def gated(hf: Config, key: str, default: str) -> Any:
    plain = activation(hf, key, default)
    if plain not in _GATED:
        raise UserError(f"config.json: {key} = {hf.get(key)!r}: GPT has no gated feed-forward with it")
    return _GATED[plain]


def their_activation(ours: str, *, tanh: str = "gelu_new") -> str:
    """The name we write; ``tanh`` is the family's own for GELU's tanh form."""
    plain = {"swiglu": "silu", "geglu_tanh": "gelu", "geglu": "gelu_erf"}.get(ours, ours)
    return {"gelu": tanh, "gelu_erf": "gelu"}.get(plain, plain)


def dropout_of(hf: Config, residual: str | None, attention: str) -> tuple[float, float]:
    """Dropout of the residual stream and of attention's probabilities."""
    return float(hf.get(residual) or 0.0) if residual else 0.0, float(hf.get(attention) or 0.0)
