"""The loop of learning from rewards: exact at the start, exact after a stop, and it reaches what can be computed."""

import contextlib
import json
import math
import os
import signal

import numpy as np
import pytest
import torch

from gptcore.align import ppo, reinforcement_parts
from gptcore.align.answers import by_answer
from gptcore.align.experience import Collector
from gptcore.align.held_out_reward import held_out_reward
from gptcore.align.policy_update import Learner, minibatches
from gptcore.align.reinforcement_spec import GRPOSpec, PPOSpec
from gptcore.errors import UserError
from gptcore.infer import SamplingParams, load, rollout
from gptcore.train import optimizers
from gptcore.train.metrics import read
from gptcore.train.step import NonFiniteError

from . import reinforcement_cases as world

METHODS = {
    "ppo": (PPOSpec, {}),
    "ppo, critic apart": (PPOSpec, {"critic": "separate", "kl_target": 0.5, "whiten_rewards": True}),
    "grpo": (GRPOSpec, {"samples": 4}),
    "dr_grpo": (GRPOSpec, {"samples": 4, "estimator": "dr_grpo", "aggregation": "dr_grpo"}),
    "dapo": (GRPOSpec, {"samples": 4, "aggregation": "dapo", "clip_high": 0.28, "beta": 0.0, "overlong_buffer": 2}),
    "gspo": (GRPOSpec, {"samples": 4, "ratio": "sequence"}),
    "rloo": (GRPOSpec, {"samples": 4, "estimator": "rloo", "kl_in": "reward", "kl_estimator": "k1"}),
    "reinforce": (GRPOSpec, {"samples": 1, "estimator": "reinforce", "aggregation": "reinforce"}),
}  # fmt: skip


def run(directory, method="ppo", table=None, **own):
    spec, options = METHODS[method]
    arguments = {
        name: own.pop(name) for name in list(own) if name in ("reward", "pretraining", "evaluate", "gold")
    }
    config, settings = world.settings_of(directory, spec, table, **{**world.SMALL, **options, **own})
    actor = world.model_of()
    result = ppo.run(
        config, settings, actor=actor, reference=world.model_of() if settings.beta else None,
        prompts=world.prompts_of("ab", "c", "def"), quiet=True, **{"reward": world.letters, **arguments},
    )  # fmt: skip
    return actor, result


def lines(directory, kind="train"):
    return [line for line in read(directory / "metrics.jsonl") if line["kind"] == kind]


@pytest.mark.parametrize("method", METHODS)
def test_before_the_first_update_nothing_has_changed(tmp_path, method):
    _, result = run(tmp_path, method, {"steps": 1}, epochs=1, minibatch=32)
    seen = result.metrics
    assert seen["ratio"] == 1.0 and seen["approx_kl"] == 0.0 and seen["clip_share"] == 0.0
    if "dapo" not in method:
        assert seen["kl"] == 0.0
    assert seen["updates"] == 1.0


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, method):
    more = {"ema_decay": 0.9, "sample_every": 1}
    whole, _ = run(tmp_path / "whole", method, {"steps": 4}, **more)
    run(tmp_path / "parts", method, {"steps": 2}, **more)
    parts, _ = run(tmp_path / "parts", method, {"steps": 4}, **more)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, parts.state_dict()[name]), name
    timeless = [
        [{k: v for k, v in line.items() if "second" not in k and k != "episodes_per_s"} for line in lines(d)]
        for d in (tmp_path / "whole", tmp_path / "parts")
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 4
    averages = [load(tmp_path / name / "average")[0].state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(weight, averages[1][name]) for name, weight in averages[0].items())
    assert not all(torch.equal(weight, averages[1][name]) for name, weight in whole.state_dict().items())


def test_a_run_is_loaded_like_any_other(tmp_path):
    actor, result = run(tmp_path)
    model, tokenizer = load(tmp_path)
    assert all(torch.equal(w, model.state_dict()[n]) for n, w in actor.state_dict().items())
    assert tokenizer.fingerprint == world.TOKENIZER.fingerprint
    assert (
        result.checkpoint.name.endswith("2")
        and json.loads((tmp_path / "config.json").read_text())["ppo"]["epochs"] == 2
    )


BANDIT = {"episodes": 256, "minibatch": 256, "max_new_tokens": 1, "beta": 0.5, "whiten_advantages": False}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ppo", {"epochs": 2, "value_coefficient": 0.5}),
        ("rloo", {"samples": 8, "aggregation": "reinforce"}),
        ("dr_grpo", {"samples": 8, "aggregation": "dr_grpo", "kl_estimator": "k2"}),
    ],
)
def test_a_bandit_reaches_its_optimum(tmp_path, method, options):
    """One token, seven arms: pi_ref exp(r / beta) / Z, within 1% total variation.

    A reward less the mean of a group of G, itself among them, is (G - 1) / G of an unbiased advantage, so Dr. GRPO's
    divergence weighs that much more than its beta says; and its gradients do not vanish at the optimum, sample by
    sample, as those with the divergence in the reward do: measured 1.6%.
    """
    beta, bound = (0.5 * 8 / 7, 0.03) if method == "dr_grpo" else (0.5, 0.01)
    gains = [0.0, 0.4, 1.0, 0.2, 0.8, -0.5, 0.6]
    reward = lambda answers: [gains[answer.response_ids[0]] for answer in answers]  # noqa: E731
    table = {
        "steps": 90,
        "optimizer": {"lr": 0.02},
        "schedule": {"name": "linear", "floor": 0.0, "warmup": 0},
    }
    actor, _ = run(tmp_path, method, table, reward=reward, **{**BANDIT, **options})
    for prompt in ([0, 1], [2], [3, 4, 5]):
        ref = world.probabilities(world.model_of(), prompt, 1)
        best, _ = world.optimum(ref, lambda response: gains[response[0]], beta)
        assert world.total_variation(ref, best) > 0.25  # there was a way to go
        assert world.total_variation(world.probabilities(actor, prompt, 1), best) <= bound


def test_a_decision_process_reaches_its_optimum(tmp_path):
    """Three tokens, each of which changes what the others are worth, and an end to choose."""

    def gain(response):
        letters = [token for token in response if token != 6]
        return 1.0 * (letters[:1] == [1]) + 1.5 * (letters[:2] == [0, 2]) + 0.5 * (response[-1] == 6)

    reward = lambda answers: [gain(answer.response_ids.tolist()) for answer in answers]  # noqa: E731
    table = {
        "steps": 120,
        "optimizer": {"lr": 0.02},
        "schedule": {"name": "linear", "floor": 0.0, "warmup": 0},
    }
    options = {**BANDIT, "max_new_tokens": 3, "lam": 1.0, "value_coefficient": 0.5, "epochs": 3, "beta": 0.3}
    actor, _ = run(tmp_path, "ppo", table, reward=reward, **options)
    for prompt in ([0, 1], [2], [3, 4, 5]):
        ref = world.probabilities(world.model_of(), prompt, 3)
        _, greatest = world.optimum(ref, gain, 0.3)
        start = world.value(ref, ref, gain, 0.3)
        reached = world.value(world.probabilities(actor, prompt, 3), ref, gain, 0.3)
        assert (reached - start) / (greatest - start) >= 0.97


def gradients(micro_tokens, order=None, **own):
    """Those of one minibatch of 32 responses, and what was seen."""
    config, spec = world.settings_of(
        "unused", **{**world.SMALL, "minibatch": 32, "micro_tokens": micro_tokens, **own}
    )
    actor = world.model_of()
    critic = reinforcement_parts.new_critic(actor, spec)
    collector = Collector(
        actor,
        critic,
        world.model_of(seed=1),
        world.prompts_of("ab", "c", "def"),
        world.letters,
        None,
        spec,
        [6],
        0,
    )
    learner = Learner(actor, critic, optimizers.build(config.optimizer, actor), None, None, spec, 0, 7)
    rows = np.arange(32) if order is None else order
    learner._gradients(collector.collect(0, 0.1), rows, 0.1, 0)
    found = {name: p.grad for module in (actor, critic) for name, p in module.named_parameters()}
    return found, dict(learner._sums)


@pytest.mark.parametrize(
    "own", [{}, {"aggregation": "grpo", "kl_in": "loss"}, {"aggregation": "dr_grpo", "top_k": 3}]
)
def test_gradients_do_not_depend_on_micro_batches_or_order(own):
    whole, seen = gradients(10_000, **own)
    for other, others in (
        gradients(40, **own),
        gradients(10_000, np.random.default_rng(0).permutation(32), **own),
    ):
        for name, gradient in whole.items():
            assert (gradient - other[name]).abs().max() <= 1e-6 * max(1.0, float(gradient.abs().max())), name
        for name in seen:
            assert others[name] == pytest.approx(seen[name], abs=1e-6), name


def test_minibatches_are_a_new_shuffle_each_epoch():
    spec = PPOSpec(**world.SMALL)
    got = [rows.tolist() for rows in minibatches(32, spec, 5, 3)]
    assert got == [rows.tolist() for rows in minibatches(32, spec, 5, 3)] and len(got) == 4
    assert sorted(got[0] + got[1]) == sorted(got[2] + got[3]) == list(range(32))
    assert got[:2] != got[2:] != [rows.tolist() for rows in minibatches(32, spec, 5, 4)][2:]


def test_old_logprobs_of_the_sampler_change_little(tmp_path):
    _, trainer = run(tmp_path / "a", table={"steps": 1})
    _, sampler = run(tmp_path / "b", table={"steps": 1}, old_logprobs="sampler")
    for name in ("reward", "policy_loss", "ratio", "value_loss"):
        assert sampler.metrics[name] == pytest.approx(trainer.metrics[name], abs=1e-4)


def test_divergence_stops_the_epochs_of_an_iteration(tmp_path):
    _, result = run(tmp_path, table={"steps": 1, "optimizer": {"lr": 0.1}}, epochs=8, target_kl=0.01)
    assert result.metrics["stopped_early"] == 1.0 and 1 <= result.metrics["updates"] < 16


def test_the_adaptive_coefficient_rises_with_divergence(tmp_path):
    run(tmp_path, table={"steps": 4, "optimizer": {"lr": 0.05}}, kl_target=0.01, kl_horizon=64.0, beta=0.05)
    betas = [line["beta"] for line in lines(tmp_path)]
    # the first iteration has divergence 0, after which it falls by a fifth of 32 / 64
    assert betas[1] == pytest.approx(0.05 * 0.9) and betas[3] == pytest.approx(betas[1] * 1.1**2)


class Text:
    """A loader of one kind of text: abcabc..."""

    def batch_at(self, step):
        from types import SimpleNamespace

        tokens = (np.arange(12)[None] + step) % 3
        return SimpleNamespace(tokens=tokens[:, :-1], targets=tokens[:, 1:])


def test_ptx_keeps_what_was_pretrained(tmp_path):
    _, plain = run(tmp_path / "plain", table={"steps": 8})
    _, mixed = run(tmp_path / "ptx", table={"steps": 8}, pretraining=Text(), pretraining_coefficient=1.0)
    losses = [line["pretraining_loss"] for line in lines(tmp_path / "ptx")]
    assert losses[0] > math.log(6) * 0.9 and losses[-1] < 0.5 * losses[0]
    assert "pretraining_loss" not in plain.metrics and mixed.metrics["updates"] == 4.0


def test_a_missing_end_is_unlearnt(tmp_path):
    table = {"steps": 25, "optimizer": {"lr": 0.01}}
    options = {"missing_end_penalty": 2.0, "beta": 0.0, "reward": lambda answers: [0.0] * len(answers)}
    run(tmp_path, "rloo", table, **{**options, "episodes": 64, "minibatch": 64})
    cut = [line["cut_share"] for line in lines(tmp_path)]
    assert np.mean(cut[:2]) > 0.3 and np.mean(cut[-2:]) < 0.1


def test_gold_and_proxy_stand_side_by_side(tmp_path):
    _, result = run(tmp_path, gold=by_answer(lambda task, text: float(text.count("b"))), evaluate=lambda m: {"x": 1.0},
                    table={"evaluation": {"every": 2}})  # fmt: skip
    assert 0.0 < result.metrics["gold_reward"] < 5.0
    assert [line["step"] for line in lines(tmp_path, "evaluation")] == [0, 2] and result.evaluation == {
        "x": 1.0
    }


@pytest.mark.parametrize("as_context", [False, True], ids=["model", "context"])
def test_evaluations_tell_gold_and_divergence_on_held_out_prompts(as_context):
    """The divergence is exactly 0 at the start, and the mean log-ratio of the answers after a change."""
    actor, other, asked = world.model_of(), world.model_of(), world.prompts_of("ab", "c", "def", "fa")
    kept = {name: p.detach().clone() for name, p in actor.named_parameters()}

    @contextlib.contextmanager
    def as_it_was():
        changed = {name: p.detach().clone() for name, p in actor.named_parameters()}
        actor.load_state_dict(kept)
        yield
        actor.load_state_dict(changed)

    params = SamplingParams(1.0, 0, 1.0, 3)
    evaluate = held_out_reward(
        asked, world.letters, max_new_tokens=5, params=params, gold=by_answer(lambda task, text: 2.0 * len(text)),
        reference=as_it_was if as_context else other,
    )  # fmt: skip
    start = evaluate(actor)
    assert start["val_kl"] == 0.0
    longest = 2.0 * start["val_length"]  # in tokens, the stop token among them
    assert longest - 2.0 <= start["val_gold_reward"] <= longest
    with torch.no_grad():
        actor.token_embedding.weight += 0.1 * torch.randn(actor.token_embedding.weight.shape)
    found = evaluate(actor)
    got = rollout(actor, asked.ids, max_new_tokens=5, params=params, stop_tokens=asked.chat.stop_ids,
                  vocab_size=world.TOKENIZER.vocab_size)  # fmt: skip

    def logprob(model, i):
        ids = torch.from_numpy(np.concatenate([got.prompt(i), got.response(i)]).astype(np.int64))
        first = len(got.prompt(i)) - 1
        with torch.no_grad():
            whole = model(ids[None])[0, first:-1].double().log_softmax(-1)
        return float(whole.gather(-1, ids[first + 1 :, None]).sum())

    expected = np.mean([logprob(actor, i) - logprob(other, i) for i in range(len(got))])
    assert found["val_kl"] == pytest.approx(expected, abs=1e-4) and abs(expected) > 1e-2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_ends_the_run_before_anything_is_learnt(tmp_path, bad):
    reward = lambda answers: [0.0] * (len(answers) - 1) + [bad]  # noqa: E731
    with pytest.raises(
        UserError, match=rf"the reward is {bad} for the answer '.*' to '.*', and not finite for 1 of 32"
    ):
        run(tmp_path, reward=reward)
    assert not list((tmp_path / "checkpoints").glob("*")) and lines(tmp_path) == []


def test_equal_rewards_are_told(tmp_path):
    run(tmp_path, "grpo", reward=lambda answers: [0.25] * len(answers))
    assert [line["text"] for line in lines(tmp_path, "warning")] == [
        "all rewards are equal: there is nothing to learn from"
    ] * 2


def test_other_bad_input_is_refused(tmp_path):
    with pytest.raises(UserError, match="gave 3 numbers for 32 answers"):
        run(tmp_path, reward=lambda answers: [0.0] * 3)
    with pytest.raises(UserError, match=r"task 1: the prompt has 8 tokens, the context leaves room for 7"):
        world.prompts_of("a", "abcdefab")
    with pytest.raises(UserError, match="the prompt is empty"):
        world.prompts_of("")
    with pytest.raises(UserError, match="no tasks"):
        world.prompts_of()
    with pytest.raises(UserError, match="samples: 5 does not divide ppo.episodes 32"):
        world.settings_of(tmp_path, **world.SMALL, samples=5)
    with pytest.raises(UserError, match="samples: grpo compares at least 2"):
        world.settings_of(tmp_path, GRPOSpec, **world.SMALL, samples=1)
    with pytest.raises(UserError, match=r"ppo.epoch.*ppo.epochs"):
        world.settings_of(tmp_path, epoch=1)
    with pytest.raises(UserError, match="pretraining_coefficient is set"):
        run(tmp_path, pretraining_coefficient=1.0)
    with pytest.raises(UserError, match=r"ppo.beta is 0.02, but there is no reference"):
        config, spec = world.settings_of(tmp_path)
        ppo.run(config, spec, actor=world.model_of(), prompts=world.prompts_of("a"), reward=world.letters)


def test_a_run_directory_of_another_kind_is_left_alone(tmp_path):
    run(tmp_path, "ppo")
    with pytest.raises(UserError, match="a run of another kind"):
        run(tmp_path, "grpo")
    with pytest.raises(UserError, match="holds a run; resume it"):
        config, spec = world.settings_of(tmp_path, **world.SMALL)
        ppo.run(
            config, spec, actor=world.model_of(), reference=world.model_of(), prompts=world.prompts_of("a"),
            reward=world.letters, resume=False,
        )  # fmt: skip


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path):
    seen = []

    def reward(answers):
        seen.append(1)
        return [1e25 * (len(seen) == 2) * len(answer.response_ids) for answer in answers]

    with pytest.raises(NonFiniteError, match="in iteration 2; lower optimizer.lr"):
        run(tmp_path, "ppo", reward=reward, whiten_advantages=False, clip=0.2)
    assert [path.name[-1] for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bf16_weights_learn_too(tmp_path, dtype):
    config, spec = world.settings_of(
        tmp_path,
        table={"steps": 12, "optimizer": {"lr": 0.02}, "dtype": dtype},
        **world.SMALL,
        micro_tokens=64,
    )
    kind = getattr(torch, dtype)
    ppo.run(
        config, spec, actor=world.model_of(dtype=kind), reference=world.model_of(dtype=kind),
        prompts=world.prompts_of("ab", "c", "def"), reward=world.letters, quiet=True,
    )  # fmt: skip
    rewards = [line["reward"] for line in lines(tmp_path)]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.5


def test_the_actor_itself_may_be_the_reference(tmp_path):
    """As with adapters switched off: a context in which the actor has the weights it began with."""
    config, spec = world.settings_of(tmp_path / "a", **world.SMALL)
    actor, start = world.model_of(), world.model_of().state_dict()

    @contextlib.contextmanager
    def as_it_was():
        now = {name: weight.clone() for name, weight in actor.state_dict().items()}
        actor.load_state_dict(start)
        yield
        actor.load_state_dict(now)

    result = ppo.run(
        config, spec, actor=actor, reference=as_it_was, prompts=world.prompts_of("ab", "c", "def"),
        reward=world.letters, quiet=True,
    )  # fmt: skip
    other, apart = run(tmp_path / "b")
    assert result.metrics == apart.metrics and result.metrics["kl"] > 0.0
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in actor.state_dict().items())


def test_a_signal_ends_the_run_after_its_checkpoint(tmp_path):
    def reward(answers):
        os.kill(os.getpid(), signal.SIGTERM)
        return world.letters(answers)

    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, table={"steps": 4, "checkpoint": {"every": 100}}, reward=reward)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert [path.name[-1] for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    actor, _ = run(tmp_path, table={"steps": 2, "checkpoint": {"every": 100}})
    whole, _ = run(tmp_path / "whole", table={"steps": 2})
    assert all(torch.equal(weight, whole.state_dict()[name]) for name, weight in actor.state_dict().items())
