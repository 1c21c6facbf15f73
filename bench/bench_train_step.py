"""A whole training step of GPT-2 124M: forward, backward, clip, AdamW."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from bench.case import DTYPES, ON_GPU, Case, Cost, Target

VOCABULARY = 50257


@dataclass(frozen=True)
class Size:
    """A GPT-2 by its preset's name: layers, heads of 64, all parameters."""

    preset: str
    layers: int
    heads: int
    parameters: int

    @property
    def width(self) -> int:
        return 64 * self.heads


SMALL = Size("gpt2", 12, 12, 124_439_808)
XL = Size("gpt2-xl", 48, 25, 1_557_611_200)
# What the peer's vocabulary is padded to in a second setting: a multiple of 128 suits oneDNN's blocks.
PADDED_VOCABULARY = 50304


def step_flops(tokens: int, length: int, size: Size = SMALL) -> float:
    """6 N + 12 L H D T for each token (PaLM, appendix B): N all parameters, attention not halved."""
    return tokens * (6.0 * size.parameters + 12.0 * size.layers * size.width * length)


def participants(
    target: Target, batch: int, length: int, size: Size = SMALL
) -> dict[str, Callable[[], Callable[[], object]]]:
    """Factories by name: calling one builds the participant and returns its step on one random batch."""
    from bench.peers.torch_gpt2 import GPT2Config, Hyper, TorchTrainer
    from bench.trainer import GptcoreTrainer
    from gptcore.models import presets

    tokens = target.randint(VOCABULARY, batch, length)
    targets = target.randint(VOCABULARY, batch, length)

    def ours() -> Callable[[], object]:
        config = presets.get(size.preset)
        trainer = GptcoreTrainer(config, target.torch_dtype, Hyper(), device=target.device)
        if target.device == "cuda":
            return trainer.captured(tokens, targets)
        return lambda: trainer.step(tokens, targets)

    def peer(mode: str, *, compiled: bool | str, vocabulary: int) -> Callable[[], Callable[[], object]]:
        def build() -> Callable[[], object]:
            config = GPT2Config(vocabulary, layers=size.layers, heads=size.heads, width=size.width)
            trainer = TorchTrainer(config, mode, Hyper(), compiled=compiled, device=target.device)
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
        if target.device == "cuda":  # in a graph, as ours
            graphs = peer(mode, compiled="reduce-overhead", vocabulary=PADDED_VOCABULARY)
            factories[f"torch_{mode}_padded_graphs_compiled"] = graphs
    return factories


def _case(batch: int, length: int, size: Size = SMALL, *, gpu: bool = False) -> Case:
    tokens = batch * length
    name = "gpt2_124m" if size is SMALL else "gpt2_1.5b"
    return Case(
        f"train_step/{name}_B{batch}_T{length}/step",
        functools.partial(participants, batch=batch, length=length, size=size),
        lambda _element: Cost(step_flops(tokens, length, size)),
        dtypes=("bfloat16",) if gpu else DTYPES,
        repeats=5,
        heavy=True,
        quick=False,
        tokens=tokens,
        devices=ON_GPU if gpu else ("cpu",),
    )


CASES = [_case(2, 512), _case(4, 1024), _case(32, 1024, gpu=True), _case(8, 1024, XL, gpu=True)]
