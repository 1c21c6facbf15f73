"""The study from the shared start to the report: what has ended is not done again, what was stopped goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.ptx import arm as arms
from bench.ptx import report
from bench.ptx.settings import PtxSpec
from bench.ptx.start import Start, make
from gptcore.align.claim import claim
from gptcore.data.atomic import write_text
from gptcore.errors import UserError

_RESULT = "result.json"
RECORDS = "records.jsonl"
PAGE = "report.html"


def run(
    directory: str | os.PathLike[str],
    spec: PtxSpec,
    seeds: Sequence[int],
    *,
    quiet: bool = True,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Make the start, walk both arms with each of ``seeds`` and write ``records.jsonl`` and ``report.html``.

    Returns the records: settings, start, one of each seed and arm, and what they come to together. The same settings
    and seeds give the same records, seconds apart.

    Raises:
        UserError: fewer than two seeds or one twice, a directory that holds something else or a study with other
            settings.
        SystemExit: after SIGINT or SIGTERM; the same call goes on from there.
    """
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise UserError(
            f"ptx: got seeds {list(seeds)}, expected two or more different ones, tests are over them"
        )
    place = Path(directory)
    claim(place, spec, "study")
    start = Start(place / "start", spec)
    records = [
        {"record": "settings", **spec.to_dict()},
        _once(place / "start", lambda: _start(start, quiet), say),
    ]
    for seed in seeds:
        for name in arms.ARMS:
            where = place / f"seed-{seed}" / name
            work = _walk(start, name, seed, where, quiet)
            records.append(_once(where, work, say))
    records.append({"record": "together", **report.together(records)})
    write_text(place / RECORDS, "".join(json.dumps(record) + "\n" for record in records))
    report.page(records).write(place / PAGE)
    return records


def _walk(start: Start, name: str, seed: int, where: Path, quiet: bool) -> Callable[[], dict[str, Any]]:
    return lambda: arms.run(start, name, seed, where, quiet=quiet)


def _start(start: Start, quiet: bool) -> dict[str, Any]:
    """Train what all arms share, and measure it."""
    make(start, quiet=quiet)
    model = start.model()
    before = arms.measure(start, model, model, start.prompts("held_out", 0), 0)
    return {
        "record": "start", "parameters": sum(p.numel() for p in model.parameters()),
        "source_tokens": start.source.tokens,
        "pretrained_bits_per_byte": start.bits_per_byte(start.model("pretrain"))["bits_per_byte"], **vars(before),
    }  # fmt: skip


def _once(place: Path, work: Callable[[], dict[str, Any]], say: Callable[[str], None]) -> dict[str, Any]:
    """The result that ``place`` holds, or that of ``work``, kept there."""
    path = place / _RESULT
    if not path.is_file():
        write_text(path, json.dumps(work()) + "\n")
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    say(report.line(record))
    return record
