"""Improve a model by imitating its own best answers, round after round.

Each round samples several answers to each prompt, keeps the best of them and trains on those. It is the
baseline that 'gptcore ppo' has to beat. MODEL, TASKS and --reward are those of 'gptcore ppo'. The table is
[expert_iteration].

The same command continues a run that was stopped.

Examples:
  gptcore expert-iteration runs/sft arithmetic --steps 4 --set expert_iteration.max_new_tokens=24
  gptcore expert-iteration runs/sft tasks.jsonl --reward exact --set expert_iteration.threshold=1
  gptcore expert-iteration runs/sft arithmetic --set expert_iteration.keep=2
"""

from __future__ import annotations

import argparse

from gptcore.cli import reinforcement

add_arguments = reinforcement.add_arguments


def run(args: argparse.Namespace) -> int:
    from gptcore.align import expert_iteration

    return reinforcement.run(args, expert_iteration.ExpertIterationSpec, expert_iteration.run)
