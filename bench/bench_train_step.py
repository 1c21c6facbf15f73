"""A whole training step of GPT-2 124M: forward, backward, clip, AdamW."""

from __future__ import annotations

import functools
from collections.abc import Callable

from bench.case import Case, Cost, Target

LAYERS, HEADS, HEAD_SIZE, VOCABULARY = 12, 12, 64, 50257
PARAMETERS = 124_439_808
# What the peer's vocabulary is padded to in a second setting: a multiple of 128 suits oneDNN's blocks.
PADDED_VOCABULARY = 50304


def step_flops(tokens: int, length: int) -> float:
    """6 N + 12 L H D T for each token (PaLM, appendix B): N all parameters, attention not halved."""
    return tokens * (6.0 * PARAMETERS + 12.0 * LAYERS * HEADS * HEAD_SIZE * length)


def participants(target: Target, batch: int, length: int) -> dict[str, Callable[[], Callable[[], object]]]:
    """Factories by name: calling one builds the participant and returns its step on one random batch."""
    from bench.peers.torch_gpt2 import GPT2Config, Hyper, TorchTrainer
    from bench.trainer import GptcoreTrainer
    from gptcore.models import presets

    tokens = target.randint(VOCABULARY, batch, length)
    targets = target.randint(VOCABULARY, batch, length)

    def ours() -> Callable[[], object]:
        trainer = GptcoreTrainer(presets.get("gpt2"), target.torch_dtype, Hyper())
        return lambda: trainer.step(tokens, targets)

    def peer(mode: str, *, compiled: bool, vocabulary: int) -> Callable[[], Callable[[], object]]:
        def build() -> Callable[[], object]:
            config = GPT2Config(vocabulary=vocabulary)
            trainer = TorchTrainer(config, mode, Hyper(), compiled=compiled)
            return lambda: trainer.step(tokens, targets)

        return build

    factories: dict[str, Callable[[], Callable[[], object]]] = {"gptcore": ours}
    modes = ("f32",) if target.dtype == "float32" else ("autocast", "bf16", "bf16_master")
    for mode in modes:
        for compiled in (False, True):
            for vocabulary in (VOCABULARY, PADDED_VOCABULARY):
                # Padding is what the fastest users do: tried where torch is fastest.
                if vocabulary == VOCABULARY or (compiled and mode != "autocast"):
                    padded = "_padded" if vocabulary != VOCABULARY else ""
                    name = f"torch_{mode}{padded}_{'compiled' if compiled else 'eager'}"
                    factories[name] = peer(mode, compiled=compiled, vocabulary=vocabulary)
    return factories


def _case(batch: int, length: int) -> Case:
    tokens = batch * length
    return Case(
        f"train_step/gpt2_124m_B{batch}_T{length}/step",
        functools.partial(participants, batch=batch, length=length),
        lambda _element: Cost(step_flops(tokens, length)),
        repeats=5,
        heavy=True,
        quick=False,
        tokens=tokens,
    )


CASES = [_case(2, 512), _case(4, 1024)]
