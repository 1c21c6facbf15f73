"""What the comparisons with transformers share."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.fixture(autouse=True, scope="session")
def _first_forward() -> None:
    """One forward of torch's that nobody compares with.

    The first one of a process strayed by 4e-5 of the logits in 1 of 350 processes, in torch's own operations.
    """
    if importlib.util.find_spec("transformers") is not None:
        from tests.integrations.huggingface_models import batch, model_of, run

        run(model_of("gpt2"), batch("none"))
