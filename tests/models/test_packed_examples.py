"""Packed examples give each token the loss and the gradient that it has alone; weights are those of a mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gptcore.data.examples import Tokenised, lay_out
from gptcore.models import GPT, GPTConfig

RNG = np.random.default_rng(3)
EXAMPLES = [
    Tokenised.of(RNG.integers(0, 48, 3).tolist(), RNG.integers(0, 48, n).tolist()) for n in (2, 7, 1, 12, 5)
]
TABLE = {"num_layers": 2, "width": 32, "context_length": 16, "vocab_size": 48, "attention": {"num_heads": 4}}


def model_of(**changes: object) -> GPT:
    return GPT(GPTConfig.from_dict({**TABLE, **changes}), seed=2)


def losses(model: GPT, examples: list[Tokenised]) -> torch.Tensor:
    row = lay_out(examples)
    bounds = torch.from_numpy(row.cu_seqlens)
    out = model(
        torch.from_numpy(row.tokens), torch.from_numpy(row.targets), cu_seqlens=bounds, reduction="none"
    )
    return out.loss[0]


def gradients(model: GPT, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_packing_changes_neither_loss_nor_gradient(position: str) -> None:
    model = model_of(position={"kind": position})
    packed = losses(model, EXAMPLES)
    alone = [losses(model, [example]) for example in EXAMPLES]
    assert float((packed - torch.cat(alone)).abs().max()) < 1e-6 * float(packed.max())
    together = gradients(model, packed.sum())
    apart = torch.stack([gradients(model, one.sum()) for one in alone]).sum(0)
    assert float((together - apart).abs().max()) < 1e-6 * float(together.abs().max())
    other = torch.cat([losses(model, [example]) for example in EXAMPLES[::-1]][::-1])
    assert float((packed - other).abs().max()) < 1e-6 * float(packed.max()), "nor does the order"


def test_what_an_example_reads_is_not_what_its_neighbour_says() -> None:
    model = model_of()
    changed = [Tokenised.of([1, 2, 3], [4] * 9), *EXAMPLES[1:]]
    mine = slice(len(EXAMPLES[0].tokens) - 1, None)
    theirs = slice(len(changed[0].tokens) - 1, None)
    assert torch.equal(losses(model, EXAMPLES)[mine], losses(model, changed)[theirs])


def test_weights_are_those_of_the_mean() -> None:
    model = model_of()
    weighted = [example._replace(weight=w) for example, w in zip(EXAMPLES, (1, 2, 0.5, 1, 3), strict=True)]
    row = lay_out(weighted)
    tokens, targets, weights = (torch.from_numpy(x) for x in (row.tokens, row.targets, row.weights))
    bounds = torch.from_numpy(row.cu_seqlens)
    out = model(tokens, targets, cu_seqlens=bounds, weights=weights, z_loss=1e-4)
    each = model(tokens, targets, cu_seqlens=bounds, reduction="none", z_loss=1e-4)
    counted = weights * (targets >= 0)
    assert float(out.loss) == pytest.approx(float((each.loss * counted).sum() / counted.sum()), rel=1e-6)
    assert float(out.z_loss) == pytest.approx(float((each.z_loss * counted).sum() / counted.sum()), rel=1e-6)
    same = model(tokens, targets, cu_seqlens=bounds, weights=torch.full_like(weights, 3.0))
    plain = model(tokens, targets, cu_seqlens=bounds)
    assert float(same.loss) == pytest.approx(float(plain.loss), rel=1e-6)
    with pytest.raises(ValueError, match="argument 'weights'"):
        model(tokens, targets, cu_seqlens=bounds, weights=weights[:, 1:])
    with pytest.raises(ValueError, match="argument 'weights'"):
        model(tokens, cu_seqlens=bounds, weights=weights)
