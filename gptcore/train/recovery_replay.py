"""Changes of a run that come from outside its settings: typed by the user, or told by an event log."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptcore.errors import UserError
from gptcore.train import events
from gptcore.train.config import TrainConfig
from gptcore.train.recovery_spec import Change

_ABOUT_EVENTS = ("step", "kind", "action")


def change_of(text: str) -> Change:
    """A change as typed: ``step=1200,lr=3e-5``.

    Raises:
        UserError: not of that form, an unknown key, a value that does not fit.
    """
    table: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"--change {text}: expected step=N and what changes, as in step=1200,lr=3e-5")
        table[key.strip()] = _value(value.strip())
    return Change.from_dict(table)


def _value(text: str) -> int | float | bool | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def changes_of(log: str | os.PathLike[str]) -> list[Change]:
    """What the events of a log come to: the changes that lead to the same end without a detector, and no update undone.

    A rewind is the data that were skipped where it went back to; a skipped update is one dropped.

    Raises:
        UserError: no log there.
    """
    if not Path(log).is_file():
        raise UserError(f"no event log at {log}; a run keeps its own as events.jsonl")
    lasting: list[
        Change
    ] = []  # what a rewind to its own step leaves standing, since its checkpoint knows of it
    passing: list[Change] = []
    for event in events.read(log):
        if event["kind"] != "done":
            continue
        step = event["step"]
        if event["action"] == "rewind":
            lasting = [change for change in lasting if change.step <= step]
            passing = [change for change in passing if change.step < step]
            lasting.append(Change(step=step, skip_batches=event["skip_batches"]))
        elif event["action"] == "skip":
            passing.append(Change(step=step - 1, drop_update=True))
        else:
            parts = {name: value for name, value in event.items() if name not in _ABOUT_EVENTS}
            passing.append(Change.from_dict({"step": step, **parts}))
    return sorted([*lasting, *passing], key=lambda change: change.step)


def replayed(
    config: TrainConfig, log: str | os.PathLike[str] | None, more: Sequence[Change] = ()
) -> TrainConfig:
    """``config`` with the decisions of ``log`` instead of its changes and detectors, and with ``more`` changes.

    Such a run ends with the bits of the one that wrote the log, given the same data and settings. A NaN that the log
    does not know of stops it.
    """
    changes = list(config.changes) if log is None else changes_of(log)
    table: dict[str, Any] = {"changes": [change.to_dict() for change in [*changes, *more]]}
    if log is not None:
        table["recovery"] = {"non_finite": "stop", "loss": "off", "grad_norm": "off", "loss_scale": "off"}
    return config.merged(table)
