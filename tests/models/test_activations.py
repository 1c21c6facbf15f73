"""Bytes of activations by formula against what torch saves for backward, and what it allocates in all."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gptcore import backend
from gptcore.models import GPT, GPTConfig, accounting, presets
from gptcore.models.activations import CHECKPOINTING, Activations, activations, gradients_at_once
from tests.allocations import allocations

VOCABULARY = 500
_SMALL = {"num_layers": 3, "width": 96, "vocab_size": VOCABULARY, "context_length": 512}
_GROUPED = {"attention": {"num_heads": 6, "num_kv_heads": 2}, "mlp": {"hidden_size": 256}}


def _case(preset: str, **changes: Any) -> GPTConfig:
    return presets.get(preset).merged({**_SMALL, **changes})


GPT2 = _case("gpt2", attention={"num_heads": 4})
LLAMA = _case("llama3-8b", **_GROUPED)
EXPERTS = _case("quickstart-moe", **_GROUPED)
CASES = {
    "gpt2": GPT2,
    "post": GPT2.merged({"norm": {"placement": "post"}}),
    "deepnorm": GPT2.merged({"norm": {"placement": "deepnorm"}, "embedding_norm": True}),
    "sandwich": GPT2.merged({"norm": {"placement": "sandwich"}}),
    "dropout": GPT2.merged({"dropout": 0.1, "attention": {"dropout": 0.1}}),
    "parallel": GPT2.merged({"norm": {"parallel": "separate"}}),
    "palm": _case("palm-8b", attention={"num_heads": 4, "head_dim": 32}),
    "bloom": _case("bloom-560m", attention={"num_heads": 4}),
    "projected": _case("opt-350m", attention={"num_heads": 4}, embedding_width=48),
    "llama": LLAMA,
    "qk_norm": LLAMA.merged({"attention": {"qk_norm": "rms_norm"}}),
    "qk_norm alibi": LLAMA.merged({"attention": {"qk_norm": "layer_norm"}, "position": {"kind": "alibi"}}),
    "experts": EXPERTS,
    "some experts": EXPERTS.merged({"num_layers": 4, "moe": {"every": 2}}),
    "shared experts": EXPERTS.merged({"moe": {"shared_experts": 2}}),
    "jitter": EXPERTS.merged({"moe": {"jitter": 0.01, "dropout": 0.1}}),
    "noisy experts": EXPERTS.merged({"moe": {"noise": True, "balance": "shazeer"}}),
    "experts post": EXPERTS.merged({"norm": {"placement": "post"}}),
    "experts parallel": EXPERTS.merged({"norm": {"parallel": "shared"}}),
}
DTYPES = {4: torch.float32, 2: torch.bfloat16}


def _model(config: GPTConfig, element_bytes: int) -> GPT:
    return GPT(config, dtype=DTYPES[element_bytes])


def _batch(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(VOCABULARY, (rows, length)), torch.randint(VOCABULARY, (rows, length))


def _saved_bytes(model: GPT, tokens: torch.Tensor, targets: torch.Tensor) -> int:
    """Of all storages that backward will read, but those of the model."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(tokens, targets)
    return sum(t.untyped_storage().nbytes() for pointer, t in saved.items() if pointer not in own)


def _made_with_the_loss(config: GPTConfig, tokens: int, element_bytes: int) -> int:
    """The head's gradient, which torch sees as saved where the loss makes gradients in forward."""
    return config.vocab_size * config.table_width * element_bytes * gradients_at_once(tokens, element_bytes)


@pytest.mark.parametrize("element_bytes", (4, 2))
@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_for_backward(name: str, element_bytes: int):
    """The count is the code's own, so that 1% (alibi's slopes and the like) is wide."""
    config = CASES[name]
    saved = _saved_bytes(_model(config, element_bytes), *_batch(4, 160))
    saved -= _made_with_the_loss(config, 640, element_bytes)
    assert activations(config, 640, element_bytes=element_bytes).kept == pytest.approx(saved, rel=0.01)


def test_few_tokens_in_bf16_make_their_gradients_with_the_loss():
    for rows in (1, 4):
        saved = _saved_bytes(_model(GPT2, 2), *_batch(rows, 160)) - _made_with_the_loss(GPT2, 160 * rows, 2)
        assert activations(GPT2, 160 * rows, element_bytes=2).kept == pytest.approx(saved, rel=0.01)


# --- checkpointing --------------------------------------------------------------------------------------------

_KEPT_RESULTS = ("aten.mm", "aten.addmm", "gptcore.matmul", "gptcore.attention", "gptcore.grouped_linear")


def _policy(context: Any, op: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    kept = any(str(op).startswith(name) for name in _KEPT_RESULTS)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpoint_blocks(model: GPT, kind: str) -> None:
    selective = {"context_fn": lambda: create_selective_checkpoint_contexts(_policy)}
    options: dict[str, Any] = selective if kind == "selective" else {}

    def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False, **options)

    for block in model.stack.blocks if kind != "none" else ():
        block.forward = wrapped(block.forward)


def _pass(config: GPTConfig, element_bytes: int, kind: str, rows: int) -> tuple[int, int]:
    """Bytes allocated from the beginning of a pass to its middle, and the most during it."""
    model, out = _model(config, element_bytes), []
    _checkpoint_blocks(model, kind)
    tokens, targets = _batch(rows, 256)
    model(tokens, targets).total.backward()  # what is made once is there then
    model.zero_grad()
    forward = allocations(lambda: out.append(model(tokens, targets)))
    backward = allocations(lambda: out.pop().total.backward())
    return forward.left, forward.left + backward.peak


def _most(found: Activations, element_bytes: int) -> int:
    return max(moment.bytes + element_bytes * moment.parameters for moment in found.moments)


@pytest.mark.parametrize("kind", CHECKPOINTING)
@pytest.mark.parametrize("element_bytes", (4, 2))
@pytest.mark.parametrize("name", ("gpt2", "deepnorm", "palm", "llama", "experts", "shared experts"))
def test_a_pass_allocates_what_is_planned(name: str, element_bytes: int, kind: str):
    config = CASES[name]
    kept, peak = _pass(config, element_bytes, kind, rows=8)
    found = activations(config, 2048, element_bytes=element_bytes, checkpointing=kind)
    assert found.kept == pytest.approx(kept - _made_with_the_loss(config, 2048, element_bytes), rel=0.01)
    assert _most(found, element_bytes) == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("name", ("gpt2", "experts"))
def test_the_end_of_a_pass_over_few_tokens_is_its_fullest_moment(name: str):
    """Where the gradients of weights outweigh the activations, and blocks are too large to run as one step."""
    config = CASES[name].merged({"width": 312})
    _, peak = _pass(config, 4, "block", rows=1)
    found = activations(config, 256, element_bytes=4, checkpointing="block")
    assert max(found.moments, key=lambda m: m.bytes + 4 * m.parameters).name not in ("loss", "last block")
    assert _most(found, 4) == pytest.approx(peak, rel=0.05)


def _scratch_of(call: Callable[[], object]) -> int:
    """Bytes of scratch that ``call`` makes two threads hold; a new thread, since scratch is kept by each."""
    held = []

    def measured() -> None:
        backend.set_num_threads(2)
        before = backend.extension().scratch_bytes()
        call()
        held.append(backend.extension().scratch_bytes() - before)
        backend.set_num_threads(0)

    thread = threading.Thread(target=measured)
    thread.start()
    thread.join()
    return held[0]


@pytest.mark.parametrize(("element_bytes", "rows"), ((4, 1), (4, 8), (2, 8)))
def test_workspace_is_the_kernels_scratch(element_bytes: int, rows: int):
    """Beside it each of two threads has blocks of weights and of attention, in whole pages of 2 MB: below 12 MB."""
    config = GPT2.merged({"vocab_size": 50257, "width": 384})
    model, (tokens, targets) = _model(config, element_bytes), _batch(rows, 512)
    scratch = _scratch_of(lambda: model(tokens, targets).total.backward())
    assert 0 <= scratch - activations(config, 512 * rows, element_bytes=element_bytes).workspace < 12e6


def test_checkpointing_keeps_less_and_makes_more_again():
    none, selective, block = (activations(LLAMA, 512, checkpointing=kind) for kind in CHECKPOINTING)
    assert none.kept > selective.kept > block.kept
    assert none.again == 0 < selective.again < block.again


def test_bad_arguments_are_named():
    for options in ({"tokens": 0}, {"element_bytes": 3}, {"checkpointing": "all"}):
        with pytest.raises(ValueError, match="activations: got"):
            activations(GPT2, **{"tokens": 1, **options})


# --- shapes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [*CASES.values(), *(presets.get(name) for name in presets.names())])
def test_parameter_shapes_are_the_models(config: GPTConfig):
    model = GPT(config, device="meta")
    shapes = accounting.parameter_shapes(config)
    assert shapes == Counter(tuple(p.shape) for p in model.parameters())
    root = [tuple(p.shape) for name, p in model.named_parameters() if ".blocks." not in name]
    assert Counter(root) == Counter(accounting.root_shapes(config))
