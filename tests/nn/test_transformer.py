"""MultiheadAttention and TransformerEncoderLayer against torch's, with every kind of mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptcore import backend
from gptcore.nn import MultiheadAttention, TransformerEncoderLayer

B, T, S, C, H = 3, 7, 9, 24, 4


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(kind: str, **options: Any) -> tuple[Any, Any]:
    """torch's module and ours with the same parameters."""
    ours_of, theirs_of = {
        "attention": (MultiheadAttention, torch.nn.MultiheadAttention),
        "layer": (TransformerEncoderLayer, torch.nn.TransformerEncoderLayer),
    }[kind]
    torch.manual_seed(1)
    theirs = theirs_of(C, H, **options)
    torch.manual_seed(1)
    ours = ours_of(C, H, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def results(module: Any, inputs: tuple[torch.Tensor, ...], **options: Any) -> list[torch.Tensor]:
    """The output and all gradients."""
    leaves = {id(x): x.clone().requires_grad_() for x in inputs}
    module.zero_grad()
    out = module(*(leaves[id(x)] for x in inputs), **options)
    out = out[0] if isinstance(out, tuple) else out
    (out * noise(*out.shape, seed=9)).sum().backward()
    return [out.detach(), *(x.grad for x in leaves.values()), *(p.grad for p in module.parameters())]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    largest = max(float(x.abs().max()) for x in theirs[1:])
    for index, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        # what a key's bias gets is zero but for the rounding of terms of the others' size
        assert (x - y).abs().max() <= 1e-5 * (y.abs().max() if index == 0 else largest)


MASKS = {
    "none": {},
    "bool": {"attn_mask": noise(T, S) > 0.8},
    "float": {"attn_mask": noise(T, S)},
    "by head": {"attn_mask": noise(B * H, T, S) > 0.8},
    "by head, float": {"attn_mask": noise(B * H, T, S)},
    "padding": {"key_padding_mask": torch.arange(S)[None] >= torch.tensor([[9], [6], [4]])},
    "padding and bool": {
        "key_padding_mask": torch.arange(S)[None] >= torch.tensor([[9], [6], [4]]),
        "attn_mask": (noise(T, S) > 0.8) & (torch.arange(S) > 0),
    },
    "padding and float": {
        "key_padding_mask": torch.arange(S)[None] >= torch.tensor([[9], [6], [4]]), "attn_mask": noise(T, S),
    },
    "float padding": {"key_padding_mask": noise(B, S)},
}  # fmt: skip


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_is_torchs_under_every_mask(mask: str, batch_first: bool):
    theirs, ours = pair("attention", batch_first=batch_first)
    shapes = [(B, T, C), (B, S, C)] if batch_first else [(T, B, C), (S, B, C)]
    q, k = (noise(*shape, seed=i) for i, shape in enumerate(shapes))
    options = {**MASKS[mask], "need_weights": False}
    backend.reset_report()
    assert_same(results(ours, (q, k, k), **options), results(theirs, (q, k, k), **options))
    assert "multi_head_attention" not in backend.report()


@pytest.mark.parametrize(
    "options", [{"bias": False}, {"kdim": 10, "vdim": 6}, {"kdim": 10, "vdim": 6, "bias": False}, {}], ids=str
)
def test_projections_of_every_kind(options: dict[str, Any]):
    theirs, ours = pair("attention", batch_first=True, **options)
    q, k, v = (
        noise(B, T, C),
        noise(B, S, options.get("kdim", C), seed=1),
        noise(B, S, options.get("vdim", C), seed=2),
    )
    assert_same(results(ours, (q, k, v), need_weights=False), results(theirs, (q, k, v), need_weights=False))


def test_self_attention_causal_and_unbatched():
    theirs, ours = pair("attention")
    x, mask = noise(T, B, C), torch.nn.Transformer.generate_square_subsequent_mask(T)
    options = {"attn_mask": mask, "is_causal": True, "need_weights": False}
    assert_same(results(ours, (x, x, x), **options), results(theirs, (x, x, x), **options))
    x = noise(T, C)
    assert_same(results(ours, (x, x, x), need_weights=False), results(theirs, (x, x, x), need_weights=False))
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        ours(x, x, x, need_weights=False, is_causal=True)


@pytest.mark.parametrize(
    ("options", "call", "reason"),
    [
        ({}, {}, "need_weights"),
        ({"add_bias_kv": True}, {"need_weights": False}, "add_bias_kv or add_zero_attn"),
        ({"add_zero_attn": True}, {"need_weights": False}, "add_bias_kv or add_zero_attn"),
        ({"dtype": torch.float64}, {"need_weights": False}, "torch.float64 on cpu"),
    ],
)
def test_what_goes_to_torch_is_reported(options: dict[str, Any], call: dict[str, Any], reason: str):
    theirs, ours = pair("attention", **options)
    x = noise(T, B, C).to(options.get("dtype", torch.float32))
    backend.reset_report()
    got, wanted = ours(x, x, x, **call), theirs(x, x, x, **call)
    assert torch.equal(got[0], wanted[0]) and (got[1] is None) == (wanted[1] is None)
    assert reason in backend.report()["multi_head_attention"]


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(
    "activation", ["relu", "gelu", torch.nn.functional.silu], ids=["relu", "gelu", "silu"]
)
def test_encoder_layer_is_torchs(norm_first: bool, activation: Any):
    options = {"dim_feedforward": 40, "dropout": 0.0, "norm_first": norm_first, "activation": activation}
    theirs, ours = pair("layer", batch_first=True, **options)
    x, padding = noise(B, T, C), torch.arange(T)[None] >= torch.tensor([[7], [5], [3]])
    assert_same(results(ours, (x,)), results(theirs, (x,)))
    masked = {"src_key_padding_mask": padding}
    assert_same(results(ours, (x,), **masked), results(theirs, (x,), **masked))
    with torch.no_grad():
        got, wanted = ours.eval()(x), theirs.eval()(x)  # torch's takes its fused path here
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_encoder_of_our_layers():
    theirs, ours = pair("layer", dim_feedforward=40, dropout=0.0, batch_first=True)
    x = noise(B, T, C)
    stacks = [torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False) for layer in (theirs, ours)]
    stacks[1].load_state_dict(stacks[0].state_dict())
    assert_same(*(results(stack, (x,)) for stack in reversed(stacks)))


def test_dropout_acts_in_training_only():
    _, ours = pair("attention", dropout=0.5)
    x = noise(T, B, C)
    torch.manual_seed(1)
    first = ours(x, x, x, need_weights=False)[0]
    assert not torch.equal(ours(x, x, x, need_weights=False)[0], first)
    torch.manual_seed(1)
    assert torch.equal(ours(x, x, x, need_weights=False)[0], first)
    ours.eval()
    assert torch.equal(ours(x, x, x, need_weights=False)[0], ours(x, x, x, need_weights=False)[0])
