"""Records refuse, as they are made, what could only train a model wrongly."""

from __future__ import annotations

from typing import Any

import pytest

from gptcore.data.records import (
    Demonstration,
    Labelled,
    Message,
    Ranking,
    Record,
    Stepwise,
    Task,
    as_messages,
    text_of,
)
from gptcore.errors import UserError

ASK = (Message("system", "Be brief."), Message("user", "2 + 2?"))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Demonstration("q", ""), "the response is empty"),
        (lambda: Demonstration("q", " \n"), "the response is empty"),
        (lambda: Demonstration("q", "a", weight=0), "weight: got 0, expected a positive number"),
        (lambda: Demonstration(7, "a"), "prompt: got int"),  # type: ignore[arg-type]
        (lambda: Ranking("q", ("a",), (0,)), "K = 1"),
        (lambda: Ranking("q", ("a", "b"), (0,)), "2 answers and 1 ranks"),
        (lambda: Ranking("q", ("a", "a"), (0, 1)), "the chosen answer equals the rejected one"),
        (lambda: Ranking("q", ("a", "b", "a"), (0, 1, 2)), "one answer stands at ranks 0 and 2"),
        (lambda: Ranking("q", ("a", "b"), (1, 1)), "nothing is preferred"),
        (lambda: Ranking("q", ("a", ""), (0, 1)), "answer 1 is empty"),
        (lambda: Ranking("q", ("a", "b"), (0, float("nan"))), "expected finite numbers"),
        (lambda: Ranking("q", ("a", "b"), (0, 1), margin=float("inf")), "margin: got inf"),
        (lambda: Labelled("q", "", True), "the response is empty"),
        (lambda: Labelled("q", "a", 1), "label: got 1, expected true or false"),  # type: ignore[arg-type]
        (lambda: Stepwise("q", ("a", "b"), (True,)), "2 steps and 1 labels"),
        (lambda: Task("", "4"), "the prompt is empty"),
        (lambda: Message("asistant", "a"), "did you mean 'assistant'?"),
        (lambda: Message("user", None), "got NoneType"),  # type: ignore[arg-type]
    ],
)
def test_what_is_refused(make: Any, sentence: str) -> None:
    with pytest.raises(UserError, match="(?s)" + sentence.replace("+", r"\+").replace("?", r"\?")):
        make()


def test_the_best_and_the_worst_of_a_ranking_with_ties() -> None:
    ranking = Ranking("q", ["b", "a", "c", "d"], [1, 0, 2, 2])  # type: ignore[arg-type]
    assert (ranking.chosen, ranking.rejected) == ("a", "d")
    assert ranking.answers == ("b", "a", "c", "d"), "lists become tuples"


def test_records_hash_and_compare_without_their_origin() -> None:
    one, other = Demonstration(ASK, "4", origin="a.jsonl, line 1"), Demonstration(ASK, "4", origin="b")
    assert one == other and hash(one) == hash(other)
    records: set[Record] = {one, Ranking("q", ("a", "b"), (0, 1)), Task("q", extra={"unit": "m"})}
    assert len(records) == 3


def test_prompts_are_texts_or_messages() -> None:
    assert text_of(ASK) == "Be brief.\n\n2 + 2?" and text_of("q") == "q"
    assert as_messages("q") == (Message("user", "q"),) and as_messages(ASK) is ASK
    assert Message("tool", "4", {"name": "sum"}).to_dict() == {"role": "tool", "content": "4", "name": "sum"}
