"""Held-out demonstrations answered by the model: a number to choose a checkpoint by that the loss does not tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gptcore.data import chat_template
from gptcore.data.chat import Chat, chat_for
from gptcore.data.records import Demonstration
from gptcore.infer import generate_batch, trained
from gptcore.models import GPT


def answers(
    model: GPT, chat: Chat, records: Sequence[Demonstration], max_new_tokens: int, *, batch: int = 32
) -> list[str]:
    """The model's greedy answer to each prompt, without its stop token; ``batch`` prompts at a time."""
    found = []
    for first in range(0, len(records), batch):
        some = records[first : first + batch]
        results = generate_batch(
            model,
            chat.tokenizer,
            [chat.prompt_ids(record.prompt, record.tools) for record in some],
            max_new_tokens=max_new_tokens,
            temperature=0.0,
            end_ids=chat.stop_ids,
            overflow="slide",
        )
        found += [result.text if result.finish_reason == "end" else "" for result in results]
    return found


def exact_match(
    records: Sequence[Demonstration], max_new_tokens: int
) -> Callable[[GPT, Chat], dict[str, float]]:
    """A score: ``exact_match``, the share of ``records`` that the model answers with their own response.

    White space around does not count. Where a response ends in ``#### N`` (GSM8K), N is what is compared. An answer
    that was not ended by a stop token is wrong.
    """

    def score(model: GPT, chat: Chat) -> dict[str, float]:
        made = answers(model, chat, records, max_new_tokens)
        right = sum(
            _final(text) == _final(record.completion) for text, record in zip(made, records, strict=True)
        )
        return {"exact_match": right / len(records)}

    return score


def mean_reward(
    records: Sequence[Demonstration], judge: str, max_new_tokens: int
) -> Callable[[GPT, Chat], dict[str, float]]:
    """A score: ``reward``, the mean of what the reward model of the run ``judge`` gives the model's answers.

    It is how InstructGPT chose among the epochs of its fine-tuning. An answer that was not ended counts as empty.

    Raises:
        UserError: no reward model there.
    """
    from gptcore.align import reward_model

    model_of_rewards, tokenizer = reward_model.load(judge)
    place = trained.tokenizer_place(judge)
    own = chat_for(tokenizer, place if chat_template.is_there(place) else "none")

    def score(model: GPT, chat: Chat) -> dict[str, float]:
        made = answers(model, chat, records, max_new_tokens)
        said = [own.response(record.prompt, text) for record, text in zip(records, made, strict=True)]
        return {"reward": float(model_of_rewards.scores(said).mean())}

    return score


def _final(text: str) -> str:
    return text.rpartition("####")[2].strip()
