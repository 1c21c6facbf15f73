"""Statistics of evaluation: intervals, tests, ratings, win rates, pass@k. NumPy alone, no torch.

| module | what it holds |
|---|---|
| ``intervals`` | Wilson, Clopper-Pearson, Student, paired differences, the bootstrap (BCa) |
| ``significance`` | McNemar, sign, paired t and permutation tests, Holm's adjustment |
| ``bradley_terry`` | ratings with a prior, sandwich and bootstrap intervals; Elo's updates |
| ``win_rate`` | pairwise win rates, plain and length-controlled |
| ``pass_at_k`` | the unbiased estimator, over problems with its interval |
| ``roc``, ``calibration`` | the area under the curve; Brier, log loss, calibration error |
| ``best_of_n`` | the distribution of the best of n samples, its divergence, its expected score |
| ``distributions`` | normal, Student, beta and binomial |

Nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name in __dir__():
        return importlib.import_module(f"gptcore.stats.{name}")
    raise AttributeError(f"module 'gptcore.stats' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))
