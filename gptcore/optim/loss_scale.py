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
    is no ``unscale_``; an update that overflowed touches nothing. With losses on a GPU the scale lives there, and
    updates wait for nothing. Arguments and ``state_dict`` are those of ``torch.amp.GradScaler``, whose state this
    loads, and ``minimum`` and ``patience``.

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
        self._skipped = 0
        self._overflows = 0
        self._at_minimum = False
        self._held: dict[str, torch.Tensor] | None = None  # the same five on a GPU, which then are the truth

    def get_scale(self) -> float:
        """The factor of the next loss."""
        self._read()
        return self._scale

    @property
    def factor(self) -> float | torch.Tensor:
        """The same as the optimizers' ``grad_scale`` takes it: on a GPU one element there, which nobody waits for."""
        return self._scale if self._held is None else self._held["scale"]

    @property
    def skipped(self) -> int:
        """Updates that overflowed."""
        self._read()
        return self._skipped

    @property
    def overflows(self) -> int:
        """Those of them that came one after the other, up to the last."""
        self._read()
        return self._overflows

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """``loss`` times the scale."""
        if not loss.is_cuda:
            return loss * self.get_scale()
        return loss * self._hold(loss.device)["scale"].to(loss.dtype)

    def step(
        self, optimizer: FusedOptimizer | ZeroOptimizer, *, micro_batches: int = 1
    ) -> bool | torch.Tensor:
        """``optimizer.step`` on gradients of scaled losses summed over ``micro_batches``, and :meth:`update`; tells
        whether the update was applied, on a GPU by one element there."""
        optimizer.step(grad_scale=self.factor * micro_batches)
        found_inf = optimizer.found_inf
        self.update(found_inf)
        return not found_inf if isinstance(found_inf, bool) else found_inf.logical_not()

    def update(self, found_inf: bool | torch.Tensor) -> None:
        """Take in whether an update overflowed: ``skipped`` counts all that did, ``overflows`` those up to the last.

        A tensor on a GPU is taken in there: scale and counts are then, and whoever asks for them waits.
        """
        if not isinstance(found_inf, bool):
            if found_inf.is_cuda:
                self._update_held(found_inf)
                return
            found_inf = bool(found_inf)
        self._read()
        self._update_here(found_inf)
        self._write()

    def _update_here(self, found_inf: bool) -> None:
        if not found_inf:
            self._overflows, self._at_minimum = 0, False
            self._growth_tracker += 1
            if self._growth_tracker == self.growth_interval:
                self._growth_tracker = 0
                grown = self._scale * self.growth_factor
                self._scale = grown if grown < math.inf else self._scale
            return
        self._skipped += 1
        self._overflows += 1
        self._growth_tracker = 0
        self._at_minimum = self._scale <= self.minimum
        self._scale = max(self._scale * self.backoff_factor, self.minimum)

    # --- on a GPU ------------------------------------------------------------------------------------------

    def _hold(self, device: torch.device) -> dict[str, torch.Tensor]:
        import torch

        if self._held is None:
            names = ("scale", "growth_tracker", "skipped", "overflows", "at_minimum")
            self._held = {name: torch.empty((), dtype=torch.float64, device=device) for name in names}
            self._write()
        return self._held

    def _update_held(self, found_inf: torch.Tensor) -> None:
        """``_update_here`` without a look at the numbers."""
        import torch

        held = self._hold(found_inf.device)
        scale = held["scale"]
        tracker = torch.where(found_inf, 0.0, held["growth_tracker"] + 1.0)
        grows = tracker == self.growth_interval
        grown = scale * self.growth_factor
        following = torch.where(grows & grown.isfinite(), grown, scale)
        fallen = (scale * self.backoff_factor).clamp(min=self.minimum)
        held["growth_tracker"].fill_(torch.where(grows, 0.0, tracker))
        held["skipped"].add_(found_inf)
        held["overflows"].fill_(torch.where(found_inf, held["overflows"] + 1.0, 0.0))
        held["at_minimum"].fill_(found_inf & (scale <= self.minimum))
        scale.fill_(torch.where(found_inf, fallen, following))

    def _read(self) -> None:
        """What a GPU holds, for the host, which waits for it."""
        if self._held is None:
            return
        import torch

        numbers = torch.stack(list(self._held.values())).tolist()
        self._scale = numbers[0]
        self._growth_tracker, self._skipped, self._overflows = (int(number) for number in numbers[1:4])
        self._at_minimum = bool(numbers[4])

    def _write(self) -> None:
        """The other way."""
        if self._held is None:
            return
        numbers = (self._scale, self._growth_tracker, self._skipped, self._overflows, self._at_minimum)
        for tensor, number in zip(self._held.values(), numbers, strict=True):
            tensor.fill_(number)

    # --- between updates -----------------------------------------------------------------------------------

    def restart(self, scale: float) -> None:
        """Go on from ``scale`` with the counts up to the last update forgotten; ``skipped`` goes on.

        Raises:
            ValueError: a scale below ``minimum``, or not finite.
        """
        if not self.minimum <= scale < math.inf:
            raise ValueError(
                f"LossScaler: argument 'scale': got {scale}, expected {self.minimum} (minimum) or more"
            )
        self._read()
        self._scale = float(scale)
        self._growth_tracker = self._overflows = 0
        self._at_minimum = False
        self._write()

    def collapsed(self) -> str | None:
        """Why a smaller scale will not help, None while it may: gradients that overflow at the least scale, or
        ``patience`` updates one after the other, are not finite for another reason."""
        self._read()
        if self._at_minimum:
            return f"gradients overflow at the least loss scale, {self.minimum:g}"
        if self._overflows >= self.patience:
            return f"gradients overflowed in {self._overflows} updates one after the other"
        return None

    def state_dict(self) -> dict[str, Any]:
        """``torch.amp.GradScaler``'s, and the counts."""
        self._read()
        return {
            "scale": self._scale,
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": self._growth_tracker,
            "skipped": self._skipped,
            "overflows": self._overflows,
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
        self._skipped, self._overflows = state.get("skipped", 0), state.get("overflows", 0)
        self._at_minimum = False
        self._write()
