"""gptcore.functional gives torch.nn.functional's results, errors included, on a grid of options."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as T
from hypothesis import given, settings
from hypothesis import strategies as st

import gptcore.functional as F
from gptcore import backend
from tests.tolerance import assert_close_to_exact, same_bits

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _fresh_report() -> None:
    backend.reset_report()


def _like_torch(
    name: str, tensors: list[torch.Tensor], *args: Any, terms: int = 64, summand: float = 0.0, **keywords: Any
) -> None:
    """Value and gradients of F.<name>(*tensors, ...) against torch's in float64, torch's own error as the yardstick."""
    ours, theirs = getattr(F, name), getattr(T, name)

    def run(function: Callable[..., Any], dtype: torch.dtype | None) -> list[torch.Tensor]:
        leaves = [t.to(dtype or t.dtype).requires_grad_() if t.is_floating_point() else t for t in tensors]
        exact = {
            key: x.to(dtype or x.dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for key, x in keywords.items()
        }
        out = function(*leaves, *args, **exact)
        torch.manual_seed(1)
        grad = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
        wanted = [t for t in leaves if t.is_floating_point()]
        return [out.detach(), *torch.autograd.grad(out, wanted, grad)]

    got, exact, twin = run(ours, None), run(theirs, torch.float64), run(theirs, None)
    for i, (a, b, c) in enumerate(zip(got, exact, twin, strict=True)):
        assert a.dtype == c.dtype and a.shape == c.shape
        assert_close_to_exact(a, b, c, terms=terms, summand=summand if i else 0.0, what=f"{name} result {i}")


def _same_error(name: str, *args: Any, **keywords: Any) -> None:
    with pytest.raises(Exception) as theirs:
        getattr(T, name)(*args, **keywords)
    with pytest.raises(type(theirs.value)) as ours:
        getattr(F, name)(*args, **keywords)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, dims", [((4, 9), 1), ((2, 3, 16), 1), ((2, 3, 4), 2), ((6,), 1)])
def test_norms(dtype: torch.dtype, shape: tuple[int, ...], dims: int) -> None:
    x, normalized = torch.randn(shape).to(dtype), shape[-dims:]
    weight, bias = torch.randn(normalized).to(dtype), torch.randn(normalized).to(dtype)
    _like_torch("layer_norm", [x], normalized)
    _like_torch("rms_norm", [x], normalized)
    for eps in (1e-5, 1e-2):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()]
        got = F.layer_norm(leaves[0], normalized, leaves[1], leaves[2], eps)
        exact = T.layer_norm(x.double(), normalized, weight.double(), bias.double(), eps)
        assert_close_to_exact(got.detach(), exact, T.layer_norm(x, normalized, weight, bias, eps), terms=64)
        got = F.rms_norm(leaves[0], normalized, leaves[1], eps)
        exact = T.rms_norm(x.double(), normalized, weight.double(), eps)
        assert_close_to_exact(got.detach(), exact, T.rms_norm(x, normalized, weight, eps), terms=64)
    assert backend.report() == {}


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_norms_add_an_offset_to_their_weight(name: str) -> None:
    ours, theirs = getattr(F, name), getattr(T, name)
    for shape in [(24,), (4, 6)]:
        x, weight = torch.randn(5, *shape), torch.randn(shape)
        assert same_bits(ours(x, shape, weight, weight_offset=1.0), ours(x, shape, weight + 1))
        wide = ours(x.double(), shape, weight.double(), weight_offset=1.0)  # by torch
        assert same_bits(wide, theirs(x.double(), shape, weight.double() + 1))
        for dtype in (torch.float32, torch.float64):
            with pytest.raises(
                ValueError, match=f"{name}: argument 'weight_offset': got 1.*without 'weight'"
            ):
                ours(x.to(dtype), shape, weight_offset=1.0)
    backend.reset_report()


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype: torch.dtype) -> None:
    x = torch.randn(5, 33).to(dtype) * 3
    for approximate in ("none", "tanh"):
        _like_torch("gelu", [x], approximate=approximate)
    _like_torch("silu", [x])
    assert backend.report() == {}
    y = x.clone()
    assert F.silu(y, inplace=True) is y
    assert backend.report() == {"silu": {"inplace": 1}}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy(dtype: torch.dtype, reduction: str, label_smoothing: float) -> None:
    logits, target = torch.randn(7, 33).to(dtype) * 4, torch.randint(0, 33, (7,))
    target[2] = target[5] = -100
    keywords = {"reduction": reduction, "label_smoothing": label_smoothing}
    _like_torch("cross_entropy", [logits, target], **keywords)
    target[2] = target[5] = 3
    _like_torch("cross_entropy", [logits, target], ignore_index=3, **keywords)
    assert backend.report() == {}


def test_cross_entropy_forms_that_go_to_torch() -> None:
    logits = torch.randn(4, 5, 3)
    _like_torch("cross_entropy", [logits, torch.randint(0, 5, (4, 3))])
    _like_torch("cross_entropy", [torch.randn(4, 5), torch.rand(4, 5)])
    weights = torch.rand(5)
    target = torch.randint(0, 5, (4,))
    x = torch.randn(4, 5)
    assert torch.equal(F.cross_entropy(x, target, weights), T.cross_entropy(x, target, weights))
    assert set(backend.report()) == {"cross_entropy"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(dtype: torch.dtype) -> None:
    weight = torch.randn(11, 6).to(dtype)
    for ids in (torch.randint(0, 11, (4, 5)), torch.tensor(3), torch.empty(0, 2, dtype=torch.int64)):
        leaf, twin = weight.clone().requires_grad_(), weight.clone().requires_grad_()
        got, expected = F.embedding(ids, leaf), T.embedding(ids, twin)
        assert torch.equal(got, expected)
        got.float().square().sum().backward()
        expected.float().square().sum().backward()
        assert_close_to_exact(leaf.grad, twin.grad.double(), twin.grad, terms=20)
    assert backend.report() == {}
    ids = torch.tensor([1, 2, 1])
    assert torch.equal(F.embedding(ids, weight, padding_idx=1), T.embedding(ids, weight, padding_idx=1))
    assert backend.report() == {"embedding": {"padding_idx": 1}}


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype: torch.dtype) -> None:
    weight, bias = torch.randn(9, 17).to(dtype), torch.randn(9).to(dtype)
    for shape in [(3, 17), (2, 3, 17), (200, 17), (17,)]:
        _like_torch("linear", [torch.randn(shape).to(dtype), weight, bias])
        with torch.no_grad():
            x = torch.randn(shape).to(dtype)
            exact = T.linear(x.double(), weight.double(), bias.double())
            assert_close_to_exact(F.linear(x, weight, bias), exact, T.linear(x, weight, bias), terms=17)
    assert backend.report().keys() == {"linear"} and backend.report()["linear"].keys() == {F.PLAIN_GEMM}


def test_linear_row_has_the_same_bits_in_every_small_batch() -> None:
    x, weight = torch.randn(40, 96), torch.randn(50, 96)
    with torch.no_grad():
        whole = F.linear(x, weight)
        for row in range(0, 40, 7):
            assert torch.equal(whole[row : row + 1], F.linear(x[row : row + 1], weight))


ATTENTION_SHAPES = [
    (2, 3, 3, 8, 8, 16),
    (1, 4, 2, 7, 7, 32),
    (2, 2, 1, 5, 9, 8),
    (1, 2, 2, 9, 5, 24),
    (1, 1, 1, 1, 33, 64),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", ATTENTION_SHAPES)
@pytest.mark.parametrize("is_causal, scale", [(False, None), (True, None), (True, 0.3)])
def test_attention(dtype: torch.dtype, sizes: tuple[int, ...], is_causal: bool, scale: float | None) -> None:
    batch, heads, kv_heads, length, source, size = sizes
    q = torch.randn(batch, heads, length, size).to(dtype)
    k, v = (torch.randn(batch, kv_heads, source, size).to(dtype) for _ in range(2))
    keywords = {"is_causal": is_causal, "scale": scale, "enable_gqa": heads != kv_heads}
    # Where a query sees one key, its gradient cancels to zero: what is added up is (dout v) k scale, here at most
    # about size * 3 * 3 * 3 * scale.
    summand = 27 * size * (scale or size**-0.5)
    _like_torch(
        "scaled_dot_product_attention", [q, k, v], terms=max(source, size), summand=summand, **keywords
    )
    assert backend.report() == {}


def test_attention_forms_that_go_to_torch() -> None:
    q, k, v = (torch.randn(2, 3, 6, 8) for _ in range(3))
    _like_torch("scaled_dot_product_attention", [q, k, v], attn_mask=torch.randn(6, 1, requires_grad=True))
    _like_torch("scaled_dot_product_attention", [q, k, torch.randn(2, 3, 6, 5)])
    three = [torch.randn(4, 6, 8) for _ in range(3)]
    _like_torch("scaled_dot_product_attention", three, is_causal=True)
    reasons = backend.report()["scaled_dot_product_attention"]
    broadcast = "gradient of an attn_mask that is broadcast over queries or keys"
    assert {broadcast, "shapes of query, key and value"} == set(reasons)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(6, 9), (1, 9), (6, 1), (1, 1, 6, 9), (2, 1, 1, 9), (4, 6, 9), (2, 4, 6, 9)]
)
def test_attention_masks(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    q = torch.randn(2, 4, 6, 16).to(dtype)
    k, v = (torch.randn(2, 4, 9, 16).to(dtype) for _ in range(2))
    mask = torch.rand(shape) > 0.3
    mask[..., 0] = True
    for attn_mask in (mask, torch.randn(shape), torch.randn(shape).to(dtype)):
        _like_torch(
            "scaled_dot_product_attention", [q, k, v], terms=16, summand=27 * 16**0.5, attn_mask=attn_mask
        )
    assert backend.report() == {}


def test_attention_with_a_row_that_sees_nothing_is_torchs() -> None:
    q, k, v = (torch.randn(2, 3, 6, 8) for _ in range(3))
    mask = torch.rand(6, 6) > 0.3
    mask[2] = False
    for attn_mask in (mask, torch.zeros(6, 6).masked_fill(~mask, float("-inf"))):
        _like_torch("scaled_dot_product_attention", [q, k, v], attn_mask=attn_mask)


@pytest.mark.parametrize("shape", [(6, 9), (4, 6, 9), (2, 1, 6, 9), (2, 4, 6, 9)])
def test_attention_mask_gets_torchs_gradient(shape: tuple[int, ...]) -> None:
    q, k, v = (torch.randn(2, 4, n, 16) for n in (6, 9, 9))
    mask = torch.randn(shape, requires_grad=True)
    gradients = [
        torch.autograd.grad(f.scaled_dot_product_attention(q, k, v, mask).square().sum(), mask)[0]
        for f in (F, T)
    ]
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6)
    assert backend.report() == {}


def test_other_dtypes_and_functions_are_torchs() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(F.layer_norm(x, (8,)), T.layer_norm(x, (8,)))
    assert torch.equal(F.relu(x), T.relu(x)) and F.pad is T.pad
    assert backend.report() == {"layer_norm": {"dtype torch.float64": 1}}
    with pytest.raises(AttributeError):
        _ = F.no_such_function


BAD_CALLS = [
    ("layer_norm", (torch.randn(3, 4), (5,)), {}),
    ("layer_norm", (torch.randn(3, 4), (4,), torch.randn(3)), {}),
    ("layer_norm", (torch.randint(0, 3, (3, 4)), (4,)), {}),
    ("rms_norm", (torch.randn(3, 4), (5,)), {}),
    ("rms_norm", (torch.randn(3, 4), (4,), torch.randn(5)), {}),
    ("gelu", (torch.randn(3),), {"approximate": "sigmoid"}),
    ("gelu", ([1.0],), {}),
    ("silu", (torch.randint(0, 3, (3,)),), {}),
    ("linear", (torch.randn(3, 4), torch.randn(5, 6)), {}),
    ("linear", (torch.randn(3, 4), torch.randn(5, 4), torch.randn(4)), {}),
    ("linear", (torch.randn(3, 4), torch.randn(5, 4).bfloat16()), {}),
    ("embedding", (torch.tensor([0, 11]), torch.randn(11, 2)), {}),
    ("embedding", (torch.tensor([-1]), torch.randn(11, 2)), {}),
    ("embedding", (torch.tensor([0.5]), torch.randn(11, 2)), {}),
    ("cross_entropy", (torch.randn(3, 4), torch.tensor([0, 1, 4])), {}),
    ("cross_entropy", (torch.randn(3, 4), torch.tensor([0, 1])), {}),
    ("cross_entropy", (torch.randn(3, 4), torch.tensor([0, 1, 2])), {"reduction": "median"}),
    ("cross_entropy", (torch.randn(3, 4), torch.tensor([0, 1, 2])), {"label_smoothing": 1.5}),
    ("cross_entropy", (torch.randn(3, 4), torch.tensor([0, 1, 2], dtype=torch.int32)), {}),
    ("scaled_dot_product_attention", tuple(torch.randn(1, h, 4, 8) for h in (3, 2, 2)), {}),
    ("scaled_dot_product_attention", tuple(torch.randn(1, 2, 4, d) for d in (8, 7, 8)), {}),
    (
        "scaled_dot_product_attention",
        (torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8).bfloat16(), torch.randn(1, 2, 4, 8)),
        {},
    ),
]


@pytest.mark.parametrize(
    "name, args, keywords", BAD_CALLS, ids=[f"{c[0]}-{i}" for i, c in enumerate(BAD_CALLS)]
)
def test_bad_input_raises_torchs_error(name: str, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    _same_error(name, *args, **keywords)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_calls_agree(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    rows, width = data.draw(st.integers(1, 9)), data.draw(st.integers(3, 40))
    x = torch.randn(rows, width).to(dtype)
    name = data.draw(
        st.sampled_from(["layer_norm", "rms_norm", "gelu", "silu", "cross_entropy", "linear", "attention"])
    )
    if name in ("layer_norm", "rms_norm"):
        # Rows of few elements give gradients that cancel; what is added up is gradient / deviation.
        spread = (
            x.double().square().mean(-1) if name == "rms_norm" else x.double().var(-1, correction=0)
        ) + 1e-5
        _like_torch(name, [x], (width,), terms=width, summand=4 * spread.min().item() ** -0.5)
    elif name in ("gelu", "silu"):
        _like_torch(name, [x])
    elif name == "linear":
        _like_torch(name, [x, torch.randn(data.draw(st.integers(1, 70)), width).to(dtype)], terms=width)
    elif name == "cross_entropy":
        _like_torch(
            name,
            [x, torch.randint(0, width, (rows,))],
            label_smoothing=data.draw(st.sampled_from([0.0, 0.3])),
        )
    else:
        shape = (data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)))
        length, source = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
        q = torch.randn(*shape, length, width).to(dtype)
        k, v = (torch.randn(*shape, source, width).to(dtype) for _ in range(2))
        causal = data.draw(st.booleans())
        _like_torch(
            "scaled_dot_product_attention",
            [q, k, v],
            terms=max(source, width),
            summand=27 * width**0.5,
            is_causal=causal,
        )


def test_every_combination_of_layouts_for_attention() -> None:
    # Transposed, sliced and contiguous views of the same numbers give the same bits.
    base = [torch.randn(2, 5, 3, 16) for _ in range(3)]
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2).contiguous() for x in base))
    for kinds in itertools.product(["view", "contiguous"], repeat=3):
        qkv = [x.transpose(1, 2) for x in base]
        qkv = [x if kind == "view" else x.contiguous() for x, kind in zip(qkv, kinds, strict=True)]
        assert torch.equal(F.scaled_dot_product_attention(*qkv), expected)
