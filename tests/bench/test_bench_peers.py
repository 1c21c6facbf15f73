"""Both sides of the whole-step benchmarks train the same model: equal weights give equal losses and gradients."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import ROOT
from bench import bench_shakespeare as shakespeare
from bench.bench_train_step import SMALL
from bench.peak import STEPS
from bench.peers.torch_gpt2 import MODES, GPT2Config, Hyper, TorchGPT2, TorchTrainer
from bench.trainer import GptcoreTrainer, copy_weights

TINY = GPT2Config(65, 64, layers=2, heads=4, width=128, bias=False)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(65, (4, 65), generator=torch.Generator().manual_seed(5))
    return tokens[:, :-1], tokens[:, 1:]


def test_the_peer_has_gpt2s_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in TorchGPT2(GPT2Config()).parameters()) == SMALL.parameters


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_the_peer_learns_a_batch(mode: str):
    trainer = TorchTrainer(TINY, mode, Hyper(lr=1e-3), compiled=False)
    first = float(trainer.step(*batch()))
    for _ in range(9):
        last = float(trainer.step(*batch(), lr=1e-3))
    assert first == pytest.approx(4.17, abs=0.2)  # ln 65
    assert last < first - 0.3
    dtype = torch.bfloat16 if mode.startswith("bf16") else torch.float32
    assert all(p.dtype == dtype and p.grad is None for p in trainer.parameters)
    assert all(m.dtype == (torch.bfloat16 if mode == "bf16" else torch.float32) for m in trainer.masters)


def test_shakespeare_batches_are_a_function_of_seed_and_step(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("abcdefghij" * 500)
    one, again, other = (shakespeare.Batches(text, seed) for seed in (1, 1, 2))
    tokens, targets = one.at(7)
    assert tokens.shape == (shakespeare.BATCH, shakespeare.LENGTH) and one.vocabulary == 10
    assert torch.equal(targets, (tokens + 1) % 10)
    assert torch.equal(tokens, again.at(7)[0]) and not torch.equal(tokens, other.at(7)[0])
    held_out = zip(one.held_out, other.held_out, strict=True)
    assert len(one.held_out) == 200 and all(torch.equal(a[0], b[0]) for a, b in held_out)
    with pytest.raises(ValueError, match="name it with --data"):
        shakespeare.Batches(tmp_path / "absent.txt", 1)


def test_the_learning_rate_follows_the_recipe():
    rates = [shakespeare.learning_rate(step) for step in (0, 99, 100, 1050, 1999)]
    assert rates[0] == pytest.approx(3e-3 / 101) and rates[1] == pytest.approx(3e-3 * 100 / 101)
    assert (
        rates[2] == 3e-3 and rates[3] == pytest.approx(1.65e-3) and rates[4] == pytest.approx(3e-4, rel=1e-2)
    )


def test_equal_weights_give_equal_losses_and_gradients():
    from gptcore.models import presets

    ours = GptcoreTrainer(presets.get("shakespeare-char", {"num_layers": 2}), torch.float32, Hyper())
    peer = TorchTrainer(TINY, "f32", Hyper(), compiled=False)
    copy_weights(peer.model, ours.model)
    # f32 sums in other orders differ in their last bits: 1e-5 is a hundred of them.
    assert float(ours.gradients(*batch())) == pytest.approx(float(peer.gradients(*batch())), rel=1e-5)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in t.model.parameters()]) for t in (ours, peer)]
    assert float(norms[0]) == pytest.approx(float(norms[1]), rel=1e-4)
    for trainer in (ours, peer):
        trainer.forget()
        trainer.step(*batch())
    assert ours.loss(*batch()) == pytest.approx(peer.loss(*batch()), rel=1e-4)


def test_a_peak_holds_at_least_the_training_state_and_not_much_more():
    command = [sys.executable, "-m", "bench.bench_memory", "gptcore", "float32", "1", "8"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout)
    state = 16 * SMALL.parameters  # weights, gradients and two moments in f32
    # A tied table has two gradients until they are added: 154 MB more. The rest is the loss's scratch.
    assert state <= found["peak"] <= 1.25 * state
    assert len(found["seconds"]) == STEPS and min(found["seconds"]) > 0
