"""Our side of whole training steps, with the same face as the peer's trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.peers.torch_gpt2 import Hyper


class GptcoreTrainer:
    """A model of gptcore with its fused AdamW; bf16 weights have f32 masters, split between them and the optimizer."""

    def __init__(
        self, config: Any, dtype: torch.dtype, hyper: Hyper, *, seed: int = 0, device: str = "cpu"
    ) -> None:
        from gptcore.models import GPT
        from gptcore.optim import AdamW, decay_groups

        torch.manual_seed(seed)
        self.model = GPT(config).to(device, dtype)
        groups = decay_groups(self.model, hyper.weight_decay)
        self.optimizer = AdamW(
            groups,
            lr=hyper.lr,
            betas=hyper.betas,
            max_norm=hyper.max_norm,
            split_master=dtype == torch.bfloat16,
        )

    def gradients(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Forward and backward without an update; returns the detached loss."""
        loss = self.model(tokens, targets).loss
        loss.backward()
        return loss.detach()

    def step(self, tokens: Tensor, targets: Tensor, lr: float | None = None) -> Tensor:
        """One training step; returns the detached loss."""
        if lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        loss = self.gradients(tokens, targets)
        self.optimizer.step()
        self.forget()
        return loss

    def captured(self, tokens: Tensor, targets: Tensor) -> Callable[[], Tensor]:
        """The step on this batch as one CUDA graph, to be replayed; it returns the loss."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is made once: the optimizer's state, the libraries' choices
            for _ in range(3):
                self.step(tokens, targets)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self.step(tokens, targets)

        def replay() -> Tensor:
            graph.replay()
            return loss

        return replay

    def forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def loss(self, tokens: Tensor, targets: Tensor) -> float:
        return float(self.model(tokens, targets).loss)


# How the peer names what gptcore names otherwise.
_RENAMED = (
    ("token_embedding.", "tokens."),
    ("position_embedding.", "positions."),
    ("stack.final_norm.", "norm."),
    ("stack.blocks.", "blocks."),
    (".norm1.", ".attention_norm."),
    (".norm2.", ".mlp_norm."),
)


def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Give our GPT the weights of the peer's TorchGPT2 of the same shape.

    Raises ValueError when the two do not have the same parameters.
    """
    theirs = dict(source.named_parameters())
    ours = {}
    for name, parameter in target.named_parameters():
        for mine, peers in _RENAMED:
            name = name.replace(mine, peers)
        ours[name] = parameter
    if {n: p.shape for n, p in ours.items()} != {n: p.shape for n, p in theirs.items()}:
        different = sorted(set(ours) ^ set(theirs)) or "shapes"
        raise ValueError(f"the models do not have the same parameters: {different}")
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(theirs[name])
