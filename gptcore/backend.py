"""The door to the native modules: loads them on first use and reports what they run on.

Only this module and :mod:`gptcore.ops` touch ``gptcore._C``.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import importlib
import importlib.util
import os
import platform
import sys
from collections import Counter
from types import ModuleType
from typing import Any

# Operations with kernels, as the folders of csrc/kernels are called.
OPS = (
    "adafactor", "adamw", "adamw_8bit", "attention", "crc32c", "cross_entropy", "embedding", "gated_activation",
    "grad_norm", "grouped_linear", "layer_norm", "linear_cross_entropy", "matmul", "moe_dispatch", "moe_router",
    "philox", "rms_norm", "rotary", "sgd",
)  # fmt: skip
# Compute capability from which kernels run: that of the A100.
OLDEST_CUDA = (8, 0)

_extension: ModuleType | None = None
_fallbacks: Counter[tuple[str, str]] = Counter()


def extension() -> ModuleType:
    """The native module ``gptcore._C``, loaded on first use.

    It needs ``libgomp.so.1``, the OpenMP runtime that torch shares. Where the system has none, torch's own
    copy is loaded first.

    Raises:
        ImportError: the extension was not built for this interpreter, or there is no libgomp; says what to do.
    """
    global _extension
    if _extension is None:
        try:
            _extension = importlib.import_module("gptcore._C")
        except ImportError as error:
            if "libgomp" not in str(error):
                raise ImportError(
                    f"gptcore's native module could not be loaded ({error}); reinstall with 'pip install .' "
                    "from the source tree, with the Python that runs it"
                ) from error
            try:
                importlib.import_module("torch")
            except ImportError:
                raise ImportError(
                    "gptcore's native module needs libgomp.so.1, which neither the system nor torch offers; "
                    "install it (Debian: libgomp1, Fedora: libgomp)"
                ) from error
            _extension = importlib.import_module("gptcore._C")
    return _extension


def cuda_extension() -> ModuleType | None:
    """The CUDA module ``gptcore._C_cuda``, or None where it was not built."""
    try:
        return importlib.import_module("gptcore._C_cuda")
    except ImportError:
        return None


def attach_cuda() -> bool:
    """Give :func:`extension` the kernels for CUDA tensors, once; it asks for them with the first such tensor.

    Returns:
        Whether there are any, and no emulated ones are in their place. Ops refuse CUDA tensors otherwise.

    Raises:
        ImportError: both modules are there, but were built from different sources.
    """
    cuda = cuda_extension()
    if cuda is None or "simt" in available_isas():
        return False
    extension().attach_kernels(cuda.kernels())
    return True


@functools.cache
def cuda_kernels() -> frozenset[str]:
    """Operations with kernels for CUDA tensors, by the names of their files; none where CUDA was not built.

    ``attention_f16`` is there where attention takes f16.
    """
    cuda = cuda_extension()
    return _ops_of([] if cuda is None else extension().kernel_tables(cuda.kernels()))


def _ops_of(tables: list[str]) -> frozenset[str]:
    """The operations that these tables of kernels belong to, which begin with their names."""
    ops = {"attention_f16"} & {table.removesuffix("_bodies") for table in tables}
    for table in tables:
        named = [op for op in OPS if table.startswith(f"{op}_")]
        if named:
            ops.add(max(named, key=len))
        elif table.startswith("grouped_"):
            ops.add("grouped_linear")
    return frozenset(ops)


def has_kernels(device: Any, *ops: str) -> bool:
    """Whether gptcore's kernels take tensors on ``device`` (a torch.device or its name), those of all ``ops``.

    A CUDA device needs none to be asked about, so that what runs where can be told without one.
    """
    return why_no_kernels(device, *ops) is None


def why_no_kernels(device: Any, *ops: str) -> str | None:
    """Why not, in a few words, or None where :func:`has_kernels` says yes."""
    kind, _, index = str(device).partition(":")
    if kind == "cpu":
        return None
    if kind != "cuda":
        return f"device {kind}"
    lacks = next((op for op in ops if op not in cuda_kernels()), None)
    return _unfit_cuda(int(index or 0)) or (None if lacks is None else f"device cuda: no kernel of {lacks}")


def takes_half(*tensors: Any) -> bool:
    """Whether these are f16 torch tensors of one device on which attention takes f16: CUDA, not the CPU."""
    device = tensors[0].device
    return (
        all(str(t.dtype) == "torch.float16" and t.device == device for t in tensors)
        and device.type != "cpu"
        and has_kernels(device, "attention_f16")
    )


@functools.cache
def _unfit_cuda(index: int) -> str | None:
    """Why no kernel runs on the CUDA device of this number."""
    cuda = cuda_extension()
    if cuda is None:
        return "device cuda: gptcore was built without CUDA"
    if not cuda_kernels():
        return "device cuda: no kernels"
    for found in cuda.devices()[0]:
        major, _, minor = found["compute_capability"].partition(".")
        if found["index"] == index and (int(major), int(minor)) < OLDEST_CUDA:
            oldest = ".".join(map(str, OLDEST_CUDA))
            return f"device cuda: compute capability {major}.{minor}, expected {oldest} or later"
    return None


def attach_simt(directory: str) -> None:
    """Add the instruction set ``simt``, CUDA's kernels run by the processor, from a build of ``tests/simt``.

    For tests; it is some thousand times slower than the others.

    Raises:
        ImportError: there is no ``_C_simt`` in ``directory``, or it was built from other sources.
    """
    paths = glob.glob(os.path.join(directory, "_C_simt*.so"))
    if not paths:
        raise ImportError(f"attach_simt: got {directory!r}, expected a directory with a _C_simt built there")
    spec = importlib.util.spec_from_file_location("_C_simt", paths[0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    extension().attach_kernels(module.kernels())


def isa() -> str:
    """The instruction set in use: ``v2``, ``v3`` (AVX2), ``v4`` (AVX-512), ``v4_bf16`` or ``amx``."""
    return extension().isa()


def available_isas() -> list[str]:
    """Instruction sets this machine can run, lowest first. ``GPTCORE_ISA`` picks one at start."""
    return extension().available_isas()


def set_isa(name: str) -> None:
    """Use another of :func:`available_isas`; ``ValueError`` if this machine lacks it."""
    extension().set_isa(name)


def fp32_precision() -> str:
    """How kernels on CUDA multiply f32: ``ieee`` (default) or ``tf32``."""
    return extension().fp32_precision()


def set_fp32_precision(name: str) -> None:
    """Let kernels on CUDA multiply f32 numbers with errors as of f32 sums, or faster in tf32.

    name: ``ieee``, as the process begins, or ``tf32``: operands rounded to 11 significant bits, f32 sums. It holds for
        attention but for decoding, in calls from then on, and means nothing on the processor. Products of torch have
        a setting of their own, ``torch.backends.cuda.matmul.fp32_precision``.

    Raises:
        ValueError: another name.
    """
    extension().set_fp32_precision(name)


def num_threads() -> int:
    """Threads that parallel loops use: the smallest of affinity, cgroup quota and OpenMP's limit."""
    return extension().num_threads()


def set_num_threads(count: int) -> None:
    """Use ``count`` threads in gptcore's loops; 0 returns to the default. Results do not depend on it."""
    extension().set_num_threads(count)


def note_fallback(call: str, reason: str) -> None:
    """Count that ``call`` went to torch because no kernel covers it; ``reason`` says what was not covered."""
    _fallbacks[call, reason] += 1


def report() -> dict[str, dict[str, int]]:
    """Calls that went to torch instead of a kernel since the start: ``{call: {reason: count}}``."""
    table: dict[str, dict[str, int]] = {}
    for (call, reason), count in sorted(_fallbacks.items()):
        table.setdefault(call, {})[reason] = count
    return table


def reset_report() -> None:
    """Forget the calls counted so far."""
    _fallbacks.clear()


@functools.cache
def mkl_is_strict() -> bool:
    """Whether torch's f32 products are MKL's and it was asked in time for bits that the threads do not change, a row's
    not changing with the other rows either from about 17 on."""
    import torch

    asked = os.environ.get("MKL_CBWR", "").upper().endswith(",STRICT")
    return asked and _was_first() and torch.backends.mkl.is_available()


def tune_malloc() -> bool:
    """Keep freed memory in the process instead of returning it to the kernel after every large tensor.

    glibc maps outputs above 32 MiB afresh on each call and the first touch of every page faults; with the
    mapping and trimming thresholds raised, memory-bound operations (torch's too) run up to 1.5 times faster,
    at the price of a process that keeps its peak size.

    Returns:
        Whether the C library took the settings (glibc only).
    """
    m_trim_threshold, m_mmap_threshold, m_mmap_max = -1, -3, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    large = 2**31 - 1
    accepted = [mallopt(m_mmap_max, 0), mallopt(m_trim_threshold, large), mallopt(m_mmap_threshold, large)]
    return bool(accepted[0] and accepted[1])


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes mapped into this process. More than one ruins parallel loops."""
    names = ("libgomp", "libiomp", "libomp")
    try:
        with open("/proc/self/maps") as maps:
            paths = {
                line.split(maxsplit=5)[5].strip() for line in maps if line.count(" ") >= 5 and "/" in line
            }
    except OSError:
        return []
    return sorted(path for path in paths if os.path.basename(path).startswith(names))


def _module_version(name: str) -> str | None:
    """Version of an importable module without importing it where its metadata tells."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def info() -> dict[str, Any]:
    """Versions, instruction sets, threads, OpenMP runtimes and CUDA devices, as ``gptcore info`` prints them."""
    native = extension()
    cuda = cuda_extension()
    devices, reason = cuda.devices() if cuda else ([], "built without CUDA")
    return {
        "version": native.__version__ or None,
        "python": platform.python_version(),
        "isa": native.isa(),
        "isas": native.available_isas(),
        "threads": native.num_threads(),
        "threads_reason": native.num_threads_reason(),
        "openmp_runtimes": openmp_runtimes(),
        "cuda_built": cuda is not None,
        "cuda_runtime": cuda.runtime_version() if cuda else None,
        "cuda_driver": cuda.driver_version() if cuda else None,
        "cuda_devices": devices,
        "cuda_reason": reason,
        "cuda_kernels": sorted(cuda_kernels()),
        "cuda_unfit": {device["index"]: _unfit_cuda(device["index"]) for device in devices},
        "torch": _module_version("torch"),
        "numpy": _module_version("numpy"),
        "mkl_cbwr": os.environ.get("MKL_CBWR"),
        "mkl_cbwr_in_time": "torch" not in sys.modules or _was_first(),
    }


def _was_first() -> bool:
    """Whether gptcore was imported before torch, so that MKL saw the setting (module order tells)."""
    order = list(sys.modules)
    return order.index("gptcore") < order.index("torch")
