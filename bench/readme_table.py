"""Writes benchmark tables from a results file between two markers: the README's, and all rows in docs/results.md.

python -m bench.readme_table bench/results/cpu.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import ROOT
from bench.case import OURS, Case
from bench.harness import Results, milliseconds, read_jsonl
from bench.rows import README

START = "<!-- benchmark-table:begin -->"
END = "<!-- benchmark-table:end -->"


def table(results: Results, allocator: str = "tuned", rows: Sequence[str] = README) -> str:
    """Markdown: a sentence on the machine and a line for each record of ``rows`` that the results have.

    Raises ValueError when no row fits or no machine is named.
    """
    machine = next((m for m in results.machines if m["allocator"] == allocator), None)
    if machine is None:
        raise ValueError(f"the results have no machine measured with the {allocator} allocator setting")
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for pattern in rows:
        for record in results.records:
            setting = (record["allocator"], record["wait_policy"]) == (allocator, "spin2000")
            if setting and Case(record["case"]).matches([pattern], record["dtype"]):
                found.setdefault((record["case"], record["dtype"]), record)
    records = list(found.values())
    if not records:
        raise ValueError(f"the results have none of the table's cases with the {allocator} allocator setting")
    lines = [
        "| case | dtype | gptcore | torch, best setting | ratio | of the limit | |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    return "\n".join([_sentence(machine), "", *lines, *(_row(record) for record in records)])


def _sentence(machine: Mapping[str, Any]) -> str:
    peak = machine["ceilings"]["peak"]
    far = machine["ceilings"]["bandwidth"]["copy"][-1][1]
    return (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}; torch {machine['torch']}, "
        f"best of eager and compiled, same allocator setting for both. Measured ceilings of the same run: "
        f"{peak['float32'] / 1e9:.0f} GFLOP/s in f32, {peak['bfloat16'] / 1e9:.0f} in bf16, "
        f"{far / 1e9:.0f} GB/s copying. A ratio above 1 means gptcore is faster."
    )


def _row(record: Mapping[str, Any]) -> str:
    best = record["best_peer"]
    cells = [record["case"], record["dtype"], milliseconds(record["gptcore_ms"])]
    cells += [f"{milliseconds(record['peers'][best])} ({best.removeprefix('torch_')})" if best else "-"]
    cells += [f"{record['ratio']:.2f}" if record["ratio"] is not None else "-"]
    cells += [f"{record['limit_fraction']:.0%}" if record["limit_fraction"] is not None else "-"]
    return f"| {' | '.join([*cells, _besides(record)])} |"


def _besides(record: Mapping[str, Any]) -> str:
    """What a case is about when it is not speed against a peer."""
    if "memory_ratio" in record:
        return f"{record['peak_mib'][OURS]:,.0f} MiB, {record['memory_ratio']:.2f} of the least peer"
    if "slowdown" in record:
        theirs = min(factor for name, factor in record["slowdown"].items() if name != OURS)
        return f"{record['slowdown'][OURS]:.2f} times slower than alone; torch {theirs:.2f}"
    if "over_plain" in record:
        return f"{record['over_plain']:.2f} of plain"
    if "tokens_per_s" in record:
        return f"{record['tokens_per_s']:,.0f} tokens/s"
    return ""


def replace_between(text: str, new: str) -> str:
    """``text`` with what is between the two markers replaced. Raises ValueError without exactly one pair."""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"expected one '{START}' and after it one '{END}'")
    before, rest = text.split(START)
    return f"{before}{START}\n{new}\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrites both files; 0 on success, 2 with a sentence otherwise."""
    parser = argparse.ArgumentParser(prog="python -m bench.readme_table", description=__doc__.splitlines()[0])
    parser.add_argument("results", help="file written by python -m bench --json")
    parser.add_argument(
        "--readme", default=str(ROOT / "README.md"), help="default: the repository's README.md"
    )
    parser.add_argument(
        "--page", default=str(ROOT / "docs" / "results.md"), help="default: the repository's docs/results.md"
    )
    parser.add_argument("--allocator", default="tuned", choices=("default", "tuned"))
    arguments = parser.parse_args(argv)
    try:
        results = read_jsonl(arguments.results)
        written = []
        for path, rows in ((Path(arguments.readme), README), (Path(arguments.page), ("*",))):
            new = table(results, arguments.allocator, rows)
            written.append((path, replace_between(path.read_text("utf-8"), new)))
        for path, text in written:
            path.write_text(text, "utf-8")
    except (OSError, ValueError) as error:
        print(f"readme_table: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
