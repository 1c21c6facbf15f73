"""A directory for work of many stages, which goes on in it only under the settings that it was begun with."""

from __future__ import annotations

import json
from pathlib import Path

from gptcore.data.atomic import write_text
from gptcore.errors import UserError
from gptcore.models.schema import Spec


def claim(place: Path, spec: Spec, what: str) -> None:
    """Make ``place`` that of ``what`` with the settings ``spec``, kept there by their section, or see that it is.

    Raises:
        UserError: a directory that holds something else, or ``what`` with other settings, which are named.
    """
    settings = place / f"{spec.section}.json"
    if settings.is_file():
        held = json.loads(settings.read_text(encoding="utf-8"))
        if held != spec.to_dict():
            changed = sorted(name for name, value in spec.to_dict().items() if held.get(name) != value)
            raise UserError(
                f"{place} holds a {what} with other settings ({', '.join(changed)}); choose another --out"
            )
        return
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"{place} is in use; choose another --out")
    place.mkdir(parents=True, exist_ok=True)
    write_text(settings, json.dumps(spec.to_dict(), indent=1) + "\n")
