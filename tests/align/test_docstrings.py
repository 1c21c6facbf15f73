"""First lines of docstrings: what is read, what the rules say, and that held-out modules stay out."""

from __future__ import annotations

import pytest

from gptcore.align.tasks import docstrings
from gptcore.errors import UserError

SIGNATURE = "def read_text(self, encoding=None, errors=None):"


@pytest.fixture(scope="module")
def parts():
    return docstrings.tasks("train"), docstrings.tasks("held_out")


@pytest.mark.parametrize(
    "line, broken",
    [
        ("Open the file in text mode, read it, and close the file.", set()),
        ("Open the file in text mode, read it, and close the file", {"period"}),
        ("Open the file...", {"period"}),
        ("open the file.", {"phrase"}),
        ("Open.", {"phrase"}),
        ("Open the file.\nRead it.", {"one line"}),
        ("Open " + "the file " * 8 + "now.", {"length"}),
        ("read_text(self, encoding=None) -> str", {"phrase", "period", "not a signature"}),
        ("Read text.", {"not a signature"}),
        ("def read_text(self, encoding=None, errors=None):", {"phrase", "period", "not a signature"}),
        ("", set(docstrings.RULES)),
        (".", {"phrase"}),
    ],
)
def test_rules(line, broken):
    kept = docstrings.rules(SIGNATURE, line)
    assert tuple(kept) == docstrings.RULES
    assert {rule for rule, held in kept.items() if not held} == broken


def test_the_library_is_read(parts):
    everything = parts[0] + parts[1]
    known = {(t.extra["module"], t.extra["name"]): t for t in everything}
    found = known["pathlib", "Path.read_text"]
    assert found.prompt == f'{SIGNATURE}\n    """'
    assert found.truth == "Open the file in text mode, read it, and close the file."
    assert docstrings.correct(found, found.truth) and docstrings.about(found, "Give the errors.")
    assert not docstrings.about(found, "Return the thing.")
    assert len(everything) > 5000 and sum(bool(t.truth) for t in everything) > 1500
    assert max(len(t.prompt) for t in everything) <= 160


def test_modules_are_held_out_whole(parts):
    packages = [{t.extra["module"].split(".")[0] for t in part} for part in parts]
    assert not packages[0] & packages[1] and packages[1]
    assert 0.03 < len(parts[1]) / len(parts[0] + parts[1]) < 0.4
    names = [
        {name.split("/")[0].removesuffix(".py") for name, _ in docstrings.texts(part)}
        for part in ("train", "held_out")
    ]
    assert not names[0] & names[1]
    assert packages[0] <= names[0] and packages[1] <= names[1]
    assert docstrings.tasks("held_out", seed=1) != parts[1]


def test_demonstrations_are_not_all_lawful(parts):
    made = docstrings.demonstrations(parts[0])
    by_prompt = {t.prompt: t for t in parts[0]}
    lawful = sum(docstrings.correct(by_prompt[d.prompt], d.completion) for d in made) / len(made)
    assert 0.3 < lawful < 0.9


def test_rankings_follow_the_rules_up_to_their_noise(parts):
    made = docstrings.rankings(parts[0], 100, k=4, noise=0.0, seed=1)
    assert len(made) == 100 and made == docstrings.rankings(parts[0], 100, k=4, noise=0.0, seed=1)
    by_prompt = {t.prompt: t for t in parts[0]}
    for r in made:
        assert len(r.answers) == len(set(r.answers)) == 4
    first = made[0]
    signature = by_prompt[first.prompt].extra["signature"]
    assert [-sum(docstrings.rules(signature, a).values()) / 5 for a in first.answers] == list(first.ranks)
    assert docstrings.rankings(parts[0], 100, k=4, noise=0.5, seed=1) != made


def test_source_is_written_for_prepare(tmp_path):
    written = docstrings.write_texts(tmp_path / "held_out", "held_out")
    files = sorted((tmp_path / "held_out").iterdir())
    assert files and all(file.suffix == ".txt" for file in files)
    assert sum(file.stat().st_size for file in files) == written > 100_000
    with pytest.raises(UserError, match="in use"):
        docstrings.write_texts(tmp_path / "held_out", "held_out")


def test_what_cannot_be_is_refused(parts):
    with pytest.raises(UserError, match="k 9"):
        docstrings.rankings(parts[0], 1, k=9)
    with pytest.raises(UserError, match="0 documented"):
        docstrings.rankings([], 1)
