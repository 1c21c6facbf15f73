"""``gptcore.replace`` and ``gptcore.restore``: the same results, the same objects, and everything back."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import gptcore
from gptcore import backend
from gptcore.integrations.swap import Report


class Small(nn.Module):
    """Every kind of torch's modules that is swapped, and some that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(31, 24, padding_idx=2)
        self.layer_norm, self.rms_norm = nn.LayerNorm(24), nn.RMSNorm(24, eps=1e-3)
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 31, bias=False)
        self.gelu, self.tanh, self.silu = nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU()
        self.sparse, self.in_place, self.conv = (
            nn.Embedding(5, 4, sparse=True),
            nn.SiLU(inplace=True),
            nn.Conv1d(1, 1, 1),
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.rms_norm(self.layer_norm(self.table(tokens)))
        return self.down(self.silu(self.tanh(self.gelu(self.up(x)))))


@pytest.fixture
def small() -> Small:
    torch.manual_seed(3)
    model = Small()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


TOKENS = torch.randint(0, 31, (3, 30), generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, tokens: torch.Tensor = TOKENS) -> list[torch.Tensor]:
    """The output and every gradient."""
    model.zero_grad()
    out = model(tokens)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_close(got: list[torch.Tensor], wanted: list[torch.Tensor], factor: float = 1e-5) -> None:
    assert len(got) == len(wanted)
    for x, y in zip(got, wanted, strict=True):
        assert (x - y).abs().max() <= factor * y.abs().max()


def test_results_gradients_names_and_objects_stay(small: Small):
    wanted, names, classes = run(small), list(small.state_dict()), [type(m) for m in small.modules()]
    parameters, state = list(small.parameters()), torch.random.get_rng_state()
    report = gptcore.replace(small, verbose=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_close(run(small), wanted)
    assert list(small.state_dict()) == names
    assert all(a is b for a, b in zip(small.parameters(), parameters, strict=True))
    assert all(isinstance(m, c) for m, c in zip(small.modules(), classes, strict=True))
    assert report.swapped == {
        "Embedding": ["table"], "LayerNorm": ["layer_norm"], "RMSNorm": ["rms_norm"], "GELU": ["gelu", "tanh"],
        "SiLU": ["silu"], "Linear, few rows or autocast": ["up", "down"],
    }  # fmt: skip
    assert report.left == {
        ("Embedding", "max_norm, scale_grad_by_freq or sparse"): ["sparse"],
        ("SiLU", "it writes its input"): ["in_place"],
    }
    gptcore.restore(small)
    assert [type(m) for m in small.modules()] == classes
    assert all(torch.equal(a, b) for a, b in zip(run(small), wanted, strict=True))


def test_the_report_is_printed(small: Small, capsys: pytest.CaptureFixture[str]):
    gptcore.replace(small)
    out = capsys.readouterr().out
    assert out.startswith("gptcore.replace:\n") and "  swapped 2 GELU\n" in out
    assert "  left 1 SiLU: it writes its input\n" in out
    gptcore.replace(nn.Sequential(nn.Flatten()))
    assert capsys.readouterr().out == "gptcore.replace:\n  found nothing to swap\n"


def test_again_swaps_nothing_twice(small: Small):
    gptcore.replace(small, verbose=False)
    classes = [type(m) for m in small.modules()]
    assert gptcore.replace(small, verbose=False).swapped == {}
    assert [type(m) for m in small.modules()] == classes


def test_hooks_copies_and_pickles_keep_working(small: Small):
    seen: list[str] = []
    small.layer_norm.register_forward_hook(lambda *_: seen.append("hook"))
    gptcore.replace(small, verbose=False)
    assert seen == []  # the trial runs no hooks
    wanted = run(small)
    assert seen == ["hook"]
    assert_close(run(copy.deepcopy(small)), wanted, 0)
    small.layer_norm._forward_hooks.clear()
    again = pickle.loads(pickle.dumps(small))
    assert_close(run(again), wanted, 0)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded.layer_norm) is type(small.layer_norm)
    gptcore.restore(loaded)
    assert type(loaded.layer_norm) is nn.LayerNorm


def test_long_sums_are_no_reason_to_leave_a_layer():
    """Two orders of a sum of thousands of terms differ by more than a few roundings."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = nn.Sequential(*(transformers.pytorch_utils.Conv1D(768, 3072) for _ in range(24)))
    assert gptcore.replace(model, verbose=False).left == {}


def test_a_subclass_is_left_alone():
    class Odd(nn.LayerNorm):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input + 1

    model = nn.Sequential(Odd(8), nn.LayerNorm(8))
    assert gptcore.replace(model, verbose=False).swapped == {"LayerNorm": ["1"]}
    assert type(model[0]) is Odd


def test_a_module_that_computes_something_else_is_left(monkeypatch: pytest.MonkeyPatch):
    class LlamaRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    monkeypatch.setattr(LlamaRMSNorm, "__module__", "transformers.models.odd")
    model = nn.Sequential(LlamaRMSNorm())
    report = gptcore.replace(model, verbose=False)
    assert report == Report({}, {("LlamaRMSNorm", "it computes something else"): ["0"]})
    assert torch.equal(model(torch.ones(1, 8)), torch.full((1, 8), 2.0))


def test_dtypes_the_kernels_lack_go_to_torch_call_by_call(small: Small):
    gptcore.replace(small, verbose=False)
    double = small.double()
    backend.reset_report()
    wanted = Small().double()
    wanted.load_state_dict(double.state_dict())
    assert torch.equal(double(TOKENS), wanted(TOKENS))
    assert {"layer_norm", "rms_norm", "gelu", "silu", "embedding"} <= backend.report().keys()


def test_under_autocast_and_compile(small: Small):
    tokens = TOKENS
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        wanted = small(tokens)
    gptcore.replace(small, verbose=False)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        got = small(tokens)
    assert got.dtype == wanted.dtype
    assert (got - wanted).abs().max() <= 0.02 * wanted.abs().max()
    eager: Any = small(tokens)
    assert_close([torch.compile(small, backend="eager", fullgraph=True)(tokens)], [eager])


def test_a_meta_model_is_left_whole():
    with torch.device("meta"):
        model = nn.Sequential(nn.LayerNorm(8), nn.GELU())
    report = gptcore.replace(model, verbose=False)
    assert report.left == {("LayerNorm", "its parameters are on the meta device"): ["0"]}
