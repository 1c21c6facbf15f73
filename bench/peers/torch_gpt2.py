"""GPT-2 in plain torch, with torch's fastest parts: the peer of whole training steps.

Scaled dot-product attention, fused AdamW, gradient clipping by foreach, fused projection of q, k and v,
head tied to the token embedding. Nothing of gptcore is imported here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# How a torch user trains in bf16: weights in f32 under autocast; weights and moments in bf16; or weights
# in bf16 with f32 masters beside them, which is what gptcore does.
MODES = ("f32", "autocast", "bf16", "bf16_master")


@dataclass(frozen=True)
class GPT2Config:
    """GPT-2 124M unless said otherwise. bias: biases in projections and norms."""

    vocabulary: int = 50257
    length: int = 1024
    layers: int = 12
    heads: int = 12
    width: int = 768
    bias: bool = True


class Attention(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, bias=config.bias)
        self.down = nn.Linear(4 * config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, bias=config.bias)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width, bias=config.bias)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class TorchGPT2(nn.Module):
    """Decoder with learned positions and tied head; ``forward`` returns the mean cross-entropy."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.length, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=config.bias)
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2's: normal with 0.02; the two projections into the residual stream over sqrt(2 layers)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                continue
            into_residual = name.endswith(("out.weight", "down.weight"))
            nn.init.normal_(
                parameter, std=0.02 / (math.sqrt(2 * self.config.layers) if into_residual else 1.0)
            )

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens, targets (B, T) int64 -> scalar loss in f32."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@dataclass
class Hyper:
    """AdamW's settings and the norm that gradients are clipped to."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    max_norm: float = 1.0


class TorchTrainer:
    """One participant: a model, an optimizer, and ``step``; mode is one of MODES.

    compiled: False, True, or a mode of torch.compile.
    loss(tokens, targets): the loss in evaluation, by the uncompiled model.
    """

    def __init__(
        self, config: GPT2Config, mode: str, hyper: Hyper, *, compiled: bool | str, seed: int = 0,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        if mode not in MODES:
            raise ValueError(
                f"TorchTrainer: argument 'mode': got '{mode}', expected one of {', '.join(MODES)}"
            )
        torch.manual_seed(seed)
        self.mode, self.hyper, self.device = mode, hyper, device
        self.model = TorchGPT2(config).to(device)
        if mode in ("bf16", "bf16_master"):
            self.model.bfloat16()
        self._forward: Callable[..., Tensor] = (
            torch.compile(self.model, dynamic=False, mode=compiled if isinstance(compiled, str) else None)
            if compiled
            else self.model
        )
        self.parameters = list(self.model.parameters())
        self.masters = self.parameters
        if mode == "bf16_master":
            self.masters = [nn.Parameter(p.detach().float()) for p in self.parameters]
            for master in self.masters:
                master.grad = torch.zeros_like(master)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.masters if p.dim() >= 2], "weight_decay": hyper.weight_decay},
                {"params": [p for p in self.masters if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=hyper.lr, betas=hyper.betas, fused=True,
        )  # fmt: skip

    def _precision(self) -> Any:
        if self.mode == "autocast":
            return torch.autocast(self.device, torch.bfloat16)
        return contextlib.nullcontext()

    def gradients(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Forward and backward without an update; returns the detached loss."""
        with self._precision():
            loss = self._forward(tokens, targets)
        loss.backward()
        return loss.detach()

    def step(self, tokens: Tensor, targets: Tensor, lr: float | None = None) -> Tensor:
        """One training step, as a training loop has it; returns the detached loss."""
        if lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        loss = self.gradients(tokens, targets)
        if self.mode == "bf16_master":
            torch._foreach_copy_([m.grad for m in self.masters], [p.grad for p in self.parameters])
        nn.utils.clip_grad_norm_(self.masters, self.hyper.max_norm, foreach=True)
        self.optimizer.step()
        if self.mode == "bf16_master":
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.masters)
        self.forget()
        return loss

    def forget(self) -> None:
        """Drop gradients; those of masters are kept as buffers, the next step overwrites them."""
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def loss(self, tokens: Tensor, targets: Tensor) -> float:
        with self._precision():
            return float(self.model(tokens, targets))
