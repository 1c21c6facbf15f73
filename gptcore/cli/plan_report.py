"""What ``gptcore plan`` says: the facts of a planned run, and these as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from gptcore.models import accounting
from gptcore.report.progress import format_count
from gptcore.train import devices
from gptcore.train.metrics import FORMULA, FORMULA_CAUSAL
from gptcore.train.plan import STAGES, Fit, Memory, memory, smallest, variants, zero_bytes
from gptcore.train.planned_run import Run
from gptcore.train.traffic import traffic


class Question(NamedTuple):
    """What is asked, of weights of ``dtype``: ``gpus`` (None: the fewest that fit), each with ``limit`` bytes; a
    ``device`` that does ``speed`` FLOP/s, others ``mfu`` of their peak; ``tokens`` of the whole run; ``price`` of a GPU
    for an hour."""

    dtype: str
    gpus: int | None
    limit: float
    device: devices.Device
    speed: float
    mfu: float
    tokens: float
    price: float | None


# --- facts --------------------------------------------------------------------------------------------------------


def facts(name: str, run: Run, asked: Question) -> dict[str, Any]:
    """All that the plan says, as plain values; bytes, FLOPs and hours as numbers."""
    fit, fits = smallest(run, asked.limit)
    gpus = fit.ranks if asked.gpus is None else asked.gpus
    return {
        "config": name,
        "parameters": run.parameters,
        "active_parameters": accounting.active_parameters(run.model),
        "dtype": asked.dtype,
        "optimizer": run.optimizer.kind,
        "update": {
            "sequences": run.sequences, "length": run.length, "tokens": run.tokens, "grain": run.grain,
            "leaves": run.leaves, "fixed_tree": run.fixed_tree,
        },
        "checkpointing": run.checkpointing,
        "offload": run.offload,
        "gpus": gpus,
        "memory": asked.limit,
        "device": asked.device.name,
        "leaves_per_gpu": run.each(gpus),
        "stages": [_stage(run, gpus, stage, asked.limit) for stage in STAGES[: 1 if gpus == 1 else 4]],
        "variants": [_variant(variant, asked.limit) for variant in variants(run)],
        "flops": _flops(run, asked),
        "devices": [_on_device(run, device, gpus, asked) for device in devices.DEVICES.values()],
        "smallest": _smallest(fit, fits),
    }  # fmt: skip


def _stage(run: Run, gpus: int, stage: int, limit: float) -> dict[str, Any]:
    lines, sent = memory(run, gpus, stage), traffic(run, gpus, stage)
    state = run.state.total / run.parameters
    formula = zero_bytes(
        run.parameters, gpus, stage, weight=run.element_bytes, gradient=run.element_bytes, state=state
    )
    return {
        "stage": stage,
        "memory": lines._asdict(),
        "total": lines.total,
        "fits": lines.total <= limit,
        "zero_formula": round(formula),
        "traffic": {**sent._asdict(), "total": sent.total},
    }


def _smallest(fit: Fit, fits: bool) -> dict[str, Any]:
    return {
        "gpus": fit.ranks,
        "stage": fit.stage,
        "total": fit.memory.total,
        "host": fit.memory.host,
        "fits": fits,
    }


def _variant(run: Run, limit: float) -> dict[str, Any]:
    return {
        "checkpointing": run.checkpointing,
        "offload": run.offload,
        **_smallest(*smallest(run, limit)),
        "without_tree": _smallest(*smallest(replace(run, fixed_tree=False), limit)),
    }


def _flops(run: Run, asked: Question) -> list[dict[str, Any]]:
    """By each convention, in an update and in the run, with its time on one device."""
    attended = accounting.flops_per_token(run.model, run.length)
    causal = accounting.flops_per_token(run.model, run.length, causal_halved=True)
    weights = 6 * accounting.active_parameters(run.model)
    rows = []
    for formula, per_token in (("6N", weights), (FORMULA_CAUSAL, causal), (FORMULA, attended)):
        cost = devices.cost(per_token * asked.tokens, asked.speed, 1, asked.price)
        rows.append(
            {
                "formula": formula, "per_token": per_token, "per_update": per_token * run.tokens,
                "run": per_token * asked.tokens, "tokens": asked.tokens, "flops_per_s": asked.speed,
                "device_hours": cost.device_hours, "device_years": cost.device_years, "cost": cost.cost,
            }
        )  # fmt: skip
    return rows


def _on_device(run: Run, device: devices.Device, gpus: int, asked: Question) -> dict[str, Any]:
    """Hours, cost and smallest number on a named device; the one that was asked for at its own speed."""
    speed = asked.speed if device == asked.device else asked.mfu * device.peak
    flops = accounting.flops_per_token(run.model, run.length) * asked.tokens
    cost = devices.cost(flops, speed, gpus, asked.price)
    return {
        "device": device.name, "memory": device.memory, "peak": device.peak, "flops_per_s": speed, "gpus": gpus,
        "hours": cost.hours, "device_hours": cost.device_hours, "cost": cost.cost,
        "smallest": _smallest(*smallest(run, device.memory)),
    }  # fmt: skip


# --- text ---------------------------------------------------------------------------------------------------------

_LINES = {
    "weights": "weights",
    "gathered": "weights gathered for use",
    "gradient": "gradient of a leaf",
    "partial_sums": "partial sums of leaves",
    "summed": "sum over all leaves",
    "masters": "optimizer: masters",
    "moments": "optimizer: moments",
    "buckets": "buckets on their way",
    "activations": "activations",
    "backward": "passing in backward",
    "workspace": "workspace of the loss",
    "not_at_once": "not at the same time",
}
assert set(_LINES) | {"host"} == set(Memory._fields)

_TRAFFIC = {
    "gradients": "gradients",
    "weights": "weights",
    "unsummed": "subtrees left unsummed",
    "per_leaf": "further leaves",
    "total": "total",
    "formula": "by ZeRO's formula",
}


def describe(plan: dict[str, Any]) -> str:
    """The facts as tables, and the answer in one last sentence."""
    blocks = [
        _head(plan),
        _memory_table(plan),
        _traffic_table(plan),
        _flops_table(plan),
        _devices_table(plan),
    ]
    return "\n\n".join([*(block for block in blocks if block), _variants_table(plan), sentence(plan)])


def _head(plan: dict[str, Any]) -> str:
    update = plan["update"]
    active = plan["active_parameters"]
    met = f" ({_count(active)} for each token)" if active != plan["parameters"] else ""
    order = "in a fixed tree" if update["fixed_tree"] else "as they come"
    return "\n".join(
        [
            f"{plan['config']}: {_count(plan['parameters'])} parameters{met}, {plan['dtype']}, {plan['optimizer']}",
            f"update: {update['sequences']} sequences of {update['length']} = {_count(update['tokens'])} tokens, in "
            f"{update['leaves']} leaves of {update['grain']}, summed {order}",
            f"activation checkpointing: {plan['checkpointing']}; offload: {plan['offload']}",
        ]
    )


def _memory_table(plan: dict[str, Any]) -> str:
    stages = plan["stages"]
    rows = [[f"bytes on each of {plan['gpus']}", *(f"stage {stage['stage']}" for stage in stages)]]
    for key, label in _LINES.items():
        values = [stage["memory"][key] for stage in stages]
        if any(values):
            rows.append([label, *map(_bytes, values)])
    rows.append(["total", *(_bytes(stage["total"]) for stage in stages)])
    rows.append(
        [f"fits in {_bytes(plan['memory'])}", *("yes" if stage["fits"] else "no" for stage in stages)]
    )
    if any(stage["memory"]["host"] for stage in stages):
        rows.append(["in host memory", *(_bytes(stage["memory"]["host"]) for stage in stages)])
    rows.append(["weights, gradients, states by ZeRO", *(_bytes(stage["zero_formula"]) for stage in stages)])
    return _table(rows)


def _traffic_table(plan: dict[str, Any]) -> str:
    if plan["gpus"] == 1:
        return ""
    stages = plan["stages"]
    each = plan["leaves_per_gpu"]
    leaves = "1 leaf each" if each == 1 else f"{each} leaves each"
    rows = [[f"sent in an update, {leaves}", *(f"stage {stage['stage']}" for stage in stages)]]
    rows += [[label, *(_bytes(stage["traffic"][key]) for stage in stages)] for key, label in _TRAFFIC.items()]
    return _table(rows)


def _flops_table(plan: dict[str, Any]) -> str:
    first = plan["flops"][0]
    where = f"{plan['device']} at {first['flops_per_s'] / 1e12:.4g} TFLOP/s"
    rows = [
        ["FLOPs", "a token", "an update", f"{_count(first['tokens'])} tokens", f"hours, one {where}", "years"]
    ]
    for row in plan["flops"]:
        amounts = (f"{row[key]:.3g}" for key in ("per_token", "per_update", "run"))
        rows.append([row["formula"], *amounts, f"{row['device_hours']:,.0f}", f"{row['device_years']:,.4g}"])
    return _table(rows)


def _devices_table(plan: dict[str, Any]) -> str:
    priced = plan["devices"][0]["cost"] is not None
    rows = [["device", "memory", "TFLOP/s", f"days on {plan['gpus']}", "device-hours", "smallest that fits"]]
    rows[0][5:5] = ["cost"] if priced else []
    for on in plan["devices"]:
        row = [
            on["device"], _bytes(on["memory"]), f"{on['flops_per_s'] / 1e12:.4g}", f"{_days(on['hours'])}",
            f"{on['device_hours']:,.0f}",
        ]  # fmt: skip
        rows.append([*row, *([f"{on['cost']:,.0f}"] if priced else []), _fit(on["smallest"])])
    return _table(rows)


def _variants_table(plan: dict[str, Any]) -> str:
    fits = f"smallest that fits in {_bytes(plan['memory'])}"
    rows = [["checkpointing", "offload", fits, "each", "in host memory", "without the tree"]]
    for variant in plan["variants"]:
        sizes = (_bytes(variant["total"]), _bytes(variant["host"]))
        found = (_fit(variant), *sizes, _fit(variant["without_tree"]))
        rows.append([variant["checkpointing"], variant["offload"], *found])
    return _table(rows)


def _fit(found: dict[str, Any]) -> str:
    if not found["fits"]:
        return "none"
    return "1" if found["gpus"] == 1 else f"{found['gpus']}, stage {found['stage']}"


def sentence(plan: dict[str, Any]) -> str:
    """The smallest number of GPUs and stage that fit, or by how much nothing does."""
    found, limit = plan["smallest"], plan["memory"]
    gpus = "1 GPU" if found["gpus"] == 1 else f"{found['gpus']} GPUs at stage {found['stage']}"
    each = "" if found["gpus"] == 1 else " each"
    if found["fits"]:
        return f"The smallest that fits in {_bytes(limit)}: {gpus}, {_bytes(found['total'])}{each}."
    return (
        f"Nothing fits in {_bytes(limit)}, up to one leaf of the update on each GPU: {gpus} would need "
        f"{_bytes(found['total'])}{each}, {_bytes(found['total'] - limit)} too much."
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned, the first to the left."""
    return "\n".join(_lines(rows))


def _lines(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip()


def _days(hours: float) -> str:
    days = hours / 24
    return f"{days:,.0f}" if days >= 100 else f"{days:.3g}"


def _bytes(value: float) -> str:
    return f"{format_count(value)}B" if value else "0"


def _count(value: float) -> str:
    # parameters and tokens are counted in billions, not giga
    return format_count(value).replace("G", "B")
