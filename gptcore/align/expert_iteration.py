"""Expert iteration: sample several answers to each prompt, keep the best, imitate them, begin again.

Anthony et al. 2017; for language models Zelikman et al. 2022 (STaR) and Gulcehre et al. 2023 (ReST). Beside a verifier
it is the baseline that reinforcement learning has to beat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from gptcore.align import ppo
from gptcore.align.behaviour_cloning import clone
from gptcore.align.experience import Experience
from gptcore.align.policy_update import Learner
from gptcore.align.reinforcement_spec import PPOSpec
from gptcore.data.permutation import derive
from gptcore.errors import UserError
from gptcore.infer import Rollouts
from gptcore.models.schema import at_least
from gptcore.train.config import TrainConfig


@dataclass(frozen=True)
class ExpertIterationSpec(PPOSpec):
    """The table [expert_iteration]: of each prompt's ``samples`` the ``keep`` best are imitated, ``epochs`` times.

    ``threshold``: least reward of an answer that is imitated; None: none. Equal answers to a prompt count once where
    ``distinct``. ``episodes``, ``minibatch``, sampling and shaping of rewards as in PPOSpec; a reference is only
    measured against.
    """

    section: ClassVar[str] = "expert_iteration"

    episodes: int = 2048
    samples: int = 8
    keep: int = 1
    threshold: float | None = None
    distinct: bool = True
    epochs: int = 2
    beta: float = 0.0
    estimator: Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce"] = "reinforce"

    def validate(self) -> None:
        super().validate()
        at_least("expert_iteration.", 1, keep=self.keep)
        if self.keep > self.samples:
            raise UserError(
                f"expert_iteration.keep: {self.keep} is more than expert_iteration.samples {self.samples}"
            )


def selected(rollouts: Rollouts, scores: NDArray[np.float64], spec: ExpertIterationSpec) -> NDArray[np.int64]:
    """Places of the responses to imitate, rising."""
    kept: list[int] = []
    for first in range(0, len(rollouts), spec.samples):
        group = np.arange(first, first + spec.samples)
        taken: set[bytes] = set()
        for place in group[np.argsort(-scores[group], kind="stable")]:
            response = rollouts.response(int(place)).tobytes()
            if len(taken) == spec.keep or (spec.threshold is not None and scores[place] < spec.threshold):
                break
            if spec.distinct and response in taken:
                continue
            taken.add(response if spec.distinct else response + bytes([len(taken)]))
            kept.append(int(place))
    return np.array(sorted(kept), dtype=np.int64)


class Imitator(Learner):
    """Learns from experience by cloning its best answers; an average of the weights has one term a round."""

    def learn(self, experience: Experience, iteration: int, lr: float, beta: float) -> dict[str, float]:
        """Updates on the selected answers; none where no answer reaches the threshold."""
        spec = self.spec
        assert isinstance(spec, ExpertIterationSpec)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        rows = selected(experience.rollouts, experience.scores, spec)
        share = len(rows) / (len(experience.rollouts) // spec.samples * spec.keep)
        if not len(rows):
            return {"kept_share": 0.0, "updates": 0.0}
        seen = clone(
            self.actor, self.optimizer, experience.rollouts.select(rows), epochs=spec.epochs,
            minibatch=spec.minibatch, seed=derive(self.seed, iteration), max_tokens=spec.micro_tokens,
            shares=self.shares,
        )  # fmt: skip
        self.updates += int(seen["updates"])
        if self.average is not None:
            self.average.update(self.actor)
        return {**seen, "kept_share": share, "kept_reward": float(experience.scores[rows].mean())}


def run(config: TrainConfig, spec: ExpertIterationSpec, **arguments: Any) -> ppo.Result:
    """``config.steps`` rounds; arguments and errors are those of :func:`gptcore.align.ppo.run`."""
    return ppo.run(config, spec, learner=Imitator, **arguments)
