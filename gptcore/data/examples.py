"""Examples as tokens, laid end to end: where the loss mask becomes targets, here and nowhere else.

Letters: n tokens of one example, N tokens of a row, S examples in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gptcore.data.packing import IGNORE
from gptcore.errors import UserError


class Tokenised(NamedTuple):
    """``tokens`` (n,) int32 and ``loss_mask`` (n,) bool: whether the token is one to predict.

    The mask is True on the tokens of responses, the stop token that ends each included, and False on prompts. The
    first token is predicted from nothing, so its place in the mask does not count. ``weight`` multiplies the loss.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    weight: float = 1.0

    @property
    def targets(self) -> int:
        """Tokens that the loss counts."""
        return int(self.loss_mask[1:].sum())

    @classmethod
    def of(
        cls, prompt: Sequence[int] | np.ndarray, response: Sequence[int] | np.ndarray, weight: float = 1.0
    ) -> Tokenised:
        """A prompt that is given and a response, its stop token included, that is to be predicted."""
        tokens = np.array([*prompt, *response], np.int32)
        mask = np.arange(len(tokens)) >= len(prompt)
        return cls(tokens, mask, weight)


class Row(NamedTuple):
    """Examples end to end: ``tokens`` and ``targets`` (1, N) int64, ``cu_seqlens`` (S + 1,) int32 from 0 to N.

    ``weights`` (1, N) f32: each token's example's weight, or None where all are 1.
    """

    tokens: np.ndarray
    targets: np.ndarray
    cu_seqlens: np.ndarray
    weights: np.ndarray | None = None

    @property
    def target_count(self) -> int:
        """Targets that the loss counts."""
        return int((self.targets != IGNORE).sum())


def lay_out(examples: Sequence[Tokenised], *, keep_last: bool = False) -> Row:
    """Lay examples end to end, each token's target being the next one of its example where the mask has that.

    An example's last token predicts nothing, so it is left out, as an input too, unless ``keep_last``: heads that
    read the hidden state of the last token (reward models) want it; its target is then ``IGNORE``.

    Raises:
        UserError: no examples, one of fewer than 2 tokens, one whose mask has another length.
    """
    if not examples:
        raise UserError("lay_out: got no examples, expected at least 1")
    tokens, targets, lengths = [], [], []
    for place, example in enumerate(examples):
        ids, mask = np.asarray(example.tokens), np.asarray(example.loss_mask)
        if ids.ndim != 1 or len(ids) < 2 or mask.shape != ids.shape:
            raise UserError(
                f"lay_out: example {place}: got tokens {ids.shape} and loss_mask {mask.shape}, expected (n,) of both, "
                "n at least 2"
            )
        following = np.where(mask[1:], ids[1:], IGNORE).astype(np.int64)
        tokens.append(ids if keep_last else ids[:-1])
        targets.append(np.append(following, IGNORE) if keep_last else following)
        lengths.append(len(targets[-1]))
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    weights = None
    if any(example.weight != 1.0 for example in examples):
        each = np.array([example.weight for example in examples], np.float32)
        weights = np.repeat(each, lengths)[None]
    return Row(np.concatenate(tokens).astype(np.int64)[None], np.concatenate(targets)[None], bounds, weights)


def leaf_weight(own: float, update: float, leaves: int) -> float:
    """What a leaf's mean loss is multiplied by, so that the mean over leaves is the mean over the update.

    ``own`` and ``update``: what the mean is taken over (response tokens, pairs), in this leaf and in the whole
    update of ``leaves`` leaves. Means over leaves of different counts would give a token in a short leaf more weight,
    and the gradient would depend on how an update is cut.
    """
    if not 0 < own <= update:
        raise UserError(f"leaf_weight: got {own} of {update}, expected above 0 and at most the whole")
    return own * leaves / update
