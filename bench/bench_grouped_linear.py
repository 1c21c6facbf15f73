"""All experts' products of a mixture-of-experts layer, against loops over them and one dense product as a limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.case import DTYPES, ON_GPU, Callables, Case, Cost, Target, with_gradient

TOKENS, TOP_K = 4096, 2
# (Cin, Cout) of the packed gate and up projection, and of the down projection of a layer of C 768, F 3072.
WIDTHS = ((768, 6144), (3072, 768))
# Of Mixtral 8x7B, and of 64 small experts.
GPU_TOKENS, GPU_WIDTHS = 16384, {8: ((4096, 28672), (14336, 4096)), 64: ((2048, 2816), (1408, 2048))}
# Experts, and how rows are spread: about evenly, as a balanced router does, or by Zipf's law.
SPREADS = ((8, "even"), (64, "even"), (64, "zipf"))
DENSE = "one dense product of as many flops: no experts, a weight E times smaller; the limit"


def group_sizes(experts: int, spread: str, rows: int = TOKENS * TOP_K) -> list[int]:
    """Rows of each expert: a draw of ``rows`` from a uniform or Zipf's distribution, always the same."""
    import torch

    odds = torch.ones(experts) if spread == "even" else 1 / torch.arange(1, experts + 1)
    draws = torch.multinomial(odds, rows, replacement=True, generator=torch.Generator().manual_seed(1))
    return torch.bincount(draws, minlength=experts).tolist()


def _loop(sizes: list[int]) -> Callable[[Any, Any], Any]:
    import torch

    def run(x: Any, weight: Any) -> Any:
        pairs = zip(x.split(sizes), weight.unbind(0), strict=True)
        return torch.cat([torch.mm(rows, w.t()) for rows, w in pairs])

    return run


def _setup(
    tokens: int, experts: int, spread: str, inner: int, outer: int, backward: bool
) -> Callable[[Target], Callables]:
    def setup(target: Target) -> Callables:
        import torch

        from gptcore.ops import grouped_linear

        sizes = group_sizes(experts, spread, tokens * TOP_K)
        offsets = torch.tensor([0, *sizes]).cumsum(0).to(target.device, torch.int32)
        x = target.randn(sum(sizes), inner, grad=backward)
        weight = target.randn(experts, outer, inner, scale=inner**-0.5, grad=backward)
        dense = target.randn(outer, inner, scale=inner**-0.5, grad=backward)
        grad = target.randn(sum(sizes), outer)

        def call(function: Callable[..., Any], *inputs: Any) -> Callable[[], Any]:
            return with_gradient(function, inputs, grad) if backward else lambda: function(*inputs)

        participants = {
            "gptcore": call(lambda x, w: grouped_linear(x, w, offsets), x, weight),
            "torch_loop_eager": call(_loop(sizes), x, weight),
        }
        grouped_mm = getattr(torch.nn.functional, "grouped_mm", None)
        if grouped_mm is not None:
            ends = offsets[1:].contiguous()
            participants["torch_grouped_mm_eager"] = call(
                lambda x, w: grouped_mm(x, w.mT, offs=ends), x, weight
            )
        participants["torch_dense_eager"] = call(lambda x, w: torch.mm(x, w.t()), x, dense)
        return participants

    return setup


def _cost(tokens: int, experts: int, inner: int, outer: int, backward: bool) -> Callable[[int], Cost]:
    rows = tokens * TOP_K

    def cost(element: int) -> Cost:
        weight, x, y = experts * inner * outer * element, rows * inner * element, rows * outer * element
        if not backward:
            return Cost(2.0 * rows * inner * outer, weight + x, y)
        return Cost(6.0 * rows * inner * outer, 2 * weight + 2 * x + y, weight + x + y)

    return cost


def _case(
    tokens: int, experts: int, spread: str, inner: int, outer: int, backward: bool, devices: Sequence[str]
) -> Case:
    direction, rows = "forward_backward" if backward else "forward", "" if tokens == TOKENS else f"_N{tokens}"
    return Case(
        f"grouped_linear/E{experts}_{spread}_Cin{inner}_Cout{outer}{rows}/{direction}",
        _setup(tokens, experts, spread, inner, outer, backward),
        _cost(tokens, experts, inner, outer, backward),
        repeats=10,
        quick="bfloat16" if inner == 768 and spread == "even" else False,
        footnotes={"torch_dense_eager": DENSE},
        dtypes=DTYPES if tokens == TOKENS else ("bfloat16",),
        devices=devices,
    )


CASES = [
    _case(TOKENS, experts, spread, inner, outer, backward, ("cpu",))
    for backward in (False, True)
    for experts, spread in SPREADS
    for inner, outer in WIDTHS
]
CASES += [
    _case(GPU_TOKENS, experts, spread, inner, outer, backward, ON_GPU)
    for backward in (False, True)
    for experts, spread in SPREADS
    for inner, outer in GPU_WIDTHS[experts]
]
