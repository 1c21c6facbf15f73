"""Room in a trained model for tokens that its vocabulary did not have."""

from __future__ import annotations

import torch

from gptcore.errors import UserError
from gptcore.models.gpt import GPT


@torch.no_grad()
def grow_vocabulary(model: GPT, used: int, vocab_size: int) -> GPT:
    """A model that knows tokens ``used`` to ``vocab_size - 1`` too, and computes for the others what ``model`` does.

    The new rows of the embedding, and of a head of its own, are the mean of the ``used`` rows, bias included. The new
    tokens then have the mean logit, whose exponential is at most the mean exponential: each old token keeps at least
    used / vocab_size of its probability (Hewitt 2021). A table with room already, being padded, is not enlarged, and
    its rows from ``used`` on are set so.

    Returns:
        A new model in ``model``'s dtype and mode where the table had to grow, else ``model`` itself.

    Raises:
        UserError: ``used`` is more than the model has, or ``vocab_size`` less than ``used``.
    """
    have = model.config.vocab_size
    if not 0 < used <= min(have, vocab_size):
        raise UserError(
            f"grow_vocabulary: got {used} tokens in use of {have}, and {vocab_size} wanted; expected the tokens in use "
            "to be in both"
        )
    grown = model
    if vocab_size > have:
        weight = model.token_embedding.weight
        config = model.config.merged({"vocab_size": vocab_size})
        grown = GPT(config, dtype=weight.dtype, device=weight.device).train(model.training)
        source = dict(model.named_parameters())
        for name, parameter in grown.named_parameters():
            parameter[: source[name].shape[0]].copy_(source[name])
    tables = [grown.token_embedding.weight]
    tables += [] if grown.head is None else list(grown.head.parameters())
    for table in tables:
        table[used:vocab_size] = table[:used].float().mean(0).to(table.dtype)
    return grown
