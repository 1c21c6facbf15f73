"""attention: causal, full, windowed, grouped heads, packed documents, decoding, fused projection, dropout, patterns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from bench.case import DTYPES, ON_GPU, PLAIN, Callables, Case, Cost, Target, compiled, with_gradient


@dataclass(frozen=True)
class Shape:
    """B sequences of T queries and S keys, H query and Hkv key/value heads of size D."""

    B: int
    T: int
    H: int
    D: int
    Hkv: int | None = None
    S: int | None = None
    causal: bool = True
    window: int | None = None
    documents: int = 1
    soft_cap: float | None = None
    alibi: bool = False
    dropout: float = 0.0
    prefix: int = 0
    sparse: tuple[int, int] | None = None  # stride and summary

    @property
    def keys(self) -> int:
        return self.S or self.T

    @property
    def kv_heads(self) -> int:
        return self.Hkv or self.H

    @property
    def plain(self) -> Shape:
        """The same without what changes or hides scores; packed documents as a batch."""
        length = self.T // self.documents
        return Shape(self.B * self.documents, length, self.H, self.D, self.Hkv, self.S, self.causal)

    @property
    def label(self) -> str:
        parts = [f"B{self.B}_H{self.H}_T{self.T}_D{self.D}"]
        parts += [f"Hkv{self.Hkv}"] * bool(self.Hkv) + [f"S{self.S}"] * bool(self.S)
        parts += [f"window{self.window}"] * bool(self.window)
        parts += [f"packed{self.documents}"] if self.documents > 1 else []
        parts += [f"softcap{self.soft_cap:g}"] if self.soft_cap else []
        parts += ["alibi"] * self.alibi
        parts += [f"dropout{self.dropout:g}"] * bool(self.dropout) + [f"prefix{self.prefix}"] * bool(
            self.prefix
        )
        parts += ["sparse{}_{}".format(*self.sparse)] if self.sparse else []
        return "_".join([*parts, "causal" if self.causal else "full"])

    def scores(self) -> float:
        """Query-key pairs that are attended to, over all batches and query heads."""
        if not self.causal:
            pairs = float(self.T * self.keys)
        elif self.window is not None:
            pairs = float(sum(min(t + 1, self.window + 1) for t in range(self.T)))
        elif self.prefix:
            pairs = float(sum(max(t + 1, self.prefix) for t in range(self.T)))
        elif self.sparse is not None:
            stride, summary = self.sparse
            fixed = sum(t % stride + 1 + t // stride * summary for t in range(self.T))
            strided = sum(min(t, stride) + 1 + max(t // stride - 1, 0) for t in range(self.T))
            pairs = float(fixed if summary else strided)
        else:
            length = self.T // self.documents
            pairs = (
                self.documents * length * (length + 1) / 2
                if self.keys == self.T
                else float(self.T * self.keys)
            )
        return self.B * self.H * pairs


def _inputs(shape: Shape, target: Target, *, grad: bool) -> list[Any]:
    q = target.randn(shape.B, shape.T, shape.H, shape.D, grad=grad)
    return [q] + [target.randn(shape.B, shape.keys, shape.kv_heads, shape.D, grad=grad) for _ in range(2)]


def _slopes(shape: Shape, device: str) -> Any:
    import torch

    return 2.0 ** (-8.0 * torch.arange(1, shape.H + 1, device=device) / shape.H) if shape.alibi else None


def _mask(shape: Shape, device: str) -> Any:
    """True where attended, or ALiBi's bias, for the shapes that torch's is_causal cannot express; else None."""
    import torch

    special = shape.documents > 1 or shape.alibi or shape.prefix or shape.sparse
    if shape.window is None and not special:
        return None
    allowed = _allowed(shape, device)
    if shape.alibi:
        position = torch.arange(shape.T, device=device)
        distance = (position[:, None] - position[None, :]).abs()
        bias = -_slopes(shape, device)[:, None, None] * distance
        return bias.masked_fill(~allowed, float("-inf"))
    return allowed


def _allowed(shape: Shape, device: str) -> Any:
    import torch

    position = torch.arange(shape.T, device=device)
    return _sees(shape, position[:, None], position[None, :])


def _sees(shape: Shape, query: Any, key: Any) -> Any:
    """Whether queries at these places see these keys, under a causal mask and what else the shape asks for."""
    keep = query >= key
    if shape.window is not None:
        keep = keep & (query - key <= shape.window)
    if shape.documents > 1:
        length = shape.T // shape.documents
        keep = keep & (query // length == key // length)
    if shape.prefix:
        keep = keep | (key < shape.prefix)
    if shape.sparse is not None:
        stride, summary = shape.sparse
        strided = (query - key <= stride) | ((query - key) % stride == 0)
        fixed = (query // stride == key // stride) | (key % stride >= stride - summary)
        keep = keep & (fixed if summary else strided)
    return keep


def _sdpa(shape: Shape, device: str) -> Callable[..., Any]:
    """torch's attention on (B, T, H, D) views, which is the layout a projection leaves behind."""
    import torch

    mask = _mask(shape, device)
    causal = mask is None and shape.causal and shape.keys == shape.T

    def call(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=shape.dropout, is_causal=causal,
            enable_gqa=shape.kv_heads != shape.H,
        )  # fmt: skip
        return out.transpose(1, 2)

    return call


def _backends(shape: Shape, sdpa: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """torch's attention by each of its fused backends, for what they can express: no mask, no soft cap."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    special = shape.documents > 1 or shape.alibi or shape.prefix or shape.sparse or shape.soft_cap
    if special or shape.window is not None:
        return {}

    def under(backend: Any) -> Callable[..., Any]:
        def call(q: Any, k: Any, v: Any) -> Any:
            with sdpa_kernel(backend):
                return sdpa(q, k, v)

        return call

    return {
        "torch_flash": under(SDPBackend.FLASH_ATTENTION),
        "torch_cudnn": under(SDPBackend.CUDNN_ATTENTION),
    }


def _composed(shape: Shape, device: str) -> Callable[..., Any]:
    """A soft cap by hand, since torch's attention has none."""
    import torch

    hidden = torch.ones(shape.T, shape.keys, dtype=torch.bool, device=device).triu(1)

    def call(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = shape.soft_cap * torch.tanh(q @ k.mT * (shape.D**-0.5 / shape.soft_cap))
        p = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return (p @ v).transpose(1, 2)

    return call


def _per_document(shape: Shape) -> Callable[..., Any]:
    """torch's attention once for each packed document: skips the pairs that a mask would compute."""
    import torch

    length = shape.T // shape.documents

    def call(q: Any, k: Any, v: Any) -> Any:
        documents = zip(*(x.transpose(1, 2).split(length, dim=2) for x in (q, k, v)), strict=True)
        outs = [
            torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=shape.causal)
            for qkv in documents
        ]
        return torch.cat(outs, dim=2).transpose(1, 2)

    return call


def _flex(shape: Shape, device: str) -> Callable[..., Any]:
    """FlexAttention with a block mask; on the CPU it needs torch.compile and has no backward."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    slopes = _slopes(shape, device)

    def score(x: Any, _b: Any, head: Any, query: Any, key: Any) -> Any:
        if shape.soft_cap is not None:
            x = shape.soft_cap * torch.tanh(x / shape.soft_cap)
        return x if slopes is None else x - slopes[head] * (query - key)

    def allowed(_b: Any, _h: Any, query: Any, key: Any) -> Any:
        return _sees(shape, query, key)

    block_mask = (
        create_block_mask(allowed, None, None, shape.T, shape.keys, device=device) if shape.causal else None
    )
    compiled_flex = compiled(flex_attention)

    def call(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        gqa, modify = shape.kv_heads != shape.H, score if shape.alibi or shape.soft_cap else None
        out = compiled_flex(q, k, v, score_mod=modify, block_mask=block_mask, enable_gqa=gqa)
        return out.transpose(1, 2)

    return call


def _ours(shape: Shape, device: str) -> Callable[..., Any]:
    import torch

    from gptcore.ops.attention import attention

    window = (-1, -1) if shape.window is None else (shape.window, 0)
    if shape.documents == 1:
        options: dict[str, Any] = {"window_size": window, "soft_cap": shape.soft_cap}
        options |= {"alibi_slopes": _slopes(shape, device), "dropout_p": shape.dropout}
        if shape.dropout:
            options["seed"] = torch.tensor([1], device=device)
        if shape.prefix:
            options["prefix_lengths"] = torch.full((shape.B,), shape.prefix, dtype=torch.int32, device=device)
        if shape.sparse is not None:
            options["sparse_stride"], options["sparse_summary"] = shape.sparse
        return lambda q, k, v: attention(q, k, v, causal=shape.causal, **options)
    length = shape.T // shape.documents
    count = shape.B * shape.documents
    bounds = torch.arange(0, (count + 1) * length, length, dtype=torch.int32, device=device)

    def packed(q: Any, k: Any, v: Any) -> Any:
        flat = (x.flatten(0, 1) for x in (q, k, v))
        return attention(*flat, causal=shape.causal, cu_seqlens_q=bounds).view(q.shape)

    return packed


def _plainly(shape: Shape, device: str) -> Callable[..., Any]:
    plain = _ours(shape.plain, device)

    def call(q: Any, k: Any, v: Any) -> Any:
        return plain(*(x.reshape(-1, shape.plain.T, *x.shape[2:]) for x in (q, k, v))).view(q.shape)

    return call


def _setup(shape: Shape, *, backward: bool) -> Callable[[Target], Callables]:
    def setup(target: Target) -> Callables:
        inputs = _inputs(shape, target, grad=backward)
        sdpa = (_composed if shape.soft_cap else _sdpa)(shape, target.device)
        functions = {
            "gptcore": _ours(shape, target.device),
            "torch_eager": sdpa,
            "torch_compiled": compiled(sdpa),
        }
        if target.device == "cuda":
            functions |= _backends(shape, sdpa)
        if shape != shape.plain:
            functions[PLAIN] = _plainly(shape, target.device)
        if shape.documents > 1:
            functions["torch_per_document_eager"] = _per_document(shape)
        by_flex = not backward or target.device == "cuda"  # no backward on the CPU
        if by_flex and shape.keys == shape.T and not target.quick and not shape.dropout:
            functions["torch_flex_compiled"] = _flex(shape, target.device)
        if backward:
            grad = target.randn(shape.B, shape.T, shape.H, shape.D)
            return {name: with_gradient(function, inputs, grad) for name, function in functions.items()}
        return {name: lambda function=function: function(*inputs) for name, function in functions.items()}

    return setup


def _setup_fused(shape: Shape, *, backward: bool) -> Callable[[Target], Callables]:
    """From one projection output (B, T, (H + 2 Hkv) D) to (B, T, H D), as a block of a GPT needs it."""

    def setup(target: Target) -> Callables:
        from gptcore.ops.attention import attention_qkv

        widths = [shape.H * shape.D, shape.kv_heads * shape.D, shape.kv_heads * shape.D]
        qkv = target.randn(shape.B, shape.T, sum(widths), grad=backward)
        attend = _sdpa(shape, target.device)

        def eager(qkv: Any) -> Any:
            q, k, v = (part.unflatten(-1, (-1, shape.D)) for part in qkv.split(widths, dim=-1))
            return attend(q, k, v).flatten(2)

        functions = {
            "gptcore": lambda qkv: attention_qkv(qkv, shape.H, shape.kv_heads, causal=True),
            "torch_eager": eager,
            "torch_compiled": compiled(eager),
        }
        if backward:
            grad = target.randn(shape.B, shape.T, widths[0])
            return {name: with_gradient(function, [qkv], grad) for name, function in functions.items()}
        return {name: lambda function=function: function(qkv) for name, function in functions.items()}

    return setup


def _cost(shape: Shape, *, backward: bool) -> Callable[[int], Cost]:
    """Two products forward, five backward (the scores are formed again); each tensor crosses memory once."""
    flops = 4.0 * shape.D * shape.scores() * (3.5 if backward else 1.0)
    queries = shape.B * shape.T * shape.H * shape.D
    keys = 2 * shape.B * shape.keys * shape.kv_heads * shape.D

    def cost(element: int) -> Cost:
        read = queries + keys + (3 * queries + keys if backward else 0)
        written = queries + (queries + keys if backward else 0)
        return Cost(flops, read * element, written * element)

    return cost


SHAPES = (
    Shape(1, 64, 1, 64),
    Shape(2, 512, 12, 64),
    Shape(4, 1024, 12, 64),
    Shape(2, 512, 12, 64, causal=False),
    Shape(1, 2048, 32, 128, Hkv=8),
    Shape(1, 4096, 12, 64),
    Shape(1, 4096, 12, 64, window=256),
    Shape(2, 1024, 12, 64, documents=4),
    Shape(4, 1024, 12, 64, soft_cap=50.0),
    Shape(4, 1024, 12, 64, soft_cap=1.0),
    Shape(4, 1024, 12, 64, alibi=True),
    Shape(4, 1024, 12, 64, dropout=0.1),
    Shape(4, 1024, 12, 64, prefix=256),
    Shape(1, 4096, 12, 64, sparse=(128, 0)),
    Shape(1, 4096, 12, 64, sparse=(128, 32)),
)
# The shapes of the figures that Hopper kernels are known by, at two lengths, and each option at the longer one.
GPU_SHAPES = (
    Shape(4, 1024, 48, 128),
    Shape(4, 8192, 48, 128),
    Shape(4, 8192, 48, 128, causal=False),
    Shape(4, 8192, 48, 64),
    Shape(4, 8192, 64, 128, Hkv=8),
    Shape(1, 8192, 48, 128, window=1024),
    Shape(1, 8192, 48, 128, documents=4),
    Shape(1, 8192, 48, 128, soft_cap=50.0),
    Shape(1, 8192, 48, 128, alibi=True),
    Shape(1, 8192, 48, 128, dropout=0.1),
)
GPU_DECODE = Shape(32, 1, 32, 128, Hkv=8, S=8192)
# Labels and directions that --quick measures.
QUICK = {
    ("B1_H1_T64_D64_causal", "forward_backward"),
    ("B2_H12_T512_D64_causal", "forward"),
    ("B2_H12_T512_D64_causal", "forward_backward"),
    ("B4_H12_T1024_D64_causal", "forward"),
    ("B1_H12_T4096_D64_window256_causal", "forward"),
}
DECODE = Shape(8, 1, 32, 128, Hkv=8, S=4096)


def _cases() -> list[Case]:
    cases = []
    for backward in (False, True):
        direction = "forward_backward" if backward else "forward"
        for shape in (*SHAPES, *GPU_SHAPES):
            cases.append(
                Case(
                    f"attention/{shape.label}/{direction}",
                    _setup(shape, backward=backward),
                    _cost(shape, backward=backward),
                    small=shape.T == 64,
                    quick=(shape.label, direction) in QUICK,
                    dtypes=("bfloat16",) if shape in GPU_SHAPES else DTYPES,
                    devices=ON_GPU if shape in GPU_SHAPES else ("cpu",),
                )
            )
            if shape.dropout:  # no two implementations drop the same weights
                cases[-1] = replace(cases[-1], tolerance=None)
        fused = SHAPES[1]
        name = f"attention/qkv_{fused.label}/{direction}"
        setup = _setup_fused(fused, backward=backward)
        cases.append(Case(name, setup, _cost(fused, backward=backward), quick=backward))
    for shape, devices in ((DECODE, ("cpu",)), (GPU_DECODE, ON_GPU)):
        name, cost = f"attention/decode_{shape.label}/forward", _cost(shape, backward=False)
        cases.append(Case(name, _setup(shape, backward=False), cost, quick=False, devices=devices))
    return cases


CASES = _cases()
