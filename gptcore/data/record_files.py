"""Files of conversations and preferences, read into records of one kind."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from gptcore.data.atomic import write_text
from gptcore.data.conversation_formats import FORMATS, detect, task_of
from gptcore.data.records import (
    Demonstration,
    Labelled,
    Prompt,
    Ranking,
    Record,
    Stepwise,
    Task,
)
from gptcore.data.rows import Row, rows_of
from gptcore.errors import UserError, unknown_name

R = TypeVar("R", Demonstration, Ranking, Labelled, Stepwise, Task)

# What a key of another name may be taken for.
FIELDS = (
    "prompt", "completion", "system", "messages", "conversations", "chosen", "rejected", "answers", "ranks", "scores",
    "label", "completions", "labels", "margin", "weight", "truth", "text",
)  # fmt: skip
_FLAGS = {
    "input_key": "prompt", "prompt_key": "prompt", "output_key": "completion", "label_key": "label",
    "chosen_key": "chosen", "rejected_key": "rejected", "margin_key": "margin", "field_prompt": "prompt",
    "field_system": "system", "field_chosen": "chosen", "field_rejected": "rejected", "field_messages": "messages",
}  # fmt: skip


@dataclass
class RecordSet(Generic[R]):
    """The records of some files. ``skipped``: how many were left out, by reason; ``formats``: of each file."""

    records: list[R] = field(default_factory=list)
    skipped: collections.Counter[str] = field(default_factory=collections.Counter)
    formats: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Any:
        return iter(self.records)


def read(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    kind: type[R],
    *,
    format: str = "auto",
    fields: Mapping[str, str] | None = None,
    bad: str = "refuse",
    limit: int | None = None,
) -> RecordSet[R]:
    """Read JSONL, JSON or Parquet files into records.

    Args:
        paths: one file or several, each also with .gz or .zst.
        kind: Demonstration, Ranking, Labelled, Stepwise or Task. A pair of Rankings' extremes gives two Labelled;
            anything with a prompt gives a Task, a response being its truth (of GSM8K what follows ``####``).
        format: a name of ``gptcore.data.conversation_formats``; "auto" takes the one that a file's first row shows.
        fields: our name (``FIELDS``) to the key in the file, dotted where it lies deeper, as in
            ``{"prompt": "question", "truth": "meta.answer"}``; OpenRLHF's ``input_key`` and axolotl's ``field_prompt``
            and their like are known too.
        bad: what a row that cannot be learnt from does: "refuse" everything, naming it, or be "skip"ped and counted.
        limit: at most so many records, from the front.

    Raises:
        UserError: a file that cannot be read, a row of another format, empty or contradictory records: names file,
            line, key, what came and what was expected. Also when nothing is left.
    """
    if bad not in ("refuse", "skip"):
        raise unknown_name("bad", bad, ("refuse", "skip"))
    if format != "auto" and format not in FORMATS:
        raise unknown_name("format", format, [*FORMATS, "auto"])
    renamed = _renaming(fields or {})
    result: RecordSet[R] = RecordSet()
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else list(paths):
        _read_file(result, path, kind, format, renamed, bad == "skip", limit)
    if not result.records:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in result.skipped.most_common(3))
        raise UserError(
            f"{_names(paths)}: no {kind.__name__.lower()} in it" + (f" ({reasons})" if reasons else "")
        )
    return result


def _read_file(
    result: RecordSet[R],
    path: str | os.PathLike[str],
    kind: type[R],
    format: str,
    renamed: Mapping[str, str],
    skip: bool,
    limit: int | None,
) -> None:
    name = format
    for row in rows_of(path):
        if limit is not None and len(result.records) >= limit:
            return
        try:
            row = _with_names(row, renamed)
            name = detect(row) if name == "auto" else name
            result.formats.setdefault(os.fspath(path), name)
            result.records += _parse(row, name, kind)
        except UserError as error:
            if not skip or isinstance(error, _WrongKind):
                raise UserError(f"{row.place}: {error}") from None
            result.skipped[str(error)] += 1


class _WrongKind(UserError):
    """A file of something else, which no row of it can mend."""


def _parse(row: Row, name: str, kind: type[R]) -> list[R]:
    needed = next((key for key in _NEEDED.get(name, ()) if key not in row.values), None)
    if needed is not None:
        row.get(needed, object, f"what format '{name}' has there")
    found: list[R] = []
    for record in FORMATS[name](row):
        found += _as_kind(record, row, name, kind)
    return found


# What the reader of a format takes for granted.
_NEEDED = {
    "messages": ("messages",), "sharegpt": ("conversations",), "completion": ("prompt", "completion"),
    "preference": ("chosen", "rejected"), "ranked": ("prompt",), "label": ("prompt", "completion"),
    "stepwise": ("prompt",), "verl": ("prompt",), "prompt": ("prompt",),
}  # fmt: skip


def _as_kind(record: Record, row: Row, name: str, kind: type[R]) -> list[R]:
    if isinstance(record, kind):
        return [record]
    if kind is Task:
        return [task_of(record, row)]  # type: ignore[list-item]
    if kind is Labelled and isinstance(record, Ranking):
        sides = ((record.chosen, True), (record.rejected, False))
        return [Labelled(record.prompt, text, good, row.place) for text, good in sides]  # type: ignore[misc]
    raise _WrongKind(
        f"format '{name}' holds a {type(record).__name__.lower()}, expected a {kind.__name__.lower()}"
    )


def _renaming(fields: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for name, key in fields.items():
        ours = _FLAGS.get(name, name)
        if ours not in FIELDS:
            raise unknown_name("field", name, [*FIELDS, *_FLAGS])
        if not isinstance(key, str) or not key:
            raise UserError(f"fields.{name}: got {key!r}, expected the name of a key")
        found[ours] = key
    return found


def _with_names(row: Row, renamed: Mapping[str, str]) -> Row:
    """``row`` with our names for the keys that were said to hold them."""
    if not renamed:
        return row
    values = {key: value for key, value in row.values.items() if key not in renamed.values()}
    for ours, key in renamed.items():
        value: Any = row.values
        for part in [key] if key in row.values else key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            values[ours] = value
        elif ours in ("prompt", "completion", "chosen", "rejected", "messages"):
            known = ", ".join(sorted(map(str, row.values)))
            raise UserError(f"key '{key}' (fields.{ours}) is missing; the row has: {known}")
    return Row(values, row.place)


def write(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Write records as JSONL in TRL's formats, which :func:`read` reads back equal; the file appears whole."""
    write_text(path, "".join(json.dumps(row_of(record), ensure_ascii=False) + "\n" for record in records))


def row_of(record: Record) -> dict[str, Any]:
    """The keys and values of one record's line."""
    if isinstance(record, Demonstration):
        return _demonstration_row(record)
    row: dict[str, Any] = {"prompt": _plain(record.prompt)}
    if isinstance(record, Ranking):
        pairs = zip(record.answers, record.ranks, strict=True)
        row["answers"] = [{"answer": answer, "rank": rank} for answer, rank in pairs]
        if record.margin is not None:
            row = {"prompt": row["prompt"], "chosen": record.chosen, "rejected": record.rejected}
            row["margin"] = record.margin
    elif isinstance(record, Labelled):
        row |= {"completion": record.completion, "label": record.label}
    elif isinstance(record, Stepwise):
        row |= {"completions": list(record.steps), "labels": list(record.labels)}
    else:
        row |= {**record.extra, **({} if record.truth is None else {"truth": record.truth})}
    return row


def _demonstration_row(record: Demonstration) -> dict[str, Any]:
    if record.messages:
        row: dict[str, Any] = {"messages": _plain(record.messages)}
    else:
        row = {"prompt": _plain(record.prompt), "completion": record.completion}
    if record.weight != 1.0:
        row["weight"] = record.weight
    return row | ({"tools": list(record.tools)} if record.tools else {})


def _plain(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else [message.to_dict() for message in prompt]


def _names(paths: Any) -> str:
    return os.fspath(paths) if isinstance(paths, (str, os.PathLike)) else ", ".join(map(os.fspath, paths))
