"""NEFTune's noise: its bound for each sequence, in training alone, drawn from the seeded generator."""

from __future__ import annotations

import math

import pytest
import torch

from gptcore.align.neftune import EmbeddingNoise
from gptcore.errors import UserError
from gptcore.models import GPT, GPTConfig

TABLE = {"num_layers": 1, "width": 64, "context_length": 32, "vocab_size": 40, "attention": {"num_heads": 2}}
TOKENS = torch.arange(30)[None]
BOUNDS = torch.tensor([0, 4, 30], dtype=torch.int32)


def noise_of(model: GPT, alpha: float, bounds: torch.Tensor | None, seed: int = 0) -> torch.Tensor:
    """What the embedding gives beyond its rows."""
    seen: list[torch.Tensor] = []
    with EmbeddingNoise(model, alpha):
        handle = model.token_embedding.register_forward_hook(lambda m, a, x: seen.append(x.detach()))
        torch.manual_seed(seed)
        model(TOKENS, TOKENS, cu_seqlens=bounds)
        handle.remove()
    return seen[0].view(30, 64) - model.token_embedding.weight.detach()[TOKENS[0]]


def test_each_sequence_has_the_noise_of_its_own_length() -> None:
    model = GPT(GPTConfig.from_dict(TABLE)).train()
    for bounds, lengths in ((BOUNDS, [4, 26]), (None, [30])):
        found = noise_of(model, 5.0, bounds)
        for part, length in zip(found.split(lengths), lengths, strict=True):
            bound = 5.0 / math.sqrt(length * 64)
            assert 0.95 * bound < float(part.abs().max()) <= bound + 1e-6
            # uniform: a third of the squared bound; 256 draws of it stray by 3 standard errors at most
            assert float(part.square().mean()) == pytest.approx(
                bound**2 / 3, rel=3 * 0.9 / math.sqrt(part.numel())
            )
            assert abs(float(part.mean())) < 4 * bound / math.sqrt(3 * part.numel())


def test_the_same_seed_draws_the_same() -> None:
    model = GPT(GPTConfig.from_dict(TABLE)).train()
    assert torch.equal(noise_of(model, 5.0, BOUNDS, 1), noise_of(model, 5.0, BOUNDS, 1))
    assert not torch.equal(noise_of(model, 5.0, BOUNDS, 1), noise_of(model, 5.0, BOUNDS, 2))


def test_there_is_none_in_evaluation_nor_afterwards() -> None:
    model = GPT(GPTConfig.from_dict(TABLE))
    before = model(TOKENS, TOKENS).loss
    with EmbeddingNoise(model, 5.0):
        assert torch.equal(model.eval()(TOKENS, TOKENS).loss, before)
        assert not torch.equal(model.train()(TOKENS, TOKENS).loss, before)
    assert torch.equal(model(TOKENS, TOKENS).loss, before)
    with EmbeddingNoise(model, 0.0):
        assert torch.equal(model(TOKENS, TOKENS).loss, before)
    with pytest.raises(UserError, match="neftune_alpha: got -1"):
        EmbeddingNoise(model, -1.0)


def test_its_gradient_reaches_a_tied_table() -> None:
    """The table is embedding and head at once, and both uses count though the embedding is watched."""
    model = GPT(GPTConfig.from_dict(TABLE)).train()
    with EmbeddingNoise(model, 1e-6):
        model(TOKENS, TOKENS, cu_seqlens=BOUNDS).loss.backward()
    noisy = model.token_embedding.weight.grad
    model.zero_grad()
    model(TOKENS, TOKENS, cu_seqlens=BOUNDS).loss.backward()
    plain = model.token_embedding.weight.grad
    assert noisy is not None and plain is not None
    assert float((noisy - plain).abs().max()) < 1e-4 * float(plain.abs().max())
