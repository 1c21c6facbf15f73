"""Fixtures over CUDA's kernels run by the processor; tests that use them skip where no build of tests/simt is named."""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Iterator
from types import ModuleType

import pytest

from gptcore import backend


@pytest.fixture(scope="session")
def simt() -> ModuleType:
    """The module _C_simt itself, for its checks of single instructions and faults."""
    if "simt" not in backend.available_isas():
        pytest.skip("tests/simt is not built; GPTCORE_SIMT names its build")
    path = glob.glob(os.path.join(os.environ["GPTCORE_SIMT"], "_C_simt*.so"))[0]
    spec = importlib.util.spec_from_file_location("_C_simt", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def on_simt(simt: ModuleType) -> Iterator[None]:
    """Ops on CPU tensors run CUDA's kernels."""
    before = backend.isa()
    backend.set_isa("simt")
    yield
    backend.set_isa(before)
