"""linear_cross_entropy on a GPU: products by the library, some tokens at a time, and one kernel between them."""

from __future__ import annotations

from typing import Any

from gptcore import backend
from gptcore.ops.arrays import Array, empty, is_torch

# f32 products that are kept at a time: 512 MiB. 1,024 tokens of a vocabulary of 131,072: so many that adding to the
# weight's f32 gradient (8 bytes an element for each chunk) takes a quarter of the time of the chunk's products.
CHUNK_PRODUCTS = 2**27
# The last two options, first_class and num_classes, where the classes are not a slice of more.
NO_SLICE = (0, 0)


def runs_in_chunks(x: Array) -> bool:
    """Whether ``x`` lies where the products are a library's; so, for tests, under the instruction set ``simt``."""
    return is_torch(x) and (x.is_cuda or (x.device.type == "cpu" and backend.isa() == "simt"))


def chunk_rows(rows: int, classes: int) -> int:
    """Tokens whose products are made at a time: a multiple of 128, or all."""
    return min(rows, max(128, CHUNK_PRODUCTS // max(classes, 1) // 128 * 128))


def forward(
    x: Any, weight: Any, targets: Any, options: tuple[Any, ...], outputs: tuple[Any, ...],
    gradients: tuple[Any, Any, Any],
) -> None:  # fmt: skip
    """As ``_C.linear_cross_entropy_forward``: fills ``outputs`` (loss, z, logprobs, lse, entropy, predicted) and, for
    gradients of 1 of loss and z, ``gradients`` (dx, dweight, dbias); each of these three may be None.

    Args:
        options: ignore_index, label_smoothing, z_loss, logit_scale, reduction, token_weight, bias, class_weight,
            logit_soft_cap, first_class, num_classes.
    """
    native = backend.extension()
    native.linear_cross_entropy_check(x, weight, targets, options, outputs, gradients)
    loss, z, *by_token = outputs
    divisors = _divisors(x, weight, targets, options)
    row_loss, row_z = (empty(x, (x.shape[0],), x.new_empty(0).double().dtype) for _ in range(2))
    wanted = any(g is not None for g in gradients)
    sums = _WeightSums(x, weight, gradients, accumulate=False) if wanted else None
    for rows in _chunks(x.shape[0], weight.shape[0]):
        products = _products(x[rows], weight)
        dlogits = _new_dlogits(products, x, weight) if wanted else None
        native.linear_cross_entropy_rows(
            products, targets[rows], _rows_of(options, rows), divisors, row_loss[rows], row_z[rows],
            *(None if t is None else t[rows] for t in by_token), False, None, None, 1.0, dlogits,
        )  # fmt: skip
        if sums is not None:
            sums.add(rows, dlogits)
    native.linear_cross_entropy_totals(row_loss, row_z, divisors, loss, z)
    if sums is not None:
        sums.finish()


def backward(
    grad_loss: Any, grad_z: Any, x: Any, weight: Any, targets: Any, lse: Any, options: tuple[Any, ...],
    gradients: tuple[Any, Any, Any], accumulate: bool,
) -> None:  # fmt: skip
    """As ``_C.linear_cross_entropy_backward``: overwrites ``gradients`` (dx, dweight, dbias), adds to dweight where
    ``accumulate``; makes the products again."""
    native = backend.extension()
    native.linear_cross_entropy_check(x, weight, targets, options, (None,) * 6, gradients)
    divisors = _divisors(x, weight, targets, options)
    sums = _WeightSums(x, weight, gradients, accumulate)
    by_token = options[4] == "none"
    for rows in _chunks(x.shape[0], weight.shape[0]):
        products = _products(x[rows], weight)
        dlogits = _new_dlogits(products, x, weight)
        grads = (g if g is None or not by_token else g[rows] for g in (grad_loss, grad_z))
        native.linear_cross_entropy_rows(
            products, targets[rows], _rows_of(options, rows), divisors, None, None, None, lse[rows], None, None,
            True, *grads, 0.0, dlogits,
        )  # fmt: skip
        sums.add(rows, dlogits)
    sums.finish()


class _WeightSums:
    """The three gradients, of which the weight's and the bias's add up over chunks in f32 and are rounded once."""

    def __init__(self, x: Any, weight: Any, gradients: tuple[Any, Any, Any], accumulate: bool) -> None:
        self.x, self.weight, (self.dx, self.dweight, self.dbias) = x, weight, gradients
        self.started = accumulate
        wide = x.new_empty(0).float().dtype
        self.sum = self.dweight
        if self.dweight is not None and self.dweight.dtype != wide:
            self.sum = empty(x, self.dweight.shape, wide)
        self.bias_sum = None if self.dbias is None else empty(x, self.dbias.shape, wide).zero_()
        if not x.shape[0] and self.sum is not None and not accumulate:
            self.sum.zero_()

    def add(self, rows: slice, dlogits: Any) -> None:
        if self.dx is not None:
            self.dx[rows] = dlogits @ self.weight.to(dlogits.dtype)
        if self.sum is not None:
            _add_product(self.sum, dlogits, self.x[rows].to(dlogits.dtype), self.started)
        if self.bias_sum is not None:
            self.bias_sum += dlogits.sum(0, dtype=self.bias_sum.dtype)
        self.started = True

    def finish(self) -> None:
        if self.dweight is not self.sum:
            self.dweight.copy_(self.sum)
        if self.dbias is not None:
            self.dbias.copy_(self.bias_sum)


def _chunks(rows: int, classes: int) -> list[slice]:
    step = chunk_rows(rows, classes)
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)] if rows else []


def _rows_of(options: tuple[Any, ...], rows: slice) -> tuple[Any, ...]:
    """The options for these tokens: token_weight is by token."""
    weights = options[5]
    return (*options[:5], None if weights is None else weights[rows], *options[6:])


def _divisors(x: Any, weight: Any, targets: Any, options: tuple[Any, ...]) -> Any:
    divisors = empty(x, (3,), x.new_empty(0).double().dtype)
    classes = options[-1] or weight.shape[0]
    backend.extension().linear_cross_entropy_divisors(targets, classes, options, divisors)
    return divisors


def _both_half(x: Any, weight: Any) -> bool:
    return x.element_size() == 2 and weight.element_size() == 2


def _products(x: Any, weight: Any) -> Any:
    """``x @ weight.T`` in f32 of bf16 factors or f32 ones."""
    import torch

    if x.is_cuda and _both_half(x, weight):
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return x.float() @ weight.float().T


def _new_dlogits(products: Any, x: Any, weight: Any) -> Any:
    return empty(products, products.shape, x.dtype if _both_half(x, weight) else products.dtype)


def _add_product(total: Any, dlogits: Any, x: Any, started: bool) -> None:
    """``total (+)= dlogits.T @ x`` in f32; what ``total`` holds before the first chunk does not count."""
    import torch

    if not total.is_cuda:
        product = dlogits.float().T @ x.float()
        total.add_(product) if started else total.copy_(product)
    elif dlogits.dtype == total.dtype:
        torch.addmm(total, dlogits.T, x, beta=int(started), out=total)
    else:
        out = torch.ops.aten.addmm.dtype_out
        out(total, dlogits.T, x, total.dtype, beta=int(started), out=total)
