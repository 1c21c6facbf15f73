"""The critic: what a response is worth so far, from a head on the actor's hidden states or on a trunk of its own."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gptcore.align.policy import Packed, packed, token_batches
from gptcore.align.reward_model import RewardModel
from gptcore.infer import Rollouts
from gptcore.models import GPT


class Critic(nn.Module):
    """A value for each place of a sequence.

    trunk: a GPT whose hidden states are read, a copy of the reward model's say; None: the actor's are, and the value's
        gradient reaches them. head: (C,) and () f32, 0 at first, so that all values are.
    """

    def __init__(self, width: int, trunk: GPT | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(1))

    @classmethod
    def from_scalar_head(cls, trunk: GPT, weight: Tensor, bias: Tensor | float = 0.0) -> Critic:
        """A critic that begins as a model with a scalar head (1, C) or (C,), a reward model, gave it."""
        critic = cls(trunk.config.width, trunk)
        with torch.no_grad():
            critic.weight.copy_(weight.reshape(-1))
            critic.bias.fill_(float(bias))
        return critic

    @classmethod
    def of_reward_model(cls, model: RewardModel) -> Critic:
        """A critic that begins as ``model``, normalisation included (Ouyang et al. 2022, appendix C.4), which is its
        trunk from then on."""
        head, deviation = model.reward_head, model.score_std
        bias = (head.bias.detach().float() - model.score_mean) / deviation
        return cls.from_scalar_head(model, head.weight.detach().float() / deviation, float(bias))

    def values(self, batch: Packed, hidden: Tensor | None) -> Tensor:
        """(R,) f32: of the states in which the response tokens were chosen; ``hidden`` (N', C) is the actor's, of use
        where there is no trunk."""
        if self.trunk is not None:
            hidden = self.trunk.hidden(batch.tokens, cu_seqlens=batch.cu_seqlens)[0]
        assert hidden is not None
        states = hidden.index_select(0, batch.before).float()
        # a product and a sum over the width, in a fixed order whatever the number of rows
        return (states * self.weight).sum(-1) + self.bias

    @torch.no_grad()
    def evaluated(self, rollouts: Rollouts, max_tokens: int) -> NDArray[np.float32]:
        """(R,) values of a critic with a trunk, without gradients."""
        found = [
            self.values(packed(rollouts.select(rows), self.weight.device), None).cpu().numpy()
            for rows in token_batches(np.diff(rollouts.cu_seqlens), max_tokens)
        ]
        return np.concatenate(found)
