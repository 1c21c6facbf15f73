"""Write one HTML file about a run, or about several side by side: values, curves, samples, settings.

Reads RUN/metrics.jsonl and RUN/config.json, of pretraining and of every stage of alignment alike. The
file has its plots inside and needs nothing else. A run may still be going on. Of a PPO run with a second
judge (--gold) it has gold and proxy reward over the root of KL.

Examples:
  gptcore report runs/ppo                            writes runs/ppo/report.html
  gptcore report runs/sft runs/ppo --out both.html   curves over one another
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from gptcore.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's directory")
    parser.add_argument(
        "--out", metavar="FILE", help="the file to write (default: report.html in the first run)"
    )
    parser.add_argument("--title", default="", help="the page's title (default: the runs' names)")


def run(args: argparse.Namespace) -> int:
    from gptcore.report import run_page
    from gptcore.train import metrics

    directories = [Path(name) for name in args.runs]
    for directory in directories:
        if not directory.is_dir():
            raise UserError(f"{directory} is no directory of a run")
    names = _names(directories)
    lines = {
        name: metrics.read(path / "metrics.jsonl") for name, path in zip(names, directories, strict=True)
    }
    settings = {name: _settings(path) for name, path in zip(names, directories, strict=True)}
    page = run_page.page(args.title or ", ".join(names), lines, {k: v for k, v in settings.items() if v})
    print(page.write(args.out or directories[0] / "report.html"))
    return 0


def _names(directories: list[Path]) -> list[str]:
    """The directories' own names, whole paths where two share one."""
    short = [path.resolve().name for path in directories]
    names = short if len(set(short)) == len(short) else [str(path) for path in directories]
    if len(set(names)) < len(names):
        raise UserError(f"the same run is named twice: {', '.join(names)}")
    return names


def _settings(directory: Path) -> dict[str, Any]:
    """What the run was made with; empty where it does not say."""
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return values if isinstance(values, dict) else {}
