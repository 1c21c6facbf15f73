"""List the model sizes that have a name, or show one of them as a config file.

N parameters, L layers, C width, H heads, Hkv key/value heads, D head size, F feed-forward width,
V vocabulary, T context length.

Examples:
  gptcore presets                         all of them
  gptcore presets gpt2                    one, with its source and settings
  gptcore presets gpt2 > my.toml          a start for a config of your own
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

_COLUMNS = ("NAME", "N", "L", "C", "H", "Hkv", "D", "F", "V", "T", "SOURCE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show only this preset, as a TOML config for 'gptcore train'")


def run(args: argparse.Namespace) -> int:
    from gptcore.models import presets

    print(_details(args.name) if args.name else _table(presets.names()))
    return 0


def _table(names: list[str]) -> str:
    """One line per preset, numbers right-aligned."""
    rows = [_COLUMNS, *(_row(name) for name in names)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    last = len(_COLUMNS) - 1
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _row(name: str) -> tuple[str, ...]:
    from gptcore.models import accounting, presets
    from gptcore.report.progress import format_count

    preset = presets.describe(name)
    c = preset.config
    sizes = (
        c.num_layers,
        c.width,
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
        c.hidden_size,
        c.vocab_size,
        c.context_length,
    )
    total = accounting.parameter_counts(c).total
    # parameters are counted in billions, not giga
    return (name, format_count(total).replace("G", "B"), *map(str, sizes), preset.source)


def _details(name: str) -> str:
    """The preset as TOML, its facts as comments."""
    from gptcore.models import accounting, presets

    preset = presets.describe(name)
    total = accounting.parameter_counts(preset.config).total
    active = accounting.active_parameters(preset.config)
    met = f", {active:,} of them for each token" if active != total else ""
    facts = [f"{preset.name}: {total:,} parameters{met}", f"source: {preset.source}"]
    if preset.note:
        facts.append(f"note: {preset.note}")
    training = accounting.state_bytes(preset.config).total
    facts.append(f"state in training: {training / 1e9:.3g} GB (bf16 weights, f32 masters and moments)")
    return "\n".join([*(f"# {fact}" for fact in facts), "", *_toml(preset.config.to_dict(), "model")])


def _toml(values: Mapping[str, Any], section: str) -> Iterator[str]:
    """``values`` as a TOML table; scalars first, as TOML demands."""
    yield f"[{section}]"
    for key, value in values.items():
        if not isinstance(value, Mapping):
            # JSON's spelling of numbers, strings, booleans and lists is TOML's too
            yield f"{key} = {json.dumps(value)}"
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield ""
            yield from _toml(value, f"{section}.{key}")
