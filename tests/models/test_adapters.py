"""Adapters on our own models: what they compute, that they can be switched off, merged, and that they alone train."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptcore.errors import UserError
from gptcore.infer import KVCache
from gptcore.models import (
    GPT,
    AdapterSpec,
    AttentionSpec,
    GPTConfig,
    MlpSpec,
    MoESpec,
    PositionSpec,
    adapters,
)
from gptcore.optim import AdamW, decay_groups

KINDS = ("lora", "dora", "prompt", "prefix")
POSITIONS = ("learned", "rotary", "alibi", "none")


def model_of(position: str = "learned", **settings: Any) -> GPT:
    attention = settings.pop("attention", {})
    config = GPTConfig(
        num_layers=2, width=32, vocab_size=61, context_length=48, tied_head=settings.pop("tied_head", True),
        attention=AttentionSpec(num_heads=4, num_kv_heads=2, **attention), mlp=MlpSpec(activation="swiglu"),
        position=PositionSpec(kind=position), **settings,
    )  # type: ignore[arg-type]  # fmt: skip
    model = GPT(config, seed=3)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model.eval()


def moved(model: GPT, name: str = "default", size: float = 0.1) -> GPT:
    """With values of the adapter away from their start."""
    with torch.no_grad():
        for n, p in model.named_parameters():
            if f"adapters.{name}." in n:
                p += size * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


def tokens(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(1))


def close(a: torch.Tensor, b: torch.Tensor, bound: float = 2e-6) -> None:
    """Within sums of f32 in another order."""
    assert (a - b).abs().max() <= bound * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_off_is_the_model_it_was_bit_for_bit(kind: str):
    model = model_of()
    before = model(tokens())
    adapters.put_on(model, AdapterSpec(kind=kind))  # type: ignore[arg-type]
    if kind in ("lora", "dora"):
        close(model(tokens()), before)  # B = 0; DoRA divides norms that are the same
    moved(model)
    assert (model(tokens()) - before).abs().max() > 0.01
    with adapters.off(model):
        assert torch.equal(model(tokens()), before)
    assert (model(tokens()) - before).abs().max() > 0.01


def test_lora_adds_scaled_products_to_the_named_rows():
    """W + alpha / sqrt(R) B A for q and v, and nothing for k, by the merged weight."""
    model = model_of()
    adapters.put_on(model, AdapterSpec(rank=4, alpha=6.0, rslora=True, targets=("q_proj", "v_proj")))
    moved(model)
    layer = model.stack.blocks[1].attention.qkv
    before, (q, v) = layer.weight.clone(), layer.updates("default")
    adapters.merge(model)
    expected = before.clone()
    expected[:32] += 3.0 * (q.b @ q.a)
    expected[48:] += 3.0 * (v.b @ v.a)
    close(layer.weight, expected)
    assert torch.equal(layer.weight[32:48], before[32:48])


def test_dora_is_the_magnitude_times_the_direction():
    model = model_of()
    adapters.put_on(model, AdapterSpec(kind="dora", rank=4, targets=("down",)))
    moved(model)
    layer = model.stack.blocks[0].mlp.down
    (update,) = layer.updates("default")
    whole = layer.weight + update.b @ update.a
    expected = update.magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True)
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(2))
    close(layer(x), x @ expected.t() + layer.bias)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merge_gives_the_same_and_unmerge_the_old_bits(kind: str):
    model = model_of(tied_head=False)
    adapters.put_on(model, AdapterSpec(kind=kind, targets=("all", "head")))  # type: ignore[arg-type]
    moved(model)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    wanted = model(tokens())
    adapters.merge(model)
    close(model(tokens()), wanted, 1e-5)
    with pytest.raises(UserError, match="unmerge them first"), adapters.off(model):
        pass
    adapters.unmerge(model)
    assert torch.equal(model(tokens()), wanted)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_several_add_up_by_their_strengths():
    model = model_of()
    base = {name: p.clone() for name, p in model.named_parameters()}
    adapters.put_on(model, AdapterSpec(rank=2), name="a", seed=1)
    adapters.put_on(model, AdapterSpec(kind="dora", rank=3, targets=("out",)), name="b", seed=2)
    moved(moved(model, "a"), "b")
    adapters.use(model, {"a": 0.5, "b": -2.0})
    both = model(tokens())
    changes = {}
    for name, strength in (("a", 0.5), ("b", -2.0)):
        adapters.use(model, name)
        adapters.merge(model)
        changes[name] = {n: strength * (p - base[n]) for n, p in model.named_parameters() if n in base}
        adapters.unmerge(model)
    plain = model_of()
    plain.load_state_dict({n: base[n] + changes["a"][n] + changes["b"][n] for n in base})
    close(both, plain(tokens()), 1e-5)
    adapters.use(model, {})
    assert torch.equal(model(tokens()), model_of()(tokens()))


def test_absorbed_is_a_plain_model_that_trains():
    model = moved(adapters.put_on(model_of(), AdapterSpec(kind="dora")))
    wanted = model(tokens())
    adapters.absorb(model)
    assert model.state_dict().keys() == model_of().state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())
    close(model(tokens()), wanted, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_its_parameters_alone_train(kind: str):
    model = adapters.put_on(model_of(), AdapterSpec(kind=kind, rank=2, tokens=3))  # type: ignore[arg-type]
    own = adapters.state_names(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == own
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = AdamW(decay_groups(model, 0.0), lr=0.01)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(own)
    losses = []
    for _ in range(12):
        out = model(tokens(), tokens().roll(-1, 1))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(float(out.loss))
    assert losses[-1] < losses[0] - 0.05
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == own


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("position", POSITIONS)
def test_virtual_tokens_packed_cached_and_in_rows_agree(position: str, kind: str):
    model = moved(adapters.put_on(model_of(position), AdapterSpec(kind=kind, tokens=5)))  # type: ignore[arg-type]
    rows = model(tokens())
    packed = model(tokens().view(1, -1), cu_seqlens=torch.tensor([0, 12, 24], dtype=torch.int32))
    close(packed.view(rows.shape), rows)
    cache = KVCache(2, 2, 2, 8, 12)
    with torch.no_grad():
        steps = [model(part, cache=cache, all_logits=True) for part in tokens().split([5, 1, 6], dim=1)]
    close(torch.cat(steps, 1), rows)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(
    "settings", [{}, {"pattern": ("banded", "dense"), "window": 4}, {"soft_cap": 3.0}], ids=str
)
def test_a_soft_prompt_of_words_is_those_words(position: str, settings: dict[str, Any]):
    """The embeddings of five words before a text give what the text gives after the words."""
    model = model_of(position, attention=settings)
    words, text = tokens()[:1, :5], tokens()[1:]
    wanted = model(torch.cat([words, text], 1))[:, 5:]
    adapters.put_on(model, AdapterSpec(kind="prompt", tokens=5))
    with torch.no_grad():
        model.virtual_tokens.adapters["default"].weight.copy_(model.token_embedding.weight[words[0]])
    close(model(text), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["block", "selective"])
def test_recomputed_activations_give_the_same_gradients(kind: str, how: str):
    """PEFT's prefixes broke under gradient checkpointing (peft #869, #2191)."""
    model = moved(adapters.put_on(model_of("rotary"), AdapterSpec(kind=kind, tokens=3))).train()  # type: ignore[arg-type]
    gradients = []
    for setting in ("none", how):
        model.zero_grad()
        model.checkpoint_activations(setting)
        model(tokens(), tokens().roll(-1, 1)).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == adapters.state_names(model)
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_slopes_of_the_loss(kind: str):
    model = moved(adapters.put_on(model_of(), AdapterSpec(kind=kind, rank=2, tokens=3)))  # type: ignore[arg-type]
    targets = tokens().roll(-1, 1)
    model(tokens(), targets).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(5)
    along = [torch.randn(p.shape, generator=generator) for p in trained]
    if kind == "dora":  # the norm has no gradient by definition: move magnitudes alone
        along = [d if p.dim() == 1 else torch.zeros_like(d) for p, d in zip(trained, along, strict=True)]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(trained, along, strict=True))
    step, ends = 1e-3, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(trained, along, strict=True):
                p += sign * step * d
            ends.append(float(model(tokens(), targets).loss.double()))
            for p, d in zip(trained, along, strict=True):
                p -= sign * step * d
    # a loss near 4 in f32 has steps of 2.4e-7; central differences err by the cube of the step besides
    assert abs((ends[0] - ends[1]) / (2 * step) - slope) <= 2 * 2.4e-7 / step + 1e-3 * abs(slope)


def test_dropout_is_of_what_goes_into_the_update_while_training():
    model = moved(adapters.put_on(model_of(), AdapterSpec(dropout=0.5)))
    still = model(tokens())
    assert torch.equal(model(tokens()), still)
    model.train()
    torch.manual_seed(0)
    first, second = model(tokens()), model(tokens())
    assert (first - second).abs().max() > 1e-3
    with adapters.off(model):
        assert torch.equal(model(tokens()), model_of()(tokens()))


def test_bf16_and_removal():
    model = model_of().bfloat16()
    before = model(tokens())
    adapters.put_on(model, AdapterSpec(), name="a")
    adapters.put_on(model, AdapterSpec(kind="prefix", tokens=2), name="b")
    adapters.use(model, {"a": 1.0, "b": 1.0})
    assert adapters.in_use(model) == {"a": 1.0, "b": 1.0} and adapters.names(model) == ["a", "b"]
    assert model(tokens()).isfinite().all()
    adapters.remove(model, "b")
    adapters.remove(model, "a")
    assert torch.equal(model(tokens()), before) and not adapters.state_names(model)


REFUSED = [
    ({"kind": "qlora"}, "unknown adapter.kind 'qlora'"),
    ({"rank": 0}, "adapter.rank"),
    ({"dropout": 1.0}, "adapter.dropout"),
    ({"targets": ("query",)}, "did you mean|known"),
    ({"targets": ("qkv", "q")}, "q is part of qkv"),
    ({"targets": ("head",), "dropout": 0.1}, "the head is one matrix"),
    ({"targets": ()}, "at least one layer"),
]


@pytest.mark.parametrize(("settings", "sentence"), REFUSED)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        AdapterSpec(**settings)


def test_what_a_model_cannot_take_is_refused():
    model = model_of()
    with pytest.raises(UserError, match="no linear layer 'head'"):
        adapters.put_on(model, AdapterSpec(targets=("head",)))
    with pytest.raises(UserError, match="48 virtual tokens leave no place"):
        adapters.put_on(model, AdapterSpec(kind="prefix", tokens=48))
    with pytest.raises(UserError, match=r"letters, digits"):
        adapters.put_on(model, AdapterSpec(), name="a.b")
    with pytest.raises(UserError, match="go on a GPT"):
        adapters.put_on(torch.nn.Linear(2, 2), AdapterSpec())
    assert not adapters.names(model) and all(p.requires_grad for p in model.parameters())
    adapters.put_on(model, AdapterSpec(kind="prompt", tokens=4))
    with pytest.raises(UserError, match="already"):
        adapters.put_on(model, AdapterSpec())
    with pytest.raises(UserError, match="one adapter at a time, at strength 1"):
        adapters.use(model, {"default": 0.5})
    with pytest.raises(UserError, match="no part of a weight"):
        adapters.merge(model)
    with pytest.raises(ValueError, match="at most the context length 44"):
        model(tokens(1, 45))
    with pytest.raises(UserError, match="unknown adapter 'other'"):
        adapters.use(model, "other")


def test_a_model_whose_feed_forwards_are_experts_takes_attention_only():
    model = model_of(moe=MoESpec(num_experts=4, top_k=2))
    adapters.put_on(model, AdapterSpec())
    assert all(".attention." in name for name in adapters.state_names(model))
