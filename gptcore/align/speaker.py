"""A model as a function from prompts to answers, for what asks one in words: critics, judges, red teams."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from gptcore.data import chat_template
from gptcore.data.chat import Chat, chat_for
from gptcore.data.records import Prompt
from gptcore.errors import UserError
from gptcore.infer import SamplingParams, trained
from gptcore.infer.rollout import rollout
from gptcore.models import GPT

Speaker = Callable[[Sequence[Prompt]], list[str]]  # one answer to each prompt, in their order


def speaker(
    model: GPT,
    chat: Chat,
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Speaker:
    """``model`` as a :data:`Speaker`: prompts through ``chat``, sampled until a stop token.

    Calls draw different numbers, the same in every process: call n is seeded by ``seed`` and n.

    Raises:
        UserError: at a call, a prompt that leaves no room for an answer in the model's context.
    """
    calls = 0

    def speak(prompts: Sequence[Prompt]) -> list[str]:
        nonlocal calls
        if not prompts:
            return []
        params = SamplingParams(temperature=temperature, top_p=top_p, seed=seed + 1_000_003 * calls)
        calls += 1
        rollouts = rollout(
            model, [chat.prompt_ids(prompt) for prompt in prompts], max_new_tokens=max_new_tokens, params=params,
            stop_tokens=list(chat.stop_ids), vocab_size=chat.tokenizer.vocab_size,
        )  # fmt: skip
        found = []
        for place in range(len(rollouts)):
            ids = rollouts.response(place)
            found.append(chat.tokenizer.decode(ids[:-1] if rollouts.stopped[place] else ids))
        return found

    return speak


def load(path: str | os.PathLike[str]) -> tuple[GPT, Chat]:
    """The model of a run, checkpoint or Hugging Face directory, with the chat template kept there or else ChatML.

    Raises:
        UserError: no model there, or a tokenizer without the tokens of its template.
    """
    if not Path(path).exists():
        raise UserError(f"no run or checkpoint at {path}")
    model, tokenizer = trained.load(path)
    place = trained.tokenizer_place(path)
    return model, chat_for(tokenizer, place if chat_template.is_there(place) else "chatml")
