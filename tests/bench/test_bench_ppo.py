"""The comparison of PPO: both sides are judged by the rule that the task itself has, and ours runs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from bench import ppo
from bench.peers.trl_ppo.worth import worth
from gptcore.align.tasks import random_walks


def test_the_rule_is_the_tasks_own() -> None:
    graph = random_walks.graph()
    setting = {
        "graph": {"successors": graph.successors, "distances": graph.distances, "longest": graph.longest},
        "end": len(graph.alphabet),
    }
    drawn = random.Random(0)
    walks = [graph.walk(drawn.randrange(1, len(graph.alphabet)), drawn) for _ in range(300)]
    walks += ["".join(drawn.choices(graph.alphabet, k=drawn.randrange(1, 11))) for _ in range(300)]
    expected = [graph.optimality(walk) for walk in walks]
    ids = [[graph.alphabet.index(letter) for letter in walk] + [setting["end"], 5] for walk in walks]
    assert [worth(setting, row) for row in ids] == expected
    assert 0.2 < sum(expected) / 600 < 0.8


def test_our_side_runs(tmp_path: Path) -> None:
    setting = ppo.random_walks(tmp_path) | {
        "threads": 1, "dtype": "float32", "critic": "shared", "out": str(tmp_path / "run"), "updates": 2,
        "episodes": 32, "minibatch": 16,
    }  # fmt: skip
    (tmp_path / "setting.json").write_text(json.dumps(setting))
    done = subprocess.run(
        [sys.executable, "-m", "bench.ppo_episodes", str(tmp_path / "setting.json")],
        capture_output=True, text=True, check=True, cwd=Path(ppo.__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["seconds"]) == len(result["processor_seconds"]) == 1
    assert len(result["rewards"]) == 2
    assert 0.2 < result["rewards"][0] < 0.8  # of the random walks that the model has read
    assert result["peak_mib"] > result["imports_mib"] > 50
