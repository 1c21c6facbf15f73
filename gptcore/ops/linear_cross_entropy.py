"""The vocabulary projection with its cross-entropy loss; logits are made for some tokens or words at a time."""

from __future__ import annotations

import sys
from math import frexp, isfinite
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from gptcore import backend
from gptcore.ops import linear_cross_entropy_chunks as chunks
from gptcore.ops.arrays import Array, as_array, as_rows, empty, empty_like, is_torch, last_contiguous
from gptcore.ops.linear_cross_entropy_chunks import runs_in_chunks
from gptcore.ops.loss_options import LossOptions, with_defaults
from gptcore.ops.registration import TorchOp

if TYPE_CHECKING:
    from typing import Unpack

# The rows whose logits the kernel keeps at a time: kMostTokens of linear_cross_entropy.cpp, which refuses more of bf16.
CHUNK_ROWS = 512

# Places among the op's inputs, which are x, weight, targets and the options in the order of the signature: those that
# every call passes, up to the reduction; then only where some are used the tensors, the soft cap, what else to return.
_Z_LOSS, _REDUCTION, _BIAS = 5, 7, 9
_ALWAYS, _TENSORS, _SOFT_CAP, _OBSERVED = slice(3, 8), slice(8, 11), slice(11, 12), slice(12, 14)


class LinearCrossEntropyOptions(LossOptions, total=False):
    """The keyword options of :func:`linear_cross_entropy`, which says what they mean and their defaults."""

    z_loss: float
    logit_scale: float
    token_weight: Array | None
    bias: Array | None
    class_weight: Array | None
    logit_soft_cap: float | None
    return_entropy: bool
    return_predicted: bool


class LinearCrossEntropy(NamedTuple):
    """``loss`` without the z-loss, ``z_loss`` with its coefficient (both () or per token); ``logprobs`` of the targets
    and ``lse`` per token. All f32; the last two are detached; per-token entries are 0 where the target is ignored."""

    loss: Any
    z_loss: Any
    logprobs: Any
    lse: Any


class LinearCrossEntropyDetails(NamedTuple):
    """:class:`LinearCrossEntropy` with ``entropy`` f32 and ``predicted`` int64 per token, None where not asked for."""

    loss: Any
    z_loss: Any
    logprobs: Any
    lse: Any
    entropy: Any
    predicted: Any


class TokenLogprobs(NamedTuple):
    """``logprobs`` as :func:`token_logprobs` gives them alone; ``entropy`` and ``predicted``, None if not asked for."""

    logprobs: Any
    entropy: Any
    predicted: Any


def linear_cross_entropy(
    x: Array,
    weight: Array,
    targets: Array,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    token_weight: Array | None = None,
    bias: Array | None = None,
    class_weight: Array | None = None,
    logit_soft_cap: float | None = None,
    return_entropy: bool = False,
    return_predicted: bool = False,
) -> LinearCrossEntropy | LinearCrossEntropyDetails:
    """Cross-entropy of ``logits = logit_scale * (x @ weight.T + bias)`` against ``targets``.

    The logits are made for a block of the vocabulary and some tokens at a time.

    Args:
        x: (..., C), f32 or bf16; torch tensor (differentiable), NumPy or CuPy array.
        weight: (V, C), f32 or bf16. Two bf16 operands are multiplied as bf16 and summed in f32, others as f32.
        targets: (...), int64 classes below V, or ``ignore_index``; ignored tokens cost no work.
        label_smoothing: share of the target's probability spread over all V classes.
        z_loss: coefficient of lse^2, returned apart from the loss (PaLM, section 5).
        logit_scale: factor of the logits.
        reduction: "mean" over the tokens that count (NaN if there are none), weighted by token_weight where that is
            given: ``sum w_i l_i / sum w_i``; "sum"; or "none".
        token_weight: (...) f32 like targets, factors of each token's loss and z_loss (not of logprobs and lse); masks
            and advantages, of any sign. It gets no gradient. A token of weight 0 costs as much as any other;
            ignore_index saves its work. Weights that add up to 0 make the mean NaN or infinite, with its gradients.
        bias: (V,) f32 or bf16, differentiable; -inf bars a class.
        class_weight: (V,) f32 or bf16, the ``weight`` of ``torch.nn.functional.cross_entropy``: a token's loss, and its
            count in the mean, times that of its target; the smoothed part class by class. z_loss has no part in it.
            It gets no gradient.
        logit_soft_cap: the logits are ``cap * tanh(logits / cap)`` then (Gemma 2, section 2); above 0.
        return_entropy: also the entropy in nats of each token's distribution.
        return_predicted: also the class of each token's largest logit, the lowest such class; -1 where the target is
            ignored.

    Returns:
        :class:`LinearCrossEntropy` ``(loss, z_loss, logprobs, lse)``, or :class:`LinearCrossEntropyDetails`
        ``(loss, z_loss, logprobs, lse, entropy, predicted)`` if either of the last two is asked for; they come from
        the same pass over the logits and are not differentiable.

    Gradients:
        Those of ``weight`` and ``bias`` are summed over all tokens in f32 and rounded once to their dtype. If
        ``weight`` has an f32 tensor ``weight.main_grad`` of its shape, an eager backward adds the unrounded gradient
        to that instead, and autograd gets none for weight (gradient accumulation in f32 over bf16 weights). The
        attribute is looked for on the tensor passed here, so autocast, which passes a copy, does without.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or targets that do not fit; nothing is written then.
        RuntimeError: on a second derivative.
    """
    flat = targets if targets.ndim == 1 else targets.reshape(-1)
    run = _op if is_torch(x) else _run
    observed = return_entropy or return_predicted
    plain = token_weight is None and bias is None and class_weight is None and logit_soft_cap is None
    more: tuple[Any, ...] = ()
    if observed or not plain:
        more = (
            *_modifiers(token_weight, bias, class_weight, logit_soft_cap),
            return_entropy,
            return_predicted,
        )
    out = run(as_rows(x), weight, flat, ignore_index, label_smoothing, z_loss, logit_scale, reduction, *more)
    if targets.ndim != 1 or len(out) > 4:
        out = _shaped(out, targets.shape, return_entropy, return_predicted)
    return LinearCrossEntropyDetails(*out) if observed else LinearCrossEntropy(*out)


def _shaped(out: Any, shape: Any, entropy: bool, predicted: bool) -> list[Any]:
    """What was asked for of the op's results, in the shape of the targets."""
    basic = [o.reshape(shape) if o.ndim else o for o in out[:4]]
    if not (entropy or predicted):
        return basic
    return [*basic, out[4].reshape(shape) if entropy else None, out[5].reshape(shape) if predicted else None]


def token_logprobs(
    x: Array,
    weight: Array,
    targets: Array,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    bias: Array | None = None,
    logit_soft_cap: float | None = None,
    return_entropy: bool = False,
    return_predicted: bool = False,
) -> Array | TokenLogprobs:
    """Log-probabilities (...) f32 of ``targets`` under the softmax of the logits, differentiable.

    Arguments as in :func:`linear_cross_entropy`; 0 where the target is ignored. With ``return_entropy`` or
    ``return_predicted`` :class:`TokenLogprobs` ``(logprobs, entropy, predicted)``, of which only the first is
    differentiable. Callers without autograd have :func:`token_logprobs_backward`.
    """
    out = linear_cross_entropy(
        x, weight, targets, ignore_index=ignore_index, logit_scale=logit_scale, bias=bias,
        logit_soft_cap=logit_soft_cap, reduction="none", return_entropy=return_entropy,
        return_predicted=return_predicted,
    )  # fmt: skip
    return TokenLogprobs(-out.loss, *out[4:]) if len(out) > 4 else -out.loss


def linear_cross_entropy_backward(
    grad_loss: Array | None,
    grad_z: Array | None,
    x: Array,
    weight: Array,
    targets: Array,
    lse: Array,
    *,
    main_grad: Array | None = None,
    **options: Unpack[LinearCrossEntropyOptions],
) -> tuple[Array | None, ...]:
    """Gradients ``(dx, dweight)`` of :func:`linear_cross_entropy` for callers without autograd.

    With a bias among the options ``(dx, dweight, dbias)``.

    Args:
        grad_loss, grad_z: gradients of loss and z_loss, f32, in their shapes, numbers where these are (); None
            counts as zero.
        lse: as the forward call returned it.
        main_grad: (V, C) f32 to add weight's gradient to; dweight is then None.
        options: as they were in the forward call.
    """
    rows, lse, flat = as_rows(x), lse.reshape(-1), targets.reshape(-1)
    chosen = with_defaults(linear_cross_entropy, options)
    grad_loss, grad_z = (as_array(g, x, "float32") for g in (grad_loss, grad_z))
    if chosen["reduction"] == "none":
        grad_loss, grad_z = (g if g is None else g.reshape(-1) for g in (grad_loss, grad_z))
    inputs = (rows, weight, flat, *chosen.values())
    always, bias = inputs[_ALWAYS], chosen["bias"] is not None
    more = _modifiers(*inputs[_TENSORS], *inputs[_SOFT_CAP])
    given: tuple[Any, ...] = (grad_loss, grad_z, rows, weight, flat, lse, *always, True, True, *more, bias)
    dx, dweight, dbias = _run_backward(*given, main_grad=main_grad)
    dx = dx.reshape(x.shape)
    return (dx, dweight, dbias) if bias else (dx, dweight)


def token_logprobs_backward(
    grad_logprobs: Array,
    x: Array,
    weight: Array,
    targets: Array,
    lse: Array,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    bias: Array | None = None,
    logit_soft_cap: float | None = None,
    main_grad: Array | None = None,
) -> tuple[Array | None, ...]:
    """Gradients ``(dx, dweight)``, and with a bias ``dbias``, of :func:`token_logprobs`.

    Args:
        grad_logprobs: f32 like targets. lse: of :func:`linear_cross_entropy` on the same arguments with ``reduction``
            "none", whose ``logprobs`` are those of :func:`token_logprobs`.
        main_grad: as for :func:`linear_cross_entropy_backward`; the others as in the forward call.
    """
    return linear_cross_entropy_backward(
        -grad_logprobs, None, x, weight, targets, lse, main_grad=main_grad, ignore_index=ignore_index,
        logit_scale=logit_scale, bias=bias, logit_soft_cap=logit_soft_cap, reduction="none",
    )  # fmt: skip


def linear_cross_entropy_reference(
    x: Any, weight: Any, targets: Any, **options: Unpack[LinearCrossEntropyOptions]
) -> LinearCrossEntropy | LinearCrossEntropyDetails:
    """The same in plain torch with the logits in memory; any floating dtype, differentiable any number of times.

    From the logits on it computes in f32 at least, as one would around ``torch.nn.functional.cross_entropy``.
    """
    import torch

    o = SimpleNamespace(**with_defaults(linear_cross_entropy, options))
    logits = x @ weight.mT
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = o.logit_scale * (logits if o.bias is None else logits + o.bias)
    if o.logit_soft_cap is not None:
        logits = o.logit_soft_cap * torch.tanh(logits / o.logit_soft_cap)
    kept = targets != o.ignore_index
    lse = torch.where(kept, torch.logsumexp(logits, -1), 0.0)
    picked = logits.gather(-1, torch.where(kept, targets, 0).unsqueeze(-1)).squeeze(-1)
    logprobs = torch.where(kept, picked, 0.0) - lse
    classes = logits.new_ones(logits.shape[-1]) if o.class_weight is None else o.class_weight
    shares = torch.where(kept, torch.ones_like(lse) if o.token_weight is None else o.token_weight, 0.0)
    counts = shares * classes[torch.where(kept, targets, 0)]
    loss, z = -counts * logprobs, shares * o.z_loss * lse * lse
    if o.label_smoothing:
        smooth = torch.where(kept, ((lse.unsqueeze(-1) - logits) * classes).mean(-1), 0.0)
        loss = (1.0 - o.label_smoothing) * loss + o.label_smoothing * shares * smooth
    if o.reduction != "none":
        mean = o.reduction == "mean"
        loss, z = loss.sum() / (counts.sum() if mean else 1), z.sum() / (shares.sum() if mean else 1)
    out = loss, z, logprobs.detach(), lse.detach()
    if not (o.return_entropy or o.return_predicted):
        return LinearCrossEntropy(*out)
    p = torch.softmax(logits.detach(), -1)
    entropy = torch.where(kept, torch.special.entr(p).sum(-1), 0.0) if o.return_entropy else None
    predicted = torch.where(kept, logits.argmax(-1), -1) if o.return_predicted else None
    return LinearCrossEntropyDetails(*out, entropy, predicted)


def _modifiers(
    token_weight: Array | None, bias: Array | None, class_weight: Array | None, logit_soft_cap: float | None
) -> tuple[Any, ...]:
    """What follows the options that every call passes, as the kernel takes it."""
    flat = None if token_weight is None else last_contiguous(token_weight.reshape(-1))
    return flat, last_contiguous(bias), last_contiguous(class_weight), logit_soft_cap


def _results(x: Array, reduction: str) -> tuple[Array, Array, Array, Array]:
    # torch makes a twin in two thirds of the time of a tensor from its shape
    twin = sys.modules["torch"].empty_like if is_torch(x) else empty_like
    lse = empty(x, (x.shape[0],), "float32")
    loss = twin(lse) if reduction == "none" else empty(x, (), "float32")
    return loss, twin(loss), twin(lse), lse


def _run(
    x: Array, weight: Array, targets: Array, ignore_index: int, smoothing: float, z_loss: float,
    scale: float, reduction: str, token_weight: Array | None = None, bias: Array | None = None,
    class_weight: Array | None = None, soft_cap: float | None = None, want_entropy: bool = False,
    want_predicted: bool = False, *, dx: Any = None, dweight: Any = None, dbias: Any = None,
) -> tuple[Array, ...]:  # fmt: skip
    out = _results(x, reduction)
    observed: tuple[Array, ...] = ()
    if want_entropy or want_predicted:
        observed = _observed(x, want_entropy, want_predicted)
    if runs_in_chunks(x):
        entropy, predicted = (
            o if w else None
            for o, w in zip(observed or (None, None), (want_entropy, want_predicted), strict=True)
        )
        options = (
            ignore_index, smoothing, z_loss, scale, reduction, token_weight, bias, class_weight, soft_cap,
            *chunks.NO_SLICE,
        )  # fmt: skip
        chunks.forward(
            last_contiguous(x), last_contiguous(weight), targets, options, (*out, entropy, predicted),
            (dx, dweight, dbias),
        )  # fmt: skip
        return (*out, *observed)
    backend.extension().linear_cross_entropy_forward(
        last_contiguous(x), last_contiguous(weight), targets, ignore_index, smoothing, z_loss, scale,
        reduction, *out, dx, dweight, token_weight, bias, class_weight, soft_cap, dbias,
        observed[0] if want_entropy else None, observed[1] if want_predicted else None,
    )  # fmt: skip
    return (*out, *observed) if observed else out


def _observed(x: Array, want_entropy: bool, want_predicted: bool) -> tuple[Array, Array]:
    """Room for entropy and predicted tokens, of no elements where not wanted."""
    rows = x.shape[:1]
    entropy = empty(x, rows if want_entropy else (0,), "float32")
    return entropy, empty(x, rows if want_predicted else (0,), "int64")


def _run_backward(
    grad_loss: Any, grad_z: Any, x: Array, weight: Array, targets: Array, lse: Array, ignore_index: int,
    smoothing: float, z_loss: float, scale: float, reduction: str, want_x: bool, want_weight: bool,
    token_weight: Any = None, bias: Any = None, class_weight: Any = None, soft_cap: float | None = None,
    want_bias: bool = False, *, main_grad: Any = None,
) -> tuple[Any, Any, Any]:  # fmt: skip
    dx = empty(x, x.shape) if want_x else None
    dweight = main_grad
    if want_weight and main_grad is None:
        dweight = empty(weight, weight.shape)
    dbias = empty_like(bias) if want_bias and bias is not None else None
    if runs_in_chunks(x):
        options = (
            ignore_index, smoothing, z_loss, scale, reduction, token_weight, bias, class_weight, soft_cap,
            *chunks.NO_SLICE,
        )  # fmt: skip
        chunks.backward(
            grad_loss, grad_z, last_contiguous(x), last_contiguous(weight), targets, lse, options,
            (dx, dweight, dbias), main_grad is not None,
        )  # fmt: skip
        return dx, None if main_grad is not None else dweight, dbias
    backend.extension().linear_cross_entropy_backward(
        grad_loss, grad_z, last_contiguous(x), last_contiguous(weight), targets, lse, ignore_index, smoothing,
        z_loss, scale, reduction, dx, dweight, main_grad is not None, token_weight, bias, class_weight, soft_cap, dbias,
    )  # fmt: skip
    return dx, None if main_grad is not None else dweight, dbias


# --- torch ------------------------------------------------------------------------------------------------------


def _forward(*inputs: Any) -> tuple[Any, ...]:
    out = _run(*inputs)
    return out if len(out) > 4 else (*out, *_observed(inputs[0], False, False))


def _fake(*inputs: Any) -> tuple[Any, ...]:
    wanted = (*inputs[_OBSERVED], False, False)[:2]  # the dispatcher leaves defaults out
    return *_results(inputs[0], inputs[_REDUCTION]), *_observed(inputs[0], *wanted)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _save(ctx, inputs, output, (None, None, None), None)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...], made: Any, main_grad: Any) -> None:
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], output[3], *made, *inputs[_TENSORS])
    ctx.options, ctx.modifiers, ctx.main_grad = inputs[_ALWAYS], inputs[_SOFT_CAP], main_grad


def _gradients_at_once(x: Any, weight: Any, main_grad: Any, z_loss: float, reduction: str) -> bool:
    """Whether the eager forward makes the gradients too, for gradients of 1 of loss and z_loss.

    That saves making the logits again, a quarter of all products, at the price of weight and its gradient
    crossing memory once per chunk of 512 tokens: bf16 products are too fast for that to pay with a second chunk.
    main_grad takes the weight's gradient unrounded.

    On a GPU the chunks are large enough for it always to pay; but whether one factor serves both losses is not known
    there without waiting, so not with a z_loss.
    """
    torch = sys.modules["torch"]
    if runs_in_chunks(x):
        return reduction != "none" and not z_loss
    if x.dtype is not weight.dtype or reduction == "none":
        return False
    return x.dtype is torch.float32 or (
        x.dtype is torch.bfloat16 and x.shape[0] <= CHUNK_ROWS and main_grad is None
    )


def _eager_forward(ctx: Any, *inputs: Any) -> tuple[Any, ...]:
    x, weight = inputs[:2]
    main_grad = getattr(weight, "main_grad", None)
    dx = dweight = dbias = None
    if _gradients_at_once(x, weight, main_grad, inputs[_Z_LOSS], inputs[_REDUCTION]):
        want_x, want_weight = ctx.needs_input_grad[:2]
        like = weight if main_grad is None else main_grad  # unrounded where it is to be added
        dx, dweight = empty_like(x) if want_x else None, empty_like(like) if want_weight else None
        dbias = empty_like(inputs[_BIAS]) if _needs_bias(ctx) else None
    output = _run(*inputs, dx=dx, dweight=dweight, dbias=dbias)
    _save(ctx, inputs, output, (dx, dweight, dbias), main_grad)
    return output


def _needs_bias(ctx: Any) -> bool:
    return len(ctx.needs_input_grad) > _BIAS and ctx.needs_input_grad[_BIAS]


def _eager_backward(ctx: Any, grad_loss: Any, grad_z: Any, *unused: Any) -> tuple[Any, ...]:
    x, _, _, _, dx, dweight, dbias, *_ = ctx.saved_tensors
    made = dx is not None or dweight is not None or dbias is not None
    if made and grad_loss is not None and runs_in_chunks(x):
        return _scaled_unseen(ctx, grad_loss, dx, dweight, dbias)
    factor = _common_factor(grad_loss, grad_z, ctx.options[2]) if made else None
    half = x.element_size() == 2 or (dbias is not None and dbias.element_size() == 2)
    # bf16 gradients are rounded already: only a power of two rounds them no second time.
    if factor is None or (half and abs(frexp(factor)[0]) != 0.5):
        return _backward(ctx, grad_loss, grad_z, *unused)
    last_use = not sys.modules["torch"]._C._autograd._get_current_graph_task_keep_graph()
    if dweight is not None and ctx.main_grad is not None:
        ctx.main_grad.add_(dweight, alpha=factor)
        dweight = None
    return _in_place(
        _scaled(dx, factor, last_use), _scaled(dweight, factor, last_use), _scaled(dbias, factor, last_use)
    )


def _scaled_unseen(ctx: Any, factor: Any, dx: Any, dweight: Any, dbias: Any) -> tuple[Any, ...]:
    """The gradients made for 1, times a factor that stays on the device; 16-bit ones are rounded again, to equal bits
    where it is a power of two."""
    if dweight is not None and ctx.main_grad is not None:
        ctx.main_grad.addcmul_(dweight, factor)
        dweight = None
    keep = sys.modules["torch"]._C._autograd._get_current_graph_task_keep_graph()
    return _in_place(
        *(g if g is None else g * factor if keep else g.mul_(factor) for g in (dx, dweight, dbias))
    )


def _in_place(dx: Any, dweight: Any, dbias: Any) -> tuple[Any, ...]:
    """One gradient per input."""
    return dx, dweight, *(None,) * (_BIAS - 2), dbias, *(None,) * (_OBSERVED.stop - _BIAS - 1)


def _common_factor(grad_loss: Any, grad_z: Any, z_loss: float) -> float | None:
    """The factor that turns the gradients for 1 into those wanted; None where no single one does."""
    if grad_loss is None:
        return None
    factor: float = grad_loss.item()
    if z_loss and (grad_z is None or grad_z.item() != factor):
        return None
    return factor if isfinite(factor) else None  # rows without gradient stay 0, not NaN


def _scaled(gradient: Any, factor: float, last_use: bool) -> Any:
    if gradient is None or (last_use and factor == 1.0):
        return gradient
    return gradient.mul_(factor) if last_use else gradient * factor


def _backward(ctx: Any, grad_loss: Any, grad_z: Any, *_: Any) -> tuple[Any, ...]:
    if grad_loss is None and grad_z is None:
        return _in_place(None, None, None)
    want_x, want_weight = ctx.needs_input_grad[:2]
    want_bias = _needs_bias(ctx)
    saved = ctx.saved_tensors
    inputs = (grad_loss, grad_z, *saved[:4], *ctx.options, want_x, want_weight)
    if len(saved) > 7:
        inputs += (*saved[7:], *ctx.modifiers, want_bias)
    if ctx.main_grad is not None and want_weight:
        made = _run_backward(*inputs, main_grad=ctx.main_grad)
        want_weight = False
    else:
        made = _backward_op(*inputs)
    return _in_place(
        *(g if want else None for g, want in zip(made, (want_x, want_weight, want_bias), strict=True))
    )


def _backward_forward(*inputs: Any) -> tuple[Any, ...]:
    x = inputs[2]
    return tuple(x.new_empty((0,)) if g is None else g for g in _run_backward(*inputs))


def _backward_fake(
    grad_loss: Any, grad_z: Any, x: Any, weight: Any, targets: Any, lse: Any, ignore_index: int, smoothing: float,
    z_loss: float, scale: float, reduction: str, want_x: bool, want_weight: bool, token_weight: Any = None,
    bias: Any = None, class_weight: Any = None, soft_cap: Any = None, want_bias: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    wanted = ((x, want_x), (weight, want_weight), (bias, want_bias))
    return tuple(t.new_empty(t.shape) if want else x.new_empty((0,)) for t, want in wanted)


_backward_op = TorchOp(
    "linear_cross_entropy_backward",
    "(Tensor? grad_loss, Tensor? grad_z, Tensor x, Tensor weight, Tensor targets, Tensor lse, int ignore_index,"
    " float label_smoothing, float z_loss, float logit_scale, str reduction, bool want_x, bool want_weight,"
    " Tensor? token_weight=None, Tensor? bias=None, Tensor? class_weight=None, float? logit_soft_cap=None,"
    " bool want_bias=False)"
    " -> (Tensor, Tensor, Tensor)",
    forward=_backward_forward,
    fake=_backward_fake,
    inference=_run_backward,
)
_op = TorchOp(
    "linear_cross_entropy",
    "(Tensor x, Tensor weight, Tensor targets, int ignore_index, float label_smoothing, float z_loss,"
    " float logit_scale, str reduction, Tensor? token_weight=None, Tensor? bias=None, Tensor? class_weight=None,"
    " float? logit_soft_cap=None, bool return_entropy=False, bool return_predicted=False)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    forward=_forward,
    inference=_run,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    eager_forward=_eager_forward,
    eager_backward=_eager_backward,
    lower_precision=True,
    full_precision=(8, 9, 10),
)
