"""Which probabilities attention's dropout keeps: the kernels' rule in plain torch."""

from __future__ import annotations

from typing import Any

from gptcore.ops.arrays import Array, empty, is_torch, namespace
from gptcore.ops.philox import philox_reference, signed_seed

STEPS = 65536


def dropout_factors(
    shape: tuple[int, ...], dropout_p: float, seed: Any, offset: int = 0, *, first: int = 0
) -> Any:
    """(B, H, T, S) float64: 0 where a probability is dropped, else what it is multiplied by.

    Query t of head h in sequence b keeps key s where its 16 random bits are below
    ``keep = floor((1 - dropout_p) * 65536 + 1/2)``, and then counts 65536 / keep times. The bits are those from
    16 * (s % 8) on of the four words that Philox4x32-10 makes of the counter (s // 8, t, b * H + h, offset).

    Args:
        seed: the key: an int, or a tensor of one int64.
        first: number of the first sequence, where it is a packed document.
    """
    import torch

    batch, heads, queries, keys = shape
    keep = int((1 - dropout_p) * STEPS + 0.5)
    if keep == STEPS:
        return torch.ones(shape, dtype=torch.float64)
    places = (
        torch.arange((keys + 7) // 8),
        torch.arange(queries)[:, None],
        (torch.arange(heads) + (torch.arange(batch)[:, None] + first) * heads)[..., None, None],
        torch.tensor(offset),
    )
    counters = torch.stack(torch.broadcast_tensors(*places), -1)
    words = philox_reference(counters, int(seed))
    bits = torch.stack((words & 0xFFFF, words >> 16), -1).flatten(-3)[..., :keys]
    return (bits < keep).double() * (STEPS / keep if keep else 0.0)


def seed_array(like: Array, seed: Any) -> Any:
    """``seed`` as the array that kernels read: an int becomes one of ``like``'s framework and device."""
    if not isinstance(seed, int):
        return seed
    value = [signed_seed("attention", seed)]
    if is_torch(like):
        return namespace(like).tensor(value, device=like.device)
    array = empty(like, (1,), "int64")
    array[...] = value[0]
    return array
