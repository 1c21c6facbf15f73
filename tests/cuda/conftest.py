"""Fixtures over CUDA's kernels run by the processor; tests that use them skip where no build of tests/simt is named."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from gptcore import backend
from tests.cuda.emulation import simt_module


@pytest.fixture(scope="session")
def simt() -> ModuleType:
    """The module _C_simt itself, for its checks of single instructions and faults."""
    if "simt" not in backend.available_isas():
        pytest.skip("tests/simt is not built; GPTCORE_SIMT names its build")
    return simt_module()


@pytest.fixture
def on_simt(simt: ModuleType) -> Iterator[None]:
    """Ops on CPU tensors run CUDA's kernels."""
    before = backend.isa()
    backend.set_isa("simt")
    yield
    backend.set_isa(before)


@pytest.fixture
def sm90(simt: ModuleType, on_simt: None) -> ModuleType:
    """The same where the emulated device is a Hopper; the module."""
    if simt.arch() != 90:
        pytest.skip("GPTCORE_SIMT_ARCH=90 makes the emulated device a Hopper")
    return simt
