"""The emulation sees what it is there to see: kernels with a fault each, and what a block of threads does together."""

from __future__ import annotations

from types import ModuleType

import pytest

from gptcore import backend

THREADS = 64


def test_threads_see_what_others_wrote_before_a_barrier(simt: ModuleType) -> None:
    for _ in range(20):
        assert simt.fault_check("barrier") == [(i + 1) % THREADS for i in range(THREADS)]


def test_a_missing_barrier_shows_since_threads_take_turns_in_any_order(simt: ModuleType) -> None:
    runs = [simt.fault_check("missing_barrier") for _ in range(20)]
    assert any(run != [(i + 1) % THREADS for i in range(THREADS)] for run in runs)


def test_shared_memory_that_nobody_wrote_is_not_a_number(simt: ModuleType) -> None:
    assert all(value != value for value in simt.fault_check("never_written"))


@pytest.mark.parametrize(
    ("kernel", "sentence"),
    [
        ("past_the_end", "a write past the block's 256 bytes of shared memory"),
        ("deadlock", "a deadlock: 32 of 64 threads wait"),
        ("half_a_warp", "a deadlock: 32 of 64 threads wait"),
    ],
)
def test_a_fault_ends_the_launch_with_a_sentence(simt: ModuleType, kernel: str, sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        simt.fault_check(kernel)
    assert simt.fault_check("barrier")[0] == 1  # and the next one is not the worse for it


def test_kernels_of_other_sources_are_refused(simt: ModuleType) -> None:
    with pytest.raises(ImportError, match="built from different sources; rebuild both"):
        backend.extension().attach_kernels(simt.kernels_of_other_sources())
