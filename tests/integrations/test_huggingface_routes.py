"""Every family by every route is eager transformers: logits, loss, gradients, decoding, greedy tokens."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from tests.checkpoint.huggingface_cases import CASES
from tests.integrations.huggingface_models import LENGTH, Run, assert_same, has_route, model_of, room_for

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tests.integrations.huggingface_routes import (  # noqa: E402
    BATCHES,
    EVERY_ROUTE,
    Batch,
    Swapped,
    alone,
    batch_of,
    by_route,
)

NEW = 64
PAIRS = [
    pytest.param(name, route, id=f"{name}-{route}")
    for name in CASES
    for route in EVERY_ROUTE
    if has_route(name, route)
]


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize(("name", "route"), PAIRS)
def test_f32(name: str, route: str, kind: str, tmp_path: Path):
    model, batch = model_of(name), batch_of(kind)
    eager = Swapped(model)
    # some families' eager attention knows nothing of packing, and ours stands in for it as it is
    wanted = alone(eager, batch) if kind == "packed" and route == "from_hf" else eager.run(batch)
    ours = by_route(model, route, tmp_path)
    assert_same(ours.run(batch), wanted)
    if route == "apply" and isinstance(ours, Swapped):
        assert_same(ours.fused_run(batch), wanted)


@pytest.mark.parametrize("kind", ["whole", "left"])
@pytest.mark.parametrize(("name", "route"), PAIRS)
def test_f32_with_a_cache(name: str, route: str, kind: str, tmp_path: Path):
    model, batch = model_of(name), batch_of(kind)
    wanted = Swapped(model).run(batch).logits
    got = by_route(model, route, tmp_path).decode(batch)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


BF16_BATCHES = [batch_of(kind, seed) for kind in ("whole", "left") for seed in range(6)]


@functools.lru_cache(maxsize=1)  # the routes of a family come one after another
def exact_and_eager(name: str) -> tuple[list[Run], list[Run]]:
    """Runs in f32 and in bf16 from the same weights."""
    exact, model = model_of(name), model_of(name, torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    return [[Swapped(m).run(batch) for batch in BF16_BATCHES] for m in (exact, model)]


def rms(results: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Of the errors of several runs."""
    return float(
        torch.stack([(x - y).float().square().mean() for x, y in zip(results, exact, strict=True)])
        .mean()
        .sqrt()
    )


@pytest.mark.parametrize(("name", "route"), PAIRS)
def test_bf16_errs_no_more_than_twice_eager(name: str, route: str, tmp_path: Path):
    exact, eager = exact_and_eager(name)
    ours = by_route(model_of(name, torch.bfloat16), route, tmp_path)
    runs = [ours.run(batch) for batch in BF16_BATCHES]
    logits = [[run.logits for run in some] for some in (runs, eager, exact)]
    assert rms(logits[0], logits[2]) <= 2 * rms(logits[1], logits[2])
    # a loss is a mean over tokens, whose errors may cancel by luck
    tokens = [
        [token_losses(run, batch) for run, batch in zip(some, BF16_BATCHES, strict=True)]
        for some in (eager, exact)
    ]
    losses = [[run.loss for run in some] for some in (runs, exact)]
    assert rms(*losses) <= 2 * rms(*tokens)
    errors = [
        {
            key: rms([run.gradients[key] for run in some], [run.gradients[key] for run in exact])
            for key in exact[0].gradients
        }
        for some in (runs, eager)
    ]
    for key, error in errors[0].items():
        # the gradient of a key's bias is 0, and of its terms nothing but rounding is left
        theirs = max(errors[1][key], errors[1][key.replace(".bias", ".weight")])
        assert error <= 2 * theirs, key


def token_losses(run: Run, batch: Batch) -> torch.Tensor:
    labels = torch.cat([batch.labels[:, 1:], torch.full((2, 1), -100)], dim=1)[batch.mask.bool()]
    return torch.nn.functional.cross_entropy(run.logits.float(), labels, reduction="none")


@pytest.mark.parametrize(("name", "route"), PAIRS)
def test_greedy_tokens(name: str, route: str, tmp_path: Path):
    model, batch = model_of(name, **with_room(name)), batch_of("left")
    wanted, gaps = Swapped(model).greedy(batch, NEW)
    got, _ = by_route(model, route, tmp_path).greedy(batch, NEW)
    assert got.shape == wanted.shape == (2, NEW)
    clear = (gaps >= 1e-4).cumprod(dim=1).bool()  # behind a tie the two may part
    assert torch.equal(got[clear], wanted[clear]) and clear.float().mean() > 0.5


def with_room(name: str) -> dict[str, float]:
    """Settings for more positions, and for logits that no soft cap brings together."""
    return {**room_for(name, LENGTH + NEW), **({"final_logit_softcapping": 30.0} if name == "gemma2" else {})}
