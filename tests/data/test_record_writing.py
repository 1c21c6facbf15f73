"""What is written is read back the same."""

import pytest

from gptcore.data.record_files import read
from gptcore.data.record_writing import write_demonstrations, write_rankings
from gptcore.data.records import Demonstration, Message, Ranking
from gptcore.errors import UserError

TALK = (Message("system", "Be brief."), Message("user", "Où?"))


def test_demonstrations(tmp_path):
    for records in ([Demonstration("2+2=", "4"), Demonstration("a\nb", "c\n")], [Demonstration(TALK, "Là.")]):
        assert write_demonstrations(tmp_path / "new" / "d.jsonl", records) == len(records)
        back = read(tmp_path / "new" / "d.jsonl", Demonstration).records
        assert [(r.prompt, r.completion) for r in back] == [(r.prompt, r.completion) for r in records]


def test_rankings(tmp_path):
    made = [Ranking("q", ("a", "b", "c"), (-3.0, -1.5, -3.0)), Ranking("r", ("x", "y"), (0.5, 0.25))]
    assert write_rankings(tmp_path / "r.jsonl", made) == 2
    back = read(tmp_path / "r.jsonl", Ranking).records
    assert [(r.prompt, r.answers) for r in back] == [(r.prompt, r.answers) for r in made]
    assert [r.ranks for r in back] == [(1, 2, 1), (2, 1)]
    assert write_rankings(tmp_path / "t.jsonl", [Ranking(TALK, ("x", "y"), (0, 1))]) == 1
    assert read(tmp_path / "t.jsonl", Ranking).records[0].prompt == TALK


def test_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing to write"):
        write_demonstrations(tmp_path / "d.jsonl", [])
    assert not (tmp_path / "d.jsonl").exists()
