"""Stop strings: whatever the pieces, the same text as cutting the whole at once."""

import itertools
import random

import pytest

from gptcore.errors import UserError
from gptcore.infer.stop_strings import StopStrings


def plain(text, stops):
    places = [(text.find(stop), stop) for stop in stops if stop in text]
    return text[: min(places)[0]] if places else text


def test_any_cut_into_pieces_gives_the_plain_answer():
    rng = random.Random(0)

    def letters(count):
        return "".join(rng.choice("aab\n") for _ in range(count))

    for _ in range(2000):
        text = letters(rng.randrange(12))
        stops = [letters(rng.randrange(1, 5)) for _ in range(rng.randrange(3))]
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(6)))
        pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        filtered = StopStrings(stops)
        shown = "".join(filtered.push(piece) for piece in pieces)
        assert plain(text, stops).startswith(shown)
        assert shown + filtered.finish() == plain(text, stops)
        assert (filtered.matched is not None) == any(stop in text for stop in stops)


def test_only_a_possible_beginning_is_held_back():
    filtered = StopStrings(["\n\nQ:"])
    assert filtered.push("one\n") == "one"
    assert filtered.push("two\n\nQ") == "\ntwo"
    assert filtered.push(": next") == ""
    assert filtered.matched == "\n\nQ:" and filtered.push("more") == "" and filtered.finish() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="a stop string is empty"):
        StopStrings(["x", ""])
