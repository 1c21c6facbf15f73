"""gptcore.ops on CuPy arrays: NumPy's numbers on a GPU where an op has a CUDA kernel, else a sentence about it."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gptcore import backend, ops
from tests.ops import array_cases

KERNELS = Path(__file__).resolve().parents[2] / "csrc" / "kernels"
# Folders of csrc/kernels by case, where the names differ.
KERNEL_OF = {
    "activations": "gated_activation", "gated_activations": "gated_activation", "attention_packed": "attention",
    "attention_paged": "attention", "attention_qkv": "attention", "moe": "moe_router", "square_sums": "grad_norm",
    "token_logprobs": "linear_cross_entropy",
}  # fmt: skip
# What looks for the norm of the gradients it is given, and then at what it is to write.
NORM_FIRST = ("adafactor_", "adamw_", "adamw_8bit_", "sgd_")
# Of an op without a kernel for CUDA, and of arguments on different devices.
NO_KERNEL = r"^\w+: argument '[\w\[\]]+': got a tensor on cuda:0, expected a tensor on the CPU: this operation has no "
REFUSAL = (
    NO_KERNEL
    + r"|got a tensor on (cuda:0|the CPU), expected one on (cuda:0|the CPU) like the arguments before it"
)


def _on_host(value: Any) -> Any:
    return value if isinstance(value, (bool, float)) else value.get()


def _assert_close(got: Any, expected: Any) -> None:
    if isinstance(expected, (bool, float)):
        assert got == pytest.approx(expected)
        return
    assert got.dtype == expected.dtype and got.shape == expected.shape
    if expected.dtype.kind in "iub":
        assert np.array_equal(got, expected)
        return
    # Sums of a few dozen terms in another order, and one rounding to the dtype.
    a, b = got.astype(np.float64), expected.astype(np.float64)
    tolerance = 2.0**-7 if expected.dtype == ml_dtypes.bfloat16 else 1e-5
    assert np.array_equal(np.isfinite(a), np.isfinite(b))
    assert np.abs(a - b)[np.isfinite(b)].max(initial=0) <= tolerance * np.abs(b[np.isfinite(b)]).max(
        initial=0
    )


@pytest.mark.cuda
@pytest.mark.parametrize("half", [False, True], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", array_cases.CASES)
def test_a_gpu_gives_numpys_numbers_or_a_refusal(name: str, half: bool) -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        pytest.skip(f"no CUDA driver ({error})")
    if count == 0:
        pytest.skip("no GPU")
    if not list((KERNELS / KERNEL_OF.get(name, name)).glob("*.cu")):
        with pytest.raises(ValueError, match=NO_KERNEL):
            array_cases.run(ops, name, cupy.asarray, half)
        return
    got = array_cases.run(ops, name, cupy.asarray, half)
    expected = array_cases.run(ops, name, lambda x: x, half)
    for a, b in zip(got, expected, strict=True):
        _assert_close(_on_host(a), b)


# --- without a GPU: arrays that say they are on one ----------------------------------------------------------------


class Pretender:
    """An array in this machine's memory that passes for CuPy's, on device 0."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.device = self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._array, name)
        return (lambda *args: Pretender(value(*args))) if name == "reshape" else value

    def __getitem__(self, key: Any) -> Pretender:
        return Pretender(self._array[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._array[key] = value

    def __neg__(self) -> Pretender:
        return Pretender(-self._array)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, max_version: tuple[int, int], stream: Any = None) -> Any:
        half = self._array.dtype == ml_dtypes.bfloat16
        capsule = (self._array.view(np.int16) if half else self._array).__dlpack__(max_version=max_version)
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        managed = pointer(capsule, b"dltensor_versioned")
        ctypes.c_int32.from_address(managed + 40).value = 2  # device.type: CUDA
        if half:
            ctypes.c_uint8.from_address(managed + 52).value = 4  # dtype.code: bfloat
        return capsule


Pretender.__module__ = "cupy"


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module that passes for CuPy."""
    cupy = ModuleType("cupy")
    cupy.empty = lambda shape, dtype: Pretender(np.empty(shape, dtype))  # type: ignore[attr-defined]
    cupy.asarray = lambda *args, **keywords: Pretender(np.asarray(*args, **keywords))  # type: ignore[attr-defined]
    cupy.ascontiguousarray = lambda x: Pretender(np.ascontiguousarray(x._array))  # type: ignore[attr-defined]
    for dtype in ("float32", "float64", "int32", "int64"):
        setattr(cupy, dtype, getattr(np, dtype))
    stream = SimpleNamespace(ptr=0)
    cupy.cuda = SimpleNamespace(get_current_stream=lambda: stream)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    yield


class Refusing:
    """gptcore.ops, where each call is first made with one array after the other on CUDA, and by an op without a kernel
    there also with all of them."""

    def __init__(self) -> None:
        self.refused: set[str] = set()
        self.has_kernel = False

    def __getattr__(self, name: str) -> Any:
        function = getattr(ops, name)
        if name in ("rotary_tables", "expert_capacity"):  # no kernel: the framework's own arrays, or none
            return function

        def call(*args: Any, **keywords: Any) -> Any:
            places = _places(args) + _places(keywords)
            assert places
            singles = [[place] for place in places]
            if self.has_kernel and (len(set(places)) == 1 or name in NORM_FIRST):
                singles = []  # which would be all of them
            for moved in singles if self.has_kernel else [places, *singles]:
                given, named = _moved(args, moved), _moved(keywords, moved)
                with pytest.raises(ValueError, match=REFUSAL):
                    function(*given, **named)
            self.refused.add(name)
            return function(*args, **keywords)

        return call


def _bits(value: Any) -> Any:
    return value.tobytes() if isinstance(value, np.ndarray) else value


def _places(value: Any) -> list[int]:
    """Where the arrays are, by identity."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [place for item in value for place in _places(item)]
    return [id(value)] if isinstance(value, np.ndarray) else []


def _moved(value: Any, places: list[int]) -> Any:
    """``value`` with the arrays at these places on CUDA."""
    if isinstance(value, dict):
        return {key: _moved(item, places) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_moved(item, places) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return Pretender(value) if id(value) in places else value


@pytest.mark.skipif("simt" in backend.available_isas(), reason="emulated kernels are in the place of CUDA's")
@pytest.mark.parametrize("half", [False, True], ids=["f32", "bf16"])
def test_every_argument_of_every_function_is_refused_on_cuda(half: bool, pretended: None) -> None:
    refusing = Refusing()
    kernels = backend.cuda_kernels()
    for name in array_cases.CASES:
        refusing.has_kernel = KERNEL_OF.get(name, name) in kernels
        got = array_cases.run(refusing, name, lambda x: x, half)
        expected = array_cases.run(ops, name, lambda x: x, half)
        for a, b in zip(got, expected, strict=True):
            assert _bits(a) == _bits(b), f"{name}: a call that was refused has written"
    assert refusing.refused == {*ops.__all__} - {"rotary_tables", "expert_capacity"}


def test_tables_and_numbers_are_made_where_the_arrays_are(pretended: None) -> None:
    from gptcore.ops.arrays import as_array, empty, empty_like, namespace

    x = Pretender(np.ones((2, 3), np.float32))
    assert namespace(x) is sys.modules["cupy"]
    made = [*ops.rotary_tables(4, 4, like=x), as_array(1.5, x), empty(x, (2,), "int64"), empty_like(x)]
    assert all(type(a) is Pretender for a in made)


def test_what_speaks_only_cudas_array_interface_is_refused() -> None:
    class Foreign:
        shape, dtype, strides = (2, 2), np.dtype("f4"), None

        @property
        def __cuda_array_interface__(self) -> dict[str, Any]:
            return {"shape": (2, 2), "typestr": "<f4", "data": (1 << 40, False), "version": 3}

    for op in (ops.layer_norm, ops.rms_norm, ops.gelu):
        with pytest.raises(
            TypeError, match=re.escape("got Foreign, expected a torch tensor, a NumPy or CuPy array")
        ):
            op(Foreign())
