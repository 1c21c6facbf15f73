"""Activation checkpointing: the same bits, under torch.compile and torch.func too, and memory as predicted."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore.errors import UserError
from gptcore.models import GPT, GPTConfig
from gptcore.train import from_table
from tests.models.cases import CASES, model_of, tokens_of

DOCUMENTS = torch.tensor([0, 5, 14, 17, 34], dtype=torch.int32)
# What draws random numbers: dropout in all three places, noise, jitter, places and choices of a router.
RANDOM = {
    "dropout": 0.1,
    "attention": {"dropout": 0.1},
    "moe": {
        "num_experts": 4, "top_k": 2, "every": 2, "capacity_factor": 1.0, "noise": True, "jitter": 0.01,
        "priority": "random", "second_choice": "gshard", "dropout": 0.1, "balance": "shazeer",
    },
}  # fmt: skip


def _trained(model: GPT, kind: str, every: int = 1, **options: Any) -> dict[str, torch.Tensor]:
    """Loss, statistics of the routers, and gradients of one backward pass."""
    model.checkpoint_activations(kind, every=every).train()
    tokens, targets = tokens_of(model.config)
    torch.manual_seed(4)
    model.zero_grad()
    out = model(tokens, targets, **options)
    out.total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for i, layer in enumerate(out.routing):
        found |= {f"{i}.{name}": value.detach() for name, value in layer._asdict().items()}
    # What comes next from the generator: backward must leave it where it was.
    return {**found, "loss": out.total.detach(), "logprobs": out.logprobs, "next": torch.rand(3)}


def _compare(model: GPT, **options: Any) -> None:
    expected = _trained(model, "none", **options)
    for kind, every in (("block", 1), ("selective", 1), ("block", 2)):
        got = _trained(model, kind, every, **options)
        assert got.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(got[name], expected[name])] == [], (kind, every)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_gradients_have_the_same_bits(name: str, dtype: torch.dtype) -> None:
    _compare(model_of(CASES[name], dtype))


@pytest.mark.parametrize("name", ["gpt2", "llama3", "gemma", "experts"])
def test_with_documents(name: str) -> None:
    _compare(model_of(CASES[name]), cu_seqlens=DOCUMENTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_random_numbers_are_drawn_again(dtype: torch.dtype) -> None:
    model = model_of(CASES["gpt2"].merged(RANDOM), dtype)
    _compare(model)
    _compare(model, cu_seqlens=DOCUMENTS)


@pytest.mark.parametrize("kind", ["block", "selective"])
@pytest.mark.parametrize("name", ["gpt2", "llama3", "experts", "encoder"])
def test_torch_compile(name: str, kind: str) -> None:
    """One graph; the library may order small products otherwise there, as without checkpointing."""
    torch._dynamo.reset()
    model = model_of(CASES[name].merged({"num_layers": 2}))
    tokens, targets = tokens_of(model.config)
    expected = _trained(model, "none")
    model.checkpoint_activations(kind).zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(tokens, targets).total.backward()
    for key, p in model.named_parameters():
        difference = (p.grad.double() - expected[key].double()).norm()
        # 1e-5 of the model's largest gradients for those that are 0 but for rounding: a key norm's bias
        assert difference <= 2e-5 * expected[key].double().norm() + 1e-7, key


def test_torch_func_and_generation_go_without() -> None:
    """torch.func has no saved tensors to hook, and nothing is kept without gradients."""
    model = model_of(CASES["gpt2"]).checkpoint_activations("block")
    tokens, targets = tokens_of(model.config)
    parameters = dict(model.named_parameters())

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, values, (tokens, targets)).loss

    got = torch.func.grad(loss)(parameters)
    expected = _trained(model, "none")
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    model.checkpoint_activations("block")
    with torch.no_grad():
        assert torch.equal(model(tokens, targets).logprobs, expected["logprobs"])


_FIELDS = (
    "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
)  # fmt: skip


# --- memory ----------------------------------------------------------------------------------------------------


class _Mallinfo(ctypes.Structure):
    """struct mallinfo2 of glibc 2.33 and later."""

    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


@pytest.fixture
def allocated() -> Iterator[Any]:
    """Bytes that malloc has given out in this process."""
    if platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("needs glibc's mallinfo2")
    question = ctypes.CDLL(None).mallinfo2
    question.restype = _Mallinfo

    def count() -> int:
        gc.collect()
        found = question()
        return int(found.uordblks + found.hblkhd)

    yield count


def _kept(model: GPT, kind: str, every: int, allocated: Any) -> float:
    """Bytes between forward and backward for each token of a layer, the head's share taken out by two depths."""
    tokens = torch.zeros(4, 512, dtype=torch.int64)
    held = []
    for layers in (2, 6):
        model = GPT(model.config.merged({"num_layers": layers}), dtype=model.head_weight.dtype)
        model.checkpoint_activations(kind, every=every)
        model(tokens, tokens).loss.backward()  # workspaces and gradients are there from now on
        before = allocated()
        out = model(tokens, tokens)
        held.append(allocated() - before)
        del out
    return (held[1] - held[0]) / 4 / tokens.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_bytes_between_forward_and_backward(dtype: torch.dtype, allocated: Any) -> None:
    """In elements for each token of a layer, C width and F = 4 C hidden, GPT-2's block.

    Everything: two sums of the stream and their norms, 4 C; q, k, v, 3 C; attention's output, C; before and after
    the activation, 2 F. Selective: what goes in, 2 C; q, k, v; attention's output and the product after it, 2 C;
    F. Whole blocks: what goes in. Beside them f32 statistics, 2 for each norm, 1 for each head; 3% for what does not
    grow with the tokens, such as the generator's state.
    """
    config = GPTConfig.from_dict(
        {
            "num_layers": 2,
            "width": 256,
            "vocab_size": 64,
            "context_length": 512,
            "attention": {"num_heads": 4},
        }
    )
    model, size = GPT(config, dtype=dtype), dtype.itemsize
    c, f, statistics = 256 * size, 1024 * size, 4 * (2 + 2 + 4)
    predicted = {
        ("none", 1): 8 * c + 2 * f + statistics,
        ("selective", 1): 7 * c + f + 4 * 4,
        ("block", 1): 2 * c,
    }
    # One of the two sums that go into a recomputed block is among what the block before it keeps.
    predicted["block", 2] = (predicted["none", 1] + predicted["block", 1] - c) / 2
    for (kind, every), expected in predicted.items():
        assert _kept(model, kind, every, allocated) == pytest.approx(expected, rel=0.03), (kind, every)


# --- settings --------------------------------------------------------------------------------------------------


def test_mistakes() -> None:
    model = model_of(CASES["gpt2"])
    with pytest.raises(UserError, match="unknown activation checkpointing 'blok'; did you mean 'block'"):
        model.checkpoint_activations("blok")
    with pytest.raises(
        ValueError, match="checkpoint_activations: argument 'every': got 0, expected 1 or more"
    ):
        model.checkpoint_activations("block", every=0)


def test_training_takes_it_from_the_config(tmp_path: Path) -> None:
    """The same weights with and without; refused for a model that has no blocks of ours."""
    from gptcore.train import run
    from tests.train.toy import TINY_GPT, Toy, ToyLoader, settings, train

    table = {"steps": 4, "model": {**TINY_GPT, "dropout": 0.1}}
    plain, _ = train(settings(tmp_path / "plain", **table))
    for kind, every in (("block", 2), ("selective", 1)):
        memory = {"activation_checkpointing": kind, "every": every}
        spared, _ = train(settings(tmp_path / kind, **table, memory=memory))
        assert spared.stack.checkpointing == (kind, every)
        assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), spared.parameters(), strict=True))
    config = from_table(settings(tmp_path / "toy", memory=memory))
    with pytest.raises(UserError, match="memory.activation_checkpointing: got selective, but Toy is no GPT"):
        run(config, model=Toy(), loader=ToyLoader(), measure_peak=False, quiet=True)
    with pytest.raises(UserError, match="memory.every: expected 1 or more, got 0"):
        from_table({"memory": {"every": 0}})
