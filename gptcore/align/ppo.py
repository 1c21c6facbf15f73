"""Learning from rewards, from the first sample to the last checkpoint: PPO, and GRPO, RLOO and REINFORCE with it.

    result = run(config, spec, actor=model, reference=copy, prompts=prompts, reward=by_answer(arithmetic.reward))

One iteration samples responses (``experience``), judges them, and learns from them (``policy_update``). Prompts,
samples and shuffles are functions of the seed and the iteration, so a run that was stopped and resumed equals one that
never was, bit for bit. Started by torchrun, processes share it (``shares``).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gptcore import checkpoint
from gptcore.align import reinforcement_state
from gptcore.align.answers import Prompts, Reward
from gptcore.align.critic import Critic
from gptcore.align.experience import Collector, Experience, Reference
from gptcore.align.losses import kl
from gptcore.align.policy_update import Learner
from gptcore.align.reinforcement_parts import check, learner_of, new_critic
from gptcore.align.reinforcement_spec import PPOSpec
from gptcore.align.shares import Shares, shares_of
from gptcore.data import chat
from gptcore.errors import UserError
from gptcore.infer.trained import TOKENIZER_DIRECTORY
from gptcore.models import GPT
from gptcore.report.progress import Progress
from gptcore.train import processes, run_state, state
from gptcore.train.config import TrainConfig
from gptcore.train.evaluation import Batches
from gptcore.train.measure import due
from gptcore.train.metrics import MetricsFile
from gptcore.train.run_directory import RunDirectory
from gptcore.train.stop import StopRequest

Evaluate = Callable[[GPT], Mapping[str, float]]


class Result(NamedTuple):
    """Where a run ended: iterations done, the last iteration's metrics, the last evaluation, the checkpoint."""

    step: int
    metrics: dict[str, float]
    evaluation: dict[str, float]
    checkpoint: Path
    seconds: float


@dataclass
class _Run:
    """A run under way."""

    config: TrainConfig
    spec: PPOSpec
    collector: Collector
    learner: Learner
    directory: RunDirectory
    identity: dict[str, Any]
    evaluate: Evaluate | None
    shares: Shares
    quiet: bool
    step: int = 0
    beta: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)


def run(
    config: TrainConfig,
    spec: PPOSpec,
    *,
    actor: GPT,
    prompts: Prompts,
    reward: Reward,
    reference: Reference | None = None,
    critic: Critic | None = None,
    pretraining: Batches | None = None,
    gold: Reward | None = None,
    evaluate: Evaluate | None = None,
    stop_tokens: Sequence[int] | None = None,
    learner: type[Learner] | None = None,
    resume: bool = True,
    quiet: bool = False,
) -> Result:
    """Improve ``actor`` by ``reward`` for ``config.steps`` iterations, resuming what ``config.run_dir`` holds.

    Args:
        config, spec: the settings; see :func:`gptcore.align.reinforcement_spec.settings`.
        actor: trained in place. reference: what it may not drift from: a frozen model, or a function whose context
            makes the actor the reference (adapters off); None: no divergence is measured.
        prompts: what is asked, with tokenizer and template. reward: judges answers, in each process those to its share
            of the prompts. gold: another judge, only logged.
        critic: with ``estimator = "gae"``; default a new one, on the actor's trunk or on a copy of it.
        pretraining: batches of text for ``pretraining_coefficient``, the mean loss on them weighted by it.
        evaluate: actor → named numbers, at the start, every ``config.evaluation.every`` iterations and at the end.
        stop_tokens: ids that end a response; default those of the chat.
        learner: what becomes of an iteration's experience; default what the settings say.
        resume: False refuses a run directory that holds checkpoints. quiet: no progress line.

    Raises:
        UserError: settings that do not fit, a reward that is not finite, a run directory in use, another model than the
            checkpoint's.
        NonFiniteError: NaN or infinite loss or gradient; the last checkpoint is intact.
        SystemExit: after SIGINT or SIGTERM, with 128 + signal, once the checkpoint is written.
    """
    shares = shares_of(config.parallel, spec.grain)
    check(config, spec, shares, reference, pretraining)
    stops = prompts.chat.stop_ids if stop_tokens is None else stop_tokens
    actor.eval()  # no dropout: it would make ratios differ from 1 where nothing has changed
    if isinstance(reference, GPT):
        reference.eval().requires_grad_(False)
    if spec.estimator == "gae" and critic is None:
        critic = new_critic(actor, spec)
    collector = Collector(actor, critic, reference, prompts, reward, gold, spec, stops, config.seed, shares)
    pupil = learner_of(config, learner, collector, pretraining)
    torch.manual_seed(config.seed)
    with (
        processes.naming_lost_ranks(shares.member, Path(config.run_dir)),
        RunDirectory(config.run_dir, shares.member.rank) as directory,
    ):
        identity = state.identity(config, actor, None, prompts.chat.tokenizer)
        settings = {**config.to_dict(), spec.section: spec.to_dict()}
        identity["config"] = settings
        quiet = quiet or not shares.first
        now = _Run(
            config, spec, collector, pupil, directory, identity, evaluate, shares, quiet, beta=spec.beta
        )
        processes.first_alone(shares.member, lambda: checkpoint.clean(directory.checkpoints))
        resumed = _resume(now, resume)
        directory.write_config(settings)
        if shares.first:
            chat.save(prompts.chat, directory.path / TOKENIZER_DIRECTORY)
        began = time.perf_counter()
        metrics = MetricsFile(directory.metrics, now.step if resumed else -1)
        try:
            _iterate(now, metrics)
        finally:
            metrics.close()
        if pupil.average is not None and shares.first:
            reinforcement_state.save_average(pupil, directory.path / "average", now.step, identity)
            chat.save(prompts.chat, directory.path / "average" / TOKENIZER_DIRECTORY)
        path = checkpoint.path_of(directory.checkpoints, now.step)
        return Result(now.step, now.metrics, now.evaluation, path, time.perf_counter() - began)


def _iterate(now: _Run, metrics: MetricsFile) -> None:
    """Iterations, evaluations and checkpoints from ``now.step`` to the end."""
    config, spec = now.config, now.spec
    with (
        StopRequest() as stop,
        Progress(
            config.steps, unit="iteration", label=spec.section, start=now.step, quiet=now.quiet
        ) as progress,
    ):
        if now.step == 0:
            _measure(now, metrics, progress)
        while now.step < config.steps:
            started = time.perf_counter()
            experience = now.collector.collect(now.step, now.beta)
            sampled = time.perf_counter()
            seen = now.learner.learn(experience, now.step, config.learning_rate(now.step), now.beta)
            now.step += 1
            _log(now, metrics, progress, experience, seen, sampled - started, time.perf_counter() - sampled)
            if spec.kl_target is not None:
                now.beta = kl.adapted(
                    now.beta,
                    experience.kl,
                    target=spec.kl_target,
                    episodes=spec.episodes,
                    horizon=spec.kl_horizon,
                )
            _measure(now, metrics, progress)
            signal = max(now.shares.gathered(stop.signal or 0))
            if signal or now.step == config.steps or due(now.step, config.checkpoint.every):
                _save(now, metrics)
            if signal:
                progress.close()
                if now.shares.first:
                    print(
                        f"gptcore: stopped at iteration {now.step}; the same command continues the run in "
                        f"{now.directory.path}",
                        file=sys.stderr,
                    )
                raise SystemExit(128 + signal)


def _log(
    now: _Run, metrics: MetricsFile, progress: Progress, experience: Experience, seen: dict[str, float],
    sampling: float, learning: float,
) -> None:  # fmt: skip
    """One line of metrics, the progress line, and samples where they are due."""
    spec, rollouts = now.spec, experience.rollouts
    now.seconds += sampling + learning
    now.tokens += len(rollouts.logprobs)
    now.metrics = {**experience.metrics, **seen, "beta": now.beta}
    metrics.write(
        "train", now.step, **now.metrics, lr=now.config.learning_rate(now.step - 1), episodes=now.step * spec.episodes,
        tokens=now.tokens, sampling_seconds=sampling, learning_seconds=learning, seconds=now.seconds,
        episodes_per_s=spec.episodes / (sampling + learning),
    )  # fmt: skip
    shown = {
        "reward": now.metrics["reward"], "KL": now.metrics["kl"], "entropy": now.metrics["entropy"],
        "clip": now.metrics.get("clip_share", 0.0), "length": now.metrics["length"],
    }  # fmt: skip
    progress.update(1, **{name: f"{value:.3f}" for name, value in shown.items()})
    if experience.constant:
        text = "all rewards are equal: there is nothing to learn from"
        metrics.write("warning", now.step, text=text)
        progress.message(f"gptcore: warning: iteration {now.step}: {text}")
    if due(now.step, spec.sample_every):
        for answer, score in list(zip(experience.answers, experience.scores, strict=True))[
            : spec.samples_shown
        ]:
            prompt = now.collector.prompts.chat.tokenizer.decode(answer.prompt_ids)
            metrics.write("sample", now.step, prompt=prompt, text=answer.text, reward=float(score))
            progress.message(f"iteration {now.step}  reward {score:.3f}  {prompt!r} -> {answer.text!r}")


def _measure(now: _Run, metrics: MetricsFile, progress: Progress) -> None:
    every = now.config.evaluation.every
    if now.evaluate is None or not every or not (now.step == now.config.steps or due(now.step, every)):
        return
    if not now.shares.first:
        return  # which alone is asked; the others wait for it
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        now.evaluation = {name: float(value) for name, value in now.evaluate(now.learner.actor).items()}
    metrics.write("evaluation", now.step, **now.evaluation)
    numbers = "  ".join(f"{name} {value:.4f}" for name, value in now.evaluation.items())
    progress.message(f"iteration {now.step}  {numbers}")


def _save(now: _Run, metrics: MetricsFile) -> None:
    metrics.sync()
    tensors, values = reinforcement_state.collect(now.learner)
    values["run"] = {
        "beta": now.beta, "seconds": now.seconds, "tokens": now.tokens, "metrics": _plain(now.metrics),
        "evaluation": now.evaluation,
    }  # fmt: skip
    keep = now.config.checkpoint.keep_last
    checkpoint.save(
        now.directory.checkpoints, now.step, tensors, {**now.identity, **values}, keep,
        member=now.shares.member, patience=now.config.parallel.timeout,
    )  # fmt: skip


def _plain(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those that JSON can say."""
    return {name: value for name, value in metrics.items() if abs(value) < float("inf")}


def _resume(now: _Run, resume: bool) -> bool:
    """Put the newest good checkpoint, if there is one, into the run; tells whether there was one."""
    directory = now.directory.checkpoints
    if not resume and checkpoint.steps(directory):
        raise UserError(f"{now.directory.path} holds a run; resume it, or choose another run_dir")
    found = run_state.opened(now.shares.member, lambda: checkpoint.latest(directory))
    if found is None:
        return False
    saved = found.state
    if now.spec.section not in saved.get("config", {}) or "run" not in saved:
        raise UserError(f"{now.directory.path} holds a run of another kind; choose another run_dir")
    state.compare(found.path, saved, now.identity)
    if saved["step"] > now.config.steps:
        raise UserError(f"{found.path} is at iteration {saved['step']}, beyond steps = {now.config.steps}")
    reinforcement_state.restore(now.learner, found)
    own = saved["run"]
    now.step, now.beta, now.seconds, now.tokens = saved["step"], own["beta"], own["seconds"], own["tokens"]
    now.metrics, now.evaluation = own["metrics"], own["evaluation"]
    if not now.quiet:
        changed = state.changes(saved["config"], now.identity["config"])
        note = f" with changed settings ({', '.join(changed)})" if changed else ""
        print(f"gptcore: resuming {now.directory.path} at iteration {now.step}{note}", file=sys.stderr)
    return True
