"""PPO beside TRL's last release with it: episodes a second, peak of memory, and whether both learn.

    python -m venv .peer && .peer/bin/pip install -c constraints.txt torch -r bench/peers/trl_ppo/requirements.txt
    python -m bench.ppo --peer-python .peer/bin/python                    random walks and GPT-2's shapes
    python -m bench.ppo --peer-python .peer/bin/python --task gpt2_124m --dtype float32 --critic separate

Both sides start from the same weights, see the same prompts, make as many updates of as many responses, and are judged
by the same rule; each run is a process of its own, in turn. An iteration counts from one judgement to the next; the
first is left out: buffers and caches are new in it. The peer's reward model is a table instead of a network. The peer
runs in each of its precisions: float32, mixed (bf16 products, f32 weights, as ours in bfloat16) and bfloat16 (weights
and Adam's moments too). Last comes one JSON object for each task, with how many times faster, cheaper and leaner ours
is than each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gptcore  # noqa: F401  before torch

HERE = Path(__file__).parent
PRECISIONS = ("float32", "mixed", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ppo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peer-python", metavar="FILE", help="of the peer's environment; without it ours alone runs"
    )
    parser.add_argument("--task", action="append", choices=SETTINGS, help="may be repeated (all)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of ours (bfloat16)"
    )
    parser.add_argument(
        "--precision", action="append", choices=PRECISIONS, help="of the peer; may be repeated (all)"
    )
    parser.add_argument(
        "--critic", choices=("shared", "separate"), default="shared",
        help="ours: a head on the actor's trunk, or a model of its own, as the peer's always is (shared)",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="of each side (all)"
    )
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="runs of each side (2)")
    parser.add_argument(
        "--updates", type=int, metavar="N", help="iterations of a run, 3 at least (12; GPT-2's shapes 3)"
    )
    args = parser.parse_args()
    if args.updates is not None and args.updates < 3:
        parser.error(
            f"--updates: got {args.updates}, expected at least 3, of which two intervals are left, one counted"
        )
    for task in args.task or SETTINGS:
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(_measured(task, SETTINGS[task](Path(scratch)), args, Path(scratch))), flush=True)


def random_walks(scratch: Path) -> dict[str, Any]:
    """trlX's toy on a GPT-2 of 1.2M parameters that has read 1,000 random walks."""
    from gptcore.align.tasks import random_walks

    graph = random_walks.graph()
    walks = [[graph.alphabet.index(letter) for letter in text] for text in
             (f"{d.prompt}{d.completion}" for d in random_walks.demonstrations(graph))]  # fmt: skip
    nodes = len(graph.alphabet)
    _save(scratch / "model", {"num_layers": 6, "width": 128, "vocab_size": 32, "context_length": 16,
                              "attention": {"num_heads": 4}}, [[*walk, nodes] for walk in walks])  # fmt: skip
    return {
        "model": str(scratch / "model"), "words": nodes, "vocab_size": 32, "end": nodes, "pad": 31,
        "prompts": [[node] for node in range(1, nodes)], "prompt_length": 1, "response": 10,
        "episodes": 128, "minibatch": 32, "epochs": 4, "lr": 3e-4, "beta": 0.05, "updates": 12,
        "graph": {"successors": graph.successors, "distances": graph.distances, "longest": graph.longest},
    }  # fmt: skip


def gpt2_124m(scratch: Path) -> dict[str, Any]:
    """GPT-2 124M with random weights: prompts of 64 tokens, responses of 64."""
    import random

    _save(scratch / "model", {"context_length": 128, "vocab_size": 50304}, None)
    drawn = random.Random(0)
    return {
        "model": str(scratch / "model"), "words": 50256, "vocab_size": 50304, "end": 50256, "pad": 50303,
        "prompts": [[drawn.randrange(50256) for _ in range(64)] for _ in range(64)], "prompt_length": 64,
        "response": 64, "episodes": 16, "minibatch": 8, "epochs": 2, "lr": 3e-6, "beta": 0.05, "updates": 3,
    }  # fmt: skip


SETTINGS = {"random_walks": random_walks, "gpt2_124m": gpt2_124m}


def _save(where: Path, changes: dict[str, Any], texts: list[list[int]] | None) -> None:
    """A GPT-2 as a Hugging Face directory, after three passes over ``texts``."""
    import torch

    from gptcore import to_hf
    from gptcore.models import GPT, presets
    from gptcore.optim import AdamW

    model = GPT(presets.get("gpt2").merged(changes), seed=0)
    if texts is not None:
        optimizer = AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            for first in range(0, len(texts), 50):
                rows = [row for row in texts[first : first + 50] if len(row) > 1]
                ends = torch.tensor([0, *(len(row) - 1 for row in rows)]).cumsum(0).int()
                tokens = torch.tensor([[token for row in rows for token in row[:-1]]])
                targets = torch.tensor([[token for row in rows for token in row[1:]]])
                optimizer.zero_grad()
                model(tokens, targets, cu_seqlens=ends).loss.backward()
                optimizer.step()
    to_hf(model, where)


def _measured(task: str, setting: dict[str, Any], args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """One JSON object: medians over the iterations of all runs but each run's first."""
    setting |= {"threads": args.threads, "dtype": args.dtype, "critic": args.critic}
    if args.updates:
        setting["updates"] = args.updates
    ours = [sys.executable, "-m", "bench.ppo_episodes"]
    sides = {"gptcore": (ours, "")}
    for precision in (args.precision or PRECISIONS) if args.peer_python else ():
        peer = [args.peer_python, str(HERE / "peers" / "trl_ppo" / "episodes.py")]
        sides[f"trl_{precision}"] = (peer, precision)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for repeat in range(args.repeats):
        for side, (command, precision) in sides.items():
            path = scratch / "setting.json"
            path.write_text(
                json.dumps({**setting, "precision": precision, "out": str(scratch / f"{side}-{repeat}")})
            )
            runs[side].append(_run([*command, str(path)]))
            print(f"{task} {side}: {_summary(runs[side][-1:], setting)}", file=sys.stderr, flush=True)
    found = {side: _summary(some, setting) for side, some in runs.items()}
    return {
        "case": f"ppo/{task}", "dtype": args.dtype, "critic": args.critic, "threads": args.threads,
        "repeats": args.repeats, **found,
        "ratios": {side: _ratios(found["gptcore"], peer) for side, peer in found.items() if side != "gptcore"},
    }  # fmt: skip


def _summary(runs: list[dict[str, Any]], setting: dict[str, Any]) -> dict[str, Any]:
    """``episodes_per_s`` of wall time, processor milliseconds of an episode, MiB at the peak, in all and above what
    lay in memory after the imports, and mean rewards of each run's first and last iteration."""
    episodes = float(setting["episodes"])
    wall, processor = (
        statistics.median(value for run in runs for value in run[name][1:])
        for name in ("seconds", "processor_seconds")
    )
    return {
        "episodes_per_s": round(episodes / wall, 3),
        "processor_ms": round(processor / episodes * 1e3, 3),
        "peak_mib": round(max(run["peak_mib"] for run in runs)),
        "over_imports_mib": round(max(run["peak_mib"] - run["imports_mib"] for run in runs)),
        "rewards": [round(run["rewards"][end], 4) for run in runs for end in (0, -1)],
    }


def _ratios(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, float]:
    """Above 1 in the first two: ours is faster; below 1 in the others: ours is leaner."""
    return {
        "episodes_per_s": round(ours["episodes_per_s"] / peer["episodes_per_s"], 2),
        "processor": round(peer["processor_ms"] / ours["processor_ms"], 2),
        "peak": round(ours["peak_mib"] / peer["peak_mib"], 3),
        "over_imports": round(ours["over_imports_mib"] / peer["over_imports_mib"], 3),
    }


def _run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "GOMP_SPINCOUNT": "2000"}
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
