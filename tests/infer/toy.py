"""A tokenizer of bytes and a model small enough to check by hand, with the faces the engine needs."""

import codecs
from types import SimpleNamespace

import torch
from torch import nn


class ByteTokenizer:
    """Ids 0 to 255 are bytes, 256 is the end of text."""

    vocab_size, eot = 257, 256

    def encode(self, text):
        return list(text.encode())

    def stream(self):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return SimpleNamespace(
            push=lambda token: decoder.decode(bytes([token])), finish=lambda: decoder.decode(b"", final=True)
        )


class ToyModel(nn.Module):
    """One causal attention layer over learned positions: its logits depend on every token and its place."""

    def __init__(self, vocab_size=260, context_length=32, width=16, num_layers=2, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.num_kv_heads, self.context_length = 2, context_length
        self.config = SimpleNamespace(
            vocab_size=vocab_size, context_length=context_length, num_layers=num_layers, num_kv_heads=2,
            head_dim=width // 2,
        )  # fmt: skip
        self.embedding = nn.Parameter(torch.randn(vocab_size, width, generator=generator))
        self.position = nn.Parameter(torch.randn(context_length, width, generator=generator))
        self.mix = nn.Parameter(torch.randn(num_layers, width, width, generator=generator) / width**0.5)
        self.forwards = []  # (B, T) of each call

    def forward(self, tokens, cache=None):
        batch, length = tokens.shape
        self.forwards.append((batch, length))
        start = cache.length
        x = self.embedding[tokens] + self.position[start : start + length]
        for layer in range(self.config.num_layers):
            heads = x.view(batch, length, 2, -1)
            k, v = cache.update(layer, heads, heads.flip(-1))
            # one query at a time in plain sums, so that the batch does not change a row's bits
            rows = []
            for t in range(length):
                seen = slice(0, start + t + 1)
                scores = (k[:, seen] * heads[:, t, None]).sum(-1).softmax(1)
                rows.append((scores[..., None] * v[:, seen]).sum(1).flatten(1))
            attended = torch.stack(rows, 1)
            x = x + torch.tanh((attended[..., None] * self.mix[layer]).sum(-2))
        cache.advance(length)
        return (x[:, -1, None] * self.embedding).sum(-1)


class ScriptedModel(nn.Module):
    """Says fixed bytes, one after another, whatever it is given: the k-th token it makes is script[k]."""

    def __init__(self, script, prompt_length, context_length=64):
        super().__init__()
        self.num_kv_heads, self.context_length = 1, context_length
        self.config = SimpleNamespace(
            vocab_size=257, context_length=context_length, num_layers=1, num_kv_heads=1, head_dim=1
        )
        self.weight = nn.Parameter(torch.zeros(1))
        self.script, self.prompt_length = list(script), prompt_length

    def forward(self, tokens, cache=None):
        batch, length = tokens.shape
        kv = torch.zeros(batch, length, 1, 1)
        cache.update(0, kv, kv)
        cache.advance(length)
        logits = torch.full((batch, 257), -10.0)
        logits[:, self.script[cache.length - self.prompt_length]] = 10.0
        return logits
