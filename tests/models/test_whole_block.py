"""A block as one step of autograd: the bits of its modules, and the modules wherever somebody wants to see them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gptcore.infer import KVCache
from gptcore.models import GPT, AdapterSpec, adapters, presets, whole_block
from gptcore.models.block import Context

VOCAB, LENGTH = 64, 32


def model_of(dtype: torch.dtype = torch.float32, width: int = 32, **changes: Any) -> GPT:
    attention = {"num_heads": 4, **changes.pop("attention", {})}
    small = {
        "num_layers": 2,
        "width": width,
        "vocab_size": VOCAB,
        "context_length": LENGTH,
        "attention": attention,
    }
    return GPT(presets.get("gpt2", {**small, **changes}), seed=1, dtype=dtype)


def tokens_of(rows: int = 6) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, 20), generator=torch.Generator().manual_seed(0))


def results(model: GPT, tokens: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """Loss, logits without gradients, and the gradients of the loss."""
    model.zero_grad()
    loss = model(tokens, tokens, **options).loss
    loss.backward()
    with torch.no_grad():
        logits = model(tokens, **options)
    return [loss.detach(), logits, *(p.grad for p in model.parameters() if p.grad is not None)]


def by_modules(monkeypatch: pytest.MonkeyPatch, call: Any) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(whole_block, "LARGEST", 0)
        return call()


def runs(monkeypatch: pytest.MonkeyPatch, call: Any) -> int:
    """How many blocks ``call`` runs as a whole."""
    count = 0
    run = whole_block.run

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return run(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(whole_block, "run", counted)
        call()
    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"width": 128},
        {"position": {"kind": "none"}},
        {"mlp": {"activation": "swiglu", "bias": False}, "norm": {"bias": False}},
        {"attention": {"num_kv_heads": 2, "window": 5, "pattern": ["banded"], "soft_cap": 20.0}},
    ],
    ids=["gpt2", "wider", "no-positions", "swiglu", "grouped"],
)
def test_bits_are_those_of_the_modules(
    dtype: torch.dtype, packed: bool, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    model, tokens, options = model_of(dtype, **changes), tokens_of(), {}
    if packed:
        tokens = tokens.view(1, -1)
        options["cu_seqlens"] = torch.tensor([0, 7, 30, 31, 60, 92, 120], dtype=torch.int32)
    assert runs(monkeypatch, lambda: results(model, tokens, **options)) == 4
    whole = results(model, tokens, **options)
    parts = by_modules(monkeypatch, lambda: results(model, tokens, **options))
    assert len(whole) == len(parts) == 2 + len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("rows", [3, 70])
@torch.no_grad()
def test_decoding_has_the_bits_of_the_modules(rows: int, monkeypatch: pytest.MonkeyPatch):
    model, tokens = model_of().eval(), tokens_of(rows)

    def decoded() -> torch.Tensor:
        cache = KVCache(2, rows, 4, 8, 20)
        return torch.stack([model(tokens[:, :12], cache=cache), *(model(tokens[:, i : i + 1], cache=cache)
                                                                  for i in range(12, 20))])  # fmt: skip

    assert runs(monkeypatch, decoded) == 2 * 9
    assert torch.equal(decoded(), by_modules(monkeypatch, decoded))


def test_gradients_that_are_not_asked_for_change_nothing(monkeypatch: pytest.MonkeyPatch):
    """The stream's gradient alone, which the head's states have: no gradient reaches what was added last."""
    block, context = model_of().stack.blocks[0], Context()
    inputs = torch.randn(6, 20, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def gradients() -> list[torch.Tensor]:
        stream, _ = block(inputs, None, context)
        return list(torch.autograd.grad(stream.sum(), [inputs, block.attention.qkv.weight]))

    assert runs(monkeypatch, gradients) == 1
    assert all(
        torch.equal(a, b) for a, b in zip(gradients(), by_modules(monkeypatch, gradients), strict=True)
    )


class Watching(TorchDispatchMode):
    """Sees every operation and changes none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_who_wants_to_see_the_parts_gets_the_modules(monkeypatch: pytest.MonkeyPatch):
    model, tokens, seen = model_of(), tokens_of(), []

    def count() -> int:
        return runs(monkeypatch, lambda: model(tokens, tokens).loss.backward())

    assert count() == 2
    hook = model.stack.blocks[0].attention.register_forward_hook(lambda *_: seen.append(1))
    assert (count(), len(seen)) == (1, 1)
    hook.remove()
    model.stack.blocks[1].mlp.down.bias.requires_grad_(False)
    assert count() == 1
    model.stack.blocks[1].mlp.down.bias.requires_grad_(True)
    with Watching():
        assert count() == 0
    cache = KVCache(2, 6, 4, 8, 20)
    assert runs(monkeypatch, lambda: model(tokens, cache=cache)) == 0  # with gradients
    model.stack.requires_grad_(False)
    assert count() == 0  # which only pass through
    with torch.no_grad():
        assert runs(monkeypatch, lambda: model(tokens)) == 2
    adapters.put_on(model, AdapterSpec(kind="lora", rank=2, targets=("q",)))
    assert count() == 0


def test_larger_streams_go_by_the_modules(monkeypatch: pytest.MonkeyPatch):
    """There the calls are no longer seen beside the kernels, and autograd frees a block's values one by one."""
    model, tokens = model_of(), tokens_of(whole_block.LARGEST // 32 // 20 + 1)
    with torch.no_grad():
        assert runs(monkeypatch, lambda: model(tokens)) == 0
        assert runs(monkeypatch, lambda: model(tokens[:-1])) == 2
