"""What the study of preferences came to, in words and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gptcore.report.html import Page
from gptcore.report.plot import Panel, Series
from gptcore.stats.intervals import wilson
from gptcore.stats.significance import holm

Row = Mapping[str, Any]


def of_losses(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The losses' lines with Holm's adjustment of each seed's p-values over the losses: ``p`` of the loss's own metric,
    ``p_right`` of the verifier's, as ``p_holm`` and ``p_right_holm``; of each share its Wilson interval."""
    made = []
    for seed in sorted({row["seed"] for row in rows}):
        own = [row for row in rows if row["seed"] == seed and "metric" in row]
        (start,) = (row for row in rows if row["seed"] == seed and row["part"] == "start")
        adjusted = holm([row["p"] for row in own])
        verified = {way: holm([row["p_right"][way] for row in own]) for way in start["right"]}
        for place, row in enumerate(own):
            count = row["examples"]
            made.append(
                {
                    **row, "p_holm": adjusted[place],
                    "own": tuple(wilson(row[when] * count, count) for when in ("before", "after")),
                    "p_right_holm": {way: p[place] for way, p in verified.items()},
                    "verified": {
                        way: tuple(wilson(sum(told["right"][way]), len(told["right"][way])) for told in (start, row))
                        for way in start["right"]
                    },
                }
            )  # fmt: skip
    return made


def told(rows: Sequence[Row]) -> list[str]:
    """The study in lines of text."""
    lines = [
        "held out, start -> after, in percent [95%]: the loss's own reward; right answers at temperature 1; greedy"
    ]
    for row in of_losses(rows):
        before, after = row["own"]
        parts = [f"seed {row['seed']} {row['part']:6} {_of(before)} -> {_of(after)} p {row['p_holm']:.1g}"]
        for way in ("sampled", "greedy"):
            was, now = row["verified"][way]
            parts.append(f"{_of(was)} -> {_of(now)} p {row['p_right_holm'][way]:.1g}")
        lines.append("; ".join(parts))
    for row in rows:
        if row["part"] == "ensemble":
            (auc, low, high), other = row["auc"], row["auc_small_margin"][0]
            lines.append(
                f"seed {row['seed']} ensemble: {row['errors']} of {row['pairs']} pairs wrong; disagreement predicts "
                f"which with AUC {auc:.3f} [{low:.3f}, {high:.3f}], a small margin with {other:.3f}"
            )
    lines.append(f"CPU seconds in all: {sum(row['cpu_seconds'] for row in rows):.0f}")
    return lines


def _of(share: tuple[float, float, float]) -> str:
    estimate, low, high = (100 * x for x in share)
    return f"{estimate:.1f} [{low:.1f}, {high:.1f}]"


def page(rows: Sequence[Row]) -> Page:
    """The study with plots."""
    made = Page(
        "Preferences", subtitle="additions with the working shown; six losses from one start, and an ensemble"
    )
    losses = of_losses(rows)
    names = {id(row): f"{row['part']}, seed {row['seed']}" for row in losses}
    made.section("Each loss's own reward on held-out answers")
    made.text(
        "The share of held-out pairs whose chosen answer the loss's own reward puts above the rejected one; of KTO the "
        "share of answers on the right side of its reference point. Losses with a reference tell nothing apart at the "
        "start: one half. Exact sign tests on the same examples, adjusted over the losses (Holm)."
    )
    shares = [(f"{names[id(row)]}, {when}", *share) for row in losses for when, share in _twice(row["own"])]
    made.intervals(shares, label="share above", reference=0.5)
    made.table(
        ["loss", "metric", "examples", "before", "after", "p (Holm)", "beta", "rate", "chosen, change in nats"],
        [
            [names[id(row)], row["metric"], row["examples"], row["before"], row["after"], row["p_holm"], row["beta"],
             row["lr"], row["chosen_change"]]
            for row in losses
        ],
    )  # fmt: skip
    for way, label in (("sampled", "right answers at temperature 1"), ("greedy", "right answers, greedy")):
        made.section(label.capitalize())
        made.text(
            "Held-out prompts answered anew, judged by the verifier; exact McNemar against the start, Holm."
        )
        shares = [
            (f"{names[id(row)]}, {when}", *x) for row in losses for when, x in _twice(row["verified"][way])
        ]
        made.intervals(shares, label=label)
        made.table(["loss", "p (Holm)"], [[names[id(row)], row["p_right_holm"][way]] for row in losses])
    for row in rows:
        if row["part"] == "ensemble":
            _ensemble(made, row)
    made.section("Settings")
    made.settings(dict(rows[0]["sizes"]))
    return made


def _twice(shares: Sequence[Any]) -> list[tuple[str, Any]]:
    return list(zip(("before", "after"), shares, strict=True))


def _ensemble(made: Page, row: Row) -> None:
    made.section(f"Disagreement of {row['sizes']['members']} reward models, seed {row['seed']}")
    made.text(
        "Members of other seeds, each without the prompts of one labeller, on one held-out pair of each prompt. An "
        "error is a pair that the mean of the members orders wrongly."
    )
    diagonal = Series("chance", [(0.0, 0.0), (1.0, 1.0)])
    errors = [(mean, count / pairs) for mean, count, pairs in row["fifths"]]
    bounds = [tuple(wilson(count, pairs)[1:]) for _, count, pairs in row["fifths"]]
    made.panels(
        [Panel("errors found over right pairs suspected", [Series("disagreement", row["curve"]), diagonal])],
        x_label="share of right pairs above the threshold", caption="ROC curve of the disagreement",
    )  # fmt: skip
    made.panels(
        [Panel("share of errors in each fifth", [Series("errors", errors, bounds)])],  # type: ignore[list-item]
        x_label="disagreement (deviation of the members' probabilities)", caption="errors by disagreement, with 95%",
    )  # fmt: skip
    made.table(
        ["predictor", "AUC"],
        [
            ["disagreement on which is better (the measure above)", tuple(row["auc"])],
            ["a small margin of the mean", tuple(row["auc_small_margin"])],
            ["disagreement on the difference of scores", tuple(row["auc_of_scores"])],
        ],
    )
