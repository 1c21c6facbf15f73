"""Improve a model by rewards that are compared within a group: GRPO, Dr. GRPO, DAPO, GSPO, RLOO, REINFORCE.

Several answers to each prompt are judged against each other, so there is no critic. MODEL, TASKS and
--reward are those of 'gptcore ppo'. The table is [grpo]; docs/alignment.md says which settings are whose
method.

The same command continues a run that was stopped.

Examples:
  gptcore grpo runs/sft arithmetic --out runs/grpo --steps 50 --set grpo.max_new_tokens=24
  gptcore grpo runs/sft gsm8k.jsonl --reward exact --set grpo.samples=16 --set grpo.temperature=0.9
  gptcore grpo runs/sft arithmetic --set grpo.aggregation=dapo --set grpo.clip_high=0.28 --set grpo.beta=0
  gptcore grpo runs/sft arithmetic --set grpo.estimator=rloo --set grpo.kl_in=reward
"""

from __future__ import annotations

import argparse

from gptcore.cli import reinforcement

add_arguments = reinforcement.add_arguments


def run(args: argparse.Namespace) -> int:
    from gptcore.align import ppo
    from gptcore.align.reinforcement_spec import GRPOSpec

    return reinforcement.run(args, GRPOSpec, ppo.run)
