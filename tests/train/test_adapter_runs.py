"""Runs that train adapters: checkpoints hold what trains, resume exactly, and want the weights they were made on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore import checkpoint
from gptcore.checkpoint import CheckpointError
from gptcore.data.characters import CharacterTokenizer
from gptcore.errors import UserError
from gptcore.infer import load
from gptcore.models import GPT, AdapterSpec, AttentionSpec, GPTConfig, adapters
from gptcore.train import from_table, run

from .toy import ToyLoader, settings

TEXT = "abcdefghijklmnopqrstuvwxyz .,\n!?"
CONFIG = GPTConfig(
    num_layers=2, width=32, vocab_size=40, context_length=16, attention=AttentionSpec(num_heads=2)
)


def trained(
    run_dir: Path,
    steps: int,
    spec: AdapterSpec | None,
    *,
    seed: int = 0,
    start: Path | None = None,
    **more: Any,
) -> GPT:
    """A model after ``steps`` updates, with an adapter if there is a ``spec``."""
    model = GPT(CONFIG, seed=seed) if start is None else load(start)[0]
    if spec is not None:
        adapters.put_on(model, spec, seed=4)
    tokenizer = CharacterTokenizer(TEXT)
    tokenizer.save(run_dir / "tokenizer")
    table = settings(
        run_dir, steps=steps, checkpoint={"every": 3, "keep_last": 9}, schedule={"name": "constant"}, **more
    )
    if start is not None:
        table["start"] = str(start)
    run(
        from_table(table),
        model=model,
        loader=ToyLoader(),
        tokenizer=tokenizer,
        measure_peak=False,
        quiet=True,
    )
    return model


@pytest.mark.parametrize("parallel", [{}, {"zero": 2}], ids=["whole", "zero 2"])
@pytest.mark.parametrize("spec", [
    AdapterSpec(rank=2, dropout=0.2), AdapterSpec(kind="dora", rank=2, targets=("q", "down")),
    AdapterSpec(kind="prompt", tokens=3), AdapterSpec(kind="prefix", tokens=3),
], ids=lambda spec: spec.kind)  # fmt: skip
def test_a_resumed_run_ends_in_the_same_bits_and_saves_what_trains(
    spec: AdapterSpec, parallel: Any, tmp_path: Path
):
    straight = trained(tmp_path / "straight", 6, spec, parallel=parallel)
    trained(tmp_path / "stopped", 3, spec, parallel=parallel)
    resumed = trained(tmp_path / "stopped", 6, spec, parallel=parallel)
    a, b = (dict(m.named_parameters()) for m in (straight, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    tensors, state = checkpoint.load(tmp_path / "stopped" / "checkpoints")
    own = adapters.state_names(resumed)
    assert {name for name in tensors if name.startswith("adapter/")} == {f"adapter/{name}" for name in own}
    assert not [name for name in tensors if name.startswith("model/")]
    moments = {name.split("/")[1] for name in tensors if name.startswith("optimizer/")}
    assert moments == own and state["adapters"]["default"]["spec"]["kind"] == spec.kind
    alone = tmp_path / "adapter.safetensors"
    checkpoint.to_safetensors(
        tmp_path / "stopped" / "checkpoints" / "step-00000006", alone, prefix="adapter/"
    )
    assert alone.stat().st_size < 40_000


def test_a_run_of_adapters_is_loaded_over_the_run_it_started_from(tmp_path: Path):
    trained(tmp_path / "base", 3, None)
    model = trained(tmp_path / "tuned", 3, AdapterSpec(rank=2), start=tmp_path / "base")
    found, tokenizer = load(tmp_path / "tuned")
    tokens = torch.arange(12)[None]
    assert torch.equal(found(tokens), model.eval()(tokens)) and tokenizer.vocab_size <= 40
    with adapters.off(found):
        assert torch.equal(found(tokens), load(tmp_path / "base")[0](tokens))
    (tmp_path / "base").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="has adapters for the model at"):
        load(tmp_path / "tuned")


def test_other_weights_or_settings_are_refused(tmp_path: Path):
    spec = AdapterSpec(rank=2)
    trained(tmp_path / "run", 3, spec)
    with pytest.raises(CheckpointError, match="adapters for other weights than the model's"):
        trained(tmp_path / "run", 6, spec, seed=1)
    with pytest.raises(CheckpointError, match=r"of other adapters \(default.spec.rank 2 -> 4"):
        trained(tmp_path / "run", 6, AdapterSpec(rank=4))
    with pytest.raises(CheckpointError, match="of other adapters"):
        trained(tmp_path / "run", 6, None)
