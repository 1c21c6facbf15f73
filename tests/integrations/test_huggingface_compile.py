"""``torch.compile`` over a model on the kernels: no more graphs than eager, and the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests.integrations.huggingface_models import ROUTES, batch, model_of, put_on, room_for, unlabelled

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(autouse=True)
def no_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def by(route: str, name: str, **changes: Any) -> Any:
    model = model_of(name, **changes)
    model.loss_type = "ForCausalLM"  # transformers warns that GPT-2 has none, which breaks eager's graph too
    if route != "eager":
        put_on(model, route)
    return model


def step(model: Any, call: Any, padding: str = "left") -> list[torch.Tensor]:
    model.zero_grad()
    loss = call(**batch(padding), use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_close(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(got) == len(wanted)
    for x, y in zip(got, wanted, strict=True):
        assert (x - y).abs().max() <= 1e-5 * y.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize(
    ("name", "padding"), [("gpt2", "left"), ("llama", "no mask")]
)  # fmt: skip
@pytest.mark.parametrize("route", ROUTES)
def test_a_training_step_in_one_graph(name: str, route: str, padding: str):
    model = by(route, name).train()
    wanted = step(model, model, padding)
    assert_close(step(model, torch.compile(model, backend="eager", fullgraph=True), padding), wanted)


@pytest.mark.parametrize(
    ("name", "route"),
    [("bloom", "replace"), ("gptj", "replace"), ("falcon", "replace"), ("mistral", "apply")],
)
def test_windows_and_layers_with_attention_of_their_own(name: str, route: str):
    model = by(route, name)
    wanted = step(model, model)
    assert_close(step(model, torch.compile(model, backend="eager", fullgraph=True)), wanted)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_backends(backend: str):
    model = by("apply", "llama", num_hidden_layers=1).train()
    wanted = step(model, model)
    assert_close(step(model, torch.compile(model, backend=backend, fullgraph=True)), wanted)


@pytest.mark.parametrize(
    ("name", "routes"),
    [("gpt2", ("attn_implementation", "replace")), ("llama", ("apply",)), ("gptj", ("replace",))],
)
def test_generation_with_a_static_cache_and_compiled_decoding(name: str, routes: tuple[str, ...]):
    """transformers compiles the forward of one token by itself; on the CPU where this flag of its tests asks it to."""
    config = transformers.CompileConfig(backend="eager", fullgraph=True, dynamic=False, mode=None)
    config._compile_all_devices = True
    options = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4, "pad_token_id": 0}
    results = []
    for route in ("eager", *routes):
        torch.compiler.reset()
        counters.clear()
        model = by(route, name, **room_for(name, 80))
        tokens = model.generate(
            **unlabelled("left"), **options, cache_implementation="static", compile_config=config
        )
        results.append((tokens, counters["stats"]["unique_graphs"]))
    for tokens, graphs in results[1:]:
        assert torch.equal(tokens, results[0][0]) and 0 < graphs <= results[0][1]
