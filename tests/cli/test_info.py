"""``gptcore info``: what it prints, from facts made up and from this machine."""

import json

from gptcore import __version__, backend
from gptcore.cli.info import describe
from gptcore.cli.main import main

FACTS = {
    "version": "0.1.0",
    "native_version": "0.1.0",
    "python": "3.11.7",
    "isa": "v3",
    "isas": ["v2", "v3"],
    "threads": 2,
    "threads_reason": "CPU affinity",
    "openmp_runtimes": ["/usr/lib/libgomp.so.1"],
    "cuda_built": False,
    "cuda_devices": [],
    "cuda_reason": "built without CUDA",
    "cuda_kernels": [],
    "cuda_unfit": {},
    "torch": "2.13.0",
    "numpy": None,
    "mkl_cbwr": "AVX2,STRICT",
    "mkl_cbwr_in_time": True,
}


def lines_of(facts):
    return {line.split()[0]: " ".join(line.split()[1:]) for line in describe(facts).splitlines()}


def test_every_fact_has_its_line():
    lines = lines_of(FACTS)
    assert lines["ISA"] == "v3 (available: v2, v3)"
    assert lines["threads"] == "2 (CPU affinity)"
    assert lines["OpenMP"] == "/usr/lib/libgomp.so.1"
    assert lines["CUDA"] == "no device (built without CUDA)"
    assert lines["kernels"] == "none for CUDA"
    assert lines["numpy"] == "not installed"
    assert lines["MKL_CBWR"] == "AVX2,STRICT"
    assert "warning" not in lines


def test_what_is_amiss_is_said():
    lines = lines_of({**FACTS, "openmp_runtimes": ["a", "b"], "mkl_cbwr_in_time": False})
    assert lines["OpenMP"] == "a, b" and lines["warning"].startswith("several OpenMP runtimes")
    assert lines["MKL_CBWR"].endswith("torch was loaded before it was set")
    assert lines_of({**FACTS, "mkl_cbwr": None})["MKL_CBWR"].startswith("not set")
    assert "reinstall gptcore" in lines_of({**FACTS, "native_version": "0.0.9"})["warning"]
    assert lines_of({**FACTS, "cuda_devices": ["0: X", "1: Y"]})["CUDA"] == "0: X, 1: Y"


def test_kernels_for_cuda_and_devices_too_old_for_them():
    unfit = {0: None, 1: "device cuda: compute capability 7.5, expected 8.0 or later"}
    lines = lines_of({**FACTS, "cuda_kernels": ["attention", "rotary"], "cuda_unfit": unfit})
    assert lines["kernels"] == (
        "CUDA's of attention, rotary; cuda:1: device cuda: compute capability 7.5, expected 8.0 or later"
    )


def test_of_this_machine(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["version"] == __version__
    assert facts["isa"] == backend.isa() and facts["isa"] in facts["isas"]
    assert main(["info"]) == 0
    assert f"({facts['threads_reason']})" in capsys.readouterr().out
