"""What every statistic asks of its arguments, named in the error."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def numbers(function: str, name: str, values: ArrayLike, *, least: int = 1) -> NDArray[np.float64]:
    """``values`` as float64, finite, at least ``least`` of them.

    Raises ValueError naming the function, the argument and what came.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size < least:
        raise ValueError(f"{function}: {name} has {array.size} values, expected at least {least}")
    if not np.isfinite(array).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"{function}: {name}{list(place)} is {array[place]}, expected finite numbers")
    return array


def paired(
    function: str, a: ArrayLike, b: ArrayLike, *, least: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two vectors of equal length, one pair for each place."""
    first, second = numbers(function, "a", a, least=least), numbers(function, "b", b, least=least)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(
            f"{function}: a is {first.shape}, b is {second.shape}, expected two vectors of one length"
        )
    return first, second


def at_least(function: str, name: str, value: float, low: float) -> None:
    """``value >= low``."""
    if not value >= low:
        raise ValueError(f"{function}: {name} is {value}, expected at least {low}")


def share(function: str, name: str, value: float) -> None:
    """``0 < value < 1``, such as a level of confidence."""
    if not 0.0 < value < 1.0:
        raise ValueError(f"{function}: {name} is {value}, expected one between 0 and 1")
