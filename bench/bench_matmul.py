"""Products with small M in fixed order, and bf16 x bf16 accumulated into f32."""

from __future__ import annotations

from collections.abc import Callable

from bench.case import Callables, Case, Cost, Target, compiled


def _setup_small(m: int, k: int, n: int) -> Callable[[Target], Callables]:
    """x (M, K) by a weight stored (N, K), as a linear layer has it in decoding."""

    def setup(target: Target) -> Callables:
        import torch

        from gptcore.ops.matmul import matmul

        x, weight = target.randn(m, k), target.randn(n, k, scale=k**-0.5)
        linear = torch.nn.functional.linear
        linear_compiled = compiled(linear)
        return {
            "gptcore": lambda: matmul(x, weight, transpose_b=True),
            "torch_eager": lambda: linear(x, weight),
            "torch_compiled": lambda: linear_compiled(x, weight),
        }

    return setup


def _setup_accumulate(k: int, m: int, n: int) -> Callable[[Target], Callables]:
    """The weight gradient dW (M, N) += dy^T (K, M) x (K, N) over K tokens, summed in f32.

    The participants start from different sums after the first call, so each has its own output.
    """

    def setup(target: Target) -> Callables:
        import torch

        from gptcore.ops.matmul import matmul

        dy, x = target.randn(k, m), target.randn(k, n)
        outs = {name: torch.zeros(m, n) for name in ("ours", "f32", "rounded")}

        def in_f32() -> torch.Tensor:
            return torch.addmm(outs["f32"], dy.float().t(), x.float(), out=outs["f32"])

        def rounded() -> torch.Tensor:
            return outs["rounded"].add_(torch.mm(dy.t(), x))

        rounded_compiled = compiled(rounded)
        return {
            "gptcore": lambda: matmul(dy, x, out=outs["ours"], accumulate=True, transpose_a=True),
            "torch_f32_eager": in_f32,
            "torch_rounded_eager": rounded,
            "torch_rounded_compiled": rounded_compiled,
        }

    return setup


def _cost_small(m: int, k: int, n: int) -> Callable[[int], Cost]:
    return lambda element: Cost(2.0 * m * k * n, (m * k + k * n) * element, m * n * element)


def _cost_accumulate(k: int, m: int, n: int) -> Callable[[int], Cost]:
    """The f32 sum is read and written."""
    return lambda element: Cost(2.0 * m * k * n, k * (m + n) * element + 4 * m * n, 4 * m * n)


# (M, K, N): GPT-2's feed-forward, its head, LLaMA 7B's projections.
SMALL = ((1, 768, 3072), (8, 768, 3072), (64, 64, 64), (64, 768, 3072), (1, 768, 50257), (8, 4096, 4096))
# (K tokens, M, N): weight gradients of GPT-2 124M at B2 T512.
ACCUMULATE = ((1024, 2304, 768), (1024, 768, 768), (1024, 3072, 768), (1024, 768, 3072), (1024, 50257, 768))
ROUNDED = "rounds each product to bf16 before it is added: the sum loses what accumulation in f32 is for"


def _cases() -> list[Case]:
    cases = [
        Case(
            f"matmul/M{m}_K{k}_N{n}/forward",
            _setup_small(m, k, n),
            _cost_small(m, k, n),
            small=m * k * n < 1 << 19,
            quick=n <= 3072,
        )
        for m, k, n in SMALL
    ]
    cases += [
        Case(
            f"matmul/accumulate_K{k}_M{m}_N{n}/forward",
            _setup_accumulate(k, m, n),
            _cost_accumulate(k, m, n),
            dtypes=("bfloat16",),
            quick=m == 3072,
            footnotes={"torch_rounded_eager": ROUNDED, "torch_rounded_compiled": ROUNDED},
        )
        for k, m, n in ACCUMULATE
    ]
    return cases


CASES = _cases()
