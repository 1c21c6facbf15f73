"""PPO put together from gptcore's own pieces, where the right answer is known: answers of three tokens at most.

The best policy under reward less beta KL gives an answer the probability reference * exp(score / beta) / Z. An exact
solver knows it; PPO has to find it from sampled answers alone.
"""

from __future__ import annotations

import numpy as np
import torch

from gptcore.align import decision_process
from gptcore.align.losses import advantages, kl, policy_gradient, values

END, BETA, ANSWERS = 2, 0.5, 512
torch.manual_seed(0)


def reward(text: tuple[int, ...], token: int, whole: bool) -> float:
    """One point for each token 1 in a whole answer."""
    return float((*text, token).count(1)) if whole else 0.0


process = decision_process.token_process(3, 3, reward, end=END)
states, index = len(process.texts), {text: i for i, text in enumerate(process.texts)}
reference = torch.full((states, 3), -np.log(3.0))  # log-probabilities: every token alike
best = decision_process.regularised(process.process, reference.exp().numpy(), BETA).policy

policy = reference.clone().requires_grad_()  # a logit for each token in each state
critic = torch.zeros(states, requires_grad=True)
optimizer = torch.optim.Adam([policy, critic], lr=0.03)


def sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States, tokens (ANSWERS, 3) and the mask of what was said."""
    at = torch.zeros(ANSWERS, 3, dtype=torch.long)
    tokens, mask = torch.zeros_like(at), torch.zeros(ANSWERS, 3, dtype=torch.bool)
    for row, draws in enumerate(torch.rand(ANSWERS, 3)):
        text: tuple[int, ...] = ()
        for t, u in enumerate(draws):
            state = index[text]
            token = int((policy[state].softmax(-1).cumsum(-1) < u).sum().clamp(max=2))
            at[row, t], tokens[row, t], mask[row, t] = state, token, True
            text = (*text, token)
            if token == END:
                break
    return at, tokens, mask


def distance() -> float:
    """Total variation between the policy's answers and the best policy's."""
    learned = policy.detach().softmax(-1).numpy()
    pairs = zip(process.answers(learned), process.answers(best), strict=True)
    return 0.5 * sum(abs(a.probability - b.probability) for a, b in pairs)


for update in range(61):
    with torch.no_grad():
        at, tokens, mask = sample()
        old = policy.log_softmax(-1)[at, tokens]
        paid = torch.tensor(process.process.rewards, dtype=torch.float32)[at, tokens]
        scores = torch.where(mask, paid, 0.0).sum(-1)
        divergence = kl.k1(old, reference[at, tokens], mask)
        rewards = advantages.token_rewards(scores, divergence, mask, BETA)
        estimates = advantages.gae(rewards, critic[at], mask, lam=0.95)
        white = advantages.whiten(estimates.advantages, mask)
    for _ in range(2):
        actor = policy_gradient.ppo(policy.log_softmax(-1)[at, tokens], old, white, mask)
        fit = values.value_loss(critic[at], estimates.returns, mask)
        optimizer.zero_grad()
        (actor.loss + fit.loss).backward()
        optimizer.step()
    if update % 20 == 0:
        print(
            f"update {update:2}  score {float(scores.mean()):.2f}  KL {float(divergence.sum(-1).mean()):.3f}  "
            f"clipped {float(actor.clip_share):.2f}  from the best policy {distance():.3f}"
        )
