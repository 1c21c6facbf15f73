"""Optimizers over slices of parameters: the norm of more gradients than theirs, and the bits of the whole."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gptcore import ops
from gptcore.optim import SGD, Adafactor, Adam, AdamW, AdamW8bit
from gptcore.optim.fused import FusedOptimizer
from gptcore.optim.slices import BlockSums, Whole, join_blocks, row_block, whole_of

OPTIMIZERS: dict[str, Callable[..., FusedOptimizer]] = {
    "adam": Adam,
    "adam_amsgrad": lambda p, **o: Adam(p, amsgrad=True, weight_decay=0.1, **o),
    "adamw": AdamW,
    "adamw_split": lambda p, **o: AdamW(p, split_master=True, **o),
    "sgd": lambda p, **o: SGD(p, momentum=0.9, **o),
    "sgd_unchecked": lambda p, **o: SGD(p, check_finite=False, **o),
    "adamw_8bit": AdamW8bit,
    "adamw_8bit_low": lambda p, **o: AdamW8bit(p, master_weights=False, seed=5, **o),
    **{
        f"adafactor_{variant}": lambda p, variant=variant, **o: Adafactor(p, variant=variant, **o)
        for variant in ("torch", "paper", "hf", "palm")
    },
}
SHAPES = [(40, 128), (4096,), (77,), (3, 130, 11)]


def make_params(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def set_grads(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def everything(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    states = optimizer.state_dict()["state"].values()
    return [p.detach().clone() for p in params] + [t.clone() for s in states for t in s.values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- step(grad_norm=) ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_of_more_gradients_clips_these(name: str, dtype: torch.dtype) -> None:
    """Parameters shared out between two optimizers, with the norm of all, go where one optimizer takes them."""
    alone, shared = make_params(dtype), make_params(dtype)
    for number, p in enumerate(shared if name.startswith("adamw_8bit") else []):
        # Its place in the list of all, which without masters is part of the rounding.
        p.whole = Whole(p.numel(), tuple(p.shape), 0, number)  # type: ignore[attr-defined]
    one = OPTIMIZERS[name](alone, max_norm=0.5)
    two = [OPTIMIZERS[name](shared[i::2], max_norm=0.5) for i in range(2)]
    for step in range(3):
        set_grads(alone, step)
        set_grads(shared, step)
        norm = ops.grad_norm([p.grad for p in shared], 2.0)
        one.step(grad_scale=2.0, grad_norm=norm)
        for optimizer in two:
            optimizer.step(grad_scale=2.0, grad_norm=norm)
            assert optimizer.last_grad_norm == one.last_grad_norm == norm[0] > 0.5
            assert optimizer.found_inf is False
    assert same([p.detach() for p in alone], [p.detach() for p in shared])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_norm_that_the_optimizer_would_take_itself_changes_nothing(name: str) -> None:
    if name == "sgd_unchecked":
        pytest.skip("takes no norm where max_norm is None, and all others are tested with one")
    params, twin = make_params(), make_params()
    own, given = OPTIMIZERS[name](params, max_norm=0.5), OPTIMIZERS[name](twin, max_norm=0.5)
    for step in range(2):
        set_grads(params, step)
        set_grads(twin, step)
        own.step()
        assert own.last_grad_norm is not None
        given.step(grad_norm=(own.last_grad_norm, False))
    for p, q in zip(params, twin, strict=True):
        # Adafactor takes RMS(U) by another way where it knows the norm, the others have the same bits.
        torch.testing.assert_close(p, q, rtol=1e-6 if name.startswith("adafactor") else 0, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_written_where_others_found_infinities(name: str, dtype: torch.dtype) -> None:
    params = make_params(dtype)
    optimizer = OPTIMIZERS[name](params)
    set_grads(params, 0)
    optimizer.step()
    before = everything(optimizer, params)
    set_grads(params, 1)
    optimizer.step(grad_norm=(math.nan, True))
    assert optimizer.found_inf and optimizer.last_grad_norm is not None
    assert math.isnan(optimizer.last_grad_norm)
    assert same(before, everything(optimizer, params))


def test_an_optimizer_of_no_gradients_reports_the_norm() -> None:
    optimizer = AdamW(make_params())
    optimizer.step(grad_norm=(3.0, False))
    assert optimizer.last_grad_norm == 3.0 and not optimizer.found_inf


@pytest.mark.parametrize("norm", [math.inf, math.nan, -1.0])
def test_a_norm_that_cannot_be_is_refused(norm: float) -> None:
    params = make_params()
    optimizer = AdamW(params)
    set_grads(params, 0)
    before = everything(optimizer, params)
    with pytest.raises(ValueError, match="AdamW: argument 'grad_norm'.*finite norm"):
        optimizer.step(grad_norm=(norm, False))
    with pytest.raises(ValueError, match="AdamW: argument 'grad_norm'.*closure"):
        optimizer.step(lambda: 0.0, grad_norm=(1.0, False))
    assert same(before, everything(optimizer, params))


# --- what a slice knows of its whole -------------------------------------------------------------------------------


def test_a_parameter_without_the_attribute_is_whole() -> None:
    p = torch.nn.Parameter(torch.zeros(3, 5))
    assert whole_of(p, 7) == Whole(15, (3, 5), 0, 7)
    p.whole = Whole(100, (20, 5), 30, 2)  # type: ignore[attr-defined]
    assert whole_of(p, 7) == Whole(100, (20, 5), 30, 2)


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 768, 50257])
@pytest.mark.parametrize("cols", [0, 1, 3, 96, 256, 768, 3072])
def test_blocks_of_rows(rows: int, cols: int) -> None:
    block = row_block((rows, cols))
    assert block >= 1 and block * cols % 1024 == 0 and -(-rows // block) <= 16
    assert row_block((5, rows, cols)) == block  # matrices of a batch on their own
    # No larger than it must be: the fewest rows that make whole 1024s, or so many that fewer make 17 blocks.
    least = 1024 // math.gcd(cols, 1024)
    assert block == least or -(-rows // (block - least)) > 16


def test_blocks_of_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="row_block: argument 'shape': got \\(7,\\)"):
        row_block((7,))


# --- sums of blocks ------------------------------------------------------------------------------------------------


def test_sums_of_blocks_are_joined_by_their_wholes() -> None:
    def entry(number: int, first: int, count: int, values: list[float]) -> BlockSums:
        whole = Whole(4096, (4096,), 1024 * first, number)
        return BlockSums(whole, first, count, torch.tensor(values, dtype=torch.float64).view(-1, 1))

    blocks = [entry(0, 2, 3, [3.0]), entry(1, 0, 1, [9.0]), entry(0, 0, 3, [1.0, 2.0]), entry(0, 2, 3, [])]
    joined = [x.flatten().tolist() for x in join_blocks(blocks)]
    assert joined == [[1.0, 2.0, 3.0], [9.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    for wrong in (blocks[:2], [*blocks, blocks[0]], [blocks[0], entry(0, 0, 3, [1.0])]):
        with pytest.raises(
            ValueError, match="join_blocks: argument 'blocks': got .* of the 3 blocks of parameter 0"
        ):
            join_blocks(wrong)


# --- AdamW8bit over slices -----------------------------------------------------------------------------------------


def cut_to_slices(params: list[torch.nn.Parameter], cuts: list[list[int]]) -> list[list[torch.nn.Parameter]]:
    """The slices of each parameter, flattened, that each owner has: cuts[i] are the ends of parameter i's."""
    owned: list[list[torch.nn.Parameter]] = [[] for _ in cuts[0][1:]]
    for number, (p, ends) in enumerate(zip(params, cuts, strict=True)):
        for own, (start, stop) in zip(owned, itertools.pairwise(ends), strict=True):
            own.append(torch.nn.Parameter(p.detach().view(-1)[start:stop].clone()))
            own[-1].whole = Whole(p.numel(), tuple(p.shape), start, number)  # type: ignore[attr-defined]
    return owned


@pytest.mark.parametrize("cuts", [
    [[0, 5120, 5120], [0, 0, 4096], [0, 77, 77], [0, 256, 4290]],
    [[0, 1024, 5120, 5120], [0, 1024, 2048, 4096], [0, 0, 0, 77], [0, 1280, 3840, 4290]],
])  # fmt: skip
@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_8bit_low"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_have_the_bits_of_the_whole(name: str, dtype: torch.dtype, cuts: list[list[int]]) -> None:
    whole = make_params(dtype)
    owned = cut_to_slices(whole, cuts)
    one = OPTIMIZERS[name](whole, max_norm=0.5)
    owners = [OPTIMIZERS[name](own, max_norm=0.5) for own in owned]
    for step in range(4):
        set_grads(whole, step)
        for p, *slices in zip(whole, *owned, strict=True):
            for s in slices:
                start = s.whole.start
                s.grad = p.grad.view(-1)[start : start + s.numel()].clone()
        norm = ops.grad_norm([p.grad for p in whole])
        one.step(grad_norm=norm)
        for i, owner in enumerate(owners):
            owner.step(grad_norm=norm)
            if step == 1:  # state that went to a file goes on as it was
                owners[i] = OPTIMIZERS[name](owned[i], max_norm=0.5)
                owners[i].load_state_dict(copy.deepcopy(owner.state_dict()))
    for p, *slices in zip(whole, *owned, strict=True):
        assert torch.equal(p.detach().view(-1), torch.cat([s.detach() for s in slices]))
        states = [next(o for o in owners if s in o.state).state[s] for s in slices]
        for key, value in one.state[p].items():
            if key != "step":
                pieces: list[Any] = [state[key] for state in states]
                assert torch.equal(value.view(-1), torch.cat(pieces)), key


def test_a_slice_of_a_large_parameter_keeps_codes_however_short() -> None:
    p = torch.nn.Parameter(torch.ones(256))
    p.whole = Whole(5000, (5000,), 512, 0)  # type: ignore[attr-defined]
    p.grad = torch.ones(256)
    optimizer = AdamW8bit([p])
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.uint8


@pytest.mark.parametrize(("start", "size"), [(128, 256), (256, 300)])
def test_slices_across_blocks_are_refused(start: int, size: int) -> None:
    p = torch.nn.Parameter(torch.ones(size))
    p.whole = Whole(5000, (5000,), start, 0)  # type: ignore[attr-defined]
    p.grad = torch.ones(size)
    with pytest.raises(
        ValueError, match=f"AdamW8bit: .*slice \\[{start}, {start + size}\\).*multiples of 256"
    ):
        AdamW8bit([p]).step()
