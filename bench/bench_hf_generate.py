"""``generate`` of transformers' GPT-2 124M, greedy, 32 tokens in and 64 out: with and without ``gptcore.replace``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from bench.bench_hf_train_step import gpt2
from bench.bench_train_step import SMALL, VOCABULARY
from bench.case import Case, Cost, Target

PROMPT, NEW = 32, 64


def _generation(model: Any, tokens: Any) -> Callable[[], object]:
    model.eval()
    options = {"do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW, "pad_token_id": 0}
    return lambda: model.generate(tokens, **options)


def participants(target: Target, batch: int) -> dict[str, Callable[[], Callable[[], object]]]:
    """Factories by name: calling one builds the model and returns its generation for one random prompt."""
    tokens = target.randint(VOCABULARY, batch, PROMPT)

    def ours() -> Callable[[], object]:
        import gptcore

        model = gpt2("sdpa").to(target.torch_dtype)
        gptcore.replace(model, verbose=False)
        return _generation(model, tokens)

    def peer(attention: str) -> Callable[[], Callable[[], object]]:
        return lambda: _generation(gpt2(attention).to(target.torch_dtype), tokens)

    return {
        "gptcore": ours,
        "transformers_sdpa_eager": peer("sdpa"),
        "transformers_eager_eager": peer("eager"),
    }


def _case(batch: int) -> Case:
    def cost(element: int) -> Cost:
        """Every new token reads every weight once."""
        parameters = SMALL.parameters
        return Cost(flops=2.0 * parameters * batch * (PROMPT + NEW), read=float(element * parameters * NEW))

    return Case(
        f"hf_generate/gpt2_124m_B{batch}/generate",
        functools.partial(participants, batch=batch),
        cost,
        repeats=5,
        heavy=True,
        quick=False,
        tokens=batch * NEW,
    )


CASES = [_case(1), _case(8)]
