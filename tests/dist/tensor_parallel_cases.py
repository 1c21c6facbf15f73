"""Models cut over ranks against the same model in one process, which every rank computes for itself.

A cut sum of K terms is other partial sums, each rounded on its own way, and their sum. The two ways part by some
sqrt(K) roundings, which add up over the sums on a path like a random walk: 2 L of the forward pass, 2 L + 1 of the
backward, and the loss. ``bound`` is twice that, of the largest element of a tensor.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor

from gptcore import dist
from gptcore.dist.tensor_shard import tensor_shards
from gptcore.models import GPT, GPTConfig
from gptcore.optim import AdamW, decay_groups
from tests.dist.model_cases import raised
from tests.dist.processes import Case, World
from tests.tolerance import ROUNDOFF, error_bound, same_bits

BATCH, LENGTH, LAYERS, WIDTH, VOCABULARY = 3, 15, 2, 32, 61

GPT2: dict[str, Any] = {"attention": {"num_heads": 4}}
LLAMA: dict[str, Any] = {
    "attention": {"num_heads": 4, "num_kv_heads": 2, "qkv_bias": False, "out_bias": False},
    "norm": {"kind": "rms_norm"}, "mlp": {"activation": "swiglu", "bias": False, "hidden_size": 45},
    "position": {"kind": "rotary"}, "tied_head": False,
}  # fmt: skip

# name: options of the model, with what no other has
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "palm": {
        "attention": {"num_heads": 4, "num_kv_heads": 1, "qk_norm": "layer_norm"},
        "norm": {"parallel": "shared"}, "mlp": {"activation": "geglu"}, "position": {"kind": "rotary"},
    },
    "gpt-j": {
        "attention": {"num_heads": 4, "sinks": True}, "norm": {"parallel": "separate"}, "tied_head": False,
        "head_bias": True, "logit_scale": 0.5, "logit_soft_cap": 3.0,
    },
    "bloom": {"attention": {"num_heads": 4}, "position": {"kind": "alibi"}, "embedding_norm": True},
    "glm": {
        "attention": {"num_heads": 8, "head_dim": 4, "soft_cap": 2.0}, "norm": {"placement": "deepnorm"},
        "embedding_grad_shrink": 0.5, "embedding_scale": 2.0,
    },
    "gemma": {
        "attention": {
            "num_heads": 4, "num_kv_heads": 2, "qk_norm": "rms_norm", "pattern": ["banded", "dense"], "window": 4,
        },
        "norm": {"kind": "rms_norm", "placement": "sandwich", "zero_centred": True},
        "mlp": {"activation": "geglu_tanh"},
    },
    "experts": {
        "attention": {"num_heads": 4}, "norm": {"placement": "post"},
        "moe": {"num_experts": 4, "every": 2, "capacity_factor": 1.0, "shared_experts": 1},
    },
    "opt": {"attention": {"num_heads": 4}, "embedding_width": 24, "position": {"offset": 2}},
}  # fmt: skip


def model_of(options: dict[str, Any], dtype: torch.dtype = torch.float32, **more: Any) -> GPT:
    sizes = {"num_layers": LAYERS, "width": WIDTH, "vocab_size": VOCABULARY, "context_length": 64}
    return GPT(GPTConfig.from_dict({**sizes, **options, **more}), seed=1, dtype=dtype)


def batch(step: int, rows: int = BATCH) -> tuple[Tensor, Tensor]:
    """Tokens and targets, skewed, so that there is something to learn; some targets don't count."""
    draws = torch.rand(rows, LENGTH + 1, generator=torch.Generator().manual_seed(step))
    text = (draws.square() * VOCABULARY).long()
    targets = text[:, 1:].clone()
    targets[0, :4] = -100
    return text[:, :-1], targets


def bound(largest: float) -> float:
    terms = 4 * WIDTH
    return 2 * ((4 * LAYERS + 2) * terms) ** 0.5 * ROUNDOFF[torch.float32] * largest


def whole_gradients(model: GPT) -> dict[str, Tensor]:
    shards = tensor_shards(model)
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: shards[name].gather(g) if name in shards else g for name, g in named.items()}


def assert_gradients(got: GPT, wanted: GPT) -> None:
    gathered = whole_gradients(got)
    for name, parameter in wanted.named_parameters():
        exact = parameter.grad
        assert (exact is None) == (name not in gathered), name
        if exact is not None:
            error, most = float((gathered[name] - exact).abs().max()), bound(float(exact.abs().max()))
            assert error <= most, f"gradient of {name}: error {error:.2e}, at most {most:.2e}"


def largest_gradient(model: GPT) -> float:
    return max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)


def assert_near(got: Tensor, wanted: Tensor, what: str) -> None:
    error, most = float((got - wanted).detach().abs().max()), bound(float(wanted.detach().abs().max()))
    assert error <= most, f"{what}: error {error:.2e}, at most {most:.2e}"


def assert_same_on_all_ranks(model: GPT, world: World) -> None:
    """What all ranks have has the same bits on all."""
    for name, parameter in model.named_parameters():
        if name not in tensor_shards(model):
            parts = [torch.empty_like(parameter) for _ in range(world.ranks)]
            c10d.all_gather(parts, parameter.detach(), group=world.group)
            assert all(same_bits(part, parts[0]) for part in parts), name


def training(options: dict[str, Any], sequence_parallel: bool) -> Case:
    """Five clipped updates: losses, norms, and the weights in the end.

    An update of Adam with this epsilon moves by at most 2 lr / epsilon of what a gradient changes.
    """
    lr, eps = 3e-3, 1e-3

    def case(world: World) -> None:
        one = model_of(options)
        cut = dist.tensor_parallel(model_of(options), world.group, sequence_parallel=sequence_parallel)
        assert sum(p.numel() for p in cut.parameters()) < 0.75 * one.num_parameters()
        optimizers = [AdamW(decay_groups(model, 0.1), lr=lr, eps=eps) for model in (one, cut)]
        largest = 0.0
        for step in range(5):
            wanted, got = (model(*batch(step), z_loss=1e-3) for model in (one, cut))
            assert_near(got.total, wanted.total, f"step {step}, loss")
            wanted.total.backward()
            got.total.backward()
            largest = max(largest, largest_gradient(one))
            norm = float(torch.nn.utils.clip_grad_norm_(one.parameters(), 0.2))
            clipped = dist.clip_gradients(cut, 0.2, world.group)
            assert norm > 0.2 and abs(clipped - norm) <= bound(norm), f"{clipped}, expected {norm}"
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert_same_on_all_ranks(cut, world)
        state = dist.full_state_dict(cut)
        for name, weight in one.state_dict().items():
            error, most = float((state[name] - weight).abs().max()), 5 * lr * 2 / eps * bound(largest)
            assert error <= most, f"{name}: error {error:.2e}, at most {most:.2e}"
            assert name.endswith("bias") or not same_bits(weight, model_of(options).state_dict()[name])

    return case


def variant(name: str, sequence_parallel: bool) -> Case:
    """Losses of every kind, logits, hidden states and gradients."""

    def case(world: World) -> None:
        one = model_of(VARIANTS[name])
        cut = dist.tensor_parallel(copy.deepcopy(one), world.group, sequence_parallel=sequence_parallel)
        tokens, targets = batch(1)
        options = {"z_loss": 1e-2, "label_smoothing": 0.1}
        for reduction in ("none", "mean"):
            wanted, got = (model(tokens, targets, reduction=reduction, **options) for model in (one, cut))
            for field in ("loss", "z_loss", "logprobs"):
                assert_near(getattr(got, field), getattr(wanted, field), f"{reduction}, {field}")
        wanted.total.backward()
        got.total.backward()
        assert_gradients(cut, one)
        assert_near(cut(tokens), one(tokens), "logits")
        assert_near(cut.hidden(tokens), one.hidden(tokens), "hidden states")
        for model in (one, cut):
            model.zero_grad()
            model(tokens).logsumexp(-1).mean().backward()
        assert_gradients(cut, one)

    return case


def documents(sequence_parallel: bool) -> Case:
    """Padding, packed documents, batches of which some rank has no row, and nothing that counts."""

    def case(world: World) -> None:
        one = model_of(LLAMA)
        cut = dist.tensor_parallel(model_of(LLAMA), world.group, sequence_parallel=sequence_parallel)
        tokens, targets = batch(2)
        mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3)) < 0.6
        bounds = torch.tensor([0, 7, 20, tokens.numel()], dtype=torch.int32)
        for options in ({"mask": mask}, {"cu_seqlens": bounds}, {"cu_seqlens": bounds, "mask": mask}):
            for model in (one, cut):
                model.zero_grad()
                model(tokens, targets, **options).total.backward()
            assert_gradients(cut, one)
            assert_near(cut(tokens, **options), one(tokens, **options), f"logits with {[*options]}")
        single = tokens[:1, :1]
        assert_near(cut(single), one(single), "logits of one token")
        nothing = torch.full_like(single, -100)
        assert cut(single, nothing).loss.isnan() and one(single, nothing).loss.isnan()

    return case


def bf16(options: dict[str, Any], sequence_parallel: bool) -> Case:
    """Against the same weights in f32: at most twice as far as one process in bf16, by the rule of kernels' tests."""

    def case(world: World) -> None:
        one = model_of(options, torch.bfloat16)
        exact = copy.deepcopy(one).float()
        cut = dist.tensor_parallel(copy.deepcopy(one), world.group, sequence_parallel=sequence_parallel)
        losses = {}
        for kind, model in (("exact", exact), ("one", one), ("cut", cut)):
            out = model(*batch(1))
            out.total.backward()
            losses[kind] = out.loss.detach()
        assert abs(losses["cut"] - losses["exact"]) <= 2 * abs(losses["one"] - losses["exact"]) + 2e-3
        gathered, named = whole_gradients(cut), dict(one.named_parameters())
        for name, parameter in exact.named_parameters():
            wanted, twin, got = parameter.grad, named[name].grad, gathered[name]
            error = float((got.float() - wanted).norm())
            # sums over ranks of parts rounded to bf16: of each of the 4 L + 1 on a path one rounding more
            floor = (
                (4 * LAYERS + 1) ** 0.5 * error_bound(wanted, None, torch.bfloat16) * wanted.numel() ** 0.5
            )
            most = 2 * float((twin.float() - wanted).norm()) + floor
            assert error <= most, f"gradient of {name}: error {error:.2e}, at most {most:.2e}"
        assert_same_on_all_ranks(cut, world)

    return case


def dropout(sequence_parallel: bool) -> Case:
    """The stream drops what one process drops; generators that differ are refused."""

    def case(world: World) -> None:
        options = {**GPT2, "dropout": 0.3}
        one = model_of(options)
        cut = dist.tensor_parallel(model_of(options), world.group, sequence_parallel=sequence_parallel)
        outs = []
        for model in (one, cut):
            torch.manual_seed(7)
            outs.append(model(*batch(1)))
            outs[-1].total.backward()
        assert_near(outs[1].loss, outs[0].loss, "loss")
        assert_gradients(cut, one)
        torch.manual_seed(world.rank)
        raised("got random generator .* on rank 0 and .* on rank 1", cut, *batch(1))
        by_attention = {**GPT2, "attention": {"num_heads": 4, "dropout": 0.5}}
        cut = dist.tensor_parallel(model_of(by_attention), world.group, sequence_parallel=sequence_parallel)
        torch.manual_seed(7)
        cut(*batch(1)).total.backward()
        assert_same_on_all_ranks(cut, world)

    return case


def checkpointing(sequence_parallel: bool) -> Case:
    """Gradients are the same where backward computes blocks, with their sums over ranks, anew."""

    def case(world: World) -> None:
        for kind in ("block", "selective"):
            one = model_of(VARIANTS["palm"])
            cut = dist.tensor_parallel(copy.deepcopy(one), world.group, sequence_parallel=sequence_parallel)
            cut.checkpoint_activations(kind)
            for model in (one, cut):
                model(*batch(1)).total.backward()
            assert_gradients(cut, one)

    return case


CASES: dict[str, Case] = {
    f"{name}{'-rows' if rows else ''}": case
    for rows in (False, True)
    for name, case in {
        "training-gpt2": training(GPT2, rows),
        "training-llama": training(VARIANTS["palm"], rows),
        "bf16-gpt2": bf16(GPT2, rows),
        "bf16-llama": bf16(VARIANTS["palm"], rows),
        "dropout": dropout(rows),
        "documents": documents(rows),
        "checkpointing": checkpointing(rows),
        **{kind: variant(kind, rows) for kind in VARIANTS if not (rows and kind == "opt")},
    }.items()
}
