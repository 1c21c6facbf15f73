"""The four ways a transformers model comes onto the kernels, each with the same questions: logits, loss, gradients,
decoding with a cache, greedy tokens."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

import gptcore
from gptcore.checkpoint.huggingface import layout
from gptcore.infer import KVCache
from tests.integrations.huggingface_models import LENGTH, PADDING, ROUTES, Run, put_on

PREFILLED = 20  # of LENGTH tokens; the rest are decoded one by one
EVERY_ROUTE = (*ROUTES, "from_hf")
BATCHES = ("whole", "left", "right", "packed")


class Batch(NamedTuple):
    """``tokens`` (B, T) and ``documents``, (row, first, end) of each text in them: what lies outside is padding."""

    tokens: Tensor
    documents: list[tuple[int, int, int]]

    @property
    def mask(self) -> Tensor:
        mask = torch.zeros_like(self.tokens)
        for row, first, end in self.documents:
            mask[row, first:end] = 1
        return mask

    @property
    def positions(self) -> Tensor:
        positions = torch.zeros_like(self.tokens)
        for row, first, end in self.documents:
            positions[row, first:end] = torch.arange(end - first)
        return positions

    @property
    def labels(self) -> Tensor:
        """The tokens, -100 for padding and for the first of a text, which nothing foretells."""
        labels = self.tokens.masked_fill(self.mask == 0, -100)
        for row, first, _ in self.documents:
            labels[row, first] = -100
        return labels

    @property
    def is_packed(self) -> bool:
        return len(self.documents) != len(self.tokens)


def batch_of(kind: str, seed: int = 2) -> Batch:
    """Two rows of LENGTH tokens: two texts, the first shorter by PADDING where there is padding; "packed" has four."""
    tokens = torch.randint(1, 61, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    documents = {
        "whole": [(0, 0, LENGTH), (1, 0, LENGTH)],
        "left": [(0, PADDING, LENGTH), (1, 0, LENGTH)],
        "right": [(0, 0, LENGTH - PADDING), (1, 0, LENGTH)],
        "packed": [(0, 0, 11), (0, 11, LENGTH), (1, 0, LENGTH - 5), (1, LENGTH - 5, LENGTH)],
    }
    return Batch(tokens, documents[kind])


def by_route(model: Any, route: str, directory: Path) -> Swapped | Converted:
    """``model`` on the kernels; through ``directory`` where the route is a checkpoint."""
    if route == "from_hf":
        model.save_pretrained(directory)
        return Converted(gptcore.from_hf(directory), model.config.model_type)
    put_on(model, route)
    return Swapped(model)


class Swapped:
    """A transformers model, on the kernels or not."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def run(self, batch: Batch) -> Run:
        """Its logits are those of the tokens that count, (N, V)."""
        out = self.model(**self._inputs(batch), labels=batch.labels)
        logits = out.logits.detach()[batch.mask.bool()]
        return Run(logits, out.loss.detach(), self._gradients(out.loss))

    def fused_run(self, batch: Batch) -> Run:
        """Through the loss that leaves the logits out, where the route has one."""
        loss = self.model(**self._inputs(batch), labels=batch.labels, skip_logits=True).loss
        return Run(None, loss.detach(), self._gradients(loss))

    def _gradients(self, loss: Tensor) -> dict[str, Tensor]:
        named = dict(self.model.named_parameters())
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return {name: g for name, g in zip(named, found, strict=True) if g is not None}

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": batch.tokens, "use_cache": False}
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            inputs["position_ids"] = batch.positions
        return inputs if batch.is_packed else {**inputs, "attention_mask": batch.mask}

    @torch.no_grad()
    def decode(self, batch: Batch) -> Tensor:
        """Logits (N, V) as in ``run``, from a cache that is filled first with many tokens and then one by one."""
        every, cache = [], None
        for first, end in spans():
            inputs = self._inputs(Batch(batch.tokens[:, first:end], []))
            inputs |= {"attention_mask": batch.mask[:, :end], "use_cache": True, "past_key_values": cache}
            if "position_ids" in inputs:
                inputs["position_ids"] = batch.positions[:, first:end]
            out = self.model(**inputs)
            every.append(out.logits)
            cache = out.past_key_values
        return torch.cat(every, dim=1)[batch.mask.bool()]

    @torch.no_grad()
    def greedy(self, batch: Batch, new: int) -> tuple[Tensor, Tensor]:
        """Tokens (B, new), and before each the gap between the two likeliest's logits."""
        self.model.generation_config.eos_token_id = None
        out = self.model.generate(
            batch.tokens, attention_mask=batch.mask, do_sample=False, max_new_tokens=new, pad_token_id=0,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        best = torch.stack([scores.topk(2).values for scores in out.scores], dim=1)
        return out.sequences[:, LENGTH:], best[..., 0] - best[..., 1]


class Converted:
    """The model as ``gptcore.models.GPT``, where texts lie end to end instead of padding."""

    def __init__(self, model: Any, family: str) -> None:
        self.model, self.family = model, family

    def run(self, batch: Batch) -> Run:
        texts = self._texts(batch)
        tokens, bounds = torch.cat(texts, dim=1), [0]
        for text in texts:
            bounds.append(bounds[-1] + text.shape[1])
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        targets = torch.cat([pad(text[:, 1:], (0, 1), value=-100) for text in texts], dim=1)
        loss = self.model(tokens, targets, cu_seqlens=cu_seqlens).loss
        logits = self.model(tokens, cu_seqlens=cu_seqlens)[0].detach()
        return Run(logits, loss.detach(), self._gradients(loss))

    def _texts(self, batch: Batch) -> list[Tensor]:
        return [batch.tokens[row : row + 1, first:end] for row, first, end in batch.documents]

    def _gradients(self, loss: Tensor) -> dict[str, Tensor]:
        named = dict(self.model.named_parameters())
        found = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        pieces = layout.pieces(self.family, self.model.config, named)
        stored = {name: p.read(i, found[p.ours]) for p in pieces for i, name in enumerate(p.theirs)}
        # transformers' modules are not called what is in the files: the head of GPT-NeoX, the experts of Mixtral,
        # which it keeps in one tensor of our layout
        for name in [name for name in found if found[name].dim() == 3]:
            kind = "gate_up_proj" if ".up." in name else "down_proj"
            stored[f"model.layers.{name.split('.')[2]}.mlp.experts.{kind}"] = found[name]
        named = {
            name: gradient for name, gradient in stored.items() if ".block_sparse_moe.experts." not in name
        }
        names = {
            name: name.replace("embed_out", "lm_head").replace("block_sparse_moe", "mlp") for name in named
        }
        return {names[name]: gradient for name, gradient in named.items()}

    @torch.no_grad()
    def decode(self, batch: Batch) -> Tensor:
        every = []
        for text in self._texts(batch):
            cache = self._cache(text.shape[1])
            for first, end in spans():
                if first < text.shape[1]:
                    every.append(self.model(text[:, first:end], cache=cache, all_logits=True)[0])
        return torch.cat(every)

    def _cache(self, capacity: int) -> KVCache:
        config, weight = self.model.config, self.model.token_embedding.weight
        return KVCache(
            config.num_layers, 1, config.num_kv_heads, config.head_dim, capacity, dtype=weight.dtype
        )

    @torch.no_grad()
    def greedy(self, batch: Batch, new: int) -> tuple[Tensor, Tensor]:
        rows, gaps = [], []
        for text in self._texts(batch):
            cache, tokens, token = self._cache(text.shape[1] + new), [], text
            for _ in range(new):
                best = self.model(token, cache=cache)[0].topk(2)
                token = best.indices[None, :1]
                tokens.append(token)
                gaps.append(best.values[0] - best.values[1])
            rows.append(torch.cat(tokens, dim=1))
        return torch.cat(rows), torch.stack(gaps).view(len(rows), new)


def spans() -> list[tuple[int, int]]:
    """First and end of every forward of ``decode``."""
    return [(0, PREFILLED), *((at, at + 1) for at in range(PREFILLED, LENGTH))]


def alone(model: Swapped, batch: Batch) -> Run:
    """Every text of ``batch`` by itself: what packing must not change."""
    runs = []
    for row, first, end in batch.documents:
        runs.append(
            (end - first - 1, model.run(Batch(batch.tokens[row : row + 1, first:end], [(0, 0, end - first)])))
        )
    total = sum(count for count, _ in runs)
    gradients = {
        name: sum((count / total * run.gradients[name] for count, run in runs), torch.zeros(()))
        for name in runs[0][1].gradients
    }
    loss = sum((count / total * run.loss for count, run in runs), torch.zeros(()))
    return Run(torch.cat([run.logits for _, run in runs]), loss, gradients)
