"""Plans against published tables, counted trees, and the bytes of real models, optimizers and updates."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptcore.errors import UserError
from gptcore.models import GPT, GPTConfig, accounting, presets
from gptcore.models.activations import CHECKPOINTING
from gptcore.train import devices, from_table, partial_sums, update
from gptcore.train.optimizers import OptimizerSpec, build
from gptcore.train.plan import STAGES, memory, rank_counts, smallest, zero_bytes
from gptcore.train.planned_run import OFFLOAD, Run
from gptcore.train.sharding import sharded
from gptcore.train.state_size import state_size
from gptcore.train.traffic import traffic
from tests.allocations import allocations, held
from tests.train.toy import Batch

TINY = presets.get("gpt2").merged(
    {"num_layers": 4, "width": 192, "vocab_size": 1000, "context_length": 256, "attention": {"num_heads": 4}}
)
GPT3 = presets.get("gpt3-175b")
DTYPES = {4: "float32", 2: "bfloat16"}


def _run(model: GPTConfig = TINY, **changes: Any) -> Run:
    return Run(model, **{"optimizer": OptimizerSpec(), "sequences": 64, "length": 256, **changes})


# --- ZeRO's formulas ------------------------------------------------------------------------------------------


def test_bytes_of_zero_as_its_paper_prints_them():
    """Rajbhandari et al. 2020, figure 1: 7.5B parameters on 64 GPUs, in GB; table 1, stages 1 to 3."""
    figure = [zero_bytes(7.5e9, 64, stage) / 1e9 for stage in STAGES]
    assert [round(gb, 1) for gb in figure] == [120.0, 31.4, 16.6, 1.9]
    table = {(7.5e9, 4): (52.5, 41.3, 30.0), (128e9, 256): (518, 263, 8), (1e12, 1024): (4011, 2013, 15.6)}
    for (parameters, ranks), printed in table.items():
        for stage, gb in zip((1, 2, 3), printed, strict=True):
            # printed with up to four digits, some cut and not rounded
            assert zero_bytes(parameters, ranks, stage) / 1e9 == pytest.approx(gb, abs=1.0, rel=0.002)


def test_formula_of_zero_refuses_what_it_does_not_know():
    for ranks, stage in ((0, 1), (4, 4)):
        with pytest.raises(ValueError, match="zero_bytes: got stage"):
            zero_bytes(1e9, ranks, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_with_one_leaf_a_rank_weights_gradients_and_states_are_those_of_zero(stage: int):
    """Apart from the f32 of sums: from stage 2 on an owner has its slice of the gradient in f32, not in bf16."""
    run = _run(GPT3, sequences=64, length=2048)
    found, n = memory(run, 64, stage), run.parameters
    held = found.weights + found.gradient + found.partial_sums + found.masters + found.moments
    wider = 2 * n / 64 if stage >= 2 else 0
    assert held == pytest.approx(zero_bytes(n, 64, stage) + wider, rel=1e-6)


# --- sums of leaves -------------------------------------------------------------------------------------------


@given(st.integers(0, 5), st.integers(0, 7))
def test_live_sums_are_bounded_by_the_depth_of_the_tree(ranks_log: int, each_log: int):
    ranks, each = 2**ranks_log, 2**each_log
    places = partial_sums.places_on_a_rank(ranks, each)
    # below the root of a rank's leaves one node of each level waits; the second leaf's place is free once it is added
    assert places.sums == max(each_log, min(each, 2))
    assert places.sums + places.more <= math.ceil(math.log2(ranks * each)) + 1
    assert partial_sums.sent_by_a_rank(ranks, each) == 1


@given(st.integers(1, 9), st.integers(1, 40))
def test_subtrees_that_a_rank_sends_are_few(ranks: int, each: int):
    assert partial_sums.sent_by_a_rank(ranks, each) <= max(1, 2 * math.floor(math.log2(each)))


@given(st.integers(1, 40), st.integers(1, 40))
def test_sums_in_owners_are_few_where_leaves_are_handed_out_in_turn(ranks: int, each: int):
    live = partial_sums.live_in_owners(ranks, each)
    # what is there after k turns are the ones of k * ranks in binary
    counts = [(turn * ranks).bit_count() for turn in range(each + 1)]
    assert live == (max(counts[:-1]), max(counts))
    assert live.most <= math.ceil(math.log2(ranks * each)) + 1


def test_sums_that_are_alive_counted_by_hand():
    # leaves 3 to 5 of 6: 3, then 4 beside it, then 5, which joins 4, and its place
    assert partial_sums.places_on_a_rank(2, 3) == (3, False)
    assert partial_sums.sent_by_a_rank(2, 3) == 2
    # of 8 leaves in a row: the sums of 4 and of 2, and the seventh, when the eighth comes
    assert partial_sums.places_on_a_rank(1, 8) == (3, True)
    # four ranks with four leaves each: 0 to 3 come first and are one sum; after 8 to 11 there are two
    assert partial_sums.live_in_owners(4, 4) == (2, 2)
    assert partial_sums.live_in_owners(4, 1) == (0, 1)
    # three ranks: 0 and 1 are siblings, 2 waits
    assert partial_sums.live_in_owners(3, 1) == (0, 2)


def test_partial_sums_are_four_bytes_a_parameter_each():
    run, n = _run(), accounting.parameter_counts(TINY).total
    first = memory(run, 8, 1)
    assert (first.gradient, first.partial_sums) == (0, 3 * 4 * n)
    alone = memory(run, 64, 1)
    assert (alone.gradient, alone.partial_sums) == (2 * n, 0)
    owners = memory(run, 8, 2)
    assert owners.gradient == 0
    assert owners.partial_sums == pytest.approx(3 * 4 * n / 8, rel=1e-5)  # of 7 turns of 8
    assert memory(replace(run, fixed_tree=False), 8, 2).partial_sums == pytest.approx(4 * n / 8, rel=1e-5)


# --- optimizers -----------------------------------------------------------------------------------------------

OPTIMIZERS = [
    {"name": "adamw"},
    {"name": "adamw", "split_master": True},
    {"name": "adam", "amsgrad": True},
    {"name": "adamw_8bit"},
    {"name": "adamw_8bit", "master_weights": False},
    {"name": "sgd"},
    {"name": "sgd", "momentum": 0.0},
    *({"name": "adafactor", "variant": variant} for variant in ("torch", "paper", "hf", "palm")),
    {"name": "adafactor", "variant": "hf", "beta1": 0.9},
]
EXPERTS = presets.get("quickstart-moe").merged({"num_layers": 2, "width": 64, "vocab_size": 300})


@pytest.mark.parametrize("element_bytes", (4, 2))
@pytest.mark.parametrize("table", OPTIMIZERS, ids=lambda table: " ".join(map(str, table.values())))
@pytest.mark.parametrize("config", (TINY, EXPERTS), ids=("gpt2", "experts"))
def test_state_is_what_the_optimizer_keeps(config: GPTConfig, table: dict[str, Any], element_bytes: int):
    spec = OptimizerSpec.from_dict(table)
    model = GPT(config, dtype=getattr(torch, DTYPES[element_bytes]))
    optimizer = build(spec, model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    kept = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    expected = state_size(spec, accounting.parameter_shapes(config), element_bytes)
    assert expected.total == sum(t.nbytes for t in kept)
    masters = sum(
        s[name].nbytes for s in optimizer.state.values() for name in ("master", "master_low") if name in s
    )
    assert expected.masters == masters


# --- whole updates --------------------------------------------------------------------------------------------


class _Loader:
    def __init__(self, rows: int = 2) -> None:
        self.rows = rows

    def batch_at(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(1000, (self.rows, 257), generator=generator).numpy()
        return Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), target_bytes=512)


@pytest.mark.parametrize(("accumulate", "fixed_tree"), ((1, True), (3, False), (3, True), (8, True)))
@pytest.mark.parametrize("element_bytes", (4, 2))
@pytest.mark.parametrize("layers", (1, 8))
def test_an_update_takes_what_is_planned(
    layers: int, element_bytes: int, accumulate: int, fixed_tree: bool, tmp_path: Any
):
    """Weights, states, gradients, their sums, activations and all that passes, on one rank; scratch is not torch's."""
    config = TINY.merged({"num_layers": layers, "width": 384 if layers == 1 else 192})
    table = {
        "run_dir": str(tmp_path), "dtype": DTYPES[element_bytes], "model": config.to_dict(),
        "data": {"batch": 2, "length": 256, "accumulate": accumulate}, "parallel": {"fixed_tree": fixed_tree},
    }  # fmt: skip
    settings = from_table(table)
    before = held()
    model = GPT(config, dtype=getattr(torch, settings.dtype))
    optimizer = sharded(settings, build(settings.optimizer, model), model)
    update(settings, model, optimizer, _Loader(), 0)
    optimizer.zero_grad()
    kept = held() - before
    step = allocations(lambda: update(settings, model, optimizer, _Loader(), 1))
    sizes = {"sequences": 2 * accumulate, "length": 256, "grain": 2}
    planned = memory(Run(config, settings.optimizer, element_bytes, **sizes, fixed_tree=fixed_tree), 1, 0)
    assert planned.total - planned.workspace == pytest.approx(kept + step.peak, rel=0.05)


@pytest.mark.parametrize("element_bytes", (4, 2))
def test_activation_checkpointing_lowers_the_peak_by_what_is_planned(element_bytes: int, tmp_path: Any):
    """Of a model most of whose bytes are activations, kept and computed anew: each peak, and how far it falls."""
    config = TINY.merged({"num_layers": 8})
    table = {
        "run_dir": str(tmp_path), "dtype": DTYPES[element_bytes], "model": config.to_dict(),
        "data": {"batch": 8, "length": 256},
    }  # fmt: skip
    settings = from_table(table)
    peaks, plans = {}, {}
    for kind in CHECKPOINTING:
        before = held()
        model = GPT(config, dtype=getattr(torch, settings.dtype))
        model.checkpoint_activations(kind)
        optimizer = build(settings.optimizer, model)
        update(settings, model, optimizer, _Loader(8), 0)
        optimizer.zero_grad()
        kept = held() - before
        step = functools.partial(update, settings, model, optimizer, _Loader(8), 1)
        peaks[kind] = kept + allocations(step).peak
        run = _run(config, element_bytes=element_bytes, sequences=8, grain=8, checkpointing=kind)
        planned = memory(run, 1, 0)
        plans[kind] = planned.total - planned.workspace
        assert plans[kind] == pytest.approx(peaks[kind], rel=0.05)
        del model, optimizer, step
    for kind, share in (("selective", 0.15), ("block", 0.45)):
        fall = peaks["none"] - peaks[kind]
        assert fall > share * peaks["none"]
        assert plans["none"] - plans[kind] == pytest.approx(fall, rel=0.05)


# --- the smallest that fits -----------------------------------------------------------------------------------


def test_memory_falls_with_the_stage_and_with_offload():
    run = _run(GPT3, sequences=256, length=2048, checkpointing="block")
    totals = [memory(run, 256, stage).total for stage in STAGES]
    assert totals == sorted(totals, reverse=True)
    kept, states, everything = (memory(replace(run, offload=what), 256, 3) for what in OFFLOAD)
    # beside the states a copy of the bf16 weights that a rank owns, and the f32 sum of their gradients
    own = -(-run.parameters // 256)
    assert states.host == everything.host == kept.masters + kept.moments + 6 * own
    assert kept.total - states.total == kept.masters + kept.moments
    assert states.total - everything.total == kept.weights == 2 * own


def test_smallest_is_the_first_that_fits():
    run = _run(GPT3, sequences=256, length=2048, checkpointing="block")
    fit, fits = smallest(run, 80e9)
    assert fits and fit.memory == memory(run, fit.ranks, fit.stage) and fit.memory.total <= 80e9
    for ranks in rank_counts(run):
        for stage in STAGES:
            if (ranks, stage) < (fit.ranks, fit.stage):
                assert memory(run, ranks, stage).total > 80e9
    least, fits = smallest(run, 1e9)
    assert not fits and least.memory.total > 1e9
    assert smallest(_run(sequences=24, grain=2), 1e6)[0].ranks <= 4
    assert rank_counts(_run(sequences=24, grain=2)) == [1, 2, 4]


@pytest.mark.parametrize(
    "name", ("palm-540b", "gpt3-175b", "bloom-176b", "mixtral-8x7b", "opt-350m", "glm-130b")
)
def test_presets_are_planned_without_being_built(name: str):
    config = presets.get(name)
    run = _run(config, sequences=2048, length=min(2048, config.context_length), checkpointing="block")
    fit, fits = smallest(run, 141e9)
    assert fits and fit.memory.total <= 141e9


# --- traffic --------------------------------------------------------------------------------------------------


def test_traffic_is_that_of_zero_with_one_leaf_a_rank():
    """Section 7 of the paper: 2 P elements, 3 P in stage 3, less the share of a rank that stays with it."""
    run, n = _run(GPT3, sequences=64, length=2048), accounting.parameter_counts(GPT3).total
    for stage, elements in ((1, 2), (2, 2), (3, 3)):
        sent = traffic(run, 64, stage)
        assert (sent.unsummed, sent.per_leaf, sent.formula) == (0, 0, elements * n * 2)
        once = 2 * run.root if stage == 3 else 0  # the rest of the model comes once, not twice
        assert sent.total == pytest.approx((sent.formula - once) * 63 / 64, rel=1e-6)
    assert traffic(run, 1, 0).total == 0


def test_further_leaves_send_more():
    run, n = _run(sequences=48), accounting.parameter_counts(TINY).total
    # 3 leaves on each of 16 ranks: two subtrees at most, in f32
    assert traffic(run, 16, 1).unsummed == 4 * n * 15 // 16
    assert traffic(run, 16, 2).per_leaf == 2 * 2 * n * 15 // 16
    assert traffic(run, 16, 3).per_leaf == 2 * (2 * n + 2 * 2 * (n - run.root)) * 15 // 16
    assert traffic(replace(run, fixed_tree=False), 16, 1).unsummed == 0


# --- FLOPs, hours, cost ---------------------------------------------------------------------------------------


def test_gpt3_takes_355_years_of_a_v100():
    """Brown et al. 2020, table D.1: 3.14e23 FLOPs; at 28 TFLOP/s 355 years."""
    assert devices.cost(3.14e23, 28e12, 1).device_years == pytest.approx(355, abs=0.5)
    flops = 6 * accounting.parameter_counts(GPT3).total * 300e9
    assert flops == pytest.approx(3.14e23, rel=0.002)
    found = devices.cost(flops, 28e12, 1024, price=1.5)
    assert found.device_years == pytest.approx(355, rel=0.005)
    assert found.hours * 1024 == pytest.approx(found.device_hours)
    assert found.cost == pytest.approx(1.5 * found.device_hours)


def test_devices_by_name():
    assert devices.device("h100").memory == 80e9
    with pytest.raises(UserError, match="unknown device 'H10'; did you mean 'H100'"):
        devices.device("H10")


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sequences": 0}, "plan: sequences: expected 1 or more, got 0"),
        ({"grain": 3}, "plan: grain: 3 sequences do not divide the 64 of an update"),
        ({"length": 257}, "plan: length: 257 is more than the context length 256"),
        ({"checkpointing": "all"}, "plan: checkpointing: expected one of none, selective, block, got 'all'"),
        ({"offload": "disk"}, "plan: offload: expected one of none, optimizer, parameters, got 'disk'"),
    ],
)
def test_a_run_that_cannot_be_is_refused(changes: dict[str, Any], sentence: str):
    with pytest.raises(UserError) as caught:
        _run(**changes)
    assert str(caught.value) == sentence


def test_ranks_and_stages_that_cannot_be_are_refused():
    for ranks, stage, sentence in (
        (0, 1, "ranks: expected 1 or more, got 0"),
        (3, 1, "3 ranks do not divide the 64 leaves"),
        (4, 4, "stage: expected 0 to 3, got 4"),
    ):
        with pytest.raises(UserError, match=sentence):
            memory(_run(), ranks, stage)
    with pytest.raises(UserError, match="FLOP/s above 0, got 0"):
        devices.cost(1e9, 0, 1)
