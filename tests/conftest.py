"""Fixtures that all rooms share: instruction sets, thread counts, seeds, the shared data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

import gptcore
from gptcore import backend

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

# The suite draws the same examples on every run; HYPOTHESIS_PROFILE=explore draws new ones.
settings.register_profile("default", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# A build of tests/simt adds CUDA's kernels, run by the processor, as one more instruction set.
if os.environ.get("GPTCORE_SIMT"):
    backend.attach_simt(os.environ["GPTCORE_SIMT"])

# torch.tanh's first call strayed by some 1e-5 in 1 of 5,846 processes, its second in none of 9,909; tests compare
# with torch, so the first one does not count.
torch.tanh(torch.linspace(-4, 4, 1 << 14))

# Child processes import the gptcore under test, whatever directory they start in; bench lies in the tree.
os.environ["PYTHONSAFEPATH"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(gptcore.__file__).parents[1]), str(ROOT)])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


PROCESSOR_ONLY = {"test_crc32c", "test_streaming"}


def _isas() -> list[Any]:
    names: list[Any] = [backend.isa()] if os.environ.get("GPTCORE_ISA") else backend.available_isas()
    return [*names, pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine has, in turn; the one of GPTCORE_ISA where that is set. And "cuda", with
    -m cuda: tensors that the test makes without saying where are then on the GPU."""
    if request.param == "cuda":
        if request.node.path.stem in PROCESSOR_ONLY:
            pytest.skip("an operation of the processor alone")
        yield from _on_gpu()
        return
    before = backend.isa()
    backend.set_isa(request.param)
    yield request.param
    backend.set_isa(before)


def _on_gpu() -> Iterator[str]:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device here")
    # Not torch.device("cuda"), a mode of torch functions, under which ops take their way for such modes.
    torch.set_default_tensor_type(torch.cuda.FloatTensor)
    yield "cuda"
    torch.set_default_tensor_type(torch.FloatTensor)


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives the default thread count back after a test that changes it."""
    yield
    backend.set_num_threads(0)


@pytest.fixture
def shared_data() -> Path:
    """The directory of real data beside the project; skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the shared data directory {SHARED_DATA} is not on this machine")
    return SHARED_DATA
