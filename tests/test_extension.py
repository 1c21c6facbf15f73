"""Properties of the built extension: no code for one instruction set in another's place, one OpenMP runtime,
nothing loaded at import."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptcore import backend

ROOT = Path(__file__).resolve().parents[1]


def _python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def _tool(name: str) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not on this machine")
    return name


def _objects() -> list[Path]:
    """Per-ISA object files of the newest build in this source tree."""
    builds = sorted((ROOT / "build").glob("*/CMakeFiles"), key=lambda path: path.stat().st_mtime)
    objects = sorted(builds[-1].glob("k_*.dir/**/*.o")) if builds else []
    if not objects:
        pytest.skip("no build tree here: the objects of an installed wheel are gone")
    return objects


def leaking_symbols(listing: str, isa: str) -> list[str]:
    """Weak definitions in an nm listing that lack the ISA's namespace: the linker may keep them for everyone."""
    weak = re.findall(r"^\S* [VWu] (\S+)$", listing, flags=re.MULTILINE)
    own = f"{len(isa)}{isa}"
    return [name for name in weak if own not in name and not name.startswith("DW.ref.")]


def test_no_symbol_of_one_isa_can_serve_another() -> None:
    nm, leaks = _tool("nm"), []
    for path in _objects():
        isa = next(part for part in path.parts if part.startswith("k_"))[2:-4]
        listing = subprocess.run(
            [nm, "--defined-only", path], capture_output=True, text=True, check=True
        ).stdout
        leaks += [f"{path.name} ({isa}): {name}" for name in leaking_symbols(listing, isa)]
    assert leaks == []


def test_a_leak_would_be_seen() -> None:
    listing = "0000 W _ZSt3maxIfERKT_S2_S2_\n0000 W _ZN7gptcore2v43expEv\n0000 T _ZN7gptcore2v41fEv\n"
    assert leaking_symbols(listing, "v4") == ["_ZSt3maxIfERKT_S2_S2_"]


def test_the_driver_for_thread_sanitizer_fits_the_contracts() -> None:
    # CI builds it; here only its calls are checked, all files at once.
    compiler, folder = _tool(os.environ.get("CXX", "c++")), ROOT / "tests" / "cpp"
    source = "".join(f'#include "{path}"\n' for path in sorted(folder.glob("*.cpp")))
    options = ["-std=c++20", "-fsyntax-only", "-DGPTCORE_STD_THREADS=1", "-I", ROOT / "csrc", "-I", folder]
    result = subprocess.run([compiler, *options, "-xc++", "-"], input=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_openmp_symbols_are_old_enough_for_torchs_copy() -> None:
    listing = subprocess.run(
        [_tool("objdump"), "-T", backend.extension().__file__], capture_output=True, text=True, check=True
    ).stdout
    versions = {tuple(map(int, v.split("."))) for v in re.findall(r"GOMP_([\d.]+)", listing)}
    assert versions and max(versions) <= (4, 5)


@pytest.mark.parametrize("order", ["import gptcore.ops, torch", "import torch, gptcore.ops"])
def test_one_openmp_runtime_in_either_import_order(order: str) -> None:
    code = (
        f"{order}\nfrom gptcore import backend\nimport torch\n"
        "torch.ones(300, 300) @ torch.ones(300, 300)\n"
        "gptcore.ops.layer_norm(torch.randn(2000, 100))\n"
        "print(len(backend.openmp_runtimes()))"
    )
    assert _python("import gptcore\n" + code) == "1"


def test_import_loads_neither_torch_nor_numpy_and_takes_a_tenth_of_a_second() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import gptcore; seconds = time.perf_counter() - start\n"
        "print(seconds, [m for m in ('torch', 'numpy', 'gptcore._C') if m in sys.modules])"
    )
    best = min((_python(code) for _ in range(3)), key=lambda line: float(line.split()[0]))
    seconds, _, loaded = best.partition(" ")
    assert loaded == "[]"
    assert float(seconds) <= 0.1


def test_ops_import_without_torch_or_numpy() -> None:
    loaded = _python(
        "import sys, gptcore.ops, gptcore.backend\nprint([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    assert loaded == "[]"


def test_mkl_is_asked_for_fixed_bits_unless_the_user_said_otherwise() -> None:
    assert _python("import gptcore, os; print(os.environ['MKL_CBWR'])").endswith("STRICT")
    assert (
        _python("import os; os.environ['MKL_CBWR'] = 'AUTO'; import gptcore; print(os.environ['MKL_CBWR'])")
        == "AUTO"
    )


def test_isa_can_be_forced_and_a_missing_one_is_named() -> None:
    code = "import os; os.environ['GPTCORE_ISA'] = '{}'; from gptcore import backend; print(backend.isa())"
    lowest = backend.available_isas()[0]
    assert _python(code.format(lowest)) == lowest
    with pytest.raises(ValueError, match="expected one of v2, v3, v4, v4_bf16, amx"):
        backend.set_isa("avx1024")


def test_cuda_module_loads_without_a_driver() -> None:
    cuda = backend.cuda_extension()
    if cuda is None:
        pytest.skip("built without CUDA")
    devices, reason = cuda.devices()
    assert isinstance(devices, list) and (devices or reason)


def test_threads_follow_the_affinity() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})\n"
        "from gptcore import backend; print(backend.num_threads(), backend.info()['threads_reason'])"
    )
    count, reason = _python(code).split(" ", 1)
    assert (count == "1" and "affinity" in reason) or "OpenMP" in reason


def test_the_stub_names_what_the_module_has() -> None:
    stub = (ROOT / "gptcore" / "_C.pyi").read_text()
    declared = set(re.findall(r"^(?:def|class) (\w+)[(:]", stub, flags=re.MULTILINE))
    module = {name for name in dir(backend.extension()) if not name.startswith("_")}
    assert declared == module
    functions = set(re.findall(r"^def (\w+)\(", stub, flags=re.MULTILINE))
    for name in sorted(functions):
        signature = backend.extension().__dict__[name].__doc__.partition("\n")[0]
        parameters = re.findall(r"(?:\(|, )(\w+): ", signature)
        body = re.search(rf"^def {name}\((.*?)\) ->", stub, flags=re.MULTILINE | re.DOTALL)
        assert body and re.findall(r"(\w+): ", body.group(1)) == parameters, name


SPILLS = """
template <int n> __global__ void __launch_bounds__(1024, 2) f(const float* x, float* y) {
  float kept[n];
  for (int i = 0; i < n; ++i) kept[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < n; ++i) for (int j = 0; j < n; ++j) y[(i * n + j) * 1024 + threadIdx.x] = kept[i] * kept[j];
}
template __global__ void f<SIZE>(const float*, float*);
"""


@pytest.mark.parametrize(("size", "fine"), [(4, True), (64, False)])
def test_a_kernel_that_spills_does_not_build(tmp_path: Path, size: int, fine: bool) -> None:
    strict = re.search(r'GPTCORE_PTXAS_STRICT "([^"]+)"', (ROOT / "csrc" / "cuda.cmake").read_text())
    assert strict is not None
    (tmp_path / "f.cu").write_text(SPILLS.replace("SIZE", str(size)))
    command = [_tool("nvcc"), "-arch=sm_80", f"-Xptxas={strict[1]}", "-c", "f.cu", "-o", "f.o"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode == 0) == fine, result.stderr
