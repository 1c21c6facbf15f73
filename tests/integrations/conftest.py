"""What every test here starts and ends with."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from gptcore import backend


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Nothing reported yet, transformers quiet, and nothing applied to it afterwards."""
    backend.reset_report()
    if importlib.util.find_spec("transformers") is None:
        yield
        return
    from transformers.utils import logging

    from gptcore.integrations import huggingface

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    huggingface.unapply()
    logging.set_verbosity_warning()
