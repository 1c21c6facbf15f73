"""transformers models of every family, their ways onto the kernels, batches with padding, and one run of both."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

import gptcore
from gptcore.integrations import huggingface
from tests.checkpoint.huggingface_cases import CASES

LENGTH, PADDING = 37, 9
ROUTES = ("attn_implementation", "apply", "replace")
# Families whose own layers compute attention and leave no choice of it, and those without an apply_gptcore_to_*.
OWN_ATTENTION = ("bloom", "gptj", "falcon")
NOT_APPLIED = ("gptj", "falcon", "glm", "glm4")


def model_of(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The case's model."""
    model_type, settings = CASES[name]
    return built(model_type, {**settings, **changes}).to(dtype)


def built(model_type: str, settings: dict[str, Any]) -> Any:
    """A model with eager attention, whose biases and gains are not at their trivial start."""
    import transformers

    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(model_type, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


def room_for(name: str, positions: int) -> dict[str, int]:
    """The setting by which the case's model has so many; BLOOM counts none."""
    family = CASES[name][0]
    key = "n_positions" if family in ("gpt2", "gptj") else "max_position_embeddings"
    return {} if family == "bloom" else {key: positions}


def has_route(name: str, route: str) -> bool:
    """Whether the case's family can come onto the kernels by this one of ``ROUTES``."""
    return CASES[name][0] not in {"attn_implementation": OWN_ATTENTION, "apply": NOT_APPLIED}.get(route, ())


def apply_to(family: str) -> Any:
    """``apply_gptcore_to_*`` of transformers' model_type."""
    return getattr(huggingface, f"apply_gptcore_to_{family.removesuffix('_text')}")


def put_on(model: Any, route: str) -> None:
    """``model`` onto the kernels by one of ``ROUTES``."""
    if route == "attn_implementation":
        huggingface.register()
        model.set_attn_implementation(huggingface.ATTENTION_NAME)
    elif route == "apply":
        apply_to(model.config.model_type)(model=model)
    elif route == "replace":
        gptcore.replace(model, verbose=False)
    else:
        raise ValueError(route)


def batch(padding: str) -> dict[str, torch.Tensor]:
    """Two sequences, the first padded on one side; the first token after the padding is no target."""
    tokens = torch.randint(1, 61, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    if padding == "left":
        mask[0, :PADDING] = 0
    elif padding == "right":
        mask[0, -PADDING:] = 0
    labels = torch.where(mask.bool(), tokens, -100)
    if padding == "left":
        labels[0, PADDING] = -100
    inputs = {"input_ids": tokens, "labels": labels}
    return inputs if padding == "no mask" else {**inputs, "attention_mask": mask}


def unlabelled(padding: str) -> dict[str, torch.Tensor]:
    """``batch`` without its labels."""
    return {name: value for name, value in batch(padding).items() if name != "labels"}


class Run(NamedTuple):
    """``logits``, where there are any; ``loss``; ``gradients`` by transformers' names."""

    logits: torch.Tensor | None
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


def run(model: Any, inputs: dict[str, torch.Tensor]) -> Run:
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return Run(out.logits.detach(), out.loss.detach(), gradients_of(model))


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: Run, wanted: Run, kept: Any = slice(None)) -> None:
    """Logits at ``kept`` places, loss and gradients within 1e-5 of their largest magnitude."""
    if got.logits is not None:
        assert (got.logits - wanted.logits)[kept].abs().max() <= 1e-5 * wanted.logits[kept].abs().max()
    assert abs(got.loss - wanted.loss) <= 1e-5 * wanted.loss.abs()
    assert got.gradients.keys() == wanted.gradients.keys()
    for name, gradient in wanted.gradients.items():
        # a bias' gradient is a sum of terms of its weight's size, and for keys nothing but their rounding is left:
        # a shift of all scores changes no softmax
        weight = wanted.gradients.get(name.replace(".bias", ".weight"), gradient)
        scale = max(gradient.abs().max(), weight.abs().max())
        assert (got.gradients[name] - gradient).abs().max() <= 1e-5 * scale, name
