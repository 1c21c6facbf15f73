"""A tied table gets one gradient: what autograd's sum of two would be, whatever is differentiated, and how often."""

from __future__ import annotations

import pytest
import torch

from gptcore.models import GPT, presets
from gptcore.models.tied import TiedTable

CONFIG = presets.get("shakespeare-char", {"vocab_size": 65, "num_layers": 2})


def _model(dtype: torch.dtype = torch.float32) -> GPT:
    return GPT(CONFIG, seed=3, dtype=dtype)


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(65, (3, 33), generator=torch.Generator().manual_seed(7))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _gradient(model: GPT) -> torch.Tensor:
    model.zero_grad()
    model(*_batch()).loss.backward()
    return model.token_embedding.weight.grad


def _hooked(model: GPT) -> GPT:
    """A hook on the embedding keeps autograd's own sum of two gradients."""
    model.token_embedding.register_forward_hook(lambda *_: None)
    return model


def test_f32_gradients_are_autograds_sum_bit_for_bit():
    # row by row both are head + (sum over occurrences), in f32
    assert torch.equal(_gradient(_model()), _gradient(_hooked(_model())))


def test_bf16_gradients_are_rounded_once(monkeypatch: pytest.MonkeyPatch):
    heads: list[torch.Tensor] = []
    keep = TiedTable.keep
    monkeypatch.setattr(TiedTable, "keep", lambda self, g: (heads.append(g.clone()), keep(self, g))[1])
    one, two = _gradient(_model(torch.bfloat16)).double(), _gradient(_hooked(_model(torch.bfloat16))).double()
    (head,) = heads
    # Ours rounds the sum. Autograd rounds the embedding's share, which is one - head up to a rounding, then the sum.
    share = (one - head.double()).abs() + 2**-8 * one.abs()
    assert ((one - two).abs() <= 2**-8 * (one.abs() + two.abs() + share) * (1 + 2**-7)).all()
    unused = torch.ones(65, dtype=torch.bool)
    unused[_batch()[0].flatten()] = False
    assert torch.equal(one[unused], two[unused])


def test_the_table_is_shared_only_where_nobody_looks(monkeypatch: pytest.MonkeyPatch):
    kept = []
    monkeypatch.setattr(TiedTable, "keep", lambda self, gradient: kept.append(gradient.shape))
    _gradient(_hooked(_model()))
    assert not kept
    model, seen = _model(), []
    forward = model.token_embedding.forward
    model.token_embedding.forward = lambda tokens: (seen.append(tokens), forward(tokens))[1]
    _gradient(model)
    assert seen and not kept
    model = _model()
    model.token_embedding.weight.main_grad = torch.zeros(65, CONFIG.width)
    model(*_batch()).loss.backward()
    assert not kept
    _gradient(_model())
    assert kept == [(65, CONFIG.width)]


def test_differentiating_twice_gives_the_same_gradients():
    model = _model()
    loss = model(*_batch()).loss
    weight = model.token_embedding.weight
    (first,) = torch.autograd.grad(loss, [weight], retain_graph=True)
    # gradients of other parameters alone leave nothing behind
    torch.autograd.grad(loss, [model.stack.final_norm.weight], retain_graph=True)
    (second,) = torch.autograd.grad(loss, [weight])
    assert torch.equal(first, second)


def test_accumulated_gradients_add_up():
    model = _model()
    single = _gradient(model).clone()
    model(*_batch()).loss.backward()
    assert torch.equal(model.token_embedding.weight.grad, single + single)


def test_hidden_states_alone_and_a_frozen_table():
    model = _model()
    model.hidden(_batch()[0]).sum().backward()
    assert model.token_embedding.weight.grad.abs().sum() > 0
    frozen = _model()
    frozen.token_embedding.weight.requires_grad_(False)
    frozen(*_batch()).loss.backward()
    assert frozen.token_embedding.weight.grad is None
    assert frozen.stack.final_norm.weight.grad is not None
