"""attention_paged: one token a sequence over a cache in shuffled pages; equal lengths and lengths from 1/8 of it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.case import ON_GPU, PLAIN, Callables, Case, Cost, Target

PAGE = 16


@dataclass(frozen=True)
class Shape:
    """B sequences of at most S keys, H query and Hkv key heads of size D."""

    B: int
    S: int
    H: int
    Hkv: int
    D: int
    ragged: bool = False

    @property
    def lengths(self) -> list[int]:
        """S each, or evenly from S / 8 to S."""
        least = self.S // 8 if self.ragged else self.S
        steps = max(self.B - 1, 1)
        return [least + (self.S - least) * (self.B - 1 - i) // steps for i in range(self.B)]

    @property
    def label(self) -> str:
        return f"B{self.B}_H{self.H}_Hkv{self.Hkv}_S{self.S}_D{self.D}" + "_ragged" * self.ragged


def _setup(shape: Shape) -> Callable[[Target], Callables]:
    def setup(target: Target) -> Callables:
        import torch

        from gptcore.ops.attention import attention
        from gptcore.ops.attention_paged import attention_paged

        blocks = shape.S // PAGE
        q = target.randn(shape.B, 1, shape.H, shape.D)
        k, v = (target.randn(shape.B * blocks, PAGE, shape.Hkv, shape.D) for _ in range(2))
        order = target.randn(shape.B * blocks, dtype="float32").argsort()
        table = order.int().view(shape.B, blocks)
        lengths = torch.tensor(shape.lengths, dtype=torch.int32, device=target.device)
        seen = (torch.arange(shape.S, device=target.device) < lengths[:, None])[:, None, None]

        def sdpa(q: Any, k: Any, v: Any) -> Any:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            mask = seen if shape.ragged else None
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            return out.transpose(1, 2)

        rows = [x[table.long()].flatten(1, 2) for x in (k, v)]
        functions = {
            "gptcore": lambda: attention_paged(q, k, v, table, lengths, causal=True),
            "torch_gather_eager": lambda: sdpa(q, *(x[table.long()].flatten(1, 2) for x in (k, v))),
            "torch_in_row_eager": lambda: sdpa(q, *rows),
        }
        if not shape.ragged:
            functions[PLAIN] = lambda: attention(q, *rows, causal=True)
        return functions

    return setup


def _cost(shape: Shape) -> Callable[[int], Cost]:
    keys, queries = sum(shape.lengths), shape.B * shape.H * shape.D

    def cost(element: int) -> Cost:
        read = (queries + 2 * keys * shape.Hkv * shape.D) * element
        return Cost(4.0 * shape.D * shape.H * keys, read, queries * element)

    return cost


CASES = [
    Case(
        f"attention_paged/{shape.label}/forward", _setup(shape), _cost(shape), quick=False, devices=devices,
        dtypes=("bfloat16",) if devices == ON_GPU else ("float32", "bfloat16"),
        footnotes={"torch_in_row_eager": "its keys lie in rows already"},
    )
    for shape, devices in (
        (Shape(8, 4096, 32, 8, 128), ("cpu",)),
        (Shape(8, 4096, 32, 8, 128, ragged=True), ("cpu",)),
        (Shape(8, 1024, 12, 12, 64), ("cpu",)),
        (Shape(32, 8192, 32, 8, 128), ON_GPU),
        (Shape(32, 8192, 32, 8, 128, ragged=True), ON_GPU),
    )
]  # fmt: skip
