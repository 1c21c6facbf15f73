"""TrainConfig: TOML in, checked settings out, and errors that name the key and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptcore.errors import UserError
from gptcore.train import TrainConfig, from_table, load

TOML = """
run_dir = "runs/x"
steps = 100
[model]
preset = "gpt2"
num_layers = 2
[model.position]
kind = "rotary"
[optimizer]
lr = 1e-3
betas = [0.9, 0.99]
[schedule]
warmup = 10
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return path


def test_load(tmp_path: Path) -> None:
    config = load(
        write(tmp_path, TOML), ["optimizer.lr=3e-4", "data.path=a.txt", "model.num_layers=3", "steps=7"]
    )
    assert config.optimizer.lr == 3e-4 and config.optimizer.betas == (0.9, 0.99)
    assert config.data.path == "a.txt" and config.steps == 7
    model = config.model_config()
    assert (model.num_layers, model.width, model.position.kind) == (3, 768, "rotary")
    assert TrainConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"stepz": 3}, "unknown key 'stepz'; did you mean 'steps'"),
        ({"optimizer": {"lrr": 3}}, "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'"),
        ({"optimiser": {}}, "unknown key 'optimiser'; did you mean 'optimizer'"),
        ({"model": {"num_layer": 3}}, "unknown key 'model.num_layer'; did you mean 'model.num_layers'"),
        ({"model": {"preset": "gtp2"}}, "did you mean 'gpt2'"),
        ({"schedule": {"name": "cosin"}}, "did you mean 'cosine'"),
        ({"dtype": "bf16"}, "dtype"),
        ({"steps": "ten"}, "steps: expected an integer"),
        ({"steps": 0}, "steps: expected 1 or more, got 0"),
        ({"data": {"batch": 0}}, "data.batch: expected 1 or more"),
        ({"data": {"length": -4}}, "data.length: expected 1 or more"),
        ({"data": {"held_out": 1.0}}, "data.held_out"),
        ({"data": {"length": 4096}}, "data.length: 4096 is more than model.context_length 1024"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr"),
        ({"optimizer": {"lr": -1.0}}, "optimizer.lr"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas"),
        ({"checkpoint": {"keep_last": 0}}, "checkpoint.keep_last: expected 1 or more"),
        ({"run_dir": ""}, "run_dir"),
    ],
)
def test_mistakes(table: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        from_table(table)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("override", ["lr", "=3", "a..b=3", ".x=1"])
def test_bad_overrides(override: str) -> None:
    with pytest.raises(UserError, match="expected key=value"):
        from_table({}, [override])


def test_override_values_are_toml_or_text() -> None:
    config = from_table(
        {}, ['data.path=["a", "b"]', "data.packed=true", "sample.prompt=Once upon", "run_dir=a/b"]
    )
    assert config.data.path == ("a", "b") and config.data.packed
    assert config.sample.prompt == "Once upon" and config.run_dir == "a/b"
    assert config.with_overrides(["steps=9"]).steps == 9


@pytest.mark.parametrize(
    ("text", "sentence"), [("steps = ", "is not valid TOML"), ("steps = 1\nsteps = 2", "is not valid TOML")]
)
def test_bad_files(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load(write(tmp_path, text))
    with pytest.raises(UserError, match="no config file at"):
        load(tmp_path / "absent.toml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read config"):
        load(tmp_path / "binary")


def test_vocabulary_follows_the_tokenizer_or_must_hold_it() -> None:
    assert from_table({}).model_config(300).vocab_size == 300
    assert from_table({"model": {"preset": "gpt2"}}).model_config(300).vocab_size == 300
    assert from_table({"model": {"vocab_size": 512}}).model_config(300).vocab_size == 512
    with pytest.raises(UserError, match=r"model.vocab_size: 100 is less than the tokenizer's 300; set"):
        from_table({"model": {"vocab_size": 100}}).model_config(300)


def test_learning_rate_is_the_schedule() -> None:
    config = from_table({"steps": 100, "optimizer": {"lr": 1.0}, "schedule": {"warmup": 9}})
    assert config.learning_rate(0) == 0.1 and config.learning_rate(9) == 1.0
    assert config.learning_rate(100) == pytest.approx(0.1), "the floor is a tenth unless given"
    wsd = config.with_overrides(["schedule.name=wsd", "schedule.decay=50", "schedule.floor=0.0"])
    assert wsd.learning_rate(50) == 1.0 and wsd.learning_rate(75) == pytest.approx(0.5)
    for name in ("constant", "linear"):
        assert config.with_overrides([f"schedule.name={name}"]).learning_rate(9) == 1.0
    assert config.with_overrides(["schedule.name=inverse_sqrt"]).learning_rate(35) == 0.5
    palm = config.with_overrides(["schedule.name=palm", "schedule.warmup=100"])
    assert palm.learning_rate(0) == 1.0 and palm.learning_rate(39_999) == 0.5
    sqrt = wsd.with_overrides(["schedule.shape=sqrt"])
    assert sqrt.learning_rate(75) == pytest.approx(1 - 0.5**0.5)


def test_micro_batches_of_a_growing_batch() -> None:
    data = {"batch": 2, "length": 8, "accumulate": 4, "ramp_tokens": 160, "ramp_from": 16}
    config = from_table({"data": data})
    ranges = [config.micro_batches(step) for step in range(8)]
    # 16 tokens and 48 / 160 of a token more for each that went by: 16, 20.8, 25.6, 35.2, 44.8, 59.2 up to 64.
    assert [len(r) for r in ranges] == [1, 1, 2, 2, 3, 4, 4, 4]
    assert [r.start for r in ranges] == [0, 1, 2, 4, 6, 9, 13, 17]
    plain = config.with_overrides(["data.ramp_tokens=0"])
    assert plain.micro_batches(3) == range(12, 16)
    with pytest.raises(UserError, match="data.ramp_from: expected 1 or more"):
        from_table({"data": {"ramp_from": 0}})


def test_shipped_configs_load() -> None:
    paths = sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*.toml"))
    assert paths
    for path in paths:
        load(path)
