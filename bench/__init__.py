"""Benchmarks of gptcore against torch at its best, judged by the machine's own ceilings.

``python -m bench --help`` shows the options; ``docs/benchmarks.md`` explains how figures are made.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _prefer_the_built_package() -> None:
    """Let an installed gptcore win over a source tree in which no extension has been built.

    ``python -m bench`` puts the current directory first in ``sys.path``, and with it sources that may
    lack ``_C`` while the installed package has it.
    """
    if any((ROOT / "gptcore").glob("_C*.so")):
        return
    here = [entry for entry in sys.path if Path(entry or ".").resolve() == ROOT]
    sys.path[:] = [entry for entry in sys.path if entry not in here] + here


_prefer_the_built_package()
