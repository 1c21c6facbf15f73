"""``gptcore report``: a file beside the run, from real training and from what other stages write."""

import json

from gptcore.cli.main import main
from gptcore.train.metrics import MetricsFile


def write_run(path, kinds):
    path.mkdir(parents=True)
    metrics = MetricsFile(path / "metrics.jsonl", 0)
    for step in range(1, 4):
        for kind in kinds:
            metrics.write(kind, step, reward=step / 3, kl=step * 0.1)
    metrics.close()
    (path / "config.json").write_text(json.dumps({"ppo": {"beta": 0.02}}))


def test_a_training_run_has_a_report(run, works):
    path = run / "report.html"
    assert works("report", run)[0].strip() == str(path)
    text = path.read_text()
    assert "evaluation: val_loss" in text and "model.width" in text and text.count("data:image/png") >= 1


def test_two_runs_side_by_side(tmp_path, capsys):
    for name in ("sft", "ppo"):
        write_run(tmp_path / name, ["train", "evaluation"])
    out = tmp_path / "both.html"
    words = ["report", str(tmp_path / "sft"), str(tmp_path / "ppo"), "--out", str(out), "--title", "Both"]
    assert main(words) == 0
    text = out.read_text()
    assert "<h1>Both</h1>" in text and '<th class="number">ppo</th>' in text and "ppo.beta" in text
    assert not (tmp_path / "sft" / "report.html").exists()


def test_bad_input_is_one_sentence(tmp_path, fails):
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "alone", ["train"])
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    assert "is no directory of a run" in fails("report", tmp_path / "nowhere")
    assert "empty has no metrics yet" in fails("report", tmp_path / "empty")
    assert "cannot read" in fails("report", tmp_path / "damaged")
    assert "named twice" in fails("report", tmp_path / "alone", tmp_path / "alone")
    assert not list(tmp_path.rglob("report.html*"))
