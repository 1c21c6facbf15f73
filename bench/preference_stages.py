"""The stages of the study of preferences: a fine-tuned start, pairs of its own answers, and what learns from them.

The task is addition with the working shown (``gptcore.align.tasks.arithmetic``). Demonstrations often carry wrongly, so
the start gives right and wrong answers to the same prompts; a pair is a better and a worse one. Labels to learn from
are confused at a rate, those to measure on are the verifier's.
"""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptcore import train as training
from gptcore.align import pairs, preferences
from gptcore.align.preference_spec import PreferenceSpec
from gptcore.align.preferences import PreferencePolicy
from gptcore.align.rankings import RankingLoader, fold_of, tokenised
from gptcore.align.reward_model import Ensemble, RewardModel
from gptcore.align.tasks import arithmetic
from gptcore.data.characters import CharacterTokenizer
from gptcore.data.chat import Chat
from gptcore.data.example_loader import ExampleLoader, Served
from gptcore.data.records import Labelled, Ranking, Task
from gptcore.infer import SamplingParams, trained
from gptcore.infer.rollout import rollout
from gptcore.infer.trained import TOKENIZER_DIRECTORY
from gptcore.models import GPT, GPTConfig

_CONTEXT = 256  # of a packed row of demonstrations; an answer with its prompt has at most 30
_NEW_TOKENS = 24


@dataclass(frozen=True)
class Sizes:
    """Of one seed's study.

    Start: ``sft_steps`` updates of 1,536 tokens on demonstrations that carry wrongly in a share ``noise`` of the cases
    near ten and slip in ``slips`` of the others. It answers
    ``prompts`` prompts to learn from and ``held_out`` others ``k`` times; a share ``confused`` of the grades to learn
    from is another answer's. Each loss takes ``steps`` updates of ``batch`` pairs, each of ``members`` reward models
    ``reward_steps`` of 16 prompts.
    """

    layers: int = 3
    width: int = 64
    heads: int = 4
    sft_steps: int = 600
    noise: float = 0.6
    slips: float = 0.15
    prompts: int = 2400
    held_out: int = 1200
    k: int = 4
    confused: float = 0.1
    steps: int = 120
    batch: int = 32
    members: int = 4
    reward_steps: int = 150


@dataclass(frozen=True)
class Method:
    """A loss with its settings, and the rate at which it learns."""

    spec: PreferenceSpec
    rate: float
    metric: str


_IMPLIED = "implied reward, chosen above rejected"
# The answers of a pair differ in few characters. DPO at a beta of 0.1, or a rate of 3e-4, takes likelihood from both:
# its own metric rises then too, and the share of right answers falls.
METHODS = {
    "DPO": Method(PreferenceSpec(loss_type="dpo", beta=2.0), 2e-5, _IMPLIED),
    "IPO": Method(PreferenceSpec(loss_type="ipo", beta=0.3), 3e-4, _IMPLIED),
    "cDPO": Method(PreferenceSpec(loss_type="dpo", beta=2.0, label_smoothing=0.1), 2e-5, _IMPLIED),
    "KTO": Method(
        PreferenceSpec(loss_type="kto", beta=0.5), 3e-5, "reward above the reference point where desirable"
    ),
    "ORPO": Method(PreferenceSpec(loss_type="orpo", beta=1.0), 3e-4, "odds, chosen above rejected"),
    "SimPO": Method(
        PreferenceSpec(loss_type="simpo", beta=20.0), 1e-5, "mean log-probability, chosen above rejected"
    ),
}


@dataclass(frozen=True)
class Study:
    """One seed in one directory: tasks, tokenizer, and the pairs that its start made."""

    directory: Path
    sizes: Sizes
    seed: int

    @cached_property
    def chat(self) -> Chat:
        """One token a character, and one that ends a text."""
        return Chat(CharacterTokenizer(arithmetic.ALPHABET), None)

    @cached_property
    def tasks(self) -> arithmetic.Split:
        """What is learnt from and what is measured on, in no pair of summands alike."""
        return arithmetic.split(self.sizes.held_out, self.seed)

    def model(self) -> GPT:
        """The start, anew; :func:`fine_tune` has made it."""
        return trained.load(self.directory / "start")[0]

    @cached_property
    def labelled(self) -> list[list[Ranking]]:
        """The start's answers to prompts to learn from, ranked: a list of each of as many labellers as there are reward
        models, who confuse grades at rates from none to twice ``confused``."""
        sizes = self.sizes
        drawn = random.Random(f"preferences {self.seed}")
        asked = drawn.sample(self.tasks.train, min(sizes.prompts, len(self.tasks.train)))
        answered = self._answered(asked, self.seed)
        made = []
        for labeller in range(sizes.members):
            own = fold_of(len(asked), sizes.members, labeller, self.seed)[1]
            rate = 2.0 * sizes.confused * labeller / max(1, sizes.members - 1)
            made.append(_ranked([answered[i] for i in own], rate, random.Random(f"{self.seed} {labeller}")))
        return made

    @property
    def rankings(self) -> list[Ranking]:
        """Those of all labellers."""
        return [one for own in self.labelled for one in own]

    @cached_property
    def held_out(self) -> list[Ranking]:
        """The same of prompts to measure on, by the verifier's grades."""
        return _ranked(self._answered(self.tasks.held_out, self.seed + 1), 0.0, random.Random(self.seed))

    def _answered(self, asked: Sequence[Task], seed: int) -> list[tuple[Task, list[str]]]:
        k = self.sizes.k
        texts = answers(self, self.model(), asked, k, temperature=1.0, seed=seed)
        return [(task, texts[place * k : (place + 1) * k]) for place, task in enumerate(asked)]

    def config(self, name: str, steps: int, rate: float, **tables: Any) -> training.TrainConfig:
        """The settings of a training: no evaluation under way, one checkpoint at the end."""
        table = {
            "run_dir": str(self.directory / name), "steps": steps, "seed": self.seed, "log_every": max(1, steps // 50),
            "data": {"batch": self.sizes.batch, "length": _CONTEXT},
            "optimizer": {"lr": rate, "weight_decay": 0.0, "betas": [0.9, 0.95]},
            "schedule": {"name": "cosine", "warmup": min(10, steps // 5)}, "model": self.shape.to_dict(),
            "evaluation": {"every": 0}, "checkpoint": {"every": steps, "keep_last": 1}, **tables,
        }  # fmt: skip
        return training.from_table(table)

    @property
    def shape(self) -> GPTConfig:
        sizes = self.sizes
        return GPTConfig.from_dict(
            {
                "num_layers": sizes.layers, "width": sizes.width, "attention": {"num_heads": sizes.heads},
                "vocab_size": self.chat.tokenizer.vocab_size, "context_length": _CONTEXT,
            }
        )  # fmt: skip


def _ranked(
    answered: Sequence[tuple[Task, list[str]]], confused: float, drawn: random.Random
) -> list[Ranking]:
    made = (arithmetic.ranking(task, texts, confused, drawn) for task, texts in answered)
    return [one for one in made if one is not None]


def fine_tune(study: Study) -> None:
    """Make the start: imitation of demonstrations with mistakes in them, from nothing."""
    sizes, chat = study.sizes, study.chat
    made = arithmetic.demonstrations(study.tasks.train, 4000, sizes.noise, sizes.slips, seed=study.seed)
    examples = [chat.response(one.prompt, one.completion) for one in made]
    tokenizer = chat.tokenizer
    served = Served(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.byte_lengths())
    loader = ExampleLoader({"sft": examples}, served, batch=6, length=_CONTEXT, seed=study.seed)
    config = study.config("start", sizes.sft_steps, 2e-3, data={"batch": 6, "length": _CONTEXT})
    _trained(study, config, GPT(study.shape, seed=study.seed), loader)


def answers(
    study: Study, model: GPT, asked: Sequence[Task], samples: int, *, temperature: float, seed: int
) -> list[str]:
    """The texts of ``samples`` answers to each task; one that did not end by itself is empty."""
    tokenizer = study.chat.tokenizer
    made = rollout(
        model, [study.chat.prompt_ids(task.prompt) for task in asked], max_new_tokens=_NEW_TOKENS,
        params=SamplingParams(temperature=temperature, seed=seed), stop_tokens=study.chat.stop_ids,
        num_samples=samples, vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    return [tokenizer.decode(made.response(i)[:-1]) if made.stopped[i] else "" for i in range(len(made))]


def _trained(study: Study, config: training.TrainConfig, model: Any, loader: Any) -> None:
    # A part that was stopped begins anew: its only checkpoint is its last, which another study may have left.
    shutil.rmtree(config.run_dir, ignore_errors=True)
    study.chat.tokenizer.save(Path(config.run_dir) / TOKENIZER_DIRECTORY)
    training.run(
        config, model=model, loader=loader, tokenizer=study.chat.tokenizer, quiet=True, measure_peak=False
    )


def learn(study: Study, name: str) -> PreferencePolicy:
    """The start after learning from the pairs by the loss ``name``."""
    method, model = METHODS[name], study.model()
    learnt = preferences.with_reference(model, records(study, method.spec, study.rankings))
    policy = PreferencePolicy.over(model, method.spec)
    tokenizer = study.chat.tokenizer
    loader = pairs.PairLoader(
        learnt, tokenizer.fingerprint, tokenizer.vocab_size, batch=study.sizes.batch, seed=study.seed
    )
    _trained(study, study.config(name, study.sizes.steps, method.rate), policy, loader)
    return policy


def records(study: Study, spec: PreferenceSpec, rankings: Sequence[Ranking]) -> list[pairs.Preference]:
    """Best and worst answers as the loss takes them; KTO's as single ones, good or bad, those of a prompt apart."""
    if spec.loss_type != "kto":
        return pairs.tokenised(rankings, study.chat, length=_CONTEXT)[0]
    labelled = [Labelled(one.prompt, one.chosen, True) for one in rankings]
    labelled += [Labelled(one.prompt, one.rejected, False) for one in rankings]
    return pairs.with_others(pairs.tokenised(labelled, study.chat, length=_CONTEXT)[0])


def credit(policy: PreferencePolicy, held_out: Sequence[pairs.Preference]) -> NDArray[np.float64]:
    """Of each pair 1 where the loss's own reward puts the chosen answer above the rejected one, 1/2 where it tells them
    not apart; with KTO of each answer, 1 where its reward is above the reference point and it is a good one, or below
    and it is not."""
    outs = preferences.outputs_of(policy, held_out)
    chosen, rejected = (
        np.concatenate([getattr(out, name).double().numpy() for out in outs])
        for name in ("chosen_rewards", "rejected_rewards")
    )
    if policy.preference.loss_type != "kto":
        return np.asarray(np.heaviside(chosen - rejected, 0.5))
    batches = [pairs.batch_of(held_out)]
    point = float(policy.of_update(batches, list)["point"]) * policy.preference.strength
    return np.heaviside(np.concatenate([chosen - point, point - rejected]), 0.5)


def reward_model(study: Study, member: int) -> RewardModel:
    """A member of the ensemble, which never sees what the labeller of its own number ranked."""
    sizes, seed, tokenizer = study.sizes, study.seed + 100 * member, study.chat.tokenizer
    mine = [one for place, own in enumerate(study.labelled) if place != member for one in own]
    ranked, _ = tokenised(mine, study.chat, length=_CONTEXT)
    model = RewardModel.over(study.model(), seed=seed)
    loader = RankingLoader(ranked, tokenizer.fingerprint, tokenizer.vocab_size, batch=16, seed=seed)
    _trained(study, study.config(f"reward-{member}", sizes.reward_steps, 5e-4), model, loader)
    model.normalise([one.answers[int(np.argmin(one.ranks))] for one in ranked[:256]])
    return model


class Judged(NamedTuple):
    """Of one pair of each held-out prompt, (P,): by what ``margin`` the ensemble's mean prefers either, 0 to 1/2;
    the members' ``disagreement`` on how likely the better one is better, and ``of_scores`` that on the difference of
    scores; whether the mean is an ``error``, for the worse one."""

    margin: NDArray[np.float64]
    disagreement: NDArray[np.float64]
    of_scores: NDArray[np.float64]
    error: NDArray[np.bool_]


def judged(study: Study, ensemble: Ensemble) -> Judged:
    """The ensemble on pairs drawn at random among those of different grades."""
    drawn = random.Random(f"judged {study.seed}")
    better, worse = [], []
    for one in study.held_out:
        places = itertools.permutations(range(len(one.ranks)), 2)
        ordered = [(a, b) for a, b in places if one.ranks[a] < one.ranks[b]]
        for side, place in zip((better, worse), drawn.choice(ordered), strict=True):
            side.append(study.chat.response(one.prompt, one.answers[place]))
    found, scores = ensemble.preferences(better, worse), ensemble.differences(better, worse)
    mean, disagreement, of_scores = (x.double().numpy() for x in (*found, scores.disagreement))
    return Judged(np.abs(mean - 0.5), disagreement, of_scores, mean <= 0.5)
