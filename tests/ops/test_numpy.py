"""gptcore.ops on NumPy arrays: torch's bits where importing torch fails, and arrays that torch has no like of."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from gptcore import backend, ops
from tests.ops import array_cases

BLOCKED = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch is blocked here")

sys.meta_path.insert(0, Blocker())
"""


def without_torch(code: str, *arguments: str) -> str:
    """What ``code`` prints in a process where importing torch fails."""
    ran = subprocess.run(
        [sys.executable, "-c", BLOCKED + code, *arguments], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def _plain(value: Any) -> tuple[str, tuple[int, ...], bytes] | int | float:
    """What a result is, down to its bits."""
    if isinstance(value, torch.Tensor):
        bits = (
            value.contiguous().reshape(-1).view(torch.uint8).numpy()
            if value.numel()
            else np.empty(0, np.uint8)
        )
        return str(value.dtype).removeprefix("torch."), tuple(value.shape), bits.tobytes()
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.shape, value.tobytes()
    assert isinstance(value, (int, float)), type(value)
    return value


def _to_torch(array: Any) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


RUN_CASES = """
import pickle
from gptcore import ops
from tests.ops import array_cases
from tests.ops.array_cases import CASES, Recorder, run

recorder = Recorder(ops)
results = {(name, half): run(recorder, name, lambda x: x, half) for name in CASES for half in (False, True)}
assert "torch" not in sys.modules
assert recorder.used == set(ops.__all__), set(ops.__all__) - recorder.used
with open(sys.argv[1], "wb") as file:
    pickle.dump(results, file)
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], list[Any]]:
    """Results of all cases in a process where importing torch fails; every public function takes part."""
    file = tmp_path_factory.mktemp("numpy") / "results"
    without_torch(RUN_CASES, str(file))
    with open(file, "rb") as results:
        return pickle.load(results)


@pytest.mark.parametrize("half", [False, True], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", array_cases.CASES)
def test_arrays_without_torch_give_the_bits_of_tensors(name: str, half: bool, alone: Any) -> None:
    expected = array_cases.run(ops, name, _to_torch, half)
    got = alone[name, half]
    assert len(got) == len(expected) > 1
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert _plain(a) == _plain(b), f"result {i}"


def test_the_line_that_was_promised() -> None:
    code = "import gptcore, numpy\nprint(gptcore.ops.layer_norm(numpy.eye(2, dtype='float32')).round(3).tolist())"
    assert without_torch(code) == "[[1.0, -1.0], [-1.0, 1.0]]"


def test_a_torch_that_was_set_to_none_is_none() -> None:
    code = "import sys; sys.modules['torch'] = None\nimport gptcore, numpy\n" + (
        "print(gptcore.ops.gelu(numpy.zeros((1, 2), 'float32')).tolist(), gptcore.backend.info()['isa'])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("[[0.0, 0.0]]")


def test_what_needs_torch_says_so_in_one_sentence() -> None:
    code = """
import gptcore, gptcore.errors, gptcore.data.loader, gptcore.data.prepare, gptcore.data.dataset, gptcore.report
import gptcore.models.presets, gptcore.models.accounting
gptcore.backend.info()
ways = [lambda room=room: getattr(gptcore, room)
        for room in ("functional", "nn", "optim", "train", "infer", "integrations", "replace")]
ways += [lambda: gptcore.models.GPT, lambda: gptcore.from_hf("."), lambda: gptcore.ops.rotary_tables(4, 4),
         lambda: gptcore.checkpoint.load("x.safetensors")]
for way in ways:
    try:
        way()
    except ImportError as error:
        print(error.name, error)
"""
    lines = without_torch(code).splitlines()
    sentence = (
        "torch this part of gptcore needs torch, which cannot be imported (torch is blocked here); "
        "gptcore.ops works without it, on NumPy and CuPy arrays"
    )
    assert lines == [sentence] * 11


def test_the_command_line_says_so_too() -> None:
    code = "from gptcore.cli.main import main; sys.exit(main(['generate', 'nowhere', '--prompt', 'x']) - 2)"
    ran = subprocess.run([sys.executable, "-c", BLOCKED + code], capture_output=True, text=True, check=True)
    assert ran.stderr.count("\n") == 1 and "needs torch" in ran.stderr


def test_a_missing_openmp_runtime_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError(
            "libgomp.so.1: cannot open shared object file" if name == "gptcore._C" else "no torch"
        )

    monkeypatch.setattr(backend, "_extension", None)
    monkeypatch.setattr("importlib.import_module", refuse)
    with pytest.raises(ImportError, match="needs libgomp.so.1, which neither the system nor torch offers"):
        backend.extension()


def _view(kind: str, x: Any) -> Any:
    """x (4, 6) in memory as NumPy has it and torch has not."""
    if kind == "fortran":
        return np.asfortranarray(x)
    if kind == "backwards":
        return np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1]
    if kind == "rows backwards":
        return np.ascontiguousarray(x[::-1])[::-1]
    if kind == "every second":
        return np.repeat(x, 2, -1)[:, ::2]
    if kind == "read-only":
        x = x.copy()
        x.flags.writeable = False
        return x
    if kind == "misaligned":
        room = np.empty(x.nbytes + 1, np.uint8)
        room[1:] = x.reshape(-1).view(np.uint8)
        return room[1:].view(x.dtype).reshape(x.shape)
    records = np.zeros(x.shape, [("pad", "u1"), ("value", x.dtype)])  # elements lie 5 or 3 bytes apart
    records["value"] = x
    return records["value"]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    "kind",
    ["fortran", "backwards", "rows backwards", "every second", "read-only", "misaligned", "field of records"],
)
def test_any_layout_gives_the_same_numbers(kind: str, dtype: Any) -> None:
    x = np.random.default_rng(0).standard_normal((4, 6), np.float32).astype(dtype)
    odd = _view(kind, x)
    assert np.array_equal(odd, x)
    stats = ops.layer_norm_stats(x)
    for got, expected in [
        (ops.layer_norm(odd), ops.layer_norm(x)),
        (ops.rms_norm(odd), ops.rms_norm(x)),
        (ops.gelu(odd), ops.gelu(x)),
        (ops.swiglu_packed(odd), ops.swiglu_packed(x)),
        (ops.cross_entropy(odd, np.arange(4)), ops.cross_entropy(x, np.arange(4))),
        (ops.layer_norm_backward(odd, odd, None, stats)[0], ops.layer_norm_backward(x, x, None, stats)[0]),
        (ops.attention(*[odd[None, :, None]] * 3), ops.attention(*[x[None, :, None]] * 3)),
    ]:
        assert type(got) is np.ndarray and got.flags.c_contiguous
        assert _plain(got) == _plain(expected)


def test_a_file_mapped_read_only_is_read_in_place(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((4, 6), np.float32)
    x.tofile(tmp_path / "x")
    mapped = np.memmap(tmp_path / "x", np.float32, "r", shape=(4, 6))
    y = ops.layer_norm(mapped)
    assert type(y) is np.ndarray and np.array_equal(y, ops.layer_norm(x))
    with pytest.raises(ValueError, match="'out': got a read-only array"):
        ops.layer_norm(x, out=mapped)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["f32", "bf16"])
def test_what_is_not_aligned_is_not_written(dtype: Any) -> None:
    out = _view("misaligned", np.zeros((4, 6), dtype))
    with pytest.raises(ValueError, match="'out': got a read-only array"):
        ops.layer_norm(np.ones((4, 6), dtype), out=out)
    assert not out.astype(np.float32).any()


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ([[1.0, 2.0]], "got list, expected a torch tensor, a NumPy or CuPy array"),
        (np.zeros((2, 2)), "'x': got float64, expected float32 or bfloat16"),
        (np.zeros((2, 2), np.complex64), "got a complex tensor"),
        (np.zeros((2, 2), ">f4"), "cannot read a tensor of type numpy.ndarray"),
        (np.zeros((2, 2), object), "cannot read a tensor of type numpy.ndarray"),
        (np.zeros((2, 2), "S4"), "cannot read a tensor of type numpy.ndarray"),
        (np.zeros((2, 2), ml_dtypes.float8_e4m3fn), "cannot read a tensor of type numpy.ndarray"),
    ],
    ids=["list", "f64", "complex", "byte-swapped", "objects", "text", "float8"],
)
def test_what_kernels_do_not_read_is_refused(argument: Any, sentence: str) -> None:
    for op in (ops.layer_norm, ops.rms_norm):
        with pytest.raises(TypeError) as caught:
            op(argument)
        assert sentence in str(caught.value)


def test_numbers_serve_as_the_gradient_of_a_mean() -> None:
    logits, targets = np.random.default_rng(0).standard_normal((3, 5), np.float32), np.arange(3)
    loss = ops.cross_entropy(logits, targets)
    gradients = [
        ops.cross_entropy_backward(g, logits, targets)
        for g in (2, 2.0, np.float32(2), loss * 0 + 2, np.array(2, "f4"))
    ]
    assert all(np.array_equal(g, gradients[0]) for g in gradients)


def test_crossing_costs_less_than_five_microseconds_for_three_arrays() -> None:
    # By DLPack alone it took 20; on a quiet machine it is 0.5.
    a = np.zeros((4, 4), np.float32)
    for arrays in ((a, a, a), tuple(a.astype(ml_dtypes.bfloat16) for _ in range(3))):
        best = float("inf")
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(1000):
                backend.extension().noop(*arrays)
            best = min(best, (time.perf_counter() - start) / 1000)
        assert best < 5e-6
