"""Records as JSONL that :mod:`gptcore.data.record_files` and other libraries read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gptcore.data.atomic import write_text
from gptcore.data.records import Demonstration, Prompt, Ranking
from gptcore.errors import UserError


def write_demonstrations(path: str | os.PathLike[str], records: Iterable[Demonstration]) -> int:
    """Write ``prompt`` and ``completion``, or ``messages`` where the prompt is a conversation; returns how many.

    The file appears whole. Raises UserError for no records, OSError where it cannot be written.
    """
    return _write(path, [_demonstration(record) for record in records])


def write_rankings(path: str | os.PathLike[str], records: Iterable[Ranking]) -> int:
    """Write ``prompt`` and ``answers``, a list of ``{"answer", "rank"}``, rank 1 being the best; returns how many.

    Ranks are numbered anew, ties kept. The file appears whole. Raises as :func:`write_demonstrations`.
    """
    return _write(path, [_ranking(record) for record in records])


def _demonstration(record: Demonstration) -> dict[str, Any]:
    if isinstance(record.prompt, str):
        return {"prompt": record.prompt, "completion": record.completion}
    return {"messages": [*_prompt(record.prompt), {"role": "assistant", "content": record.completion}]}


def _ranking(record: Ranking) -> dict[str, Any]:
    places = {rank: place for place, rank in enumerate(sorted(set(record.ranks)), 1)}
    answers = [
        {"answer": answer, "rank": places[rank]}
        for answer, rank in zip(record.answers, record.ranks, strict=True)
    ]
    return {"prompt": _prompt(record.prompt), "answers": answers}


def _prompt(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else [message.to_dict() for message in prompt]


def _write(path: str | os.PathLike[str], rows: list[dict[str, Any]]) -> int:
    if not rows:
        raise UserError(f"{path}: there is nothing to write")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    return len(rows)
