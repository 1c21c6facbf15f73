"""Who computes for CUDA tensors, told without a GPU: fake tensors have shapes and a device, and no data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import gptcore.functional as F
from gptcore import backend, nn, ops
from gptcore.models import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[2]
KERNELS = frozenset((
    "adafactor", "adamw", "adamw_8bit", "attention", "attention_f16",
    "cross_entropy", "embedding", "gated_activation", "grad_norm", "grouped_linear", "layer_norm",
    "linear_cross_entropy", "moe_dispatch", "moe_router", "philox", "rms_norm", "rotary", "sgd",
))  # fmt: skip
TINY: dict[str, Any] = {
    "vocab_size": 64, "context_length": 16, "width": 32, "num_layers": 2, "attention": {"num_heads": 4},
}  # fmt: skip


class Calls(TorchDispatchMode):
    """Names of the operations that come by."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))

    @property
    def ours(self) -> list[str]:
        return [name.removeprefix("gptcore::") for name in self.names if name.startswith("gptcore::")]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all kernels that CUDA is to have were there, on a device that runs them."""
    monkeypatch.setattr(backend, "cuda_kernels", lambda: KERNELS)
    monkeypatch.setattr(backend, "_unfit_cuda", lambda index: None)
    backend.reset_report()


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_unfit_cuda", lambda index: "device cuda: gptcore was built without CUDA")
    backend.reset_report()


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as mode:
        yield mode


def on_cuda(*shape: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda", **options)


def faked(module: torch.nn.Module) -> Any:
    """A module of the meta device with fake parameters on CUDA."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = torch.nn.Parameter(torch.empty_like(p, device="cuda"), False)
    return module


@pytest.mark.usefixtures("kernels")
def test_what_a_device_has() -> None:
    assert backend.has_kernels("cpu") and backend.has_kernels("cpu", "crc32c")
    assert backend.has_kernels("cuda:1", "attention", "rotary")
    assert backend.why_no_kernels("cuda", "attention", "matmul") == "device cuda: no kernel of matmul"
    assert backend.why_no_kernels(torch.device("meta")) == "device meta"


def test_devices_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cuda:
        def devices(self) -> Any:
            return [{"index": 0, "compute_capability": "7.5"}, {"index": 1, "compute_capability": "12.0"}], ""

    monkeypatch.setattr(backend, "cuda_kernels", lambda: KERNELS)
    unfit = backend._unfit_cuda.__wrapped__
    monkeypatch.setattr(backend, "cuda_extension", lambda: Cuda())
    assert unfit(0) == "device cuda: compute capability 7.5, expected 8.0 or later"
    assert unfit(1) is None
    monkeypatch.setattr(backend, "cuda_extension", lambda: None)
    assert unfit(0) == "device cuda: gptcore was built without CUDA"


def test_the_built_module_names_its_kernels() -> None:
    if backend.cuda_extension() is None:
        pytest.skip("built without CUDA")
    assert "layer_norm" in backend.cuda_kernels() and "matmul" not in backend.cuda_kernels()
    assert backend.has_kernels("cuda", "layer_norm")


def test_operations_are_found_by_their_tables() -> None:
    names = ["adamw_8bit_bodies", "attention_bf16_bodies", "attention_f16_bodies", "grouped_device_bodies"]
    names += ["linear_cross_entropy_rows_bodies", "moe_router_device_bodies", "something_bodies"]
    assert backend._ops_of(names) == {
        "adamw_8bit", "attention", "attention_f16", "grouped_linear", "linear_cross_entropy", "moe_router",
    }  # fmt: skip
    folders = {path.name for path in (ROOT / "csrc" / "kernels").iterdir() if path.is_dir()}
    assert set(backend.OPS) == folders


def test_the_page_has_a_row_for_each_operation() -> None:
    rows = re.findall(
        r"^\| (\w+)[^|]*\| (yes|in work)[^|]*\|", (ROOT / "docs" / "gpu.md").read_text(), re.MULTILINE
    )
    assert {op for op, _ in rows} == set(backend.OPS) - {"crc32c", "matmul"}
    written = {op for op, state in rows if state == "yes"}
    assert written <= {path.parent.name for path in (ROOT / "csrc" / "kernels").glob("*/*.cu")}


def test_every_op_is_registered_for_cuda() -> None:
    registered = [op for op in vars(torch.ops.gptcore).values() if hasattr(op, "default")]
    assert registered
    for op in registered:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op.default.name(), "CUDA"), op


@pytest.mark.usefixtures("kernels", "fake")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_functions_take_the_kernels(dtype: torch.dtype) -> None:
    x, w = on_cuda(6, 8, dtype=dtype), on_cuda(8, dtype=dtype)
    q, ids = on_cuda(2, 4, 6, 8, dtype=dtype), on_cuda(6, dtype=torch.int64)
    with Calls() as calls:
        outs = [
            F.layer_norm(x, [8], w, w), F.rms_norm(x, [8], w), F.gelu(x), F.silu(x), F.embedding(ids, x),
            F.cross_entropy(x, ids), F.scaled_dot_product_attention(q, q, q, dropout_p=0.1, is_causal=True),
        ]  # fmt: skip
    assert backend.report() == {}
    assert all(out.device.type == "cuda" for out in outs)
    names = {"layer_norm", "rms_norm", "gated_activation", "embedding", "cross_entropy", "attention"}
    assert names <= {name.split(".")[0] for name in calls.ours}


@pytest.mark.usefixtures("no_kernels", "fake")
def test_without_kernels_torch_computes_and_that_is_noted() -> None:
    x, w = on_cuda(6, 8), on_cuda(8)
    with torch.no_grad(), Calls() as calls:
        F.layer_norm(x, [8], w, w), nn.RMSNorm(8, device="cuda", dtype=torch.bfloat16)(x)
    assert calls.ours == []
    assert backend.report() == {
        "layer_norm": {"device cuda: gptcore was built without CUDA": 1},
        "rms_norm": {"torch.bfloat16 on cuda": 1},
    }


@pytest.mark.usefixtures("kernels", "fake")
def test_tensors_of_two_devices_are_left_to_torch() -> None:
    with pytest.raises(RuntimeError, match="device"):
        F.layer_norm(on_cuda(6, 8), [8], torch.empty(8, dtype=torch.bfloat16))
    assert backend.report() == {"layer_norm": {"several devices": 1}}


@pytest.mark.usefixtures("kernels", "fake")
def test_half_precision_is_for_attention_alone() -> None:
    q = on_cuda(2, 4, 6, 8, dtype=torch.float16)
    with Calls() as calls:
        assert F.scaled_dot_product_attention(q, q, q).dtype == torch.float16
        assert F.gelu(q).dtype == torch.float16
    assert calls.ours == ["attention"] and list(backend.report()) == ["gelu"]


@pytest.mark.usefixtures("kernels", "fake")
def test_products_are_torchs() -> None:
    x, w = on_cuda(3, 8), on_cuda(5, 8)
    with torch.no_grad(), Calls() as calls:
        y = faked(nn.Linear(8, 5, device="meta", dtype=torch.bfloat16))(x)
        F.linear(x, w)
    assert calls.ours == [] and y.shape == (3, 5)
    with torch.no_grad(), Calls() as calls:
        assert ops.matmul(x, w, transpose_b=True).shape == (3, 5)
    assert calls.ours == ["matmul"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("extra", ["", "bias", "accumulate"])
def test_torchs_product_is_ours(dtype: torch.dtype, wide: bool, extra: str) -> None:
    from gptcore.ops.matmul import _by_torch

    if dtype == torch.bfloat16 and wide:
        pytest.skip("torch has products of bf16 into f32 on CUDA only")
    if extra == "accumulate" and dtype == torch.bfloat16:
        pytest.skip("sums are f32")
    a, b, bias = (torch.randn(*s).to(dtype) for s in ((3, 8), (8, 5), (5,)))
    out = torch.randn(3, 5).to(torch.float32 if wide else dtype)
    options = {"bias": bias if extra == "bias" else None, "accumulate": extra == "accumulate"}
    expected = ops.matmul(a, b, out=out.clone(), **options)
    _by_torch(a, b, options["bias"], out, options["accumulate"])
    torch.testing.assert_close(out, expected)


def test_torchs_product_refuses_what_the_kernel_refuses() -> None:
    from gptcore.ops.matmul import _by_torch

    a = torch.ones(2, 2)
    with pytest.raises(ValueError, match="argument 'bias': got one with accumulate=True"):
        _by_torch(a, a, a[0], a.clone(), True)
    with pytest.raises(TypeError, match=r"argument 'out': got torch.bfloat16 with accumulate=True"):
        _by_torch(a, a, None, a.bfloat16(), True)


@pytest.mark.usefixtures("kernels", "fake")
@pytest.mark.parametrize(
    ("dtype", "attention", "loss"),
    [(torch.bfloat16, torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16, torch.float32)],
    ids=["bf16", "f16"],
)
def test_autocast_of_the_device_counts(
    dtype: torch.dtype, attention: torch.dtype, loss: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, torch.dtype] = {}

    class Dtypes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.namespace == "gptcore":
                seen[function.name()] = args[0].dtype
            return function(*args, **(kwargs or {}))

    q, x = on_cuda(2, 6, 4, 8, dtype=torch.float32), on_cuda(6, 8, dtype=torch.float32)
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda device: device == "cuda"
    )  # torch's own asks for a GPU
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: dtype)
    with Dtypes():
        ops.attention(q, q, q)
        ops.linear_cross_entropy(x, x, on_cuda(6, dtype=torch.int64))
    assert seen["gptcore::attention"] == attention and seen["gptcore::linear_cross_entropy"] == loss
    y = torch.empty(2, 6, 4, 8)
    with Dtypes():
        ops.attention(y, y, y)
    assert seen["gptcore::attention"] == torch.float32


@pytest.fixture
def meta_as_cuda(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the device without memory stand for CUDA, which autograd asks for streams that this torch may lack."""
    ask = backend.why_no_kernels
    monkeypatch.setattr(
        backend, "why_no_kernels", lambda device, *ops: ask(str(device).replace("meta", "cuda"), *ops)
    )


@pytest.mark.usefixtures("meta_as_cuda")
@pytest.mark.parametrize("model", ["gpt2", "llama", "alibi"])
def test_a_model_waits_for_no_device(model: str) -> None:
    """Forward and backward on a device run on the kernels, and nothing is read on the host: that device has no data."""
    tables: dict[str, dict[str, Any]] = {
        "gpt2": {"attention": {"num_heads": 4, "dropout": 0.1}, "dropout": 0.1},
        "llama": {
            "norm": {"kind": "rms_norm"}, "position": {"kind": "rotary"}, "mlp": {"activation": "swiglu"},
            "tied_head": False,
        },
        "alibi": {"position": {"kind": "alibi"}},
    }  # fmt: skip
    gpt = GPT(GPTConfig.from_dict({**TINY, **tables[model]}), dtype=torch.bfloat16, device="meta")
    tokens = torch.empty(2, 16, dtype=torch.int64, device="meta")
    with Calls() as calls:
        gpt(tokens, tokens).total.backward()
    assert backend.report() == {}
    assert {"attention_qkv", "linear_cross_entropy"} <= set(calls.ours) or "attention" in calls.ours
    assert not [name for name in calls.names if name in ("aten::_local_scalar_dense", "aten::nonzero")]
    assert all(p.grad is not None for p in gpt.parameters())


@pytest.mark.usefixtures("kernels", "fake")
def test_experts_wait_for_no_device() -> None:
    layer = faked(nn.MoE(32, 64, num_experts=4, device="meta", dtype=torch.bfloat16))
    with torch.no_grad(), Calls() as calls:
        x, _ = layer.checked(on_cuda(2, 16, 32), None)
        engine = layer.engine(x)
        routing = layer.route(engine, *layer.scores(engine, x), None, True)
        rows = engine.dispatch(x, routing.rows, routing.offsets)
        rows = layer.apply_experts(engine, rows, routing.offsets)
        y = engine.combine(rows, routing.rows, routing.offsets, routing.gates)
    assert backend.report() == {} and y.shape == (32, 32)
    assert {"moe_router", "moe_dispatch", "grouped_linear", "gated_activation", "moe_combine"} <= set(
        calls.ours
    )
    assert "aten::_local_scalar_dense" not in calls.names


@pytest.mark.usefixtures("no_kernels", "fake")
def test_experts_without_kernels_are_refused() -> None:
    layer = faked(nn.MoE(32, 64, num_experts=4, device="meta"))
    with torch.no_grad(), pytest.raises(ValueError, match="got a tensor on cuda:0, expected one on the CPU"):
        layer(torch.empty(2, 16, 32, device="cuda"))
