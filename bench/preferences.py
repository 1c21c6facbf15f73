"""What each preference loss teaches, and whether reward models that disagree err: ``python -m bench preferences``.

One small model is fine-tuned on additions that often carry wrongly. From that start DPO, IPO, cDPO, KTO, ORPO and
SimPO learn from the same pairs of its own answers. Each is measured on held-out prompts, before and after, by its own
reward (is the chosen answer above the rejected one; with KTO above the reference point or below) and by the verifier on
answers sampled anew; tests are paired and exact (sign, which on right and wrong is McNemar's), adjusted over the losses
(Holm). Then reward models of several seeds, each without one labeller's prompts, judge held-out pairs: the area under
the ROC curve says how well their disagreement predicts that their mean is wrong.

Every part that has ended is a line of preferences.jsonl and is not done again: the command can be stopped and given
again. preferences.html shows them with plots.

examples:
  python -m bench preferences                        one seed, a few minutes of one core
  python -m bench preferences --seeds 3 --out runs/preferences
  python -m bench preferences --results bench/results   a copy of record and report there
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench import preference_report
from bench import preference_stages as stages
from bench.preference_stages import METHODS, Sizes, Study
from gptcore import backend
from gptcore.align import preferences
from gptcore.align.preferences import PreferencePolicy
from gptcore.align.reward_model import Ensemble
from gptcore.align.tasks import arithmetic
from gptcore.data.atomic import write_text
from gptcore.errors import UserError
from gptcore.models import GPT
from gptcore.stats import roc, significance

RECORD, REPORT = "preferences.jsonl", "preferences.html"
WAYS = {"greedy": 0.0, "sampled": 1.0}

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is left of the study, and print what it came to."""
    parser = argparse.ArgumentParser(
        prog="python -m bench preferences", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 1 to N (1)")
    parser.add_argument("--out", default="runs/preferences", metavar="DIR", help="(runs/preferences)")
    parser.add_argument("--results", metavar="DIR", help="where copies of record and report go")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1:
        parser.error(f"--seeds {arguments.seeds}: expected at least 1")
    _keep_to_one_thread()
    out = Path(arguments.out)
    rows = run(out, Sizes(), range(1, arguments.seeds + 1), say=print)
    if arguments.results:
        Path(arguments.results).mkdir(parents=True, exist_ok=True)
        for name in (RECORD, REPORT):
            shutil.copyfile(out / name, Path(arguments.results) / name)
    print("\n".join(["", *preference_report.told(rows), f"report: {out / REPORT}"]))
    return 0


def _keep_to_one_thread() -> None:
    """Matrices this small gain nothing from a second one."""
    import torch  # here, since gptcore, which fixes the bits of MKL's products, has to come before it

    torch.set_num_threads(1)
    backend.set_num_threads(1)


def run(out: Path, sizes: Sizes, seeds: Sequence[int], *, say: Callable[[str], None]) -> list[Row]:
    """The lines of every part, those that were not in ``out`` done now; the report is written anew.

    Raises:
        UserError: a record of other sizes.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = kept(out / RECORD, sizes)
    for seed in seeds:
        study = Study(out / f"seed-{seed}", sizes, seed)
        parts: dict[str, Callable[[], Row]] = {"start": lambda study=study: start(study)}  # type: ignore[misc]
        for name in METHODS:
            parts[name] = lambda study=study, name=name: loss(study, name, _row(rows, study.seed, "start"))  # type: ignore[misc]
        parts["ensemble"] = lambda study=study: ensemble(study)  # type: ignore[misc]
        for part, work in parts.items():
            if _row(rows, seed, part) is not None:
                continue
            say(f"seed {seed}: {part}")
            began = time.process_time()
            row = {"study": "preferences", "seed": seed, "part": part, **work()}
            rows.append({**row, "cpu_seconds": time.process_time() - began, "sizes": asdict(sizes)})
            write_text(out / RECORD, "".join(json.dumps(row) + "\n" for row in rows))
    parts_in_order = ["start", *METHODS, "ensemble"]
    rows = sorted(
        (row for row in rows if row["seed"] in seeds),
        key=lambda row: (row["seed"], parts_in_order.index(row["part"])),
    )
    preference_report.page(rows).write(out / REPORT)
    return rows


def kept(record: Path, sizes: Sizes) -> list[Row]:
    """The lines that there are. Raises UserError where they are of other sizes, or no lines of this study."""
    if not record.is_file():
        return []
    try:
        rows = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
        sizes_of_all = [row["sizes"] for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record} is no record of this study: {error}") from error
    if any(other != asdict(sizes) for other in sizes_of_all):
        raise UserError(f"{record} is of a study of other sizes; choose another --out")
    return rows


def _row(rows: Sequence[Row], seed: int, part: str) -> Any:
    return next((row for row in rows if (row["seed"], row["part"]) == (seed, part)), None)


def start(study: Study) -> Row:
    """What the losses begin from, and which held-out prompts it answers right."""
    stages.fine_tune(study)
    model = study.model()
    return {
        "parameters": sum(p.numel() for p in model.parameters()), "right": right(study, model),
        "pairs": len(study.rankings), "held_out_pairs": len(study.held_out),
    }  # fmt: skip


def right(study: Study, model: GPT) -> dict[str, list[int]]:
    """Of each held-out prompt 1 where the verifier finds the model's answer right, else 0; greedily and sampled."""
    found = {}
    for way, temperature in WAYS.items():
        texts = stages.answers(
            study, model, study.tasks.held_out, 1, temperature=temperature, seed=study.seed
        )
        found[way] = [int(arithmetic.reward(*both)) for both in zip(study.tasks.held_out, texts, strict=True)]
    return found


def loss(study: Study, name: str, began: Mapping[str, Any]) -> Row:
    """One loss: its own held-out metric and the verifier's, before and after, each with its test."""
    method = METHODS[name]
    held_out = preferences.with_reference(study.model(), stages.records(study, method.spec, study.held_out))
    before = stages.credit(PreferencePolicy.over(study.model(), method.spec), held_out)
    policy = stages.learn(study, name)
    after = stages.credit(policy, held_out)
    now = right(study, policy)
    numbers = preferences.evaluation(held_out)(policy)
    return {
        "metric": method.metric, "beta": method.spec.strength, "lr": method.rate, "examples": len(before),
        "before": float(before.mean()), "after": float(after.mean()), "p": significance.sign(after, before),
        "right": now, "p_right": {way: significance.mcnemar(now[way], began["right"][way]) for way in WAYS},
        "margin": numbers["margin"], "chosen_change": numbers["chosen_change"],
    }  # fmt: skip


def ensemble(study: Study) -> Row:
    """Whether the ensemble's disagreement predicts its errors, beside how well its own margin does."""
    members = [stages.reward_model(study, member) for member in range(study.sizes.members)]
    found = stages.judged(study, Ensemble(members))
    return {
        "pairs": len(found.error), "errors": int(found.error.sum()),
        "auc": list(roc.auc(found.disagreement, found.error)),
        "auc_small_margin": list(roc.auc(-found.margin, found.error)),
        "auc_of_scores": list(roc.auc(found.of_scores, found.error)),
        "curve": _curve(found.disagreement, found.error), "fifths": _fifths(found),
    }  # fmt: skip


def _curve(scores: np.ndarray, error: np.ndarray) -> list[list[float]]:
    """Share of right pairs and share of errors above each of 50 thresholds, from none to all."""
    cuts = np.quantile(scores, np.linspace(1.0, 0.0, 50), method="lower")
    return [
        [0.0, 0.0],
        *([float((scores[~error] >= cut).mean()), float((scores[error] >= cut).mean())] for cut in cuts),
    ]


def _fifths(found: stages.Judged) -> list[list[float]]:
    """Mean disagreement, errors and pairs of each fifth of the pairs, from the most agreed."""
    order = np.argsort(found.disagreement, kind="stable")
    return [
        [float(found.disagreement[own].mean()), int(found.error[own].sum()), len(own)]
        for own in np.array_split(order, 5)
    ]
