"""Cases of alignment shared by processes, run by ``tests/dist/processes.py``: losses and gradients of one process."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as c10d
from torch import nn

from gptcore import checkpoint
from gptcore.align import pairs, ppo, rankings
from gptcore.align.answers import by_answer
from gptcore.align.critic import Critic
from gptcore.align.demonstrations import served_by
from gptcore.align.experience import Collector, Experience
from gptcore.align.expert_iteration import ExpertIterationSpec, Imitator
from gptcore.align.policy_update import Learner
from gptcore.align.preference_spec import PreferenceSpec
from gptcore.align.preferences import PreferencePolicy, with_reference
from gptcore.align.reinforcement_parts import check
from gptcore.align.reinforcement_spec import GRPOSpec, PPOSpec, settings
from gptcore.align.reward_model import RewardModel, agreement, evaluation
from gptcore.align.shares import ALONE, Shares, shares_of
from gptcore.align.trpo import TrustRegionLearner
from gptcore.data.example_loader import ExampleLoader
from gptcore.data.examples import Tokenised
from gptcore.dist import Member
from gptcore.errors import UserError
from gptcore.models import GPT
from gptcore.train import from_table, optimizers, run, strategies
from gptcore.train.config import ParallelSpec
from gptcore.train.evaluation import Batches, tensors_of
from gptcore.train.step import update
from tests.align import reinforcement_cases as toy
from tests.dist.processes import World
from tests.dist.zero_cases import alone

# A gradient is read as the difference that a step of plain descent makes: so long a one that the weights' own digits
# do not count beside it.
RATE = 1024.0
DESCENT = {"name": "sgd", "lr": RATE, "momentum": 0.0, "max_norm": 0}


def close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    """Within ``tolerance`` of the largest magnitude of all."""
    size = max(float(value.abs().max()) for value in expected.values())
    assert size > 0 and got.keys() == expected.keys()
    for name, value in expected.items():
        assert float((got[name] - value).abs().max()) <= tolerance * size, name


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients(before: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: (before[name] - value) / RATE for name, value in weights_of(model).items()}


# --- stages that learn from files ---------------------------------------------------------------------------------

LEAVES, GRAIN = 4, 2


def answer(rng: np.random.Generator) -> Tokenised:
    return Tokenised.of(rng.integers(0, 6, rng.integers(1, 4)), rng.integers(0, 6, rng.integers(1, 8)))


def sft(model: GPT, rng: np.random.Generator) -> tuple[nn.Module, Batches]:
    """Examples of many lengths: leaves weigh by their response tokens."""
    tasks = {"one": [answer(rng) for _ in range(24)]}
    loader = ExampleLoader(
        tasks, served_by(toy.prompts_of("a").chat), batch=GRAIN, length=16, accumulate=LEAVES, seed=3
    )
    assert len({loader.batch_at(i).weight for i in range(LEAVES)}) > 1
    return model, loader


def reward(model: GPT, rng: np.random.Generator) -> tuple[nn.Module, Batches]:
    """Two to five answers to a prompt, some tied."""
    ranked = [
        rankings.Ranked(
            tuple(answer(rng) for _ in range(k)), tuple(rng.integers(0, 3, k - 1).tolist()) + (3.0,)
        )
        for k in rng.integers(2, 6, 12)
    ]
    loader = rankings.RankingLoader(ranked, "toy", toy.CONFIG.vocab_size, batch=GRAIN, seed=3)
    return RewardModel.over(model, seed=1, centring=0.01), loader


def preference(loss: str) -> Callable[[GPT, np.random.Generator], tuple[nn.Module, Batches]]:
    def build(model: GPT, rng: np.random.Generator) -> tuple[nn.Module, Batches]:
        found = [pairs.Preference(answer(rng), answer(rng)) for _ in range(12)]
        if loss == "kto":
            parted = [
                one._replace(**{"rejected" if i % 3 else "chosen": None}) for i, one in enumerate(found)
            ]
            found = pairs.with_others(parted)
        loader = pairs.PairLoader(
            with_reference(model, found), "toy", toy.CONFIG.vocab_size, batch=GRAIN, seed=3
        )
        with torch.no_grad():  # away from the reference, where every pair would have one slope
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        return PreferencePolicy.over(model, PreferenceSpec(loss_type=loss)), loader

    return build


STAGES = {
    "sft": sft, "reward": reward,
    **{loss: preference(loss) for loss in ("dpo", "ipo", "kto", "orpo", "simpo")},
}  # fmt: skip


def stage(name: str) -> Callable[[World], None]:
    """One update, against the sum over its leaves by autograd."""

    def case(world: World) -> None:
        for parallel in ({"zero": 0}, {"zero": 2}, {"strategy": "ddp"}):
            config = from_table(
                {
                    "model": toy.CONFIG.to_dict(), "data": {"batch": GRAIN, "accumulate": LEAVES, "length": 12},
                    "optimizer": DESCENT, "schedule": {"name": "constant", "warmup": 0}, "parallel": parallel,
                }
            )  # fmt: skip
            plain, loader = STAGES[name](toy.model_of(3), np.random.default_rng(1))
            batches = [loader.batch_at(leaf) for leaf in range(LEAVES)]
            of_update = getattr(plain, "of_update", None)  # what a loss takes of all its update
            shared = of_update(batches, list) if of_update else {}
            total = torch.zeros(())
            for batch in batches:
                tokens, targets, options = tensors_of(batch, torch.device("cpu"))
                loss = plain(tokens, targets, **options, **shared).loss
                total = total + getattr(batch, "weight", 1.0) * loss / LEAVES
            trained = {n: p for n, p in plain.named_parameters() if p.requires_grad}
            slopes = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
            expected = {
                n: torch.zeros_like(p) if g is None else g
                for (n, p), g in zip(trained.items(), slopes, strict=True)
            }
            model, _ = STAGES[name](toy.model_of(3), np.random.default_rng(1))
            before = weights_of(model)
            called, optimizer = strategies.prepare(config, model)
            told = update(config, called, optimizer, loader, 0)
            whole = float(total.detach())
            assert abs(told - whole) <= 1e-6 * abs(whole)
            close({n: g for n, g in gradients(before, model).items() if n in trained}, expected)

    return case


def divided_weights(world: World) -> None:
    """A reward model of which no process has all weights: evaluation, normalisation and agreement all the same."""
    told: list[Any] = [tempfile.mkdtemp() if world.rank == 0 else None]
    c10d.broadcast_object_list(told, 0)
    found = []
    for zero in (0, 3):
        rng = np.random.default_rng(1)
        model, loader = reward(toy.model_of(3), rng)
        assert isinstance(model, RewardModel) and isinstance(loader, rankings.RankingLoader)
        config = from_table(
            {
                "run_dir": f"{told[0]}/{zero}", "model": toy.CONFIG.to_dict(), "steps": 2,
                "data": {"batch": GRAIN, "accumulate": LEAVES, "length": 12}, "parallel": {"zero": zero},
                "evaluation": {"every": 1}, "checkpoint": {"every": 2},
            }
        )  # fmt: skip
        kept = loader.rankings[:6]
        result = run(
            config, model=model, loader=loader, evaluate=evaluation(kept), measure_peak=False, quiet=True
        )
        found.append(
            (result.evaluation, agreement(model, kept), float(model.score_mean), float(model.score_std))
        )
    if world.rank == 0:  # which alone evaluates where it can
        assert found[0] == found[1] and found[0][3] != 1.0


# --- learning from rewards ----------------------------------------------------------------------------------------

PROMPTS = ("ab", "c", "def", "aa", "fe")


def short(own: dict[str, Any]) -> dict[str, Any]:
    return {"episodes": 12, "minibatch": 12, "epochs": 1, "max_new_tokens": 5, **own}


METHODS: dict[str, tuple[type[PPOSpec], type[Learner], dict[str, Any]]] = {
    "ppo": (PPOSpec, Learner, short({"whiten_rewards": True})),
    "ppo with text": (
        PPOSpec, Learner,
        short({"critic": "separate", "pretraining_coefficient": 2.0, "pretraining_batches": 2}),
    ),
    "grpo": (GRPOSpec, Learner, short({"samples": 4, "micro_tokens": 20, "top_k": 4})),
    "dapo": (
        GRPOSpec, Learner,
        short({"samples": 4, "aggregation": "dapo", "micro_tokens": 9, "entropy_coefficient": 0.1}),
    ),
    "rloo, fewer responses than processes": (
        GRPOSpec, Learner,
        short({"samples": 2, "episodes": 4, "minibatch": 1, "estimator": "rloo", "kl_in": "reward"}),
    ),
    "expert iteration": (ExpertIterationSpec, Imitator, short({"samples": 4, "minibatch": 2, "micro_tokens": 16})),
}  # fmt: skip


class Text:
    """Noise to remember."""

    def batch_at(self, step: int) -> Any:
        from gptcore.data.loader import Batch

        rows = np.random.default_rng(step).integers(0, 6, (2, 9))
        return Batch(rows[:, :-1], rows[:, 1:], None, 16, 16, step)


def judge(task: Any, text: str) -> float:
    return text.count("a") - 0.5 * text.count("b") + 0.01 * len(text)


def learnt(
    kind: type[PPOSpec], learner: type[Learner], own: dict[str, Any], shares: Shares, lr: float
) -> tuple[Experience, dict[str, float], dict[str, torch.Tensor]]:
    """An iteration: its experience, what was told of its updates, and how far they moved the weights."""
    table = {"optimizer": {**DESCENT, "lr": lr}, kind.section: own}
    config, spec = settings(kind, table, toy.CONFIG)
    actor, critic = toy.model_of(), None
    if spec.estimator == "gae":
        critic = Critic(toy.CONFIG.width, toy.model_of(2).eval() if spec.critic == "separate" else None)
        with torch.no_grad():
            critic.weight.normal_(generator=torch.Generator().manual_seed(5))
    prompts = toy.prompts_of(*PROMPTS)
    collector = Collector(
        actor.eval(), critic, toy.model_of(1).eval(), prompts, by_answer(judge), None, spec,
        prompts.chat.stop_ids, 7, shares,
    )  # fmt: skip
    optimizer = optimizers.build(config.optimizer, actor, seed=0)
    own_optimizer = None if critic is None else optimizers.build(config.optimizer, critic, seed=0)
    pupil = learner(
        actor, critic, optimizer if spec.trust_region else shares.optimizer(optimizer, actor),
        None if own_optimizer is None or critic is None else shares.optimizer(own_optimizer, critic),
        Text() if spec.pretraining_coefficient else None, spec, 7, collector.vocab_size, None, shares,
    )  # fmt: skip
    both = nn.ModuleDict({"actor": actor, **({} if critic is None else {"critic": critic})})
    before = weights_of(both)
    experience = collector.collect(3, 0.1)
    seen = pupil.learn(experience, 3, lr, 0.1)
    return experience, seen, {name: before[name] - value for name, value in weights_of(both).items()}


def same_experience(got: Experience, expected: Experience) -> None:
    """Bit for bit: random numbers and statistics are of all prompts."""
    assert [one.text for one in got.answers] == [one.text for one in expected.answers]
    for name in ("old_logprobs", "ref_logprobs", "advantages", "values", "returns"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None and b is None) or torch.equal(a, b), name
    for name in (
        "tokens",
        "cu_seqlens",
        "prompt_lengths",
        "response_offsets",
        "logprobs",
        "entropies",
        "stopped",
    ):
        assert np.array_equal(getattr(got.rollouts, name), getattr(expected.rollouts, name)), name
    assert got.metrics == expected.metrics and got.kl == expected.kl
    assert np.array_equal(got.scores, expected.scores) and got.constant == expected.constant


def method(name: str) -> Callable[[World], None]:
    def case(world: World) -> None:
        kind, learner, own = METHODS[name]
        # several updates: at a rate at which the second sees a policy that it can learn from
        lr = RATE if own["minibatch"] == own["episodes"] else 1.0
        experience, seen, expected = learnt(kind, learner, own, ALONE, lr)
        for zero in (0, 2):
            parallel = ParallelSpec(zero=zero)
            got = learnt(kind, learner, own, shares_of(parallel, 0), lr)
            same_experience(got[0], experience)
            close(got[2], expected)
            assert got[1].keys() == seen.keys()
            for key, value in seen.items():
                assert got[1][key] == pytest.approx(value, rel=1e-6, abs=1e-6), key

    return case


def trust_region(world: World) -> None:
    """Conjugate gradients carry rounding on: ten steps of them through differences of gradients, 1e-2 apart."""
    own = short({"critic": "separate", "trust_region": 0.01, "minibatch": 6})
    experience, seen, expected = learnt(PPOSpec, TrustRegionLearner, own, ALONE, 1.0)
    parallel = ParallelSpec()
    got = learnt(PPOSpec, TrustRegionLearner, own, shares_of(parallel, 0), 1.0)
    same_experience(got[0], experience)
    assert seen["accepted"] == got[1]["accepted"] == 1.0 and got[1]["approx_kl"] <= 0.01
    close(got[2], expected, 1e-2)
    assert got[1]["value_loss"] == pytest.approx(seen["value_loss"], rel=1e-5)


def bits_by_grain(world: World) -> None:
    """Leaves that no number of processes changes: one process's bits, under every stage."""
    kind, learner, own = METHODS["ppo"]
    own = {**own, "grain": 3, "minibatch": 6, "epochs": 2}
    lone = Shares(Member(alone(world), 0, 1), ParallelSpec(), 3)
    _, seen, expected = learnt(kind, learner, own, lone, 0.5)
    for zero in (0, 1, 2):
        parallel = ParallelSpec(zero=zero)
        got = learnt(kind, learner, own, shares_of(parallel, 3), 0.5)
        assert [name for name, value in expected.items() if not torch.equal(got[2][name], value)] == []
        assert {**got[1], "grad_norm": 0.0} == {**seen, "grad_norm": 0.0}
        assert got[1]["grad_norm"] == pytest.approx(seen["grad_norm"], rel=1e-7)


def errors_of_one_end_all(world: World) -> None:
    """A judge that fails on one process, and settings that the processes do not divide."""
    shares = shares_of(ParallelSpec(), 0)

    def work() -> int:
        if world.rank == 1:
            raise UserError("the reward is nan")
        return 1

    with pytest.raises(
        UserError, match="^the reward is nan" if world.rank == 1 else "^rank 1: the reward is nan"
    ):
        shares.of_all(work)
    with pytest.raises(UserError, match="1 prompts are not enough for 2 processes"):
        shares.prompts(1)
    with pytest.raises(UserError, match="3 leaves, which 2 processes do not divide"):
        Shares(shares.member, shares.parallel, 2).leaves(np.full(6, 4, np.int32), 100)
    config, spec = settings(PPOSpec, {"ppo": {"pretraining_coefficient": 1.0, "beta": 0.0}}, toy.CONFIG)
    with pytest.raises(
        UserError, match="pretraining_batches: got 1 an update, expected a multiple of the 2 processes"
    ):
        check(config, spec, shares, None, Text())
    for parallel, sentence in (
        ({"zero": 3}, "sampling wants them whole"),
        ({"strategy": "ddp"}, "zero alone"),
    ):
        with pytest.raises(UserError, match=sentence):
            shares_of(ParallelSpec.from_dict(parallel), 0)


def a_signal_to_one_stops_all(world: World) -> None:
    """Rank 1 is asked to end in the second iteration: both end after it, and the run goes on from their checkpoint."""
    told: list[Any] = [tempfile.mkdtemp() if world.rank == 0 else None]
    c10d.broadcast_object_list(told, 0)
    table = {"steps": 4, "run_dir": told[0], "checkpoint": {"every": 10}, "ppo": short({"beta": 0.0})}
    config, spec = settings(PPOSpec, table, toy.CONFIG)
    asked: list[int] = []

    def reward(answers: Any) -> list[float]:
        asked.append(len(answers))
        if world.rank == 1 and len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return [judge(one.task, one.text) for one in answers]

    def go() -> ppo.Result:
        return ppo.run(
            config, spec, actor=toy.model_of(), prompts=toy.prompts_of(*PROMPTS), reward=reward, quiet=True
        )

    with pytest.raises(SystemExit) as ended:
        go()
    assert ended.value.code == 128 + signal.SIGTERM
    assert checkpoint.steps(f"{told[0]}/checkpoints") == [2]
    assert go().step == 4 and asked == [6] * 4


CASES: dict[str, Callable[[World], None]] = {
    **{f"stage {name}": stage(name) for name in STAGES},
    "divided weights": divided_weights,
    **{name: method(name) for name in METHODS},
    "trust region": trust_region,
    "bits by grain": bits_by_grain,
    "errors of one end all": errors_of_one_end_all,
    "a signal to one stops all": a_signal_to_one_stops_all,
}
