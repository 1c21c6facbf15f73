"""The settings of a stage: the tables of training, and one of its own, from one TOML file and ``--set``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from gptcore.align import trl_names
from gptcore.data.atomic import write_text
from gptcore.errors import UserError
from gptcore.models.adapter_spec import AdapterSpec
from gptcore.train.config import TrainConfig, merge, override

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_KNOWN = (*(field.name for field in fields(TrainConfig)), AdapterSpec.section)


def read(
    stage: str,
    path: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    over: Mapping[str, Any] | None = None,
    more: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was set: the tables of training and an adapter, and that of ``stage``; TRL's names as what they mean here.

    Args:
        path: a TOML file. over: what lies over it. overrides: ``key.sub=value``, over both. more: tables that the
            stage takes beside its own, left in the first.

    Raises:
        UserError: no such file, not TOML, a name that nobody knows, an override that is none.
    """
    known = [*_KNOWN, stage, *more]
    table = trl_names.ours(_toml(path) if path is not None else {}, stage, known)
    table = merge(table, over or {})
    for text in overrides:
        table = merge(table, trl_names.ours(override(text), stage, known))
    own = table.pop(stage, {})
    if not isinstance(own, Mapping):
        raise UserError(f"{stage}: expected a table, got {own!r}")
    return table, dict(own)


def keep(run_dir: str | os.PathLike[str], stage: str, values: Mapping[str, Any]) -> None:
    """Keep a stage's settings beside the run's, for :func:`kept`."""
    write_text(_place(run_dir, stage), json.dumps(values, indent=2) + "\n")


def kept(run_dir: str | os.PathLike[str], stage: str) -> dict[str, Any]:
    """The settings that a stage was run with. Raises UserError where there is no such run."""
    place = _place(run_dir, stage)
    try:
        values = json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no run of 'gptcore {stage}' to continue at {run_dir}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{place}: cannot be read: {error}") from None
    return dict(values)


def _place(run_dir: str | os.PathLike[str], stage: str) -> Path:
    return Path(run_dir) / f"{stage}.json"


def _toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no config file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config {path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"config {path} is not valid TOML: {error}") from None
