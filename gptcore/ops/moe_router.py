"""The router of a mixture-of-experts layer: K experts for every token, gates, places under a capacity, losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from gptcore import backend
from gptcore.errors import unknown_name
from gptcore.ops.arrays import Array, as_array, contiguous, empty, empty_like, last_contiguous
from gptcore.ops.registration import TorchOp

_NO_LIMIT = 2**31 - 1
MOST_EXPERTS, MOST_CHOICES = 4096, 64  # the kernel's
# A second choice of renormalised gate g is kept with probability min(1, g / threshold).
SECOND_THRESHOLDS = {"always": 0.0, "gshard": 0.5, "st_moe": 0.2}
CAPACITY_CONVENTIONS = ("per_token", "per_assignment")
_ROUNDINGS: dict[str, Callable[[float], int]] = {"up": math.ceil, "down": math.floor, "nearest": round}


class MoERouting(NamedTuple):
    """What :func:`moe_router` gives for N tokens, E experts, K choices; dispatch and combine take it from here.

    gates: (N, K) f32, differentiable; 0 for a choice that is dropped and for padding.
    experts: (N, K) int32, the likeliest first; -1 for padding.
    rows: (N, K) int32, a choice's row among the tokens sorted by expert; -1 where it is dropped.
    offsets: (E + 1,) int32; the rows of expert e are offsets[e] to offsets[e + 1] - 1.
    requested: (E,) int32, choices before any is dropped for capacity.
    balance_loss, z_loss: () f32, differentiable, without coefficients.
    entropy: () f32, of the router's probabilities in nats, mean over tokens; not differentiable.
    lse: (N,) f32 and share: (E,) f32: for :func:`moe_router_backward`.
    """

    gates: Array
    experts: Array
    rows: Array
    offsets: Array
    requested: Array
    balance_loss: Array
    z_loss: Array
    entropy: Array
    lse: Array
    share: Array

    @property
    def drop_rate(self) -> Array:
        """() share of the choices that found their expert full."""
        requested = self.requested.sum()
        return 1.0 - self.offsets[-1] / (requested + (requested == 0)) - (requested == 0) * 1.0

    @property
    def load(self) -> Array:
        """() requests of the most wanted expert over the mean; 1 is balanced, E all at one."""
        requested = self.requested.sum()
        return self.requested.max() * len(self.requested) / (requested + (requested == 0))


def moe_router(
    logits: Array,
    *,
    top_k: int = 2,
    capacity: int | None = None,
    renormalise: bool = True,
    mask: Array | None = None,
    priority: Array | str | None = None,
    second_choice: str = "always",
    uniforms: Array | None = None,
    balance: str = "first",
) -> MoERouting:
    """Choose ``top_k`` experts for each token and its place among those of an expert.

    First choices are placed before second ones, second before third; a choice that finds ``capacity`` others at
    its expert is dropped, to the residual. Arithmetic is f32 whatever the dtype.

    Args:
        logits: (N, E), f32 or bf16, E up to 4096; torch tensor (differentiable), NumPy array. For noisy top-K
            (Shazeer et al. 2017) they come with their noise.
        top_k: K, 1 to 64 and at most E. Of equal logits the expert of lower index is chosen first.
        capacity: most tokens of an expert, see :func:`expert_capacity`; None drops none.
        renormalise: gates sum to 1 over the K chosen, as a softmax after the choice does; otherwise they are the
            probabilities over all experts, which a single choice needs to get a gradient (Switch).
        mask: (N,) bool, False for padding, which takes no place and counts in no loss.
        priority: who is placed first within a choice: None by position, "gate" by the first choice's probability,
            or (N,) f32, larger first (random numbers for a random permutation).
        second_choice: "always" kept; at random with probability min(1, 2 g) ("gshard", Lepikhin et al. 2020) or
            min(1, g / 0.2) ("st_moe", Zoph et al. 2022), g the second gate renormalised over two; one not kept
            takes no place. Needs ``uniforms``.
        uniforms: (N,) f32 in [0, 1).
        balance: whose share the balance loss takes, E sum_e share_e mean_n p_ne: "first" choices (GShard, Switch,
            ST-MoE) or "all" K (transformers).

    Returns:
        :class:`MoERouting`. A NaN logit is chosen last and makes its token's gates and all losses NaN; without a
        token that counts the losses are 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit; nothing is written then.
        RuntimeError: on a second derivative.
    """
    options = _checked(top_k, capacity, renormalise, priority, second_choice, balance)
    by_values = None if isinstance(priority, str) else priority
    return MoERouting._make(_op(logits, mask, by_values, uniforms, *options))


def moe_router_backward(
    dgates: Array | None,
    dbalance_loss: float,
    dz_loss: float,
    logits: Array,
    routing: MoERouting,
    *,
    renormalise: bool = True,
) -> Array:
    """Gradient of :func:`moe_router` by ``logits``, (N, E), for callers without autograd.

    Args:
        dgates: (N, K) f32, gradient of the gates; None is zero. That of a dropped choice does not count.
        dbalance_loss, dz_loss: gradients of the losses: their coefficients.
        routing: what the forward call gave; ``renormalise`` as it was there.
    """
    balance, z = (as_array(x, logits, "float32") for x in (dbalance_loss, dz_loss))
    return _run_backward(
        dgates, balance, z, logits, routing.experts, routing.rows, routing.lse, routing.share, renormalise
    )


def expert_capacity(
    tokens: int,
    experts: int,
    *,
    factor: float,
    top_k: int = 2,
    convention: str = "per_token",
    minimum: int = 1,
    rounding: str = "up",
) -> int:
    """Most tokens of an expert, for ``tokens`` (padding included) and ``experts``.

    Args:
        factor: capacity factor; 1 is what balanced experts need, by the convention.
        convention: "per_token", factor * tokens / experts (Mesh-TensorFlow, ST-MoE), or "per_assignment", top_k times
            that (GShard, DeepSpeed, MegaBlocks).
        minimum: at least so many (DeepSpeed and Mesh-TensorFlow take 4).
        rounding: "up" (DeepSpeed), "down" (Mesh-TensorFlow, MegaBlocks) or "nearest".

    Raises:
        ValueError: a factor that is not above 0, unknown names, or a capacity of 0.
    """
    _known("convention", convention, CAPACITY_CONVENTIONS)
    _known("rounding", rounding, _ROUNDINGS)
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(
            f"expert_capacity: argument 'factor': got {factor}, expected a finite number above 0"
        )
    share = factor * tokens / experts * (top_k if convention == "per_assignment" else 1)
    capacity = max(_ROUNDINGS[rounding](share), minimum)
    if capacity < 1 and tokens:
        raise ValueError(
            f"expert_capacity: got 0 (factor {factor}, {tokens} tokens, {experts} experts, rounded {rounding}), "
            "expected at least 1; every token would be dropped"
        )
    return max(capacity, 1)  # no tokens: any will do


def moe_router_reference(
    logits: Any,
    *,
    top_k: int = 2,
    capacity: int | None = None,
    renormalise: bool = True,
    mask: Any = None,
    priority: Any = None,
    second_choice: str = "always",
    uniforms: Any = None,
    balance: str = "first",
) -> MoERouting:
    """The same in plain torch and slow loops, any floating dtype, gates and losses differentiable any number of
    times."""
    import torch

    tokens, number = logits.shape
    counted = torch.ones(tokens, dtype=torch.bool) if mask is None else mask.bool()
    probabilities = torch.softmax(logits, dim=-1)
    chosen = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :top_k]
    gates = probabilities.gather(1, chosen)
    if renormalise:
        gates = torch.softmax(logits.gather(1, chosen), dim=-1)
    by = probabilities.max(dim=-1).values if isinstance(priority, str) else priority
    order = range(tokens) if by is None else torch.sort(by, descending=True, stable=True).indices.tolist()
    threshold = SECOND_THRESHOLDS[second_choice]
    limit = _NO_LIMIT if capacity is None else capacity
    places, requested = torch.full((tokens, top_k), -1), [0] * number
    for k in range(top_k):
        for n in order:
            second = (gates[n, 1] / (gates[n, 0] + gates[n, 1])).item() if k == 1 else 1.0
            drawn = not threshold or k != 1 or float(uniforms[n]) * threshold < second
            if counted[n] and drawn:
                expert = int(chosen[n, k])
                if requested[expert] < limit:
                    places[n, k] = requested[expert]
                requested[expert] += 1
    offsets = [0]
    for count in requested:
        offsets.append(offsets[-1] + min(count, limit))
    start = torch.tensor(offsets)
    kept = places >= 0
    rows = torch.where(kept, places + start[chosen], -1)
    total = max(int(counted.sum()), 1)
    voters = chosen[counted][:, : top_k if balance == "all" else 1]
    share = torch.bincount(voters.flatten(), minlength=number) / total
    lse = torch.logsumexp(logits, dim=-1)
    spread = torch.special.entr(probabilities).sum(dim=-1)
    return MoERouting(
        gates=torch.where(kept, gates, 0.0),
        experts=torch.where(counted[:, None], chosen, -1).int(),
        rows=rows.int(),
        offsets=start.int(),
        requested=torch.tensor(requested).int(),
        balance_loss=number * (share * probabilities[counted].sum(dim=0)).sum() / total,
        z_loss=lse[counted].square().sum() / total,
        entropy=spread[counted].sum().detach() / total,
        lse=lse.detach(),
        share=share,
    )


def _checked(
    top_k: int, capacity: int | None, renormalise: bool, priority: Any, second_choice: str, balance: str
) -> tuple[int, bool, bool, float, int, bool]:
    """The options as the extension takes them."""
    _known("second_choice", second_choice, SECOND_THRESHOLDS)
    _known("balance", balance, ("first", "all"))
    if isinstance(priority, str):
        _known("priority", priority, ("gate",))
    limit = _NO_LIMIT if capacity is None else min(capacity, _NO_LIMIT)
    threshold = SECOND_THRESHOLDS[second_choice]
    return top_k, renormalise, isinstance(priority, str), threshold, limit, balance == "all"


def _known(name: str, value: str, known: Any) -> None:
    if value not in known:
        raise unknown_name(name, value, known)


def _outputs(logits: Array, top_k: int) -> tuple[Array, ...]:
    if logits.ndim != 2:
        raise ValueError(
            f"moe_router: argument 'logits': got {logits.ndim} dimensions, expected 2: (tokens, experts)"
        )
    tokens, experts = logits.shape
    choices = tokens, max(top_k, 0)
    return (
        empty(logits, choices, "float32"), empty(logits, choices, "int32"), empty(logits, choices, "int32"),
        empty(logits, (experts + 1,), "int32"), empty(logits, (experts,), "int32"), empty(logits, (), "float32"),
        empty(logits, (), "float32"), empty(logits, (), "float32"), empty(logits, (tokens,), "float32"),
        empty(logits, (experts,), "float32"),
    )  # fmt: skip


def _run(
    logits: Array, mask: Any, priority: Any, uniforms: Any, top_k: int, renormalise: bool, by_gate: bool,
    threshold: float, capacity: int, count_all: bool,
) -> tuple[Array, ...]:  # fmt: skip
    gates, experts, *others = outputs = _outputs(logits, top_k)
    backend.extension().moe_router_forward(
        last_contiguous(logits), mask, priority, uniforms, renormalise, by_gate, threshold, capacity, count_all,
        experts, gates, *others,
    )  # fmt: skip
    return outputs


def _run_backward(
    dgates: Any, dbalance_loss: Any, dz_loss: Any, logits: Array, experts: Array, rows: Array, lse: Array,
    share: Array, renormalise: bool,
) -> Array:  # fmt: skip
    dlogits = empty_like(logits)
    backend.extension().moe_router_backward(
        contiguous(dgates), dbalance_loss, dz_loss, last_contiguous(logits), experts, rows, lse, share, renormalise,
        dlogits,
    )  # fmt: skip
    return dlogits


# --- torch ------------------------------------------------------------------------------------------------------


def _fake(logits: Any, mask: Any, priority: Any, uniforms: Any, top_k: int, *_: Any) -> tuple[Any, ...]:
    return _outputs(logits, top_k)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, experts, rows, offsets, requested, _, _, entropy, lse, share = output
    ctx.mark_non_differentiable(experts, rows, offsets, requested, entropy, lse, share)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], experts, rows, lse, share)
    ctx.options = inputs[5]


def _backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    given, nothing = (grads[0], grads[5], grads[6]), (None,) * 9  # of gates, balance_loss and z_loss
    if all(grad is None for grad in given) or not ctx.needs_input_grad[0]:
        return None, *nothing
    return _backward_op(*given, *ctx.saved_tensors, ctx.options), *nothing


def _backward_fake(dgates: Any, dbalance_loss: Any, dz_loss: Any, logits: Any, *_: Any) -> Any:
    return empty_like(logits)


_backward_op = TorchOp(
    "moe_router_backward",
    "(Tensor? dgates, Tensor? dbalance_loss, Tensor? dz_loss, Tensor logits, Tensor experts, Tensor rows, Tensor lse,"
    " Tensor share, bool renormalise) -> Tensor",
    forward=_run_backward,
    fake=_backward_fake,
)
_op = TorchOp(
    "moe_router",
    "(Tensor logits, Tensor? mask, Tensor? priority, Tensor? uniforms, SymInt top_k, bool renormalise, bool by_gate,"
    " float second_threshold, SymInt capacity, bool count_all)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    forward=_run,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    native_hooks=True,
)
