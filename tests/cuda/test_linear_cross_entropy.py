"""linear_cross_entropy in chunks, as on a GPU, by CUDA's kernels on the processor."""

from __future__ import annotations

import pytest
import torch

from gptcore.ops import linear_cross_entropy_chunks as chunks
from gptcore.ops.linear_cross_entropy import linear_cross_entropy
from tests.ops.linear_cross_entropy_cases import DTYPES, check, inputs
from tests.tolerance import assert_close_to_exact, same_bits


def test_a_chunk_is_a_multiple_of_128_or_all() -> None:
    assert chunks.chunk_rows(10**6, 131_072) == 1024
    assert chunks.chunk_rows(10**6, 50_257) == 2560
    assert chunks.chunk_rows(100, 131_072) == 100
    assert chunks.chunk_rows(10**6, 10**9) == 128
    for classes in (1, 65, 50_257, 131_072, 256_000):
        assert chunks.chunk_rows(10**6, classes) * classes <= max(chunks.CHUNK_PRODUCTS, 128 * classes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_several_chunks_match_float64_simt(
    simt: None, monkeypatch, dtype: torch.dtype, reduction: str
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_PRODUCTS", 128 * 40)
    check(*inputs(300, 24, 40, dtype), reduction=reduction, z_loss=1e-3)
    check(*inputs(300, 24, 40, dtype), reduction=reduction, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_at_once_are_scaled_on_the_device_simt(
    on_simt: None, monkeypatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_PRODUCTS", 128 * 40)
    x, weight, targets = inputs(200, 24, 40, dtype)
    made = {}
    for factor in (1.0, 0.25, 3.0):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        (linear_cross_entropy(*leaves, targets).loss * factor).backward()
        made[factor] = [leaf.grad for leaf in leaves]
    for one, quarter, three in zip(*(made[f] for f in (1.0, 0.25, 3.0)), strict=True):
        assert same_bits(one * 0.25, quarter)
        assert same_bits((one.float() * 3.0).to(dtype), three)


def test_the_weights_gradient_goes_to_main_grad_unrounded_simt(on_simt: None, monkeypatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_PRODUCTS", 128 * 40)
    x, weight, targets = inputs(300, 24, 40, torch.bfloat16)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets).backward()
    weight.requires_grad_()
    weight.main_grad = torch.ones(40, 24)
    linear_cross_entropy(x, weight, targets).loss.backward()
    assert weight.grad is None
    # What is rounded to bf16 on the way are the gradients of the logits, each by 2^-9 of itself at most.
    twin = (exact[1].grad * (1 + 2**-9)).float()
    assert_close_to_exact(weight.main_grad - 1, exact[1].grad, twin, terms=300, summand=1.0)


def test_same_bits_in_every_run_simt(on_simt: None, monkeypatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_PRODUCTS", 128 * 40)
    x, weight, targets = inputs(300, 24, 40, torch.bfloat16)

    def run() -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        out = linear_cross_entropy(*leaves, targets, return_entropy=True, return_predicted=True)
        out.loss.backward()
        return [*out, *(leaf.grad for leaf in leaves)]

    first = run()
    assert all(same_bits(a, b) for a, b in zip(first, run(), strict=True))
