"""Worlds small enough to enumerate: a tokenizer of letters, models of a few hundred weights, exact optima."""

import itertools
import math

import torch

from gptcore.align.answers import Prompts, by_answer
from gptcore.align.reinforcement_spec import PPOSpec, settings
from gptcore.data import tokenizer as tokenizers
from gptcore.data.chat import Chat
from gptcore.data.records import Task
from gptcore.models import GPT, GPTConfig

TOKENIZER = tokenizers.train(["abcdef"], kind="characters")  # a to f are 0 to 5, the end of text is 6
CONFIG = GPTConfig.from_dict(
    {
        "num_layers": 1, "width": 16, "vocab_size": TOKENIZER.vocab_size, "context_length": 12, "init_std": 0.2,
        "attention": {"num_heads": 2},
    }
)  # fmt: skip
QUICK = {"steps": 2, "optimizer": {"lr": 3e-3}, "checkpoint": {"every": 1}}
SMALL = {"episodes": 32, "minibatch": 16, "epochs": 2, "max_new_tokens": 5}


def model_of(seed=0, dtype=torch.float32):
    return GPT(CONFIG, seed=seed, dtype=dtype)


def settings_of(run_dir, spec=PPOSpec, table=None, **own):
    return settings(spec, {**QUICK, **(table or {}), "run_dir": str(run_dir), spec.section: own}, CONFIG)


def prompts_of(*texts, room=7):
    return Prompts([Task(text) for text in texts], Chat(TOKENIZER, None), room=room)


def count_of_a(task, text):
    return float(text.count("a"))


letters = by_answer(count_of_a)


def responses(length):
    """Every response of at most ``length`` tokens: ended by the stop token, or cut."""
    end = TOKENIZER.eot
    for n in range(1, length + 1):
        for head in itertools.product(range(end), repeat=n - 1):
            yield (*head, end)
    yield from itertools.product(range(end), repeat=length)


def probabilities(model, prompt, length):
    """Response → log-probability, by enumeration."""
    found = {}
    for response in responses(length):
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            whole = model(ids)[0].double().log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        found[response] = sum(float(whole[p, t]) for p, t in zip(places, response, strict=True))
    assert math.isclose(sum(map(math.exp, found.values())), 1.0, abs_tol=1e-5)
    return found


def optimum(ref, reward, beta):
    """Response → probability under pi_ref exp(r / beta) / Z, and beta log Z, the greatest value there is."""
    weights = {response: math.exp(logp + reward(response) / beta) for response, logp in ref.items()}
    total = sum(weights.values())
    return {response: weight / total for response, weight in weights.items()}, beta * math.log(total)


def value(policy, ref, reward, beta):
    """Expected reward less beta times the divergence from ``ref``."""
    return sum(
        math.exp(p) * (reward(response) - beta * (p - ref[response])) for response, p in policy.items()
    )


def total_variation(policy, best):
    return 0.5 * sum(abs(math.exp(p) - best[response]) for response, p in policy.items())
