"""Every published shape of conversations and preferences, read into records; and what is wrong with a file, named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from gptcore.data.record_files import read, row_of, write
from gptcore.data.records import Demonstration, Labelled, Message, Ranking, Stepwise, Task
from gptcore.errors import UserError

U, A = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
ASK, BRIEF = (Message("user", "2 + 2?"),), Message("system", "Be brief.")
HH = "\n\nHuman: 2 + 2?\n\nAssistant: Which sum?\n\nHuman: That one.\n\nAssistant:"
HH_TURNS = (
    Message("user", "2 + 2?"), Message("assistant", "Which sum?"), Message("user", "That one."),
)  # fmt: skip
ANSWERS = ("4", "5")


def file_of(tmp_path: Path, *rows: Any, name: str = "data.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"messages": [U, A]}, ASK, "4"),
        ({"messages": [{**U, "name": None}, A], "tools": None}, ASK, "4"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]}, A]}, ASK, "4"),
        ({"prompt": "2 + 2?", "completion": "4"}, "2 + 2?", "4"),
        ({"prompt": [U], "completion": [A]}, ASK, "4"),
        ({"text": "all of it"}, "", "all of it"),
        ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, ASK, "4"),
        ({"system": "Be brief.", "conversations": [U, A]}, (BRIEF, *ASK), "4"),
        ({"instruction": "Add.", "input": "2, 2", "output": "4"}, "Add.\n\n2, 2", "4"),
        ({"instruction": "2 + 2?", "input": "", "output": "4"}, "2 + 2?", "4"),
        (
            {"instruction": "That one.", "output": "4", "history": [["2 + 2?", "Which sum?"]]},
            HH_TURNS,
            "4",
        ),
        ({"question": "2 + 2?", "answer": "two more\n#### 4"}, "2 + 2?", "two more\n#### 4"),
        ({"prompt": "def f():", "canonical_solution": " return 1", "test": "t"}, "def f():", " return 1"),
    ],
)
def test_demonstrations(tmp_path: Path, row: Any, prompt: Any, completion: str) -> None:
    (record,) = read(file_of(tmp_path, row), Demonstration)
    assert (record.prompt, record.completion) == (prompt, completion)
    assert record.origin.endswith("data.jsonl, line 1")
    if isinstance(prompt, tuple):
        assert record.messages == (*prompt, Message("assistant", completion))


@pytest.mark.parametrize(
    ("row", "prompt", "answers"),
    [
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, "2 + 2?", ANSWERS),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is black."},
            "The sky is",
            (" blue.", " black."),
        ),
        ({"prompt": [U], "chosen": [A], "rejected": [{**A, "content": "5"}]}, ASK, ANSWERS),
        ({"chosen": [U, A], "rejected": [U, {**A, "content": "5"}]}, ASK, ANSWERS),
        ({"chosen": HH + " 4", "rejected": HH + " 5"}, HH_TURNS, ANSWERS),
        (
            {"system": "Be brief.", "question": "2 + 2?", "chosen": "4", "rejected": "5"},
            (BRIEF, *ASK),
            ANSWERS,
        ),
        ({"system": "Be brief.", "input": "2 + 2?", "chosen": "4", "rejected": "5"}, (BRIEF, *ASK), ANSWERS),
        ({"instruction": "2 + 2?", "chosen_response": "4", "rejected_response": "5"}, "2 + 2?", ANSWERS),
        (
            {
                "system": "Be brief.",
                "prompt": "2 + 2?",
                "chosen": [U, A],
                "rejected": [U, {**A, "content": "5"}],
            },
            (BRIEF, *ASK),
            ANSWERS,
        ),
    ],
)
def test_pairs(tmp_path: Path, row: Any, prompt: Any, answers: Any) -> None:
    (record,) = read(file_of(tmp_path, row), Ranking)
    assert (record.prompt, record.answers, record.ranks) == (prompt, answers, (0.0, 1.0))


def test_tools_as_a_list_or_as_json(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = [{"messages": [U, A], "tools": tools}, {"messages": [U, A], "tools": json.dumps(tools)}]
    assert [list(record.tools) for record in read(file_of(tmp_path, *rows), Demonstration)] == [tools, tools]
    for bad in ("{", "7"):
        with pytest.raises(UserError, match="line 1: key 'tools'"):
            read(file_of(tmp_path, {"messages": [U, A], "tools": bad}), Demonstration)


def test_ranked_answers(tmp_path: Path) -> None:
    answers = [{"answer": "5", "rank": 2.0}, {"answer": "4", "rank": 1.0}, {"answer": "6", "rank": 2.0}]
    rows = [
        {"prompt": "\n\nHuman: 2 + 2?\n\nAssistant: ", "answers": answers, "turns": 1},
        {"prompt": "2 + 2?", "answers": ["5", "4", "6"], "scores": [-2, -1, -2]},
    ]
    first, second = read(file_of(tmp_path, *rows), Ranking)
    assert first.prompt == ASK and second.prompt == "2 + 2?"
    assert first.answers == second.answers == ("5", "4", "6") and first.ranks == second.ranks == (2, 1, 2)
    assert (
        read(file_of(tmp_path, {"prompt": "q", "chosen": "4", "rejected": "5", "margin": 2}), Ranking)
        .records[0]
        .margin
        == 2
    )


def test_labels_steps_and_tasks(tmp_path: Path) -> None:
    (good,) = read(file_of(tmp_path, {"prompt": "2 + 2?", "completion": "4", "label": True}), Labelled)
    assert good == Labelled("2 + 2?", "4", True)
    pair = file_of(tmp_path, {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"})
    assert list(read(pair, Labelled)) == [good, Labelled("2 + 2?", "5", False)]
    steps = {"prompt": "2 + 2?", "completions": ["count", "4"], "labels": [True, False]}
    assert list(read(file_of(tmp_path, steps), Stepwise)) == [
        Stepwise("2 + 2?", ("count", "4"), (True, False))
    ]
    verl = {
        "data_source": "sums", "prompt": [U], "ability": "math", "extra_info": {"index": 0, "split": None},
        "reward_model": {"style": "rule", "ground_truth": "4"},
    }  # fmt: skip
    (task,) = read(file_of(tmp_path, verl), Task)
    assert task == Task(ASK, "4", {"data_source": "sums", "ability": "math", "extra_info": {"index": 0}})
    asked = file_of(tmp_path, {"prompt": "2 + 2?", "level": 1})
    assert list(read(asked, Task)) == [Task("2 + 2?", None, {"level": 1})]


def test_keys_of_other_names(tmp_path: Path) -> None:
    path = file_of(tmp_path, {"q": "2 + 2?", "good": "4", "meta": {"bad": "5"}})
    fields = {"prompt_key": "q", "field_chosen": "good", "rejected": "meta.bad"}
    assert list(read(path, Ranking, fields=fields)) == [Ranking("2 + 2?", ANSWERS, (0, 1))]
    with pytest.raises(
        UserError, match=r"line 1: key 'nope' \(fields.prompt\) is missing; the row has: good, meta, q"
    ):
        read(path, Ranking, fields={**fields, "prompt": "nope", "prompt_key": "nope"})
    with pytest.raises(UserError, match="unknown field 'chosn'; did you mean 'chosen'"):
        read(path, Ranking, fields={"chosn": "good"})


def test_parquet_gzip_zstandard_and_json_give_what_jsonl_gives(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    rows = [{"messages": [U, A]}, {"messages": [{"role": "system", "content": "Be brief."}, U, A]}]
    plain = file_of(tmp_path, *rows)
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "data.jsonl.zst").write_bytes(zstandard.compress(plain.read_bytes()))
    (tmp_path / "data.json").write_text(json.dumps(rows))
    # a fixed schema fills in what some rows lack
    table = pa.Table.from_pylist([{**row, "tools": None if i else ["t"]} for i, row in enumerate(rows)])
    pq.write_table(table.drop_columns("tools"), tmp_path / "data.parquet")
    expected = list(read(plain, Demonstration))
    for name in ("data.jsonl.gz", "data.jsonl.zst", "data.json", "data.parquet"):
        found = read(tmp_path / name, Demonstration)
        assert list(found) == expected, name
    assert read([plain, tmp_path / "data.json"], Demonstration).formats == {
        str(plain): "messages", str(tmp_path / "data.json"): "messages",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "row", "sentence"),
    [
        (Demonstration, [1], "line 2: got a JSON list, expected an object"),
        (Demonstration, {"messages": [U]}, "line 2: a conversation of 1 message"),
        (Demonstration, {"messages": [A, U]}, "line 2: the conversation ends with user"),
        (
            Demonstration,
            {"messages": "hello"},
            "line 2: key 'messages': got text 'hello', expected messages or",
        ),
        (
            Demonstration,
            {"messages": [U, {"role": "assistant"}]},
            r"line 2: key 'messages\[1\].content': got nothing",
        ),
        (Demonstration, {"messages": [U, {"role": "asistant", "content": "4"}]}, "did you mean 'assistant'"),
        (
            Demonstration,
            {"messages": [U, {"role": "assistant", "content": ""}]},
            "line 2: the response is empty",
        ),
        (
            Demonstration,
            {"messages": [U, {**A, "content": ""}, U, A]},
            r"the response is empty \(message 1\)",
        ),
        (Demonstration, {"massages": [U, A]}, "key 'messages' is missing, .* the row has: massages"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, kind: Any, row: Any, sentence: str) -> None:
    path = file_of(tmp_path, {"messages": [U, A]}, row)
    with pytest.raises(UserError, match=f"^{path}, {sentence}" if sentence.startswith("line") else sentence):
        read(path, kind)


@pytest.mark.parametrize(
    ("kind", "row", "sentence"),
    [
        (
            Ranking,
            {"prompt": "q", "chosen": "4", "rejected": "4"},
            "the chosen answer equals the rejected one",
        ),
        (Ranking, {"chosen": HH + " 4", "rejected": HH + " 4"}, "the chosen answer equals the rejected one"),
        (Ranking, {"chosen": [U, A, U, A], "rejected": [U, U]}, "the two conversations part at message 1"),
        (Ranking, {"prompt": "q", "answers": [{"answer": "4", "rank": 1}]}, "K = 1"),
        (Ranking, {"prompt": "q", "answers": [{"answer": "4"}]}, "key 'rank' is missing"),
        (
            Ranking,
            {"prompt": "q", "chosen": "4", "rejected": ["5"]},
            "'chosen' and 'rejected': got str '4' and list",
        ),
        (Ranking, {"messages": [U, A]}, "format 'messages' holds a demonstration, expected a ranking"),
        (
            Labelled,
            {"prompt": "q", "completion": "4", "label": 1},
            "key 'label': got int 1, expected true or false",
        ),
        (Task, {"prompt": "q", "reward_model": {"style": "rule"}}, "key 'ground_truth' is missing"),
        (Demonstration, {"prompt": "q"}, "format 'prompt' holds a task, expected a demonstration"),
        (Demonstration, {"a": 1, "b": 2}, "keys a, b are of no known format .*messages"),
        (Demonstration, {"instruction": "q", "output": 4}, "key 'output': got int 4, expected text"),
        (Demonstration, {"instruction": "q", "output": "4", "history": [["a"]]}, r"key 'history\[0\]'"),
        (
            Demonstration,
            {"instruction": "q", "instances": [{"input": ""}]},
            r"key 'instances\[0\]': key 'output'",
        ),
        (Demonstration, {"prompt": "q", "completion": " "}, "the response is empty"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(tmp_path: Path, kind: Any, row: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=f"data.jsonl, line 1: .*{sentence}|data.jsonl, line 1: {sentence}"):
        read(file_of(tmp_path, row), kind)


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    good, same = (
        {"prompt": "q", "chosen": "4", "rejected": "5"},
        {"prompt": "q", "chosen": "4", "rejected": "4"},
    )
    found = read(file_of(tmp_path, good, same, good, same), Ranking, bad="skip")
    assert len(found) == 2 and found.skipped == {"the chosen answer equals the rejected one": 2}
    with pytest.raises(UserError, match="no ranking in it .2 x the chosen answer equals"):
        read(file_of(tmp_path, same, same), Ranking, bad="skip")
    with pytest.raises(UserError, match="holds a ranking, expected a demonstration"):
        read(file_of(tmp_path, good), Demonstration, bad="skip")


def test_files_that_are_damaged_or_absent(tmp_path: Path) -> None:
    cases = {
        "torn.jsonl": (b'{"a": ', "torn.jsonl, line 1: not JSON"),
        "latin.jsonl": (b'{"a": "\xe9"}', "line 1: not UTF-8 .byte 0xe9."),
        "one.json": (b"{}", "got a JSON dict, expected an array"),
        "cut.jsonl.gz": (gzip.compress(b"x" * 999)[:-9], "truncated"),
        "x.parquet": (b"PAR1", "cannot be read as Parquet"),
        "x.txt": (b"", "unknown kind of file, expected .jsonl, .json, .parquet"),
    }
    for name, (data, sentence) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=sentence):
            read(tmp_path / name, Demonstration)
    with pytest.raises(UserError, match="no file at"):
        read(tmp_path / "absent.jsonl", Demonstration)
    with pytest.raises(UserError, match="no demonstration in it"):
        read(file_of(tmp_path), Demonstration)


def test_what_is_written_reads_back_equal(tmp_path: Path) -> None:
    records = {
        Demonstration: [
            Demonstration("q", "a", weight=0.5),
            Demonstration(ASK, "4", messages=(*ASK, Message("assistant", "4"))),
        ],
        Ranking: [Ranking(ASK, ("a", "b", "c"), (1, 0, 1)), Ranking("q", ("a", "b"), (0.0, 1.0), margin=0.5)],
        Labelled: [Labelled("q", "a", False)],
        Stepwise: [Stepwise("q", ("a", "b"), (True, False))],
        Task: [Task(ASK, "4", {"level": 1})],
    }
    for kind, some in records.items():
        for record in some:  # a file has one format
            write(tmp_path / "out.jsonl", [record])
            assert list(read(tmp_path / "out.jsonl", kind)) == [record], row_of(record)


def test_gsm8k(shared_data: Path) -> None:
    path = shared_data / "gsm8k_train.jsonl.gz"
    tasks = read(path, Task)
    assert (
        len(tasks) == 7473
        and tasks.records[0].truth == "72"
        and "#### 72" in tasks.records[0].extra["solution"]
    )
    assert all(float(task.truth) is not None for task in tasks), "every truth is a number"
    (first,) = read(path, Demonstration, limit=1)
    assert str(first.prompt).startswith("Natalia sold clips") and first.completion.endswith("#### 72")


def test_self_instruct_seeds_and_humaneval(shared_data: Path) -> None:
    seeds = read(shared_data / "self_instruct_seed_tasks.jsonl", Demonstration)
    assert len(seeds) == 175 and str(seeds.records[1].prompt).endswith("\n\nNight : Day :: Right : Left")
    problems = read(shared_data / "HumanEval.jsonl.gz", Task)
    assert len(problems) == 164 and "def check" in problems.records[0].truth
    assert problems.records[0].extra["entry_point"] == "has_close_elements"
