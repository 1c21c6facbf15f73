"""Improve a model by rewards: proximal policy optimisation with a critic.

MODEL is where to begin, a run that 'gptcore sft' or 'gptcore train' made, say; it is also what the policy
may not drift from. TASKS are what it is asked: a built-in task (arithmetic, docstrings, random_walks,
secrets) or files of prompts, with what is right under 'truth' or 'answer'. --reward says how answers are
judged: 'task' (a built-in task's own), 'exact', or a function of yours, FILE.py:FUNCTION, which is called
with the task and the text of an answer and returns a number.

Settings come from --config, then from the other options, then from --set: the table [ppo], [tasks], and
those of 'gptcore train', of which steps counts iterations. With ppo.pretraining_coefficient (PPO-ptx) and
--text the model keeps what it had learnt before. docs/alignment.md explains them.

The same command continues a run that was stopped.

Examples:
  gptcore ppo runs/sft arithmetic --out runs/ppo --steps 50 --set ppo.max_new_tokens=24
  gptcore ppo runs/sft prompts.jsonl --reward judge.py:score --set ppo.beta=0.05
  gptcore ppo runs/sft docstrings --text builtin --set ppo.pretraining_coefficient=1.0
  gptcore ppo --config my.toml --set ppo.kl_target=6
  torchrun --nproc-per-node 2 -m gptcore ppo runs/sft arithmetic --zero 1 --set ppo.grain=16
"""

from __future__ import annotations

import argparse

from gptcore.cli import reinforcement

add_arguments = reinforcement.add_arguments


def run(args: argparse.Namespace) -> int:
    from gptcore.align import ppo
    from gptcore.align.reinforcement_spec import PPOSpec

    return reinforcement.run(args, PPOSpec, ppo.run)
