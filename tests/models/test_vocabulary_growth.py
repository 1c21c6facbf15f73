"""New tokens in a trained model: the old ones keep what they had, the new ones have the mean."""

from __future__ import annotations

import pytest
import torch

from gptcore.errors import UserError
from gptcore.models import GPT, GPTConfig
from gptcore.models.vocabulary_growth import grow_vocabulary

TABLE = {"num_layers": 1, "width": 16, "context_length": 8, "vocab_size": 40, "attention": {"num_heads": 2}}
TOKENS = torch.arange(8)[None]


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied_head": False, "head_bias": True}, {"embedding_width": 8}],
    ids=["tied", "own", "factored"],
)
def test_old_tokens_keep_their_logits_and_new_ones_have_the_mean(changes: dict[str, object]) -> None:
    model = GPT(GPTConfig.from_dict({**TABLE, **changes}), seed=1).eval()
    grown = grow_vocabulary(model, 40, 42)
    before, after = model(TOKENS).detach(), grown(TOKENS).detach()
    assert grown.config.vocab_size == 42 and torch.equal(before, after[..., :40])
    mean = before.mean(-1)
    kept = after.softmax(-1)[..., :40] / before.softmax(-1)
    assert float(kept.min()) > 40 / 42 - 1e-6
    assert float((after[..., 40] - mean).abs().max()) < 1e-6 and torch.equal(after[..., 40], after[..., 41])
    assert torch.equal(grown.token_embedding.weight[41], model.token_embedding.weight.mean(0))


def test_a_padded_table_has_room() -> None:
    model = GPT(GPTConfig.from_dict(TABLE), seed=1)
    assert grow_vocabulary(model, 30, 32) is model
    rows = model.token_embedding.weight
    assert torch.equal(rows[30], rows[:30].mean(0)) and torch.equal(rows[31], rows[30])


def test_sizes_that_do_not_fit() -> None:
    model = GPT(GPTConfig.from_dict(TABLE), seed=1)
    for used, wanted in ((41, 42), (30, 29), (0, 3)):
        with pytest.raises(UserError, match="grow_vocabulary: got"):
            grow_vocabulary(model, used, wanted)
