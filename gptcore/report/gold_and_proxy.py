"""What is meant and what is optimised, over how far a policy has gone: gold and proxy reward over √KL.

Where the proxy goes on rising while gold falls, the policy has learnt to please the reward model (Gao et al. 2022,
figure 1). √KL, because that is what a small change of the policy grows with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gptcore.report.plot import Panel, Series

X_LABEL = "√KL from the reference (√nats an answer)"
CAPTION = (
    "gold, what is meant, and proxy, what is optimised, over √KL; dots are evaluations on held-out prompts"
)

# gold, proxy and divergence as metrics lines have them: a stage's own, an iteration of PPO, its held-out evaluation
_KEYS = (
    ("gold", "proxy", "kl"),
    ("gold_reward", "reward", "kl"),
    ("val_gold_reward", "val_reward", "val_kl"),
)


def panels(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Panel]:
    """Two plots of each run whose metrics lines have gold, proxy and divergence; none of the others.

    Args:
        runs: the metrics lines of each run, by its name. Read are ``gold``, ``proxy`` and ``kl``; ``gold_reward``,
            ``reward`` and ``kl``, as iterations of PPO log them; ``val_gold_reward``, ``val_reward`` and ``val_kl``,
            as its evaluations do, drawn as dots.
    """
    made = []
    for run, lines in runs.items():
        found = [(keys, told) for keys in _KEYS if (told := _told(lines, keys))]
        for place, name in enumerate(("gold", "proxy")):
            series = [_series(told, keys[place], keys[2]) for keys, told in found]
            made += [Panel(f"{run}: {name}", series)] if series else []
    return made


def _told(lines: Sequence[Mapping[str, Any]], keys: tuple[str, ...]) -> list[Mapping[str, Any]]:
    """Lines that have all of ``keys``, by divergence; none of a run that was measured against no reference."""
    told = [line for line in lines if all(isinstance(line.get(key), (int, float)) for key in keys)]
    if len(told) > 1 and not any(line[keys[2]] for line in told):
        return []
    return sorted(told, key=lambda line: line[keys[2]])


def _series(told: Sequence[Mapping[str, Any]], key: str, divergence: str) -> Series:
    # an estimate of a divergence near 0 can fall below it
    points = [(max(0.0, line[divergence]) ** 0.5, float(line[key])) for line in told]
    held_out = key.startswith("val_")
    return Series(
        "held out" if held_out else "iterations" if key.endswith("reward") else key, points, dots=held_out
    )
