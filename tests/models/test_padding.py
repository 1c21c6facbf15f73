"""Padded batches: a row is what it would be alone, and padding meets no layer, no expert and no loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from gptcore.models import GPT, GPTConfig
from gptcore.train import held_out
from gptcore.train.evaluation import tensors_of
from tests.models.cases import CASES, model_of

LENGTHS, T = (7, 12, 0, 3, 1), 12


def experts(name: str = "llama", **moe: Any) -> GPTConfig:
    return CASES[name].merged({"moe": {"num_experts": 5, "hidden_size": 40, **moe}})


def mask_of(side: str) -> torch.Tensor:
    """(B, T): padding to the right, to the left, or anywhere."""
    place = torch.arange(T).expand(len(LENGTHS), T)
    lengths = torch.tensor(LENGTHS)[:, None]
    if side == "anywhere":
        order = torch.rand(len(LENGTHS), T, generator=torch.Generator().manual_seed(1)).argsort(-1)
        return order < lengths
    return place < lengths if side == "right" else place >= T - lengths


def batch_of(config: GPTConfig, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Padding holds tokens and targets like any other: it is the mask that tells."""
    generator = torch.Generator().manual_seed(4)
    tokens, targets = (torch.randint(0, config.vocab_size, mask.shape, generator=generator) for _ in range(2))
    targets[mask & (torch.rand(mask.shape, generator=generator) < 0.2)] = -100
    return tokens, targets


@pytest.mark.parametrize("side", ["right", "left", "anywhere"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "encoder", "sinks", "gemma"])
def test_a_row_is_what_it_would_be_alone(name: str, side: str) -> None:
    """With experts that drop no token; every kind of position, and attention without causality too."""
    config, mask = experts(name, top_k=2), mask_of(side)
    model = model_of(config).eval()
    tokens, targets = batch_of(config, mask)
    with torch.no_grad():
        logits, hidden = model(tokens, mask=mask), model.hidden(tokens, mask=mask)
        each = model(tokens, targets, mask=mask, reduction="none", z_loss=1e-3)
        for padded in (logits, hidden, each.loss, each.z_loss, each.logprobs):
            assert padded.shape[:2] == mask.shape and not padded[~mask].any()
        for row in range(len(LENGTHS)):
            if not LENGTHS[row]:
                continue
            alone, wanted = tokens[row][mask[row]][None], targets[row][mask[row]][None]
            torch.testing.assert_close(logits[row][mask[row]], model(alone)[0], rtol=2e-5, atol=2e-5)
            out = model(alone, wanted, reduction="none", z_loss=1e-3)
            torch.testing.assert_close(each.loss[row][mask[row]], out.loss[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(each.logprobs[row][mask[row]], out.logprobs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "moe", [{}, {"balance": "shazeer", "noise": True}, {"priority": "gate", "balance": "all"}]
)
def test_routing_is_that_of_the_unpadded_rows(moe: dict[str, Any]) -> None:
    """Under a capacity: the same bits as the rows laid end to end, in outputs, drops, all losses and gradients."""
    config, mask = experts(capacity_factor=0.9, **moe), mask_of("right")
    model = model_of(config)
    tokens, targets = batch_of(config, mask)
    bounds = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32)

    def run(*inputs: torch.Tensor, **options: Any) -> tuple[Any, list[torch.Tensor]]:
        torch.manual_seed(3)
        model.zero_grad()
        out = model(*inputs, **options)
        out.total.backward()
        return out, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    padded, gradients = run(tokens, targets, mask=mask)
    packed, wanted = run(tokens[mask][None], targets[mask][None], cu_seqlens=bounds)
    for name in ("loss", "balance_loss", "router_z_loss"):
        assert torch.equal(getattr(padded, name), getattr(packed, name)), name
    assert torch.equal(padded.logprobs[mask], packed.logprobs[0])
    for mine, theirs in zip(padded.routing, packed.routing, strict=True):
        assert float(mine.drop_rate) > 0
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))


def test_without_a_mask_padding_would_count() -> None:
    """What the mask is for: targets of -100 alone leave padding in the routing."""
    config, mask = experts(capacity_factor=0.9), mask_of("right")
    model = model_of(config)
    tokens, targets = batch_of(config, mask)
    targets[~mask] = -100
    counted, apart = model(tokens, targets), model(tokens, targets, mask=mask)
    assert not torch.equal(counted.balance_loss, apart.balance_loss)


def test_padding_at_the_end_of_packed_documents() -> None:
    config = experts(capacity_factor=1.0)
    model = model_of(config).eval()
    tokens = torch.randint(0, config.vocab_size, (2, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 6:] = False
    bounds = torch.tensor([0, 4, 10, 16, 20], dtype=torch.int32)  # the last document is padding
    got = model(tokens, mask=mask, cu_seqlens=bounds)
    wanted = model(tokens[mask][None], cu_seqlens=bounds[:-1])
    assert torch.equal(got[mask], wanted[0]) and not got[~mask].any()
    assert torch.equal(model(tokens, mask=torch.ones_like(mask)), model(tokens, mask=mask | ~mask))


def test_mistakes_are_named() -> None:
    model = model_of(experts())
    tokens, mask = batch_of(model.config, mask_of("right"))[0], mask_of("right")
    with pytest.raises(
        ValueError, match=r"'mask': got shape \(5, 11\), expected that of the tokens, \(5, 12\)"
    ):
        model(tokens, mask=mask[:, 1:])
    with pytest.raises(TypeError, match=r"'mask': got torch.int64, expected torch.bool"):
        model(tokens, mask=mask.long())
    with pytest.raises(ValueError, match="'mask': got no token that counts, expected at least one"):
        model(tokens, tokens, mask=torch.zeros_like(mask))
    with pytest.raises(ValueError, match=r"'targets': got shape \(4, 12\), expected \(5, 12\)"):
        model(tokens, tokens[1:], mask=mask)
    with pytest.raises(ValueError, match="'mask': got one beside a cache"):
        model(tokens, mask=mask, cache=object())
    with pytest.raises(ValueError, match=r"expected \(B, T\) with B and T above 0"):
        model(torch.empty(0, 12, dtype=torch.long))


class Batch(NamedTuple):
    tokens: np.ndarray
    targets: np.ndarray
    mask: np.ndarray


def test_batches_of_a_loader_may_have_a_mask() -> None:
    config, mask = experts(), mask_of("right")
    model: GPT = model_of(config).eval()
    tokens, targets = batch_of(config, mask)
    batch = Batch(tokens.numpy(), targets.numpy(), mask.numpy())
    _, _, options = tensors_of(batch, torch.device("cpu"))
    assert set(options) == {"mask"} and options["mask"].dtype == torch.bool

    class Loader:
        def batch_at(self, step: int) -> Batch:
            return batch

    with torch.no_grad():
        wanted = model(tokens, targets, mask=mask)
        found = held_out(Loader(), 2)(model)
    assert found["val_loss"] == pytest.approx(float(wanted.loss), rel=1e-6)
