"""docs/arrays.md: its examples run without torch, and its table names every function."""

from __future__ import annotations

import re
from pathlib import Path

from gptcore import ops
from tests.ops.test_numpy import without_torch

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "arrays.md").read_text()


def test_the_examples_run_in_order_without_torch() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 8
    without_torch("\n".join(blocks) + "\nassert 'torch' not in sys.modules")


def test_every_function_is_on_the_page() -> None:
    named = set(re.findall(r"\b\w+\b", PAGE.partition("## Examples")[0]))
    assert {*ops.__all__} - named == set()
