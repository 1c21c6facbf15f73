"""What the arms come to together: means with intervals, paired tests, the claims, and a page that shows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.ptx.arm import ARMS
from gptcore.report.html import Page
from gptcore.report.plot import Panel, Series
from gptcore.stats import intervals, significance

Record = Mapping[str, Any]

WORSE_WITH, WORSE_WITHOUT = 0.01, 0.03  # bits per byte: at most, and at least
KL_WITHIN = 0.2  # of each other
CORRECT_BELOW = 0.01  # share of answers
LEVEL = 0.05
COMPARED = ("change", "kl", "correct", "about", "reward")
MINUTES = 6.0  # of one core


class Claim(NamedTuple):
    """What was asked for, the figure, and whether it holds."""

    asked: str
    measured: float
    holds: bool


def together(records: Iterable[Record]) -> dict[str, Any]:
    """Of the records of a study: by arm what each seed measured, means with 95% intervals, p-values, and the claims.

    ``change``: bits per byte after less before, what alignment costs. p-values are of Student's paired t test and of
    the exact permutation, whose smallest with five seeds is 2 / 32.
    """
    rows = list(records)
    before = next(row for row in rows if row["record"] == "start")
    table: dict[str, dict[str, list[float]]] = {}
    for name in ARMS:
        own = [row for row in rows if row.get("arm") == name]
        table[name] = {
            key: [float(row[key]) for row in own]
            for key in ("bits_per_byte", "kl", "correct", "about", "reward", "updates", "cpu_seconds")
        }
        table[name]["change"] = [value - before["bits_per_byte"] for value in table[name]["bits_per_byte"]]
    plain, mixed = (table[name] for name in ARMS)
    return {
        "seeds": len(plain["change"]),
        "arms": table,
        "means": {
            name: {key: list(intervals.mean(values)) for key, values in own.items()} for name, own in table.items()
        },
        "difference": {key: list(intervals.difference(mixed[key], plain[key])) for key in COMPARED},
        "p": {
            "t": significance.paired_t(mixed["change"], plain["change"]),
            "permutation": significance.permutation(mixed["change"], plain["change"]),
        },
        "claims": [claim._asdict() for claim in claims(plain, mixed)],
    }  # fmt: skip


def claims(plain: Mapping[str, Sequence[float]], mixed: Mapping[str, Sequence[float]]) -> list[Claim]:
    """Each claim of the study on what the arm without (``plain``) and with ptx (``mixed``) measured, seed by seed."""
    with_ptx, without = float(np.mean(mixed["change"])), float(np.mean(plain["change"]))
    p = significance.paired_t(mixed["change"], plain["change"])
    apart = float(np.mean(mixed["kl"]) / np.mean(plain["kl"]) - 1.0)
    worst = float(max(_apart(mixed["kl"], plain["kl"])))
    below = float(np.mean(plain["correct"]) - np.mean(mixed["correct"]))
    updates = float(np.max(np.abs(np.subtract(mixed["updates"], plain["updates"]))))
    minutes = max(*mixed["cpu_seconds"], *plain["cpu_seconds"]) / 60.0
    return [
        Claim(f"bits per byte worsen by at most {WORSE_WITH} with ptx", with_ptx, with_ptx <= WORSE_WITH),
        Claim(f"and by at least {WORSE_WITHOUT} without", without, without >= WORSE_WITHOUT),
        Claim(f"paired t test of the two, p < {LEVEL}", p, p < LEVEL),
        Claim("updates, largest difference of a pair: 0", updates, updates == 0.0),
        Claim(f"mean final KL within {KL_WITHIN:.0%}", apart, abs(apart) <= KL_WITHIN),
        Claim(f"final KL of every pair within {KL_WITHIN:.0%}", worst, worst <= KL_WITHIN),
        Claim(f"rule-correct share with ptx at most {CORRECT_BELOW} below", below, below <= CORRECT_BELOW),
        Claim(f"an arm takes at most {MINUTES:.0f} minutes of a core", minutes, minutes <= MINUTES),
    ]


def _apart(a: Sequence[float], b: Sequence[float]) -> NDArray[np.float64]:
    """How far the greater of each pair is above the smaller, as a share of the smaller."""
    return np.asarray(np.maximum(a, b) / np.minimum(a, b) - 1.0)


def line(record: Record) -> str:
    """One record in words."""
    name = f"seed {record['seed']}, {record['arm']}" if record["record"] == "arm" else record["record"]
    return (
        f"{name:18} {record['bits_per_byte']:.4f} bits/byte, KL {record['kl']:.3f} ± {record['kl_error']:.3f}, "
        f"rule-correct {record['correct']:.3f}, about {record['about']:.3f}, reward {record['reward']:.3f}"
    )


def told(found: Mapping[str, Any]) -> list[str]:
    """:func:`together` in words."""
    lines = [f"means over {found['seeds']} seeds [95% interval]"]
    for name, own in found["means"].items():
        cells = [f"{key} {intervals.Interval(*own[key])}" for key in ("change", "kl", "correct", "about")]
        lines.append(f"{name:8} {', '.join(cells)}")
    lines.append(f"p = {found['p']['t']:.2g} (paired t), {found['p']['permutation']:.2g} (permutation)")
    lines += [
        f"{'holds' if claim['holds'] else 'FAILS':5}  {claim['asked']}: {claim['measured']:.4g}"
        for claim in found["claims"]
    ]
    return lines


def page(records: Sequence[Record]) -> Page:
    """The study with plots: the claims, what alignment costs, every arm's figures, and the settings."""
    by_kind = {row["record"]: row for row in records if row["record"] != "arm"}
    arms = [row for row in records if row["record"] == "arm"]
    start, found = by_kind["start"], by_kind["together"]
    made = Page(
        "PPO with the pretraining mix",
        subtitle=f"first lines of docstrings, {found['seeds']} seeds, one start",
    )
    made.section("Claims")
    made.table(
        ["asked", "measured", "holds"],
        [[claim["asked"], claim["measured"], "yes" if claim["holds"] else "NO"] for claim in found["claims"]],
    )
    made.section("What alignment costs")
    made.text("Held-out bits per byte, change from the start: means over seeds, Student's 95% intervals.")
    changes = [(name, *found["means"][name]["change"]) for name in ARMS]
    made.intervals(changes, label="change of bits per byte", reference=0.0)
    shown = _panels(arms, start)
    made.panels(shown, x_label="iteration", caption="means over seeds, with their range")
    made.section("Figures")
    means = [[name, *(tuple(found["means"][name][key]) for key in COMPARED)] for name in ARMS]
    difference = ["difference, paired", *(tuple(found["difference"][key]) for key in COMPARED)]
    made.table(["mean over seeds", *COMPARED], [*means, difference])
    p = found["p"]
    made.text(f"Change, paired by seed: p = {p['t']:.2g} (t), {p['permutation']:.2g} (exact permutation).")
    keys = (
        "seed",
        "arm",
        "bits_per_byte",
        "kl",
        "correct",
        "about",
        "reward",
        "beta",
        "updates",
        "cpu_seconds",
    )
    made.table(keys, [[row[key] for key in keys] for row in arms])
    made.section("The start")
    made.table(["", "value"], [[key, value] for key, value in start.items() if key != "record"])
    made.settings(by_kind["settings"])
    return made


def _panels(arms: Sequence[Record], start: Record) -> list[Panel]:
    """Bits per byte, KL, reward and beta over the iterations, a line for each arm."""
    panels = []
    titles = {
        "bits_per_byte": "change of held-out bits per byte", "kl": "KL(policy ‖ start), nats an answer",
        "reward": "reward: share of rules kept", "beta": "beta, adapted",
    }  # fmt: skip
    for key, title in titles.items():
        curve = "source" if key == "bits_per_byte" else "curve"
        less = start["bits_per_byte"] if curve == "source" else 0.0
        lines = []
        for name in ARMS:
            own = [row[curve] for row in arms if row["arm"] == name]
            values = np.array([[point[key] for point in points] for points in own]) - less
            steps = [float(point["step"]) for point in own[0]]
            bounds = list(zip(values.min(0).tolist(), values.max(0).tolist(), strict=True))
            lines.append(Series(name, list(zip(steps, values.mean(0).tolist(), strict=True)), bounds))
        panels.append(Panel(title, lines))
    return panels
