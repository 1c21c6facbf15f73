"""Writes the README's benchmark table from a results file, between two markers.

python -m bench.readme_table bench/results/cpu.jsonl
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import ROOT
from bench.harness import Results, milliseconds, read_jsonl

START = "<!-- benchmark-table:begin -->"
END = "<!-- benchmark-table:end -->"
# One or two telling cases of each operation; the whole list is in the results file.
ROWS = (
    "train_step/*",
    "attention/qkv_*/forward_backward",
    "attention/B4_H12_T1024_D64_causal/*",
    "attention/*window256*/forward",
    "layer_norm/4096x768/forward_backward",
    "rms_norm/2048x4096_residual/forward_backward",
    "gated_activation/gelu_tanh_1024x3072/forward_backward",
    "gated_activation/swiglu_2048x11008/forward_backward",
    "rotary/B2_T512_H12_D64_halves/forward_backward",
    "embedding/V50257_C768_N1024/forward_backward",
    "linear_cross_entropy/N1024_C768_V50257/forward_backward",
    "adamw/gpt2_124m/step",
    "matmul/accumulate_K1024_M3072_N768/forward",
)


def table(results: Results, allocator: str = "tuned") -> str:
    """Markdown: a sentence on the machine and a row for each of ROWS that the results have.

    Raises ValueError when no row fits or no machine is named.
    """
    machine = next((m for m in results.machines if m["allocator"] == allocator), None)
    if machine is None:
        raise ValueError(f"the results have no machine measured with the {allocator} allocator setting")
    records = [
        record
        for pattern in ROWS
        for record in results.records
        if fnmatch.fnmatch(record["case"], pattern)
        and record["allocator"] == allocator
        and record["wait_policy"] == "spin2000"
    ]
    if not records:
        raise ValueError(f"the results have none of the table's cases with the {allocator} allocator setting")
    lines = [
        "| case | dtype | gptcore | torch, best setting | ratio | of the limit |",
        "|---|---|---:|---:|---:|---:|",
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
    return f"| {' | '.join(cells)} |"


def replace_between(text: str, new: str) -> str:
    """``text`` with what is between the two markers replaced. Raises ValueError without exactly one pair."""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"expected one '{START}' and after it one '{END}'")
    before, rest = text.split(START)
    return f"{before}{START}\n{new}\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrites the README; 0 on success, 2 with a sentence otherwise."""
    parser = argparse.ArgumentParser(prog="python -m bench.readme_table", description=__doc__.splitlines()[0])
    parser.add_argument("results", help="file written by python -m bench --json")
    parser.add_argument(
        "--readme", default=str(ROOT / "README.md"), help="default: the repository's README.md"
    )
    parser.add_argument("--allocator", default="tuned", choices=("default", "tuned"))
    arguments = parser.parse_args(argv)
    try:
        readme = Path(arguments.readme)
        new = replace_between(
            readme.read_text("utf-8"), table(read_jsonl(arguments.results), arguments.allocator)
        )
        readme.write_text(new, "utf-8")
    except (OSError, ValueError) as error:
        print(f"readme_table: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
