"""Speed figures, the metrics file, the measured peak, and the loss curve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gptcore.errors import UserError
from gptcore.models import GPTConfig, accounting
from gptcore.report.plot import loss_curve, running_mean
from gptcore.train import peak
from gptcore.train.metrics import MetricsFile, ModelFlops, read, throughput


def test_flops_by_hand() -> None:
    """GPT-2 124M at T = 1024: 6·124439808 + 12·12·12·64·1024, and half the second term."""
    flops = ModelFlops.of(GPTConfig(), 1024)
    assert flops.per_token == 6 * 124_439_808 + 12 * 12 * 12 * 64 * 1024
    assert flops.per_token_causal == 6 * 124_439_808 + 6 * 12 * 12 * 64 * 1024


def test_throughput_by_hand() -> None:
    fields = throughput(1000, 2.0, ModelFlops(40, 30), peak.Peak(1e5, "a"))
    assert fields == {
        "tokens_per_s": 500.0,
        "model_flops_per_s": 20_000.0,
        "mfu": 0.2,
        "mfu_causal_halved": 0.15,
    }


def test_work_done_twice_is_the_hardwares_and_not_the_models() -> None:
    """Two of GPT-2's 12 blocks, each 7,087,872 parameters, forward once more."""
    flops = ModelFlops.of(GPTConfig(), 1024, [0, 6])
    assert flops.remade == 2 * (2 * 7_087_872 + 4 * 768 * 1024)
    assert flops[:2] == ModelFlops.of(GPTConfig(), 1024)[:2]
    table: dict[str, object] = {"moe": {"num_experts": 8, "top_k": 2}, "mlp": {"activation": "swiglu"}}
    experts, fewer = GPTConfig.from_dict(table), GPTConfig.from_dict({**table, "num_layers": 11})
    assert experts.expert_layers == tuple(range(12))
    layer = accounting.active_parameters(experts) - accounting.active_parameters(fewer)
    assert accounting.remade_flops_per_token(experts, 1, [0]) == 2 * layer + 4 * 768
    assert throughput(1000, 2.0, ModelFlops(40, 30, 10), peak.Peak(1e5, "a"))["hfu"] == 0.25


def test_against_a_data_sheet_and_a_product() -> None:
    known = peak.beside_data_sheet("NVIDIA H200", torch.bfloat16, 790e12)
    assert known.flops_per_s == 989.4e12 and known.product == 790e12
    assert str(known) == ("peak 989 TFLOP/s (NVIDIA H200, data sheet, dense bf16; a product reaches 790)")
    fields = throughput(1000, 2.0, ModelFlops(40, 30), peak.Peak(1e5, "a", 4e4))
    assert fields["mfu"] == 0.2 and fields["mfu_of_product"] == 0.5
    assert fields["mfu_causal_halved_of_product"] == 0.375
    assert peak.beside_data_sheet("NVIDIA Something", torch.bfloat16, 1e14)[0] == 1e14
    assert "float32 product" in peak.beside_data_sheet("NVIDIA H200", torch.float32, 4e14).name


@pytest.mark.cuda
def test_a_gpus_product() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    found = peak.of(torch.device("cuda"), torch.bfloat16)
    assert found.product is None or 0.3 < found.product / (found.flops_per_s or 1.0) < 1.05


def test_what_is_unknown_is_none() -> None:
    unknown = peak.Peak(None, "NVIDIA Something")
    assert throughput(10, 1.0, ModelFlops(40, 30), unknown)["mfu"] is None
    assert throughput(10, 1.0, None, peak.Peak(1e5, "a"))["model_flops_per_s"] is None
    assert str(unknown) == "peak unknown (NVIDIA Something)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_a_speed_of_this_machine(dtype: torch.dtype) -> None:
    """No processor since 2010 is below 1 GFLOP/s in a product, and none reaches a petaflop."""
    found = peak.measure_cpu(dtype, seconds=0.05, size=512)
    assert found.flops_per_s is not None and 1e9 < found.flops_per_s < 1e15
    assert "measured" in found.name and str(dtype).removeprefix("torch.") in found.name


def test_the_measurement_does_not_draw_random_numbers() -> None:
    before = torch.get_rng_state()
    peak.measure_cpu(torch.float32, seconds=0.01, size=256)
    assert torch.equal(before, torch.get_rng_state())


def write(path: Path, steps: list[int], opened_at: int) -> None:
    metrics = MetricsFile(path, opened_at)
    for step in steps:
        metrics.write("train", step, loss=step / 2)
    metrics.sync()
    metrics.close()


def test_reopening_drops_what_lies_beyond(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3, 4, 5], -1)
    write(path, [4, 5, 6], 3)
    assert [line["step"] for line in read(path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("tail", ['{"kind": "train", "st', "\0\0\0\0\n", "[1]\n", '{"step": "x"}\n', "\n"])
def test_a_torn_tail_is_dropped(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2], -1)
    with open(path, "a") as file:
        file.write(tail)
    write(path, [3], 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_nan_is_null(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "m", -1)
    metrics.write("evaluation", 1, val_loss=float("nan"), other=float("inf"), text="é")
    metrics.close()
    assert read(tmp_path / "m") == [
        {"kind": "evaluation", "step": 1, "val_loss": None, "other": None, "text": "é"}
    ]


def test_unwritable_metrics_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot open"):
        MetricsFile(tmp_path / "absent" / "m", -1)
    assert read(tmp_path / "absent" / "m") == []


def test_running_mean() -> None:
    assert running_mean([1.0, 3.0, 5.0, 10.0], 1) == [2.0, 3.0, 6.0, 7.5]
    assert running_mean([1.0, 3.0], 0) == [1.0, 3.0]
    assert running_mean([], 3) == []


def test_loss_curve_is_a_png_with_something_on_it(tmp_path: Path) -> None:
    from matplotlib import image

    path = tmp_path / "loss.png"
    train = [(step, 4.0 / step) for step in range(1, 200)]
    assert loss_curve(path, [*train, (200, None)], [(0, 4.0), (199, 0.1)], title="run") == path
    pixels = image.imread(path)
    assert pixels.shape == (750, 1200, 4)
    blue, red = (
        (pixels[..., :3] - torch.tensor(c).numpy()) for c in ((0.298, 0.447, 0.69), (0.769, 0.306, 0.322))
    )
    assert (abs(blue).max(-1) < 0.02).sum() > 500 and (abs(red).max(-1) < 0.02).sum() > 500


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert loss_curve(tmp_path / "loss.png", [(1, None)], []) is None
    assert not (tmp_path / "loss.png").exists()
