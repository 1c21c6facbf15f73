"""The shapes in which conversations, demonstrations, preferences and tasks are published, and how each is read.

A format is a function from a row to records. Which one a row has is seen from its keys (:func:`detect`).

| format | keys | record |
|---|---|---|
| messages | messages: [{role, content}], tools | Demonstration |
| sharegpt | conversations: [{from, value}], system | Demonstration |
| completion | prompt, completion (texts or messages) | Demonstration |
| alpaca | instruction, input, output, history, system | Demonstration |
| seeds | instruction, instances: [{input, output}] (self-instruct) | Demonstrations |
| question | question, answer (GSM8K; its truth follows ####) | Demonstration |
| text | text, all of it to learn | Demonstration |
| preference | chosen, rejected; prompt, question, input or instruction; system, margin; HH's too | Ranking |
| argilla | instruction, chosen_response, rejected_response, system | Ranking |
| ranked | prompt, answers: [{answer, rank}], or answers with ranks or scores (Nectar) | Ranking |
| label | prompt, completion, label (KTO) | Labelled |
| stepwise | prompt, completions, labels | Stepwise |
| verl | data_source, prompt, ability, reward_model: {ground_truth}, extra_info | Task |
| humaneval | prompt, canonical_solution, test, entry_point | Demonstration, Task |
| prompt | prompt, truth | Task |
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gptcore.data.records import (
    Demonstration,
    Labelled,
    Message,
    Prompt,
    Ranking,
    Record,
    Stepwise,
    Task,
)
from gptcore.data.rows import Row
from gptcore.errors import UserError

Reader = Callable[[Row], list[Record]]

# Who speaks, as other collections name them.
_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "bot": "assistant", "model": "assistant", "ai": "assistant", "function_call": "assistant", "developer": "system",
    "function": "tool", "observation": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
_TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")
_MESSAGE_KEYS = {"role", "content", "from", "value"}


def detect(row: Row) -> str:
    """The format of ``row``, by its keys.

    Raises:
        UserError: the keys are of no format.
    """
    keys = set(row.values)
    for name, needed in _SIGNS:
        if needed <= keys:
            return name
    known = "; ".join(f"{name}: {', '.join(sorted(needed))}" for name, needed in _SIGNS)
    raise UserError(f"keys {', '.join(sorted(map(str, keys))) or 'none'} are of no known format ({known})")


def messages_of(value: Any, key: str) -> tuple[Message, ...]:
    """Messages as ``[{role, content}]`` or ``[{from, value}]``, or a transcript in HH's form.

    Contents in parts are joined, and a message that only calls a tool has the content "".
    """
    if isinstance(value, str):
        return _transcript(value, key)
    if not isinstance(value, Sequence) or not value:
        raise UserError(f"key '{key}': got {_named(value)}, expected a list of messages")
    return tuple(_message(item, f"{key}[{number}]") for number, item in enumerate(value))


def prompt_of(value: Any, key: str, system: str = "") -> Prompt:
    """A prompt from a text, a transcript that ends where the assistant is to speak, or messages."""
    if isinstance(value, str):
        if not value.startswith("\n\nHuman:"):
            return (Message("system", system), Message("user", value)) if system else value
        found = _transcript(value, key)
        if found[-1].role == "assistant" and not found[-1].content.strip():
            found = found[:-1]
    else:
        found = messages_of(value, key)
    return (Message("system", system), *found) if system else found


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise UserError(f"key '{where}': got {_named(item)}, expected a message with role and content")
    role = item.get("role", item.get("from"))
    if not isinstance(role, str):
        raise UserError(f"key '{where}.role': got {_named(role)}, expected who speaks")
    content = item.get("content", item.get("value"))
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_part(part, where) for part in content)
    if content is None and (item.get("tool_calls") or item.get("function_call")):
        content = ""
    if not isinstance(content, str):
        raise UserError(f"key '{where}.content': got {_named(content)}, expected text")
    extra = {key: value for key, value in item.items() if key not in _MESSAGE_KEYS}
    try:
        return Message(_ROLES.get(role.lower(), role.lower()), content, extra)
    except UserError as error:
        raise UserError(f"key '{where}': {error}") from None


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise UserError(f"key '{where}.content': got a part that is no text, which no model here reads")
    return text


def _transcript(text: str, key: str) -> tuple[Message, ...]:
    """HH's form: turns opened by "\\n\\nHuman:" and "\\n\\nAssistant:"."""
    lead, *parts = _TRANSCRIPT.split(text)
    if lead.strip() or not parts:
        raise UserError(
            f"key '{key}': got text {text[:40]!r}, expected messages or a Human/Assistant transcript"
        )
    speakers = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        Message(speakers[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)
    )


def demonstration(messages: Sequence[Message], **fields: Any) -> Demonstration:
    """A conversation whose last turn is the assistant's.

    Raises:
        UserError: it ends otherwise, or has only one turn.
    """
    if len(messages) < 2:
        raise UserError(f"a conversation of {len(messages)} message, expected a prompt and a response")
    if messages[-1].role != "assistant":
        raise UserError(f"the conversation ends with {messages[-1].role}, expected the assistant's response")
    for number, message in enumerate(messages):
        if message.role == "assistant" and not message.content.strip() and "tool_calls" not in message.extra:
            raise UserError(f"the response is empty (message {number})")
    return Demonstration(tuple(messages[:-1]), messages[-1].content, messages=tuple(messages), **fields)


def _messages(row: Row) -> list[Record]:
    return [demonstration(messages_of(row.values["messages"], "messages"), **_of_row(row))]


def _sharegpt(row: Row) -> list[Record]:
    system = row.text("system", "")
    turns = messages_of(row.values["conversations"], "conversations")
    return [demonstration([*([Message("system", system)] if system else []), *turns], **_of_row(row))]


def _completion(row: Row) -> list[Record]:
    prompt = prompt_of(row.values["prompt"], "prompt", row.text("system", ""))
    completion = row.values["completion"]
    if isinstance(completion, str):
        return [Demonstration(prompt, completion, **_of_row(row))]
    before = prompt if isinstance(prompt, tuple) else (Message("user", prompt),)
    return [demonstration([*before, *messages_of(completion, "completion")], **_of_row(row))]


def _alpaca(row: Row) -> list[Record]:
    asked = _joined(row.text("instruction"), row.text("input", ""))
    history = row.values.get("history", [])
    before = [Message("system", row.text("system"))] if row.values.get("system") else []
    if not isinstance(history, Sequence) or isinstance(history, str):
        raise UserError(f"key 'history': got {_named(history)}, expected a list of [said, answered]")
    for number, turn in enumerate(history):
        if not isinstance(turn, Sequence) or isinstance(turn, str) or [type(t) for t in turn] != [str, str]:
            raise UserError(f"key 'history[{number}]': got {_named(turn)}, expected [said, answered]")
        before += [Message("user", turn[0]), Message("assistant", turn[1])]
    if not before:
        return [Demonstration(asked, row.text("output"), **_of_row(row))]
    said = [*before, Message("user", asked), Message("assistant", row.text("output"))]
    return [demonstration(said, **_of_row(row))]


def _seeds(row: Row) -> list[Record]:
    instances = row.get("instances", list, "a list of {input, output}")
    found: list[Record] = []
    for number, instance in enumerate(instances):
        inner = Row(instance if isinstance(instance, Mapping) else {}, row.place)
        try:
            asked = _joined(row.text("instruction"), inner.text("input", ""))
            found.append(Demonstration(asked, inner.text("output"), **_of_row(row)))
        except UserError as error:
            raise UserError(f"key 'instances[{number}]': {error}") from None
    return found


def _question(row: Row) -> list[Record]:
    return [Demonstration(row.text("question"), row.text("answer"), **_of_row(row))]


def _text(row: Row) -> list[Record]:
    return [Demonstration("", row.text("text"), **_of_row(row))]


def _preference(row: Row) -> list[Record]:
    chosen, rejected = row.values["chosen"], row.values["rejected"]
    if type(chosen) is not type(rejected):
        raise UserError(f"keys 'chosen' and 'rejected': got {_named(chosen)} and {_named(rejected)}")
    named = next((key for key in ("prompt", "question", "input", "instruction") if key in row.values), None)
    system = row.text("system", "")
    if not isinstance(chosen, str) or chosen.startswith("\n\nHuman:"):
        sides = messages_of(chosen, "chosen"), messages_of(rejected, "rejected")
        given = None if named is None else prompt_of(row.values[named], named, system)
        prompt, answers = _common_turns(sides, given, system)
    elif named is not None:
        prompt, answers = prompt_of(row.values[named], named, system), (chosen, rejected)
    else:
        cut = _common_words(chosen, rejected)
        prompt, answers = chosen[:cut], (chosen[cut:], rejected[cut:])
    margin = row.get("margin", (int, float), "a number") if "margin" in row.values else None
    return [Ranking(prompt, answers, (0.0, 1.0), margin, origin=row.place)]


def _common_turns(
    sides: tuple[tuple[Message, ...], tuple[Message, ...]], given: Prompt | None, system: str
) -> tuple[Prompt, tuple[str, str]]:
    """The prompt, which is what both conversations begin with unless it was given apart, and the last turn of each."""
    shared = 0
    while shared < min(map(len, sides)) and sides[0][shared] == sides[1][shared]:
        shared += 1
    if shared == len(sides[0]) == len(sides[1]):
        raise UserError("the chosen answer equals the rejected one")
    rests = sides[0][shared:], sides[1][shared:]
    if [[m.role for m in rest] for rest in rests] != [["assistant"], ["assistant"]]:
        raise UserError(
            f"the two conversations part at message {shared}, {len(rests[0])} and {len(rests[1])} before their ends; "
            "expected them to differ in the assistant's last turn alone"
        )
    before: Prompt = sides[0][:shared]
    if not before:
        before = given if given is not None else ""
    elif system and before[0].role != "system":  # type: ignore[union-attr]
        before = (Message("system", system), *before)  # type: ignore[misc]
    return before, (rests[0][0].content, rests[1][0].content)


def _common_words(one: str, other: str) -> int:
    """The length of what both texts begin with, cut back to where a word ends."""
    length = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )

    def ends_word(text: str) -> bool:
        return not text[length - 1].isspace() and (length == len(text) or text[length].isspace())

    while length and not (ends_word(one) and ends_word(other)):
        length -= 1
    return length


def _argilla(row: Row) -> list[Record]:
    prompt = prompt_of(row.text("instruction"), "instruction", row.text("system", ""))
    answers = row.text("chosen_response"), row.text("rejected_response")
    return [Ranking(prompt, answers, (0.0, 1.0), origin=row.place)]


def _ranked(row: Row) -> list[Record]:
    answers = row.get("answers", list, "a list of {answer, rank}")
    if all(isinstance(answer, Mapping) for answer in answers):
        items = [Row(answer, row.place) for answer in answers]
        texts = [item.text("answer") for item in items]
        ranks = [item.get("rank", (int, float), "a number, 1 the best") for item in items]
    else:
        texts = [answer if isinstance(answer, str) else "" for answer in answers]
        key = "scores" if "scores" in row.values else "ranks"
        numbers = row.get(key, list, "one number for each answer")
        ranks = [-n for n in numbers] if key == "scores" else numbers
    prompt = prompt_of(row.values["prompt"], "prompt", row.text("system", ""))
    return [Ranking(prompt, tuple(texts), tuple(ranks), origin=row.place)]


def _label(row: Row) -> list[Record]:
    completion = row.values["completion"]
    text = completion if isinstance(completion, str) else messages_of(completion, "completion")[-1].content
    prompt = prompt_of(row.values["prompt"], "prompt", row.text("system", ""))
    return [Labelled(prompt, text, row.get("label", bool, "true or false"), origin=row.place)]


def _stepwise(row: Row) -> list[Record]:
    steps = row.get("completions", list, "a list of steps")
    labels = row.get("labels", list, "true or false for each step")
    return [
        Stepwise(prompt_of(row.values["prompt"], "prompt"), tuple(steps), tuple(labels), origin=row.place)
    ]


def _verl(row: Row) -> list[Record]:
    reward = Row(row.get("reward_model", Mapping, "{style, ground_truth}"), row.place)
    truth = reward.get("ground_truth", object, "what the verifier compares with")
    extra = {key: row.values[key] for key in ("data_source", "ability", "extra_info") if key in row.values}
    return [Task(prompt_of(row.values["prompt"], "prompt"), truth, extra, origin=row.place)]


def _humaneval(row: Row) -> list[Record]:
    return [Demonstration(row.text("prompt"), row.text("canonical_solution"), **_of_row(row))]


def _prompt(row: Row) -> list[Record]:
    extra = {key: value for key, value in row.values.items() if key not in ("prompt", "truth")}
    prompt = prompt_of(row.values["prompt"], "prompt", row.text("system", ""))
    return [Task(prompt, row.values.get("truth"), extra, origin=row.place)]


def task_of(record: Record, row: Row) -> Task:
    """What a verifier could judge of a row that holds something else: its prompt, and its answer as the truth."""
    if isinstance(record, Task):
        return record
    truth: Any = record.completion if isinstance(record, Demonstration) else None
    extra: dict[str, Any] = {}
    if "canonical_solution" in row.values:
        truth = row.values.get("test")
        extra = {key: row.values[key] for key in ("entry_point", "task_id") if key in row.values}
    elif isinstance(truth, str) and "####" in truth:
        extra, truth = {"solution": truth}, truth.rpartition("####")[2].strip().replace(",", "")
    return Task(record.prompt, truth, extra, origin=row.place)


def _of_row(row: Row) -> dict[str, Any]:
    """What demonstrations of every format may carry."""
    found: dict[str, Any] = {"origin": row.place}
    if isinstance(row.values.get("weight"), (int, float)):
        found["weight"] = row.values["weight"]
    if row.values.get("tools"):
        found["tools"] = _tools(row.values["tools"])
    return found


def _tools(value: Any) -> tuple[Any, ...]:
    """Tools as a list, or as one written in JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f"key 'tools': not JSON: {error}") from None
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"key 'tools': got {_named(value)}, expected a list of tools")
    return tuple(value)


def _joined(instruction: str, given: str) -> str:
    """Alpaca's two parts of a request."""
    return f"{instruction}\n\n{given}" if given.strip() else instruction


def _named(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


# Tried in this order: the more keys, the earlier.
_SIGNS: list[tuple[str, set[str]]] = [
    ("preference", {"chosen", "rejected"}),
    ("argilla", {"instruction", "chosen_response", "rejected_response"}),
    ("ranked", {"prompt", "answers"}),
    ("stepwise", {"prompt", "completions", "labels"}),
    ("verl", {"prompt", "reward_model"}),
    ("label", {"prompt", "completion", "label"}),
    ("completion", {"prompt", "completion"}),
    ("messages", {"messages"}),
    ("sharegpt", {"conversations"}),
    ("humaneval", {"prompt", "canonical_solution"}),
    ("seeds", {"instruction", "instances"}),
    ("alpaca", {"instruction", "output"}),
    ("question", {"question", "answer"}),
    ("prompt", {"prompt"}),
    ("text", {"text"}),
]
FORMATS: dict[str, Reader] = {
    "preference": _preference, "argilla": _argilla, "ranked": _ranked, "stepwise": _stepwise, "verl": _verl,
    "label": _label, "completion": _completion, "messages": _messages, "sharegpt": _sharegpt,
    "humaneval": _humaneval, "seeds": _seeds, "alpaca": _alpaca, "question": _question, "prompt": _prompt,
    "text": _text,
}  # fmt: skip
