"""The keyword options that cross_entropy and linear_cross_entropy share, and how functions beside them take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict


class LossOptions(TypedDict, total=False):
    """Options of a loss over class targets; the functions' own signatures hold the defaults."""

    ignore_index: int
    label_smoothing: float
    reduction: str


def with_defaults(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """All keyword options of ``function`` in its order: those given, the others at its defaults.

    Raises:
        TypeError: an option that ``function`` does not have.
    """
    defaults: dict[str, Any] = function.__kwdefaults__  # type: ignore[attr-defined, assignment]
    for name in options:
        if name not in defaults:
            expected = ", ".join(defaults)
            raise TypeError(
                f"{function.__name__}: got an unexpected keyword argument {name!r}, expected {expected}"
            )
    return {**defaults, **options}
