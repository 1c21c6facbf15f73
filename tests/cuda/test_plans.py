"""How CUDA's row kernels cut their work: what must hold of every shape, asked of the headers themselves."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[2] / "csrc"

PROGRAM = """
#include <cstdio>
#include <initializer_list>
#include "core/cuda/norm_plan.h"
#include "kernels/adafactor/adafactor_tiles.h"
#include "kernels/embedding/embedding_plan.h"
using namespace gptcore::cuda;
void print(const char* pass, long rows, long packs, int arch, const NormPlan& p) {
  std::printf("%s %ld %ld %d %d %d %d %d %ld\\n", pass, rows, packs, arch, p.packs, p.lanes, p.groups, p.cluster,
              static_cast<long>(p.blocks));
}
int main() {
  const long edges[] = {1, 2, 3, 8, 31, 32, 33, 64, 65, 96, 128, 129, 200, 512, 513, 1000, 1024, 1025, 2048, 2049,
                        4096, 4097, 8192, 8193, 16384, 16385, 100000, 160, 192, 256, 320, 400, 1152};
  for (long rows : {0L, 1L, 7L, 64L, 5000L, 100000L}) {
    for (long packs : edges) {
      for (int arch : {80, 90, 100}) {
        const DeviceLimits device{arch, 132, arch == 80 ? 163 << 10 : 227 << 10};
        print("forward", rows, packs, arch, norm_forward_plan(rows, packs, device));
        print("backward", rows, packs, arch, norm_backward_plan(rows, 8 * packs, packs, arch));
      }
    }
  }
  for (long rows : {1L, 33L, 3072L, 50257L}) {
    for (long cols : {1L, 8L, 64L, 511L, 512L, 513L, 768L, 1024L, 1600L, 2048L, 3072L, 4095L, 4096L, 4097L, 14336L}) {
      for (bool held : {true, false}) {
        if (held && cols > gptcore::kHeldCols) continue;
        const auto t = held ? gptcore::held_tiling_of(rows, cols) : gptcore::tiling_of(rows, cols, true);
        std::printf("adafactor %ld %ld %d %d %d %ld %ld %ld %ld\\n", rows, cols, held, t.threads, t.fours,
                    static_cast<long>(t.rows), static_cast<long>(t.cols), static_cast<long>(t.row_blocks),
                    static_cast<long>(t.col_blocks));
      }
    }
  }
  for (long tokens : {1L, 4096L, 4097L, 1000000L}) {
    for (long vocabulary : {1L, 511L, 512L, 50257L, 262143L, 262144L}) {
      const SortPlan p = sort_plan(tokens, vocabulary);
      std::printf("sort %ld %ld %ld %d\\n", tokens, vocabulary, static_cast<long>(p.tiles), p.passes);
    }
  }
}
"""


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("without a C++ compiler")
    directory = tmp_path_factory.mktemp("plans")
    (directory / "plans.cpp").write_text(PROGRAM)
    program = directory / "plans"
    subprocess.run(
        [compiler, "-std=c++17", f"-I{SOURCES}", str(directory / "plans.cpp"), "-o", str(program)], check=True
    )
    lines = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()
    return [line.split() for line in lines]


def test_norms_cut_every_shape_into_what_a_device_has(plans: list[list[str]]) -> None:
    layouts: dict[tuple[str, int, int], set[tuple[int, ...]]] = {}
    for name, *numbers in plans:
        if name not in ("forward", "backward"):
            continue
        rows, packs, arch, held, lanes, groups, cluster, blocks = map(int, numbers)
        case = f"{name}: {rows} rows of {packs} packs on {arch}"
        layouts.setdefault((name, packs, arch), set()).add((held, lanes, cluster))
        most = {
            "forward": {0: 512, 1: 512, 2: 512, 4: 512, 8: 384},
            "backward": {0: 512, 1: 640, 2: 512, 3: 384},
        }[name]
        assert 1 <= lanes * groups <= most[held] and blocks % cluster == 0, case
        assert lanes % 32 == 0 or (lanes < 32 and 32 % lanes == 0 and lanes * groups % 32 == 0), case
        assert lanes <= 32 or groups <= 15, f"{case}: each row of a block has a barrier of its own"
        assert cluster in (1, 2, 4, 8) and (cluster == 1 or (arch >= 90 and groups == 1)), case
        if held:  # else the rows are read again, at any width
            assert held * lanes * cluster >= packs, case
            assert (lanes - 32) * held * cluster < packs, f"{case}: a warp without work"
        else:
            assert packs > (2048 if name == "forward" else 1024) * (8 if arch >= 90 else 1), case
        if name == "backward":
            assert 1 <= blocks // cluster <= 132, case
            assert (blocks // cluster) * 2 * 8 * packs * 4 <= max(64 << 20, 132 * 64 * packs), case
            if rows * 8 * packs <= 16384 and held:
                assert blocks == cluster, f"{case}: more than one launch"
        elif held:
            assert min(rows, 1) <= blocks // cluster <= 132 // cluster, case
        else:
            assert blocks == rows, case
    # A row's bits depend on its width, never on how many there are.
    assert all(len(kinds) == 1 for kinds in layouts.values())


@pytest.mark.parametrize("packs", [96, 128, 160, 200, 192, 256, 320, 400])  # GPT-2's widths, in bf16 and f32
def test_norms_of_gpt2_have_enough_bytes_under_way(plans: list[list[str]], packs: int) -> None:
    """What a multiprocessor reads in 800 ns where the device copies 4.2 TB/s: 17 KB backward, 13 forward."""
    for name, *numbers in plans:
        if name != "sort" and numbers[:3] == ["100000", str(packs), "90"]:
            groups = int(numbers[5])
            assert groups * packs * 16 * (2 if name == "backward" else 1) >= (
                17e3 if name == "backward" else 13e3
            )


def test_ids_are_sorted_by_as_many_digits_as_they_have(plans: list[list[str]]) -> None:
    found = [tuple(map(int, numbers)) for name, *numbers in plans if name == "sort"]
    assert found
    for tokens, vocabulary, tiles, passes in found:
        assert (tiles - 1) * 4096 < tokens <= tiles * 4096
        assert 512**passes > vocabulary and (passes == 1 or 512 ** (passes - 1) <= vocabulary)


def test_adafactor_cuts_matrices_into_what_a_block_of_threads_has(plans: list[list[str]]) -> None:
    found = [tuple(map(int, numbers)) for name, *numbers in plans if name == "adafactor"]
    assert found
    for rows, cols, held, threads, fours, tile_rows, tile_cols, row_blocks, col_blocks in found:
        case = f"{rows} x {cols}, held: {held}"
        groups = 256 // threads
        assert threads in (32, 64, 128, 256) and 1 <= fours <= (4 if held else 1), case
        assert (row_blocks - 1) * tile_rows < rows <= row_blocks * tile_rows, case
        assert (col_blocks - 1) * tile_cols < cols <= col_blocks * tile_cols, case
        assert tile_rows % groups == 0 and tile_rows // groups <= 64, (
            f"{case}: sums in f32 of more than 64 rows"
        )
        if held:  # whole rows, and sums of columns that shared memory holds and that are few beside the rows
            assert col_blocks == 1 and 4 * threads * (fours - 1) < cols <= 4 * threads * fours, case
            assert groups * 4 * threads * fours <= 4096 and tile_rows >= 32, case
            assert tile_rows * cols <= 65536 or tile_rows == 32, case
        else:
            assert tile_rows * tile_cols == 65536, case
