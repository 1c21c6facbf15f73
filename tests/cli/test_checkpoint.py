"""``gptcore checkpoint``: what each action writes and prints, and what it refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file

from gptcore import checkpoint
from gptcore.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STATE = {"config": {"seed": 3}, "tokenizer": "abc"}


def tensors(step=0):
    draws = torch.Generator().manual_seed(step)
    return {
        "model/a.weight": torch.randn(6, 5, generator=draws),
        "optimizer/a.weight/exp_avg": torch.randn(6, 5, generator=draws).bfloat16(),
    }


def same(path, want):
    got = checkpoint.load(path)[0]
    return got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.fixture
def saved(tmp_path):
    """A run's directory with checkpoints of steps 1 and 2."""
    for step in (1, 2):
        checkpoint.save(tmp_path / "run" / "checkpoints", step, tensors(step), STATE)
    return tmp_path / "run"


def test_verify_names_what_is_damaged_and_exits_with_1(saved, works, fails, capsys):
    out, err = works("checkpoint", "verify", saved, "--quiet")
    assert err == ""
    assert out.splitlines() == [
        f"{saved}/checkpoints/step-0000000{step}: good, 2 tensors, 180B in 1 file" for step in (1, 2)
    ]
    shard = saved / "checkpoints" / "step-00000002" / "shard-00000-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 16
    shard.write_bytes(data)
    (saved / "checkpoints" / "step-00000001" / "manifest.json").unlink()
    assert main(["checkpoint", "verify", str(saved), "--quiet"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"checkpoint {saved}/checkpoints/step-00000001 is incomplete: it has no manifest.json",
        f"checkpoint {shard.parent} is corrupt: tensor 'optimizer/a.weight/exp_avg' fails its checksum in {shard.name}",
    ]
    shard.unlink()
    assert main(["checkpoint", "verify", str(shard.parent), "--quiet"]) == 1
    assert f"{shard.name}: No such file" in capsys.readouterr().out
    assert f"no checkpoint in {saved.parent}" in fails("checkpoint", "verify", saved.parent)
    assert "no checkpoint at" in fails("checkpoint", "verify", saved / "absent")


def test_show(saved, works):
    path = saved / "checkpoints" / "step-00000002"
    out, _ = works("checkpoint", "show", saved)
    lines = out.splitlines()
    assert lines[:3] == [f"path      {path}", "step      2", "size      180B in 1 file"]
    assert lines[3].startswith("made by   gptcore ") and f"torch {torch.__version__}" in lines[3]
    assert lines[4:] == [
        "model     1 tensors, 120B in 1 pieces", "optimizer 1 tensors, 60B in 1 pieces",
        'config    {"seed": 3}', 'tokenizer "abc"',
    ]  # fmt: skip
    works("checkpoint", "reshard", path, "--shards", "2")
    out, _ = works("checkpoint", "show", path, "--tensors")
    assert out.splitlines()[-2:] == [
        "model/a.weight              float32    [6, 5]            0[0:23] 1[23:30]",
        "optimizer/a.weight/exp_avg  bfloat16   [6, 5]            1[0:30]",
    ]
    facts = json.loads(works("checkpoint", "show", path, "--json")[0])
    assert facts["step"] == 2 and facts["state"] == {**STATE, "step": 2} and len(facts["files"]) == 2
    pieces = [[0, 0, 23], [1, 23, 30]]
    assert facts["tensors"]["model/a.weight"] == {"dtype": "float32", "shape": [6, 5], "pieces": pieces}


def test_reshard_export_and_import(saved, works, tmp_path):
    path = saved / "checkpoints" / "step-00000002"
    out, err = works("checkpoint", "reshard", saved, "--shards", "3", "--out", tmp_path / "other")
    assert out == f"{path} -> {tmp_path}/other/step-00000002, 3 files\n" and "360/360 B" in err
    assert same(tmp_path / "other", tensors(2))
    works("checkpoint", "reshard", path, "--shards", "1", "--only", "model/", "--quiet")
    assert list(checkpoint.load(path)[0]) == ["model/a.weight"]

    file = tmp_path / "weights.safetensors"
    out, _ = works("checkpoint", "export", tmp_path / "other", "--out", file, "--quiet")
    assert out == f"{tmp_path}/other/step-00000002 -> {file}, 120B\n"
    assert torch.equal(load_file(file)["a.weight"], tensors(2)["model/a.weight"])

    works("checkpoint", "export", tmp_path / "other", "--format", "dcp", "--out", tmp_path / "dcp", "--quiet")
    out, _ = works("checkpoint", "import", tmp_path / "dcp", "--out", tmp_path / "back", "--shards", "2")
    assert out == f"{tmp_path}/dcp -> {tmp_path}/back/step-00000002, 180B\n"
    assert same(tmp_path / "back", tensors(2))
    assert checkpoint.read_state(tmp_path / "back" / "step-00000002") == {**STATE, "step": 2}
    works("checkpoint", "import", tmp_path / "dcp", "--out", tmp_path / "back", "--step", "9", "--quiet")
    assert checkpoint.steps(tmp_path / "back") == [2, 9]


def test_what_is_refused(saved, fails, tmp_path):
    assert "--shards is not for 'gptcore checkpoint show'" in fails(
        "checkpoint", "show", saved, "--shards", "2"
    )
    assert "--shards N" in fails("checkpoint", "reshard", saved)
    assert "'shards': got 0, expected 1 or more" in fails("checkpoint", "reshard", saved, "--shards", "0")
    for action in ("export", "import"):
        assert "say where to" in fails("checkpoint", action, saved)
    assert "no torch.distributed.checkpoint at" in fails(
        "checkpoint", "import", saved, "--out", tmp_path / "x"
    )
    assert "invalid choice: 'mend'" in fails("checkpoint", "mend", saved)
