"""Every case is well formed without being run, and the command line chooses among them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.__main__ import main
from bench.case import DTYPES, ELEMENT_BYTES, default_suites, load, suites
from bench.harness import Options, Setting, plan, select
from bench.rows import README, ROWS

ROOT = Path(__file__).resolve().parents[2]


def test_each_kernel_has_a_bench_file_of_its_name():
    kernels = {folder.name for folder in (ROOT / "csrc" / "kernels").iterdir() if folder.is_dir()}
    assert kernels <= set(suites()), "csrc/kernels/<op> without bench/bench_<op>.py"


def test_cases_are_well_formed():
    names: list[str] = []
    for suite in suites():
        for case in load(suite):
            names.append(case.name)
            assert (case.setup is None) != (case.measure is None), case.name
            assert case.repeats >= 3 and case.dtypes and set(case.dtypes) <= set(DTYPES), case.name
            for dtype in case.dtypes:
                cost = case.cost(ELEMENT_BYTES[dtype])
                assert cost.flops >= 0 and cost.read >= 0 and cost.written >= 0, case.name
                assert sum(moved for _, moved in cost.traffic) == cost.bytes, case.name
                assert case.target_ms or cost.flops or cost.bytes, f"{case.name} has no limit to be judged by"
    assert len(names) == len(set(names)), "two cases share a name"


def test_costs_are_the_arithmetic_they_claim():
    cases = {case.name: case for suite in ("attention", "train_step", "adamw") for case in load(suite)}
    full = cases["attention/B2_H12_T512_D64_full/forward"].cost(4)
    assert full.flops == 4 * 2 * 12 * 512 * 512 * 64
    causal = cases["attention/B2_H12_T512_D64_causal/forward"].cost(4)
    assert causal.flops == 4 * 2 * 12 * (512 * 513 / 2) * 64
    window = cases["attention/B1_H12_T4096_D64_window256_causal/forward"].cost(4)
    pairs = sum(min(t + 1, 257) for t in range(4096))
    assert window.flops == 4 * 12 * pairs * 64
    step = cases["train_step/gpt2_124m_B2_T512/step"].cost(2)
    assert step.flops == 1024 * (6 * 124_439_808 + 12 * 12 * 768 * 512)
    assert cases["adamw/gpt2_124m/step"].cost(4).bytes == 124_439_808 * (3 * 4 + 2 * 4 + 3 * 4)


def test_quick_leaves_out_whole_steps_and_default_leaves_out_trainings():
    assert "shakespeare" not in default_suites()
    quick = select(Options(suites=suites(), quick=True))
    assert quick and {case.suite for case, _ in quick}.isdisjoint(
        {"train_step", "memory", "neighbour", "shakespeare"}
    )


def test_plan_gives_every_allocator_and_small_operations_the_default_wait_policy():
    chosen = select(Options(suites=["layer_norm"]))
    jobs = plan(Options(), chosen)
    assert [setting for setting, _ in jobs] == [
        Setting("tuned", "spin2000"),
        Setting("default", "spin2000"),
        Setting("default", "default"),
    ]
    assert len(jobs[0][1]) == len(jobs[1][1]) == len(chosen)
    assert jobs[2][1] == [(case.name, dtype) for case, dtype in chosen if case.small] != []


def test_every_row_has_a_case_and_what_is_measured_once_goes_with_the_first_allocator():
    cases = [(case, dtype) for suite in suites() for case in load(suite) for dtype in case.dtypes]
    for pattern in (*ROWS, *README):
        assert any(case.matches([pattern], dtype) for case, dtype in cases), pattern
    jobs = plan(Options(), select(Options(suites=["memory", "sgd"])))
    assert [setting.allocator for setting, pairs in jobs if any("memory" in name for name, _ in pairs)] == [
        "tuned"
    ]


def test_quick_takes_one_dtype_of_a_case_that_says_so():
    options = Options(suites=["adamw"], quick=True)
    assert [dtype for case, dtype in select(options) if case.name == "adamw/gpt2_124m/step"] == ["float32"]


def test_quick_measures_a_case_once():
    chosen = select(Options(suites=["layer_norm"], quick=True))
    jobs = plan(Options(quick=True, allocators=["tuned"]), chosen)
    assert [setting for setting, _ in jobs] == [Setting("tuned", "spin2000"), Setting("tuned", "default")]
    measured = [pair for _, cases in jobs for pair in cases]
    assert sorted(measured) == sorted({(case.name, dtype) for case, dtype in chosen})


def test_a_setting_replaces_what_the_caller_had_set():
    base = {
        "PATH": "/bin",
        "GOMP_SPINCOUNT": "7",
        "OMP_NUM_THREADS": "9",
        "MKL_CBWR": "SSE2",
        "OMP_WAIT_POLICY": "x",
    }
    plain = Setting("default", "default").environment(2, base)
    assert plain == {"PATH": "/bin", "OMP_NUM_THREADS": "2"}
    tuned = Setting("tuned", "spin2000", "torch").environment(1, base)
    assert tuned["MALLOC_MMAP_MAX_"] == "0" and int(tuned["MALLOC_TRIM_THRESHOLD_"]) > 1 << 32
    assert tuned["GOMP_SPINCOUNT"] == "2000" and tuned["MKL_CBWR"] == ""


def test_list_filters_by_glob(capsys: pytest.CaptureFixture[str]):
    assert main(["--list", "--case", "layer_norm/64x64/*", "--dtype", "bfloat16"]) == 0
    listed = capsys.readouterr().out.split()
    assert listed == ["layer_norm/64x64/forward/bfloat16", "layer_norm/64x64/forward_backward/bfloat16"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--suite", "layernorm"], "there is no such suite"),
        (["--case", "no_such_case*"], "no case fits"),
        (["--threads", "0"], "expected at least 1"),
        (["--from-json", "/no/such/file"], "No such file"),
    ],
)
def test_wrong_options_get_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_a_case_runs_on_the_devices_it_names():
    on_cpu = {case.name for case, _ in select(Options(suites=suites()))}
    on_gpu = {case.name for case, _ in select(Options(suites=suites(), device="cuda"))}
    assert "layer_norm/64x64/forward" in on_cpu & on_gpu
    assert "attention/B4_H48_T8192_D128_causal/forward" in on_gpu - on_cpu
    assert "train_step/gpt2_124m_B2_T512/step" in on_cpu - on_gpu
    # malloc and waiting threads are the processor's: one setting.
    jobs = plan(Options(device="cuda"), select(Options(suites=["layer_norm"], device="cuda")))
    assert len(jobs) == 1


def test_every_target_of_a_gpu_has_a_case():
    names = {case.name.split("/")[0] for suite in suites() for case in load(suite) if "cuda" in case.devices}
    assert names >= {
        "attention", "layer_norm", "rms_norm", "gated_activation", "rotary", "embedding", "cross_entropy",
        "linear_cross_entropy", "adamw", "adafactor", "adamw_8bit", "sgd", "moe_router", "grouped_linear", "train_step",
    }  # fmt: skip
