"""``gptcore plan``: tables, JSON, the last sentence, and what it refuses."""

import json
import subprocess
import sys

import pytest

from gptcore.cli.main import main
from gptcore.cli.plan import parse_amount
from gptcore.errors import UserError
from gptcore.train.plan import Memory


def plan(capsys, *words):
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_lines_add_up_and_the_smallest_is_named(capsys):
    words = ["gpt3-6.7b", "--gpus", "64", "--memory", "40G", "--batch", "256", "--checkpointing", "block"]
    found = plan(capsys, *words)
    assert [stage["stage"] for stage in found["stages"]] == [0, 1, 2, 3]
    for stage in found["stages"]:
        lines = dict(stage["memory"])
        assert set(lines) == set(Memory._fields)
        assert stage["total"] == sum(lines.values()) - lines["host"]
        assert stage["fits"] == (stage["total"] <= 40e9)
    assert main(["plan", *words]) == 0
    out = capsys.readouterr().out
    best = found["smallest"]
    assert out.splitlines()[-1].startswith(f"The smallest that fits in 40.0GB: {best['gpus']} GPU")
    assert (
        "bytes on each of 64" in out
        and "not at the same time" in out
        and "sent in an update, 4 leaves each" in out
    )
    same = next(v for v in found["variants"] if v["checkpointing"] == "block" and v["offload"] == "none")
    assert (same["gpus"], same["stage"]) == (best["gpus"], best["stage"])
    assert len(found["variants"]) == 9


def test_gpt3_on_v100(capsys):
    found = plan(
        capsys, "gpt3-175b", "--device", "V100", "--tflops", "28", "--tokens", "300G", "--price", "2"
    )
    weights, causal, whole = found["flops"]
    assert weights["run"] == pytest.approx(3.14e23, rel=0.002)
    assert weights["device_years"] == pytest.approx(355, rel=0.005)
    assert weights["cost"] == 2 * weights["device_hours"]
    assert weights["run"] < causal["run"] < whole["run"]
    v100, h100 = (next(d for d in found["devices"] if d["device"] == name) for name in ("V100", "H100"))
    assert v100["flops_per_s"] == 28e12
    assert h100["flops_per_s"] == pytest.approx(0.4 * 989.4e12)


def test_what_does_not_fit_says_by_how_much(capsys):
    found = plan(capsys, "palm-540b", "--memory", "16G")
    assert not found["smallest"]["fits"]
    assert main(["plan", "palm-540b", "--memory", "16G"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Nothing fits in 16.0GB") and last.endswith("too much.")


def test_float16_takes_what_bfloat16_does_but_for_split_masters(capsys):
    """Two bytes a parameter more where bf16 splits them: f16's masters are always whole."""
    lines = [
        {
            dtype: plan(capsys, "gpt2", "--gpus", "1", "--dtype", dtype, *words)
            for dtype in ("float16", "bfloat16")
        }
        for words in ((), ("--set", "optimizer.split_master=true"))
    ]
    totals = [{dtype: found["stages"][0]["total"] for dtype, found in each.items()} for each in lines]
    assert totals[0]["float16"] == totals[0]["bfloat16"] == totals[1]["float16"]
    assert totals[1]["float16"] - totals[1]["bfloat16"] == 2 * lines[0]["float16"]["parameters"]


def test_a_config_file_is_planned_as_it_says(config, capsys):
    found = plan(capsys, str(config), "--set", "data.accumulate=8", "--set", "optimizer.name=adafactor")
    update = {"sequences": 16, "length": 16, "tokens": 256, "grain": 2, "leaves": 8, "fixed_tree": True}
    assert found["update"] == update
    assert (found["dtype"], found["optimizer"]) == ("float32", "adafactor torch")
    assert found["flops"][0]["tokens"] == 4 * 256  # steps


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["gpt5"], "unknown preset 'gpt5'; did you mean"),
        (["missing.toml"], "no config file at missing.toml"),
        (["gpt2", "--gpus", "0"], "--gpus: expected 1 or more, got 0"),
        (["gpt2", "--gpus", "3"], "3 ranks do not divide the 512 leaves"),
        (["gpt2", "--memory", "80X"], "--memory: expected an amount above 0 such as 80G or 80GiB, got '80X'"),
        (["gpt2", "--memory", "0"], "--memory: expected an amount above 0"),
        (["gpt2", "--device", "H10"], "unknown device 'H10'; did you mean 'H100'?"),
        (["gpt2", "--mfu", "40"], "--mfu: expected above 0, at most 1, got 40.0"),
        (["gpt2", "--tflops", "-1"], "--tflops: expected above 0, got -1.0"),
        (["gpt2", "--price", "-1"], "--price: expected 0 or more, got -1.0"),
        (
            ["gpt2", "--checkpointing", "all"],
            "checkpointing: expected one of none, selective, block, got 'all'",
        ),
        (["gpt2", "--offload", "disk"], "offload: expected one of none, optimizer, parameters, got 'disk'"),
        (["gpt2", "--length", "2048"], "length: 2048 is more than the context length 1024"),
        (["gpt2", "--set", "optimizer.nam=sgd"], "optimizer.nam"),
        (["gpt2", "--set", "parallel.strategy=ddp"], "parallel.strategy: plan counts zero, got ddp"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence, capsys, monkeypatch):
    monkeypatch.delenv("GPTCORE_TRACEBACK", raising=False)
    assert main(["plan", *words]) == 2
    out, error = capsys.readouterr()
    assert out == "" and sentence in error and error.count("\n") == 1


def test_amounts():
    amounts = {
        "80G": 80e9,
        "80GB": 80e9,
        "80GiB": 80 * 2**30,
        "1.5 T": 1.5e12,
        "3e11": 3e11,
        "512": 512,
        "4k": 4000,
    }
    for text, value in amounts.items():
        assert parse_amount("--memory", text) == value
    for text in ("", "G", "80Gi B", "-1G", "80i", "nan", "1e", "80 GBB"):
        with pytest.raises(UserError, match="--tokens: expected an amount"):
            parse_amount("--tokens", text)


def test_the_largest_preset_takes_well_under_a_second():
    code = "import time; from gptcore.cli.main import main; main(['plan', 'gpt2']); start = time.perf_counter(); "
    code += "main(['plan', 'palm-540b', '--batch', '2048', '--json']); print(time.perf_counter() - start)"
    # the first plan imports torch's optimizers, which takes seconds
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) < 1.0
