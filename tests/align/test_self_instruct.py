"""Growing a set of instructions: similarity by hand and by another algorithm, and a reason for each reject."""

from __future__ import annotations

import functools
import random

import pytest

from gptcore.align import self_instruct
from gptcore.align.self_instruct import Filter, grow, rouge_l, words_of
from gptcore.errors import UserError

SEEDS = [
    "Write a poem about the sea.",
    "Sort these numbers from small to large.",
    "Name three fruits that are red.",
]


def test_rouge_l_by_hand():
    assert rouge_l(list("abc"), list("abc")) == 1.0
    assert rouge_l(list("abcd"), list("axcd")) == 0.75
    assert rouge_l(list("ab"), list("ba")) == 0.5
    assert rouge_l([], list("a")) == rouge_l(list("a"), []) == rouge_l(list("a"), list("b")) == 0.0
    # Lin 2004, section 3.2: reference "police killed the gunman"
    reference = words_of("police killed the gunman")
    assert rouge_l(words_of("police kill the gunman"), reference) == 0.75
    assert rouge_l(words_of("the gunman kill police"), reference) == 0.5


def test_rouge_l_equals_its_recursive_definition():
    drawn = random.Random(0)
    for _ in range(50):
        a, b = ("".join(drawn.choices("abc", k=drawn.randint(1, 9))) for _ in range(2))

        @functools.cache
        def common(i, j, a=a, b=b):
            if i == len(a) or j == len(b):
                return 0
            if a[i] == b[j]:
                return 1 + common(i + 1, j + 1)
            return max(common(i + 1, j), common(i, j + 1))

        assert rouge_l(a, b) == 2 * common(0, 0) / (len(a) + len(b))


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "empty"), (" \n", "empty"), ("12 + 34 = 46", "malformed"), ("Say \x07 this out loud", "malformed"),
        ("Half a � character here", "malformed"), ("Do it", "too short"), ("word " * 151, "too long"),
        ("no no no no no no no", "repetitive"), ("Write a poem about the sea!", "duplicate"),
        ("write a short poem about the sea", "duplicate"), ("Tell a secret to your friend", "refused"),
        ("Explain how rain is made.", None),
    ],
)  # fmt: skip
def test_reasons(text, reason):
    filter = Filter(accepts=lambda text: "secret" not in text)
    assert filter.reason(text, [words_of(seed) for seed in SEEDS]) == reason
    assert reason is None or reason in self_instruct.REASONS


def test_a_set_grows_and_counts_its_rejects():
    new = [
        "Explain how rain is made.",
        "Translate the word house into Latin.",
        "List the planets by their size.",
    ]
    asked = []

    def propose(examples):
        asked.append(list(examples))
        return [new[(len(asked) - 1) % 3], "Write a poem about the sea.", "", "Do it"]

    grown = grow(SEEDS, propose, 3, shown=4, seed=1)
    assert grown.kept == new and grown.rounds == 3 and grown.growth == [1, 2, 3]
    assert grown.rejected == {"duplicate": 3, "empty": 3, "too short": 3} and len(grown.rejects) == 9
    assert all(len(set(examples)) == len(examples) <= 4 for examples in asked)
    assert any(set(examples) & set(new) for examples in asked[1:])


def test_it_ends_when_nothing_new_comes_and_never_keeps_its_own_again():
    grown = grow(SEEDS, lambda examples: ["Explain how rain is made."], 5, most_rounds=7)
    assert (grown.kept, grown.rounds) == (["Explain how rain is made."], 7)
    assert grown.rejected == {"duplicate": 6}


def test_lists_of_a_model():
    shown = self_instruct.listed(SEEDS)
    assert shown.startswith("Instructions:\n1. Write a poem") and shown.endswith("\n4.")
    assert self_instruct.items_of(" Do this thing.\n\n5. Do that thing.\n6) And more") == [
        "Do this thing.", "Do that thing.", "And more",
    ]  # fmt: skip


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="0 seeds"):
        grow([], list, 1)
    with pytest.raises(UserError, match="count 0"):
        grow(SEEDS, list, 0)
    with pytest.raises(UserError, match="similar 0"):
        Filter(similar=0.0)
