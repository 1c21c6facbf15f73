"""Log-probabilities of sampled responses in the training forward, of the distribution that they were sampled from.

Temperature and truncation are part of a policy: whoever leaves them out of one of two log-probabilities has a ratio
that is not 1 where nothing has changed. Here every pass, with gradients and without, of the policy and of a reference,
goes through :func:`scores`. Sequences are laid end to end; the logits of a whole batch exist at no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptcore import ops
from gptcore.align.kept_logits import KeptSets, Logits, kept_logprobs
from gptcore.align.sampled_entropy import entropies
from gptcore.errors import UserError
from gptcore.infer import Rollouts
from gptcore.models import GPT
from gptcore.nn.linear import SMALL


class Packed(NamedTuple):
    """Sequences as a model takes them, and where the responses are.

    tokens: (1, N') int64, N' at least 65: below that matrix products sum in another order, so a few documents of one
    token follow. targets: (1, N') int64, the response token that each place predicts, or -100. cu_seqlens: int32.
    before: (R,) int64, the places that predict the response tokens. kept: what truncation left of them.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    before: Tensor
    kept: KeptSets | None


class Scores(NamedTuple):
    """logprobs: (R,) f32, differentiable. entropies: (R,) f32, detached unless asked otherwise. hidden: (N', C), what
    the head reads from."""

    logprobs: Tensor
    entropies: Tensor
    hidden: Tensor


def packed(rollouts: Rollouts, device: torch.device | str = "cpu") -> Packed:
    """The sequences of ``rollouts`` as tensors on ``device``."""
    missing = max(0, SMALL + 1 - len(rollouts.tokens))
    tokens = np.concatenate([rollouts.tokens, np.zeros(missing, np.int32)]).astype(np.int64)
    places = rollouts.response_places
    targets = np.full(len(tokens), -100, np.int64)
    targets[places - 1] = tokens[places]
    end = rollouts.cu_seqlens[-1]
    bounds = np.concatenate([rollouts.cu_seqlens, np.arange(end + 1, end + missing + 1, dtype=np.int32)])
    kept = None
    if rollouts.kept is not None:
        rows = np.repeat(np.arange(len(places)), np.diff(rollouts.kept.offsets))
        sampled = np.flatnonzero(rollouts.kept.ids == rollouts.tokens[places][rows])
        arrays = (rollouts.kept.ids.astype(np.int64), rows, sampled)
        kept = KeptSets(*(torch.from_numpy(array).to(device) for array in arrays))
    return Packed(
        torch.from_numpy(tokens)[None].to(device),
        torch.from_numpy(targets)[None].to(device),
        torch.from_numpy(bounds).to(device),
        torch.from_numpy(places - 1).to(device),
        kept,
    )


def scores(
    model: GPT,
    batch: Packed,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    entropy_slopes: bool = False,
) -> Scores:
    """Log-probabilities, entropies and hidden states of ``batch`` under ``model``.

    Args:
        temperature, vocab_size: those that the responses were sampled with. The sets of a truncation are in ``batch``;
            a reference model is read on the same sets, so that its divergence from itself is 0.
        entropy_slopes: make the entropies differentiable, for some more products with the head.

    Raises:
        UserError: temperature 0, which is no distribution to learn.
    """
    if not temperature > 0.0:
        raise UserError(f"temperature is {temperature}, expected above 0: a greedy choice has no gradient")
    hidden, rows, weight = model.hidden_and_head(batch.tokens, cu_seqlens=batch.cu_seqlens)
    config, bias = model.config, model.head_bias
    if vocab_size is not None and vocab_size < weight.shape[0]:
        weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    rows, hidden = rows.view(-1, rows.shape[-1]), hidden.view(-1, hidden.shape[-1])
    logits = Logits(config.logit_scale, config.logit_soft_cap, bias)
    if batch.kept is not None:
        read = rows.index_select(0, batch.before)
        parts = kept_logprobs(read, weight, batch.kept, logits, temperature, entropy_slopes=entropy_slopes)
        return Scores(*parts, hidden)
    cap = config.logit_soft_cap
    out = ops.token_logprobs(
        rows, weight, batch.targets[0], bias=bias, logit_scale=config.logit_scale / temperature,
        logit_soft_cap=None if cap is None else cap / temperature, return_entropy=True,
    )  # fmt: skip
    entropy = out.entropy.index_select(0, batch.before)
    if entropy_slopes:
        entropy = entropies(rows.index_select(0, batch.before), weight, logits, temperature, known=entropy)
    return Scores(out.logprobs.index_select(0, batch.before), entropy, hidden)


class Evaluated(NamedTuple):
    """(R,) f32 each, without gradients; ``values`` where they were asked for."""

    logprobs: NDArray[np.float32]
    entropies: NDArray[np.float32]
    values: NDArray[np.float32] | None


@torch.no_grad()
def evaluated(
    model: GPT,
    rollouts: Rollouts,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    values: Callable[[Packed, Tensor], Tensor] | None = None,
    max_tokens: int = 4096,
) -> Evaluated:
    """:func:`scores` of all responses, ``max_tokens`` tokens at a time.

    ``values`` makes (R,) numbers of a batch and its hidden states, as a critic on the model's trunk does. The bits do
    not depend on ``max_tokens``, nor on whether gradients were wanted.
    """
    device = next(model.parameters()).device
    found: list[list[Tensor]] = []
    for rows in token_batches(np.diff(rollouts.cu_seqlens), max_tokens):
        batch = packed(rollouts.select(rows), device)
        out = scores(model, batch, temperature=temperature, vocab_size=vocab_size)
        found.append([out.logprobs, out.entropies])
        if values is not None:
            found[-1].append(values(batch, out.hidden))
    parts = [torch.cat(part).cpu().numpy() for part in zip(*found, strict=True)]
    return Evaluated(parts[0], parts[1], parts[2] if values is not None else None)


def token_batches(lengths: NDArray[np.int32], max_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Runs of sequences with together at most ``max_tokens`` tokens, each at least one sequence."""
    first, tokens = 0, 0
    for place, length in enumerate(lengths.tolist()):
        if place > first and tokens + length > max_tokens:
            yield np.arange(first, place)
            first, tokens = place, 0
        tokens += length
    yield np.arange(first, len(lengths))
