"""Records, result files and the dialogue between the harness and its measuring processes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import ROOT, harness, readme_table
from bench.__main__ import main
from bench.case import Case, both_directions
from bench.child import CaseError, Job, _check_agreement, build_record
from bench.harness import REQUIRED_KEYS, Options, Results, read_jsonl, run, write_jsonl

MACHINE = {
    "cpu": "a processor", "threads": 2, "isa": "v4", "torch": "2.13.0", "allocator": "tuned",
    "ceilings": {
        "bandwidth": {kind: [[1 << 20, 9e10], [1 << 29, 3e10]] for kind in ("read", "copy", "in_place")},
        "peak": {"float32": 4e11, "bfloat16": 2e12},
        "method": {"float32": "given", "bfloat16": "given"},
    },
}  # fmt: skip


def record(name: str = "layer_norm/4096x768/forward_backward", **changes: Any) -> dict[str, Any]:
    case = Case(name, lambda _target: {}, footnotes={"torch_wrong": "does less"})
    samples = {"gptcore": [2e-3, 2e-3, 3e-3], "torch_eager": [4e-3] * 3, "torch_compiled": [3e-3] * 3}
    job = Job([], threads=2, allocator="tuned")
    made = build_record(case, "float32", {**samples, "torch_wrong": [1e-3] * 3}, 1e-3, job)
    return made | {"flops": 1e6, "bytes": 1e6} | changes


def test_a_record_judges_against_the_best_peer_that_does_the_same_work():
    made = record()
    assert all(key in made for key in REQUIRED_KEYS)
    assert made["gptcore_ms"] == 2.0 and made["peers"]["torch_compiled"] == 3.0
    assert made["best_peer"] == "torch_compiled" and made["ratio"] == 1.5
    assert made["peers"]["torch_wrong"] == 1.0, "a footnoted peer is shown"
    assert made["limit_fraction"] == 0.5 and made["repeats"] == 3 and made["spread"] == 0.25


def test_a_record_without_peers_has_no_ratio():
    made = build_record(Case("a/b"), "float32", {"gptcore": [1e-3]}, 0.0, Job([]))
    assert made["ratio"] is None and made["best_peer"] is None and made["limit_fraction"] is None


def test_results_survive_the_file(tmp_path: Path):
    path = str(tmp_path / "results.jsonl")
    write_jsonl(path, Results([MACHINE], [record()]))
    found = read_jsonl(path)
    assert found.machines == [MACHINE] and found.records == [record()]
    with open(path, "a") as file:
        file.write('{"case": "half a rec')
    with pytest.raises(ValueError, match=r"results\.jsonl:3: not a line of JSON"):
        read_jsonl(path)


def test_wrong_results_are_not_timed():
    right, wrong = torch.ones(8), torch.ones(8)
    wrong[3] = 1.5
    _check_agreement({"gptcore": lambda: (right, None), "torch": lambda: right}, 1e-6)
    with pytest.raises(CaseError, match="differs from torch"):
        _check_agreement({"gptcore": lambda: wrong, "torch": lambda: right}, 0.1)
    with pytest.raises(CaseError, match="shape"):
        _check_agreement({"gptcore": lambda: right[:4], "torch": lambda: right}, 0.1)
    with pytest.raises(CaseError, match="differs"):
        _check_agreement({"gptcore": lambda: right * float("nan"), "torch": lambda: right}, 0.1)


def test_both_directions_takes_gradients_of_what_wants_them():
    x, w = torch.ones(3, requires_grad=True), torch.full((3,), 2.0, requires_grad=True)
    calls = both_directions({"gptcore": lambda x, w: x * w}, [x, w], torch.ones(3), backward=True)
    out, dx, dw = calls["gptcore"]()
    assert torch.equal(out, w) and torch.equal(dx, w) and torch.equal(dw, x) and x.grad is None
    (forward,) = both_directions({"gptcore": lambda x, w: x * w}, [x, w], backward=False).values()
    assert not forward().requires_grad


def test_a_dying_process_costs_one_case(monkeypatch: pytest.MonkeyPatch):
    """The first process dies in its second case; another one takes what is left, the dead one is reported."""
    started: list[list[tuple[str, str]]] = []

    def events(job: Job, environment: dict[str, str]):
        started.append(list(job.cases))
        yield {"event": "machine", "number": len(started)}
        for name, dtype in job.cases:
            yield {"event": "begin", "case": name, "dtype": dtype}
            if len(started) == 1 and dtype == "bfloat16":
                return
            yield {"event": "record", "record": record(name, dtype=dtype)}

    monkeypatch.setattr(harness, "_events", events)
    results, log = Results(), io.StringIO()
    options = Options(suites=["layer_norm"], patterns=["layer_norm/4096x768/*"], allocators=["tuned"])
    run(options, results, log)
    assert [len(cases) for cases in started] == [4, 2]
    assert results.failures == [("layer_norm/4096x768/forward/bfloat16", "the measuring process died")]
    assert len(results.records) == 3 and [m["number"] for m in results.machines] == [1]
    assert "[4/4, 0:00 left]" in log.getvalue()


def test_the_readme_table_is_written_between_its_markers(tmp_path: Path):
    results, readme, page = (tmp_path / name for name in ("r.jsonl", "README.md", "page.md"))
    write_jsonl(str(results), Results([MACHINE], [record(), record("layer_norm/64x64/forward")]))
    readme.write_text(f"before\n{readme_table.START}\nold\n{readme_table.END}\nafter\n")
    page.write_text(f"{readme_table.START}\n{readme_table.END}\n")
    command = [str(results), "--readme", str(readme), "--page", str(page)]
    assert readme_table.main(command) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{readme_table.START}\n") and text.endswith(
        f"{readme_table.END}\nafter\n"
    )
    row = (
        "| layer_norm/4096x768/forward_backward | float32 | 2.000 ms | 3.000 ms (compiled) | 1.50 | 50% |  |"
    )
    assert row in text and "old" not in text and "64x64" not in text
    assert row in page.read_text() and "layer_norm/64x64/forward" in page.read_text()
    readme.write_text("no markers")
    assert readme_table.main(command) == 2
    assert readme.read_text() == "no markers"


def test_plot_draws_one_picture_for_each_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    results = tmp_path / "r.jsonl"
    write_jsonl(str(results), Results([MACHINE], [record(), record("rms_norm/4096x768/forward")]))
    assert main(["--from-json", str(results), "--plot", str(tmp_path / "plots")]) == 0
    pictures = sorted((tmp_path / "plots").iterdir())
    assert [p.name for p in pictures] == ["roofline_layer_norm.png", "roofline_rms_norm.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["case"] == "rms_norm/4096x768/forward"


def test_one_real_case_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "real.jsonl"
    case = ["--case", "layer_norm/64x64/forward/float32", "--allocator", "tuned", "--wait-policy", "spin2000"]
    assert main([*case, "--quick", "--repeats", "3", "--json", str(path)]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(key in last for key in REQUIRED_KEYS)
    assert last["case"] == "layer_norm/64x64/forward" and last["dtype"] == "float32" and last["repeats"] == 3
    assert last["gptcore_ms"] > 0 and set(last["peers"]) == {"torch_eager"} and last["ratio"] > 0
    assert (last["allocator"], last["wait_policy"]) == ("tuned", "spin2000")
    (machine,) = read_jsonl(str(path)).machines
    assert machine["torch"] == torch.__version__ and machine["ceilings"]["peak"]["bfloat16"] > 0


def test_a_terminated_run_prints_what_it_has_and_leaves_no_process(tmp_path: Path):
    path = tmp_path / "partial.jsonl"
    command = [
        sys.executable,
        "-m",
        "bench",
        "--case",
        "layer_norm/*",
        "--repeats",
        "500",
        "--json",
        str(path),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "cases with tuned allocator" in process.stderr.readline()
    (child,) = wait_for_children(process.pid)
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and "interrupted" in errors
    assert path.exists()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists():
            return
        time.sleep(0.05)
    raise AssertionError("the measuring process outlives the harness")


def wait_for_children(pid: int) -> list[str]:
    for _ in range(200):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            return children
        time.sleep(0.05)
    raise AssertionError("no measuring process has been started")
