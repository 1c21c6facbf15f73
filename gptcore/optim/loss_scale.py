"""Dynamic loss scaling: the loss is multiplied so that f16 gradients neither vanish nor overflow.

Micikevicius et al. 2018, "Mixed Precision Training", section 3.2. f16 has nothing below 6e-8 and above 65,504;
gradients of a loss times a power of two have the same bits otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from gptcore.optim.fused import FusedOptimizer
    from gptcore.optim.zero import ZeroOptimizer


class LossScaler:
    """A scale that halves when a gradient overflows, and doubles after ``growth_interval`` updates without.

    ::

        scaler.scale(loss).backward()
        applied = scaler.step(optimizer)

    The optimizers divide the gradients by the scale and look for infinities in the pass that they make anyway, so there
    is no ``unscale_``; an update that overflowed touches nothing. Arguments and ``state_dict`` are those of
    ``torch.amp.GradScaler``, whose state this loads, and ``minimum`` and ``patience``.

    Args:
        init_scale: the first scale, above 0; powers of two keep all bits.
        growth_factor: above 1.
        backoff_factor: above 0, below 1.
        growth_interval: updates without overflow before the scale grows, 1 or more.
        minimum: the least scale.
        patience: overflows one after the other that count as a collapse, 1 or more.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        init_scale: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        *,
        minimum: float = 1.0,
        patience: int = 30,
    ) -> None:
        fits = {
            "init_scale": (init_scale, minimum <= init_scale < math.inf, f"{minimum} (minimum) or more"),
            "growth_factor": (growth_factor, 1.0 < growth_factor < math.inf, "above 1"),
            "backoff_factor": (backoff_factor, 0.0 < backoff_factor < 1.0, "above 0 and below 1"),
            "growth_interval": (growth_interval, growth_interval >= 1, "1 or more"),
            "minimum": (minimum, 0.0 < minimum < math.inf, "above 0"),
            "patience": (patience, patience >= 1, "1 or more"),
        }
        for name, (value, fitting, expected) in fits.items():
            if not fitting:
                raise ValueError(f"LossScaler: argument '{name}': got {value}, expected {expected}")
        self._scale = float(init_scale)
        self.growth_factor, self.backoff_factor = growth_factor, backoff_factor
        self.growth_interval = growth_interval
        self.minimum, self.patience = minimum, patience
        self._growth_tracker = 0
        self.skipped = 0
        self.overflows = 0
        self._at_minimum = False

    def get_scale(self) -> float:
        """The factor of the next loss."""
        return self._scale

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """``loss`` times the scale."""
        return loss * self._scale

    def step(self, optimizer: FusedOptimizer | ZeroOptimizer, *, micro_batches: int = 1) -> bool:
        """``optimizer.step`` on gradients of scaled losses summed over ``micro_batches``, and :meth:`update`; tells
        whether the update was applied."""
        optimizer.step(grad_scale=self._scale * micro_batches)
        self.update(optimizer.found_inf)
        return not optimizer.found_inf

    def update(self, found_inf: bool) -> None:
        """Take in whether an update overflowed: ``skipped`` counts all that did, ``overflows`` those up to the last."""
        if not found_inf:
            self.overflows, self._at_minimum = 0, False
            self._growth_tracker += 1
            if self._growth_tracker == self.growth_interval:
                self._growth_tracker = 0
                grown = self._scale * self.growth_factor
                self._scale = grown if grown < math.inf else self._scale
            return
        self.skipped += 1
        self.overflows += 1
        self._growth_tracker = 0
        self._at_minimum = self._scale <= self.minimum
        self._scale = max(self._scale * self.backoff_factor, self.minimum)

    def restart(self, scale: float) -> None:
        """Go on from ``scale`` with the counts up to the last update forgotten; ``skipped`` goes on.

        Raises:
            ValueError: a scale below ``minimum``, or not finite.
        """
        if not self.minimum <= scale < math.inf:
            raise ValueError(
                f"LossScaler: argument 'scale': got {scale}, expected {self.minimum} (minimum) or more"
            )
        self._scale = float(scale)
        self._growth_tracker = self.overflows = 0
        self._at_minimum = False

    def collapsed(self) -> str | None:
        """Why a smaller scale will not help, None while it may: gradients that overflow at the least scale, or
        ``patience`` updates one after the other, are not finite for another reason."""
        if self._at_minimum:
            return f"gradients overflow at the least loss scale, {self.minimum:g}"
        if self.overflows >= self.patience:
            return f"gradients overflowed in {self.overflows} updates one after the other"
        return None

    def state_dict(self) -> dict[str, Any]:
        """``torch.amp.GradScaler``'s, and the counts."""
        return {
            "scale": self._scale,
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": self._growth_tracker,
            "skipped": self.skipped,
            "overflows": self.overflows,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken, torch's included, whose counts begin at 0.

        Raises:
            ValueError: a state without a scale, as that of torch's scaler when it is disabled.
        """
        if "scale" not in state:
            raise ValueError(f"LossScaler: argument 'state': got {sorted(state)}, expected one with 'scale'")
        self._scale = float(state["scale"])
        self.growth_factor, self.backoff_factor = state["growth_factor"], state["backoff_factor"]
        self.growth_interval, self._growth_tracker = state["growth_interval"], state["_growth_tracker"]
        self.skipped, self.overflows = state.get("skipped", 0), state.get("overflows", 0)
        self._at_minimum = False
