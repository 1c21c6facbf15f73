"""Types of the native module. Arrays are torch, NumPy or CuPy; the contracts stand in csrc/kernels/<op>/<op>.h."""

from collections.abc import Callable, Sequence
from typing import Any

Tensor = Any
Number = float | Tensor

__version__: str

def adafactor(
    params: list[Tensor],
    grads: list[Tensor],
    row_vars: list[Tensor],
    col_vars: list[Tensor],
    variances: list[Tensor],
    exp_avgs: list[Tensor],
    copies: list[Tensor],
    weight_decay: Sequence[float],
    step_size: Number,
    beta2: Number,
    beta1: float,
    eps1: float,
    eps2: float,
    eps_added: bool,
    clip_threshold: float | None,
    scale_parameter: bool,
    scaled_decay: bool,
    maximize: bool,
    max_norm: float | None,
    grad_scale: Number,
    grad_norm: Number | None,
    decay_factor: Number,
    steps: list[Tensor],
    norm: Tensor | None,
    found_inf: Tensor | None,
) -> tuple[float, bool]: ...
def adafactor_blocks(
    phase: int,
    params: list[Tensor],
    grads: list[Tensor],
    row_vars: list[Tensor],
    col_vars: list[Tensor],
    variances: list[Tensor],
    exp_avgs: list[Tensor],
    copies: list[Tensor],
    slices: Sequence[tuple[int, int, int, int, int]],
    weight_decay: Sequence[float],
    step_size: Number,
    beta2: Number,
    beta1: float,
    eps1: float,
    eps2: float,
    eps_added: bool,
    clip_threshold: float | None,
    scale_parameter: bool,
    scaled_decay: bool,
    maximize: bool,
    max_norm: float | None,
    grad_scale: Number,
    grad_norm: Number | None,
    decay_factor: Number,
    statistics: list[Tensor],
    totals: list[Tensor],
    sums: list[Tensor],
) -> None: ...
def adamw_8bit(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_scales: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_sq_scales: list[Tensor],
    copies: list[Tensor],
    steps: list[Tensor],
    weight_decay: Sequence[float],
    step: Number | None,
    lr: Number,
    beta1: float,
    beta2: float,
    eps: float,
    maximize: bool,
    max_norm: float | None,
    grad_scale: Number,
    grad_norm: Number | None,
    seed: int,
    places: Sequence[tuple[int, int]],
    norm: Tensor | None,
    found_inf: Tensor | None,
) -> tuple[float, bool]: ...
def adamw(
    params: list[Tensor],
    lows: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    copies: list[Tensor],
    steps: list[Tensor],
    weight_decay: Sequence[float],
    step: Number | None,
    lr: Number,
    beta1: float,
    beta2: float,
    eps: float,
    decoupled: bool,
    maximize: bool,
    max_norm: float | None,
    grad_scale: Number,
    grad_norm: Number | None,
    norm: Tensor | None,
    found_inf: Tensor | None,
) -> tuple[float, bool]: ...
def attach_kernels(kernels: object) -> None: ...
def attention_backward(
    dout: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    options: tuple[Any, ...],
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dlse: Tensor | None,
    dbias: Tensor | None,
    dsinks: Tensor | None,
) -> None: ...
def attention_eager_backward(ctx: Any, grad_out: Any) -> Any: ...
def attention_eager_forward(ctx: Any, inputs: tuple[Any, ...]) -> Any: ...
def attention_forward(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    options: tuple[Any, ...],
    out: Tensor | None,
    lse: Tensor | None,
) -> None: ...
def attention_paged(
    q: Tensor | None,
    k_pages: Tensor | None,
    v_pages: Tensor | None,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    options: tuple[Any, ...],
    out: Tensor | None,
    lse: Tensor | None,
) -> None: ...
def available_isas() -> list[str]: ...
def backward_method(
    direct: Callable[..., Any],
    general: Callable[..., Any],
    is_grad_enabled: Callable[[], bool],
    transform: Callable[[], Any],
) -> Callable[..., Any]: ...
def crc32c(x: Tensor | None, initial: int, out: Tensor | None) -> int: ...
def cross_entropy_backward(
    grad_loss: Tensor | None,
    logits: Tensor | None,
    targets: Tensor | None,
    weight: Tensor | None,
    lse: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    dlogits: Tensor | None,
) -> None: ...
def cross_entropy_eager_backward(ctx: object, grad_loss: object) -> object: ...
def cross_entropy_eager_forward(
    ctx: object,
    logits: object,
    targets: object,
    weight: object,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> object: ...
def cross_entropy_forward(
    logits: Tensor | None,
    targets: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    loss: Tensor | None,
    lse: Tensor | None,
) -> None: ...
def cross_entropy_plain(
    logits: object, targets: object, weight: object, ignore_index: int, label_smoothing: float, reduction: str
) -> object: ...
def embedding_backward(
    ids: Tensor | None, grad_out: Tensor | None, dweight: Tensor | None, accumulate: bool
) -> None: ...
def embedding_eager_backward(ctx: object, grad_out: object) -> object: ...
def embedding_eager_forward(ctx: object, ids: object, weight: object) -> object: ...
def embedding_forward(ids: Tensor | None, weight: Tensor | None, out: Tensor | None) -> None: ...
def gated_activation_backward(
    kind: int,
    grad_y: Tensor | None,
    gate: Tensor | None,
    up: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    dgate: Tensor | None,
    dup: Tensor | None,
    dgate_bias: Tensor | None,
    dup_bias: Tensor | None,
) -> None: ...
def gated_activation_eager_backward(ctx: object, grad_y: object) -> object: ...
def gated_activation_eager_forward(
    ctx: object, gate: object, up: object, gate_bias: object, up_bias: object, kind: int
) -> object: ...
def gated_activation_forward(
    kind: int,
    gate: Tensor | None,
    up: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    y: Tensor | None,
) -> None: ...
def grad_norm(
    grads: list[Tensor], grad_scale: Number, norm: Tensor | None, found_inf: Tensor | None
) -> tuple[float, bool]: ...
def grouped_linear(
    x: Tensor | None,
    weight: Tensor | None,
    offsets: Tensor | None,
    bias: Tensor | None,
    out: Tensor | None,
    largest: int = ...,
) -> None: ...
def grouped_linear_backward(
    dy: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    offsets: Tensor | None,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    accumulate: bool,
    largest_dx: int = ...,
    largest_dweight: int = ...,
) -> None: ...
def isa() -> str: ...
def kernel_tables(kernels: object) -> list[str]: ...
def layer_norm_backward(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    h: Tensor | None,
    weight: Tensor | None,
    weight_offset: float,
    stats: Tensor | None,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None: ...
def layer_norm_eager_backward(ctx: object, grad_y: object) -> object: ...
def layer_norm_plain(
    x: object, weight: object, bias: object, eps: float, weight_offset: float, out: object
) -> object: ...
def layer_norm_eager_forward(
    ctx: object, x: object, weight: object, bias: object, eps: float, weight_offset: float
) -> object: ...
def layer_norm_forward(
    x: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    y: Tensor | None,
    h: Tensor | None,
    stats: Tensor | None,
) -> None: ...
def linear_cross_entropy_backward(
    grad_loss: Tensor | None,
    grad_z: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    targets: Tensor | None,
    lse: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    reduction: str,
    dx: Tensor | None,
    dweight: Tensor | None,
    accumulate: bool,
    token_weight: Tensor | None = None,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    logit_soft_cap: float | None = None,
    dbias: Tensor | None = None,
    first_class: int = 0,
    num_classes: int = 0,
) -> None: ...
def linear_cross_entropy_check(
    x: Tensor | None,
    weight: Tensor | None,
    targets: Tensor | None,
    options: tuple[Any, ...],
    outputs: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
) -> None: ...
def linear_cross_entropy_divisors(
    targets: Tensor | None, classes: int, options: tuple[Any, ...], divisors: Tensor | None
) -> None: ...
def linear_cross_entropy_rows(
    products: Tensor | None,
    targets: Tensor | None,
    options: tuple[Any, ...],
    divisors: Tensor | None,
    row_loss: Tensor | None,
    row_z: Tensor | None,
    logprobs: Tensor | None,
    lse: Tensor | None,
    entropy: Tensor | None,
    predicted: Tensor | None,
    lse_given: bool,
    grad_loss: Tensor | None,
    grad_z: Tensor | None,
    missing: float,
    dlogits: Tensor | None,
) -> None: ...
def linear_cross_entropy_totals(
    row_loss: Tensor | None,
    row_z: Tensor | None,
    divisors: Tensor | None,
    loss: Tensor | None,
    z: Tensor | None,
) -> None: ...
def linear_cross_entropy_forward(
    x: Tensor | None,
    weight: Tensor | None,
    targets: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    reduction: str,
    loss: Tensor | None,
    z: Tensor | None,
    logprobs: Tensor | None,
    lse: Tensor | None,
    dx: Tensor | None = None,
    dweight: Tensor | None = None,
    token_weight: Tensor | None = None,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    logit_soft_cap: float | None = None,
    dbias: Tensor | None = None,
    entropy: Tensor | None = None,
    predicted: Tensor | None = None,
    first_class: int = 0,
    num_classes: int = 0,
) -> None: ...
def matmul(
    a: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    out: Tensor | None,
    accumulate: bool,
    transpose_a: bool,
    transpose_b: bool,
) -> None: ...
def moe_combine_backward(
    dout: Tensor | None,
    y: Tensor | None,
    rows: Tensor | None,
    gates: Tensor | None,
    offsets: Tensor | None,
    dy: Tensor | None,
    dgates: Tensor | None,
) -> None: ...
def moe_combine_forward(
    y: Tensor | None,
    rows: Tensor | None,
    gates: Tensor | None,
    offsets: Tensor | None,
    out: Tensor | None,
) -> None: ...
def moe_dispatch_forward(
    x: Tensor | None,
    rows: Tensor | None,
    offsets: Tensor | None,
    out: Tensor | None,
) -> None: ...
def moe_router_backward(
    dgates: Tensor | None,
    dbalance_loss: Tensor | None,
    dz_loss: Tensor | None,
    logits: Tensor | None,
    experts: Tensor | None,
    rows: Tensor | None,
    lse: Tensor | None,
    share: Tensor | None,
    renormalise: bool,
    dlogits: Tensor | None,
) -> None: ...
def moe_router_eager_backward(
    ctx: object,
    dgates: object,
    dexperts: object,
    drows: object,
    doffsets: object,
    drequested: object,
    dbalance_loss: object,
    dz_loss: object,
    dentropy: object,
    dlse: object,
    dshare: object,
) -> object: ...
def moe_router_eager_forward(
    ctx: object,
    logits: object,
    mask: object,
    priority: object,
    uniforms: object,
    top_k: int,
    renormalise: bool,
    by_gate: bool,
    second_threshold: float,
    capacity: int,
    count_all: bool,
) -> object: ...
def moe_router_forward(
    logits: Tensor | None,
    mask: Tensor | None,
    priority: Tensor | None,
    uniforms: Tensor | None,
    renormalise: bool,
    by_gate: bool,
    second_threshold: float,
    capacity: int,
    count_all: bool,
    experts: Tensor | None,
    gates: Tensor | None,
    rows: Tensor | None,
    offsets: Tensor | None,
    requested: Tensor | None,
    balance_loss: Tensor | None,
    z_loss: Tensor | None,
    entropy: Tensor | None,
    lse: Tensor | None,
    share: Tensor | None,
) -> None: ...
def noop(a: Tensor | None, b: Tensor | None, c: Tensor | None) -> None: ...
def num_threads() -> int: ...
def num_threads_reason() -> str: ...
def philox(counters: Tensor | None, seed: int, out: Tensor | None) -> None: ...
def rms_norm_backward(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    h: Tensor | None,
    weight: Tensor | None,
    weight_offset: float,
    rstd: Tensor | None,
    dx: Tensor | None,
    dweight: Tensor | None,
) -> None: ...
def rms_norm_forward(
    x: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    y: Tensor | None,
    h: Tensor | None,
    rstd: Tensor | None,
) -> None: ...
def rotary(
    x: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    inverse: bool,
    out: Tensor | None,
) -> None: ...
def router(
    tensor: type,
    parameter: type,
    is_grad_enabled: Callable[[], bool],
    is_listening: Sequence[Callable[[], Any]],
    kernel: Callable[..., Any],
    autograd: Callable[..., Any],
    dispatcher: Callable[..., Any],
    name: str,
) -> Callable[..., Any]: ...
def scratch_bytes() -> int: ...
def set_isa(name: str) -> None: ...
def fp32_precision() -> str: ...
def set_fp32_precision(name: str) -> None: ...
def set_num_threads(count: int) -> None: ...
def sgd(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    copies: list[Tensor],
    weight_decay: Sequence[float],
    first: Sequence[bool],
    lr: Number,
    momentum: float,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    max_norm: float | None,
    grad_scale: Number,
    grad_norm: Number | None,
    check_finite: bool,
    norm: Tensor | None,
    found_inf: Tensor | None,
) -> tuple[float | None, bool]: ...
def square_blocks(grads: list[Tensor], block: int) -> int: ...
def square_sums(
    grads: list[Tensor], block: int, grad_scale: Number, out: Tensor | None, found_inf: Tensor | None
) -> bool: ...
