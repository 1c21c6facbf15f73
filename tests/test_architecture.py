"""The floors of the house, read from the imports: nothing imports upwards, kernels know only core."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gptcore"

# Lowest first. Rooms on one floor do not import each other unless SIDEWAYS says so.
FLOORS = [
    {"_C", "_C_cuda"},
    {"errors", "torch_required"},
    {"backend"},
    {"ops", "functional", "stats", "report"},
    {"dist"},
    {"nn", "optim", "data"},
    {"models"},
    {"checkpoint"},
    {"train", "infer"},
    {"prompting"},
    {"eval"},
    {"align"},
    {"serve", "integrations"},
    {"cli"},
    {"__main__"},
]
# functional is torch's face over the same kernels.
SIDEWAYS = {("functional", "ops")}
# Rooms that may be imported without a floor between: the extension is the business of two rooms only.
MAY_IMPORT_EXTENSION = {"backend"}


def _rooms() -> dict[str, int]:
    return {room: level for level, floor in enumerate(FLOORS) for room in floor}


def _room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py") if relative.parts[0] != "__init__.py" else ""


def _imports(path: Path) -> list[tuple[int, str]]:
    """(line, room) of each gptcore room that a file imports, at top level or inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            module = node.module or ""
            names = [f"gptcore.{alias.name}" for alias in node.names] if module == "gptcore" else [module]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names = [
                arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            ]
        found += [(node.lineno, name.split(".")[1]) for name in names if name.startswith("gptcore.")]
    return found


def _violations(rooms: dict[str, int], files: list[Path]) -> list[str]:
    broken = []
    for path in files:
        room = _room_of(path)
        for line, target in _imports(path):
            if not room or target == room or target.startswith("__"):
                continue
            where = f"{path.relative_to(ROOT)}:{line}: {room} imports {target}"
            if target in {"_C", "_C_cuda"} and room not in MAY_IMPORT_EXTENSION:
                broken.append(f"{where}; only backend loads the extension")
            elif target not in rooms or room not in rooms:
                broken.append(f"{where}; a room without a floor in tests/test_architecture.py")
            elif rooms[target] > rooms[room]:
                broken.append(f"{where}, which is above it")
            elif rooms[target] == rooms[room] and (room, target) not in SIDEWAYS:
                broken.append(f"{where}, which is on the same floor")
    return broken


def test_nothing_imports_upwards() -> None:
    assert _violations(_rooms(), sorted(PACKAGE.rglob("*.py"))) == []


def test_the_reader_of_imports_sees_a_violation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = tmp_path / "ops"
    room.mkdir()
    (room / "bad.py").write_text(
        "def f():\n    from gptcore.models import GPT\n    import gptcore.nn.linear\n"
    )
    monkeypatch.setattr("tests.test_architecture.PACKAGE", tmp_path)
    monkeypatch.setattr("tests.test_architecture.ROOT", tmp_path)
    broken = _violations(_rooms(), [room / "bad.py"])
    assert len(broken) == 2 and all("above" in line for line in broken)


def _includes(path: Path) -> list[str]:
    return re.findall(r'^#include [<"]([^>"]+)[>"]', path.read_text(), flags=re.MULTILINE)


def test_native_code_keeps_to_its_rooms() -> None:
    broken = []
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix not in {".h", ".cpp", ".cu", ".cuh"}:
            continue
        relative = path.relative_to(ROOT / "csrc")
        for include in _includes(path):
            where = f"{relative} includes {include}"
            if re.match(r"(torch|ATen|c10)/", include):
                broken.append(f"{where}: torch headers stay out")
            if relative.parts[0] != "bindings" and re.match(r"(Python\.h|pybind11/)", include):
                broken.append(f"{where}: only bindings know Python")
            if relative.parts[0] == "core" and include.startswith(("kernels/", "bindings/")):
                broken.append(f"{where}: core includes nothing above it")
            own = f"kernels/{relative.parts[1]}/" if relative.parts[0] == "kernels" else ""
            if own and include.startswith(("kernels/", "bindings/")) and not include.startswith(own):
                broken.append(f"{where}: a kernel includes core and itself only")
    assert broken == []


def test_kernel_bodies_use_no_standard_library() -> None:
    # A std:: template compiled for AVX-512 could be the copy the linker keeps for everyone.
    allowed = {"cstdint", "cstddef", "immintrin.h"}
    broken = []
    for path in sorted((ROOT / "csrc" / "kernels").rglob("*")):
        if not re.search(r"_(cpu|amx)\.cpp$|_body\.h$", path.name):
            continue
        outside = [i for i in _includes(path) if not i.startswith(("core/", "kernels/")) and i not in allowed]
        if outside or re.search(r"\bstd::", path.read_text()):
            broken.append(f"{path.relative_to(ROOT)}: {outside or 'std::'}")
    assert broken == []


def _kernels() -> list[str]:
    return sorted(p.name for p in (ROOT / "csrc" / "kernels").iterdir() if p.is_dir())


@pytest.mark.parametrize(
    "home",
    [
        "csrc/kernels/{}/{}.h",
        "csrc/bindings/{}.cpp",
        "gptcore/ops/{}.py",
        "tests/ops/test_{}.py",
        "tests/cpp/{}.cpp",
        "bench/bench_{}.py",
        "docs/kernels/{}.md",
    ],
)
def test_every_kernel_has_one_stem_everywhere(home: str) -> None:
    missing = [home.format(*[kernel] * home.count("{}")) for kernel in _kernels()]
    assert [path for path in missing if not (ROOT / path).is_file()] == []


def test_no_room_is_called_after_nothing() -> None:
    names = {"utils", "util", "helpers", "helper", "common", "misc"}
    files = [
        p
        for folder in ("gptcore", "csrc", "bench", "tests")
        for p in (ROOT / folder).rglob("*")
        if p.is_file()
    ]
    assert [p for p in files if p.stem in names or names & set(p.relative_to(ROOT).parts[:-1])] == []
