"""torch.compile sees one graph, forward and backward."""

from __future__ import annotations

import pytest
import torch

from tests.models.cases import CASES, model_of, tokens_of


def _gradients(model, compiled, tokens, targets, cu_seqlens):
    out = compiled(tokens, targets, cu_seqlens=cu_seqlens, z_loss=1e-3)
    (out.loss + out.z_loss).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return out, gradients


def _compare(name: str, backend: str, packed: bool, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    model = model_of(CASES[name].merged({"num_layers": 2}), dtype)
    tokens, targets = tokens_of(model.config)
    cu_seqlens = torch.tensor([0, 5, 14, 17, 34], dtype=torch.int32) if packed else None
    eager, expected = _gradients(model, model, tokens, targets, cu_seqlens)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    out, gradients = _gradients(model, compiled, tokens, targets, cu_seqlens)
    # the same kernels, but torch.compile may order the library's small products and casts differently
    rtol = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.loss, eager.loss, rtol=rtol, atol=0)
    for key, gradient in gradients.items():
        difference = (gradient.double() - expected[key].double()).norm()
        assert difference <= 2 * rtol * expected[key].double().norm() + 1e-12, key
    with torch.no_grad():
        logits = compiled(tokens, cu_seqlens=cu_seqlens)
    assert logits.shape == (*tokens.shape, model.config.vocab_size)


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("gpt2", False),
        ("gpt2", True),
        ("llama3", False),
        ("gemma", True),
        ("glm", False),
        ("bloom", True),
        ("experts", False),
    ],
)
def test_one_graph(name: str, packed: bool):
    _compare(name, "aot_eager", packed, torch.float32)


def test_one_graph_in_bf16():
    _compare("gpt3", "aot_eager", False, torch.bfloat16)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_one_graph_through_inductor(name: str, dtype: torch.dtype):
    _compare(name, "inductor", False, dtype)
