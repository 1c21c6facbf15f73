"""A GPT through CUDA's kernels: emulated on the processor beside the processor's own, and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptcore import backend
from gptcore.data.characters import CharacterTokenizer
from gptcore.infer import SamplingParams, generate, rollout
from gptcore.models import GPT, GPTConfig, whole_block
from gptcore.train import from_table, strategies
from gptcore.train import run as train
from gptcore.train.step import update
from tests.train.toy import ToyLoader, settings

GPT2: dict[str, Any] = {
    "num_layers": 2, "width": 32, "context_length": 16, "vocab_size": 32, "attention": {"num_heads": 2},
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "dropout": {"attention": {"num_heads": 2, "dropout": 0.2}},
    "llama": {
        "norm": {"kind": "rms_norm"}, "position": {"kind": "rotary"}, "tied_head": False,
        "attention": {"num_heads": 2, "num_kv_heads": 1}, "mlp": {"activation": "swiglu"},
    },
    "experts": {"moe": {"num_experts": 4, "top_k": 2}, "num_layers": 1},
}  # fmt: skip
# What a step may differ by where sums are made in another order; updates add to it.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 3e-2}


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    if why := backend.why_no_kernels("cuda", "attention", "embedding", "layer_norm", "linear_cross_entropy"):
        pytest.skip(why)
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda", torch.cuda.current_device())


def losses_of(name: str, dtype: torch.dtype, device: str = "cpu", steps: int = 4) -> list[float]:
    """Of the first updates of a tiny model."""
    model = GPT(GPTConfig.from_dict({**GPT2, **MODELS[name]}), seed=1, dtype=dtype, device=device)
    config = from_table(settings("unused", data={"batch": 2, "length": 8}, device=device))
    _, optimizer = strategies.prepare(config, model)
    return [update(config, model, optimizer, ToyLoader(batch=2), step) for step in range(steps)]


def on_the_processor(name: str, dtype: torch.dtype) -> list[float]:
    before = backend.isa()
    backend.set_isa([isa for isa in backend.available_isas() if isa != "simt"][-1])
    losses = losses_of(name, dtype)
    backend.set_isa(before)
    return losses


@pytest.mark.usefixtures("on_simt")
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", list(MODELS))
def test_emulated_kernels_train_as_the_processors_simt(name: str, dtype: torch.dtype) -> None:
    got = losses_of(name, dtype)
    torch.testing.assert_close(got, on_the_processor(name, dtype), rtol=TOLERANCE[dtype], atol=0)
    assert got == losses_of(name, dtype)  # the same bits again
    assert got[-1] < got[0]


@pytest.mark.usefixtures("on_simt")
def test_a_block_as_a_whole_and_by_its_modules_simt(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = losses_of("gpt2", torch.float32, steps=2)
    monkeypatch.setattr(whole_block, "LARGEST", 0)
    assert losses_of("gpt2", torch.float32, steps=2) == whole


def texts(device: str) -> list[Any]:
    """Greedy and random continuations, and log-probabilities of sampled tokens."""
    tokenizer = CharacterTokenizer("abcdefghijklmnopqrstuvwxyz .,")
    config = GPTConfig.from_dict({**GPT2, "vocab_size": tokenizer.vocab_size})
    model = GPT(config, seed=3, device=device)
    greedy = generate(model, tokenizer, "ab", max_new_tokens=6, temperature=0.0)
    drawn = generate(model, tokenizer, "b c", max_new_tokens=6, seed=5)
    params = SamplingParams(temperature=1.0, top_k=9, top_p=0.9, seed=2)
    rolled = rollout(model, [[1, 2], [3, 4, 5]], max_new_tokens=5, params=params, num_samples=3)
    return [greedy.token_ids, drawn.token_ids, rolled.tokens.tolist(), rolled.logprobs.tolist()]


@pytest.mark.usefixtures("on_simt")
def test_emulated_kernels_generate_as_the_processors_simt() -> None:
    got = texts("cpu")
    before = backend.isa()
    backend.set_isa([isa for isa in backend.available_isas() if isa != "simt"][-1])
    expected = texts("cpu")
    backend.set_isa(before)
    assert got[:3] == expected[:3]
    assert got[3] == pytest.approx(expected[3], abs=1e-4)


# --- on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", list(MODELS))
def test_a_gpu_trains_as_the_processor(gpu: torch.device, name: str, dtype: torch.dtype) -> None:
    if name == "dropout":
        pytest.skip("the devices' generators draw different seeds")
    backend.reset_report()
    got = losses_of(name, dtype, "cuda")
    assert backend.report() == {}
    torch.testing.assert_close(got, losses_of(name, dtype), rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.cuda
@pytest.mark.parametrize("name", list(MODELS))
def test_a_gpu_has_the_same_bits_every_time(gpu: torch.device, name: str) -> None:
    first = losses_of(name, torch.bfloat16, "cuda", steps=8)
    for _ in range(10):
        assert losses_of(name, torch.bfloat16, "cuda", steps=8) == first


@pytest.mark.cuda
def test_a_gpu_generates_as_the_processor(gpu: torch.device) -> None:
    got, expected = texts("cuda"), texts("cpu")
    assert got[:3] == expected[:3]
    assert got[3] == pytest.approx(expected[3], abs=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_on_a_gpu(gpu: torch.device, tmp_path: Any, dtype: str) -> None:
    """Graphs, batches ahead, evaluation, checkpoints: a run that is stopped and resumed has the bits of a whole one."""
    backend.reset_report()
    weights = []
    for name, stops in (("whole", [30]), ("parts", [15, 30])):
        for steps in stops:
            model = GPT(GPTConfig.from_dict(GPT2), seed=1)
            table = settings(
                tmp_path / name, steps=steps, device="cuda", dtype=dtype, schedule={"name": "constant"}
            )
            result = train(from_table(table), model=model, loader=ToyLoader(), measure_peak=False, quiet=True)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert result.loss is not None and result.loss < 3.0
    assert backend.report() == {}


@pytest.mark.cuda
def test_training_keeps_to_its_memory(gpu: torch.device) -> None:
    losses_of("gpt2", torch.bfloat16, "cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        losses_of("gpt2", torch.bfloat16, "cuda")
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
