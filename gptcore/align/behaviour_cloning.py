"""Behaviour cloning: updates towards responses as they are, whoever gave them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from gptcore.align import policy
from gptcore.align.losses.supervised import nll
from gptcore.align.shares import ALONE, Shares, accumulate, begin, step
from gptcore.data.permutation import derive
from gptcore.infer import Rollouts
from gptcore.models import GPT
from gptcore.train.sharding import Optimizer
from gptcore.train.step import NonFiniteError


def clone(
    actor: GPT,
    optimizer: Optimizer,
    demonstrations: Rollouts,
    *,
    epochs: int = 1,
    minibatch: int = 64,
    seed: int = 0,
    max_tokens: int = 4096,
    shares: Shares = ALONE,
) -> dict[str, float]:
    """Train ``actor`` on the response tokens of ``demonstrations`` (as ``infer.rollouts.pack`` makes them).

    ``epochs`` times over, ``minibatch`` responses an update in an order that ``seed`` decides; the loss is the mean
    over an update's tokens, however they are split into passes of ``max_tokens``. Gives the mean loss and gradient norm
    and the number of updates. ``shares``: of several processes, all of which have the demonstrations, this one's part;
    ``optimizer`` is then what it made. Raises NonFiniteError, before a weight is touched.
    """
    losses, norms = [], []
    for rows in _updates(len(demonstrations), epochs, minibatch, seed):
        chosen = demonstrations.select(rows)
        leaves = shares.leaves(np.diff(chosen.cu_seqlens), max_tokens)
        begin(optimizer, len(leaves))
        found = []
        for leaf in leaves:
            batch = policy.packed(chosen.select(leaf.rows), next(actor.parameters()).device)
            logprobs = policy.scores(actor, batch._replace(kept=None)).logprobs
            value = leaf.weight * nll(
                logprobs, torch.ones_like(logprobs, dtype=torch.bool), total=float(len(chosen.logprobs))
            )
            value.backward()
            if len(leaves) > 1:
                accumulate(optimizer)
            found.append((leaf.number, {"loss": float(value.detach())}))
        loss = shares.sums(found)["loss"]
        if not math.isfinite(loss):
            optimizer.zero_grad()
            raise NonFiniteError(f"the loss on demonstrations is {loss}; lower optimizer.lr", loss)
        step(optimizer)
        if optimizer.found_inf:
            raise NonFiniteError("a gradient is not finite on demonstrations; lower optimizer.lr", loss)
        losses.append(loss)
        norms.append(float(optimizer.last_grad_norm or 0.0))
    return {"loss": float(np.mean(losses)), "grad_norm": float(np.mean(norms)), "updates": float(len(losses))}


def _updates(count: int, epochs: int, minibatch: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """The demonstrations of each update; the last of an epoch may be fewer."""
    for epoch in range(epochs):
        order = np.random.default_rng(derive(seed, epoch)).permutation(count)
        yield from (order[first : first + minibatch] for first in range(0, count, minibatch))
