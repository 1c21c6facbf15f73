"""A step of a reward model on prompts with nine ranked answers: all 36 pairs of a prompt from nine forwards.

Against a trainer of pairs, of the same model and the same 36 pairs a prompt, which sends both answers of every pair
through it: 72 forwards, packed as ours are, and by transformers' GPT-2 in padded rows, as TRL's RewardTrainer has them.
Forward and backward; the update is the same for all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench.case import OURS, Case, Cost, Target

if TYPE_CHECKING:
    from gptcore.align.rankings import Ranked

ANSWERS, PROMPTS = 9, 2
PAIRS = PROMPTS * ANSWERS * (ANSWERS - 1) // 2
PROMPT, LONGEST = 64, 48
LAYERS, WIDTH, HEADS, VOCABULARY, CONTEXT = 4, 256, 4, 8192, 128
MODEL = 12 * LAYERS * WIDTH * WIDTH  # parameters that multiply; the table of words is only read


def rankings() -> list[Ranked]:
    """Answers of 16 to 48 tokens to a prompt of 64, the same in every process."""
    import numpy as np

    from gptcore.align.rankings import Ranked
    from gptcore.data.examples import Tokenised

    rng, found = np.random.default_rng(1), []
    for _ in range(PROMPTS):
        prompt = rng.integers(0, VOCABULARY, PROMPT)
        answers = [rng.integers(0, VOCABULARY, rng.integers(16, LONGEST + 1)) for _ in range(ANSWERS)]
        ranks = tuple(float(rank) for rank in rng.permutation(ANSWERS))
        found.append(Ranked(tuple(Tokenised.of(prompt, answer) for answer in answers), ranks))
    return found


def participants(target: Target) -> dict[str, Callable[[], Callable[[], object]]]:
    """Factories by name: calling one builds the model and returns its step."""
    from gptcore.align.rankings import pairs_of

    some = rankings()
    return {
        OURS: functools.partial(_ours, target, some),
        "pairs_packed": functools.partial(_ours, target, pairs_of(some)),
        "transformers_pairs_padded": functools.partial(_theirs, target, pairs_of(some)),
    }


def _ours(target: Target, some: list[Ranked]) -> Callable[[], object]:
    import torch

    from gptcore.align.rankings import batch_of
    from gptcore.align.reward_model import RewardModel
    from gptcore.models import GPT, AttentionSpec, GPTConfig
    from gptcore.train.evaluation import tensors_of

    config = GPTConfig(
        num_layers=LAYERS, width=WIDTH, vocab_size=VOCABULARY, context_length=CONTEXT,
        attention=AttentionSpec(num_heads=HEADS),
    )  # fmt: skip
    model = RewardModel.over(GPT(config, dtype=target.torch_dtype)).train()
    tokens, targets, options = tensors_of(batch_of(some), torch.device("cpu"))

    def step() -> object:
        model.zero_grad(set_to_none=True)
        loss = model(tokens, targets, **options).loss
        loss.backward()
        return loss.detach()

    return step


def _theirs(target: Target, pairs: list[Ranked]) -> Callable[[], object]:
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification, set_seed

    set_seed(1)
    config = GPT2Config(
        n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, vocab_size=VOCABULARY, n_positions=CONTEXT, num_labels=1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        attn_implementation="sdpa",
    )  # fmt: skip
    model: Any = GPT2ForSequenceClassification(config).train().to(target.torch_dtype)
    ordered = [
        one.answers if one.ranks[0] < one.ranks[1] else one.answers[::-1] for one in pairs
    ]  # the better one first
    rows = [torch.from_numpy(one[side].tokens).long() for side in (0, 1) for one in ordered]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)

    def step() -> object:
        model.zero_grad(set_to_none=True)
        chosen, rejected = model(input_ids=tokens, attention_mask=mask).logits[:, 0].chunk(2)
        loss = -torch.nn.functional.logsigmoid(chosen.float() - rejected.float()).mean()
        loss.backward()
        return loss.detach()

    return step


def _cost(_element_bytes: int) -> Cost:
    """6 FLOPs a parameter and token of nine answers with their prompts, attention left out."""
    tokens = sum(len(answer.tokens) for one in rankings() for answer in one.answers)
    return Cost(6.0 * MODEL * tokens)


CASES = [
    Case(
        f"reward_model/K{ANSWERS}_P{PROMPTS}_L{LAYERS}_C{WIDTH}/forward_backward",
        participants, _cost, repeats=5, heavy=True, quick=False,
    )
]  # fmt: skip
