"""The GPT against an independent float64 implementation, and the identities it has to keep."""

from __future__ import annotations

import itertools

import pytest
import torch

from gptcore import backend
from gptcore.errors import UserError
from gptcore.models import GPT, GPTConfig, accounting, presets
from tests.models import oracle
from tests.models.cases import CASES, model_of, tokens_of

SMOOTHING, Z = 0.1, 1e-3


def _oracle_gradients(config, weights, dtype, tokens, targets, lengths=None):
    """loss, z-loss and gradients by name, of the oracle in ``dtype``."""
    leaves = {name: w.detach().to(dtype).requires_grad_() for name, w in weights.items()}
    y = oracle.logits(config, leaves, tokens, lengths)
    loss, z = oracle.losses(y, targets, SMOOTHING, Z)
    (loss + z).backward()
    return loss.detach(), z.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def _error(got: torch.Tensor, exact: torch.Tensor, scale: float = 1e-12) -> float:
    """Error relative to the norm of ``exact``, or to ``scale`` where that is larger."""
    return float((got.detach().double() - exact).norm() / exact.norm().clamp(min=scale))


def _shrink(config: GPTConfig, gradients):
    """The oracle has no gradient shrink; with an own head it is one factor on one gradient."""
    gradients["token_embedding.weight"] *= config.embedding_grad_shrink
    return gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_against_the_oracle(name: str, packed: bool, dtype: torch.dtype):
    config = CASES[name].merged({"tied_head": False}) if name == "glm" else CASES[name]
    model = model_of(config, dtype)
    tokens, targets = tokens_of(config)
    lengths = [5, 9, 3, 17] if packed else None
    cu_seqlens = torch.tensor([0, 5, 14, 17, 34], dtype=torch.int32) if packed else None
    out = model(tokens, targets, cu_seqlens=cu_seqlens, z_loss=Z, label_smoothing=SMOOTHING, reduction="mean")
    (out.loss + out.z_loss).backward()

    weights = dict(model.named_parameters())
    loss, z, exact = _oracle_gradients(config, weights, torch.float64, tokens, targets, lengths)
    _, _, same = _oracle_gradients(config, weights, dtype, tokens, targets, lengths)
    exact, same = _shrink(config, exact), _shrink(config, same)

    # Twice what torch makes of the same formulas in the same dtype, plus a floor: 16 roundings' worth, for
    # gradients in which torch happens to be lucky (bf16 rounds each intermediate to 2**-9).
    eps = torch.finfo(dtype).eps
    assert abs(float(out.loss.detach() - loss)) <= 4 * eps * float(loss)
    assert abs(float(out.z_loss.detach() - z)) <= 8 * eps * float(z)
    assert set(exact) == set(weights)
    # A shift of all keys changes nothing: its gradient is 0, and its error is held against all gradients together.
    scale = 1e-3 * float(torch.stack([g.norm() for g in exact.values()]).norm())
    for key, parameter in weights.items():
        limit = 2 * _error(same[key], exact[key], scale) + 16 * eps
        assert _error(parameter.grad, exact[key], scale) <= limit, key
        assert parameter.grad.dtype == dtype


@pytest.mark.parametrize("name", CASES)
def test_logits_against_the_oracle(name: str):
    config = CASES[name]
    model = model_of(config)
    tokens, _ = tokens_of(config)
    with torch.no_grad():
        got = model(tokens)
    weights = {key: w.detach().double() for key, w in model.named_parameters()}
    exact = oracle.logits(config, weights, tokens)
    assert got.dtype == torch.float32
    assert got.shape == (2, 17, config.vocab_size)
    # f32 sums over at most a few hundred terms in three layers: some tens of roundings of 6e-8
    assert _error(got, exact) < 3e-6


def test_logits_of_bf16_are_f32_with_and_without_gradients():
    config = CASES["llama3"]
    model = model_of(config, torch.bfloat16)
    tokens, _ = tokens_of(config)
    with_gradients = model(tokens)
    with torch.no_grad():
        without = model(tokens)
    assert with_gradients.dtype == without.dtype == torch.float32
    assert with_gradients.requires_grad
    # without gradients no logit was rounded to bf16, so some differ from their bf16 rounding
    assert (without != without.bfloat16().float()).any()
    assert _error(with_gradients.detach(), without.double()) < 2 * torch.finfo(torch.bfloat16).eps


class ListCache:
    """The simplest cache: lists of what came."""

    def __init__(self, layers: int) -> None:
        self.keys: list[list[torch.Tensor]] = [[] for _ in range(layers)]
        self.values: list[list[torch.Tensor]] = [[] for _ in range(layers)]
        self.length = 0

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys[layer].append(k.clone())
        self.values[layer].append(v.clone())
        return torch.cat(self.keys[layer], 1), torch.cat(self.values[layer], 1)

    def advance(self, tokens: int) -> None:
        self.length += tokens


@pytest.mark.parametrize("name", [name for name, config in CASES.items() if config.attention.causal])
def test_decoding_with_a_cache_equals_the_full_forward(name: str):
    config = CASES[name]
    model = model_of(config)
    tokens, _ = tokens_of(config, length=13)
    cache = ListCache(config.num_layers)
    with torch.no_grad():
        full = model(tokens)
        prompt = model(tokens[:, :6], cache=cache, all_logits=True)
        assert cache.length == 6
        pieces = [prompt]
        for t in range(6, 13):
            last = model(tokens[:, t : t + 1], cache=cache)
            assert last.shape == (2, config.vocab_size)
            pieces.append(last[:, None])
    assert cache.length == 13
    # the same f32 sums in another order
    assert _error(torch.cat(pieces, 1), full.double()) < 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_decoding_gives_a_row_the_same_bits_in_every_batch(dtype: torch.dtype):
    config = CASES["llama3"]
    model = model_of(config, dtype)
    tokens, _ = tokens_of(config, batch=5, length=9)

    def decode(rows: torch.Tensor) -> torch.Tensor:
        cache = ListCache(config.num_layers)
        with torch.no_grad():
            return torch.stack([model(rows[:, t : t + 1], cache=cache) for t in range(rows.shape[1])], 1)

    together = decode(tokens)
    for row in range(5):
        assert torch.equal(decode(tokens[row : row + 1])[0], together[row])


@pytest.mark.parametrize("name", ["gpt2", "gpt3", "llama3", "palm", "bloom"])
def test_packed_documents_equal_separate_ones(name: str):
    config = CASES[name]
    model = model_of(config)
    tokens, _ = tokens_of(config, batch=1, length=20)
    bounds = [0, 1, 8, 20]
    with torch.no_grad():
        packed = model(tokens, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
        for a, b in itertools.pairwise(bounds):
            alone = model(tokens[:, a:b])
            assert _error(packed[:, a:b], alone.double()) < 3e-6


def test_tied_head_shares_the_table_and_sums_both_gradients():
    tied = GPT(CASES["gpt2"], seed=4)
    assert tied.head_weight is tied.token_embedding.weight
    assert "head.weight" not in tied.state_dict()
    free = GPT(CASES["gpt2"].merged({"tied_head": False}), seed=4)
    free.load_state_dict({**tied.state_dict(), "head.weight": tied.token_embedding.weight.detach()})
    tokens, targets = tokens_of(tied.config)
    tied(tokens, targets).loss.backward()
    free(tokens, targets).loss.backward()
    both = free.token_embedding.weight.grad.double() + free.head.weight.grad
    assert _error(tied.token_embedding.weight.grad, both) < 1e-6


def test_embedding_gradient_shrink():
    """The forward is untouched; the table's gradient is alpha times as large, the head's is not."""
    config = CASES["gpt2"].merged({"tied_head": False})
    tokens, targets = tokens_of(config)
    plain, shrunk = GPT(config, seed=5), GPT(config.merged({"embedding_grad_shrink": 0.1}), seed=5)
    results = [model(tokens, targets) for model in (plain, shrunk)]
    for result in results:
        result.loss.backward()
    assert torch.equal(results[0].loss, results[1].loss)
    assert torch.equal(plain.head.weight.grad, shrunk.head.weight.grad)
    assert torch.equal(plain.position_embedding.weight.grad, shrunk.position_embedding.weight.grad)
    assert _error(shrunk.token_embedding.weight.grad, 0.1 * plain.token_embedding.weight.grad.double()) < 1e-6


def test_per_token_losses():
    config = CASES["gpt2"]
    model = model_of(config)
    tokens, targets = tokens_of(config)
    each = model(tokens, targets, reduction="none")
    assert each.loss.shape == each.z_loss.shape == each.logprobs.shape == tokens.shape
    assert torch.equal(each.loss[0, 3:6], torch.zeros(3))
    assert not each.logprobs.requires_grad
    counted = targets != -100
    torch.testing.assert_close(each.loss[counted].detach(), -each.logprobs[counted])
    mean = model(tokens, targets).loss
    torch.testing.assert_close(each.loss[counted].mean(), mean, rtol=1e-6, atol=0)
    # the gradient of one token's loss alone, as preference losses want it
    each.loss[1, 2].backward()
    assert model.token_embedding.weight.grad.norm() > 0


def test_state_dict_round_trip():
    config = CASES["gemma"]
    model, other = model_of(config), GPT(config, seed=9)
    tokens, _ = tokens_of(config)
    with torch.no_grad():
        assert not torch.equal(model(tokens), other(tokens))
        other.load_state_dict(model.state_dict())
        assert torch.equal(model(tokens), other(tokens))
    assert not any("cos" in key or "sin" in key for key in model.state_dict())


def test_rotary_tables_stay_f32():
    model = GPT(CASES["llama"]).to(torch.bfloat16)
    cos, _ = model.rotary(0)
    assert cos.dtype == torch.float32
    assert model.token_embedding.weight.dtype == torch.bfloat16
    assert torch.equal(cos, GPT(CASES["llama"]).rotary(0)[0])


@pytest.mark.parametrize("name", CASES)
def test_formula_counts_what_is_built(name: str):
    config = CASES[name]
    model = GPT(config)
    assert model.num_parameters() == accounting.parameter_counts(config).total
    assert model.flops_per_token(24) == accounting.flops_per_token(config, 24)
    assert model.state_bytes().total == 16 * model.num_parameters()


@pytest.mark.parametrize(
    "name", ["gpt1", "gpt2-xl", "gpt3-175b", "opt-350m", "bloom-176b", "palm-540b", "glm-130b", "llama2-70b"]
)
def test_formula_counts_what_is_built_at_full_size(name: str):
    model = GPT(presets.get(name), device="meta", dtype=torch.bfloat16)
    assert model.num_parameters() == accounting.parameter_counts(model.config).total
    assert model.state_bytes().parameters == 2 * model.num_parameters()


@pytest.mark.parametrize("changes", [{"dropout": 0.5}, {"attention": {"dropout": 0.5}}])
def test_dropout_acts_in_training_only_and_draws_from_the_generator(changes: dict):
    config = CASES["gpt2"].merged(changes)
    model, plain = GPT(config, seed=1), GPT(CASES["gpt2"], seed=1)
    tokens, targets = tokens_of(config)
    torch.manual_seed(0)
    first = model(tokens, targets).loss
    assert not torch.equal(first, model(tokens, targets).loss)
    torch.manual_seed(0)
    assert torch.equal(first, model(tokens, targets).loss)
    with torch.no_grad():
        got, expected = model.eval()(tokens), plain.eval()(tokens)
    assert _error(got, expected.double()) < 1e-6
    assert "attention" not in changes or torch.equal(got, expected)


def test_attention_dropout_differs_by_layer():
    config = CASES["gpt2"].merged({"attention": {"dropout": 0.5}})
    model, (tokens, _) = GPT(config, seed=1), tokens_of(config)
    dropped = []
    for block in model.stack.blocks:
        block.attention.register_forward_pre_hook(
            lambda module, args: dropped.append((module._options(args[0], args[1])["offset"], args[1].seed))
        )
    model(tokens)
    assert [offset for offset, _ in dropped] == [0, 1, 2] and len({int(seed) for _, seed in dropped}) == 1


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"relative_bias": True}, "relative_bias"),
        ({"cross_attention": True}, "cross_attention"),
    ],
)
def test_what_is_only_foreseen_is_refused(changes: dict, key: str):
    config = CASES["gpt2"].merged({"attention": changes})
    with pytest.raises(
        UserError, match=rf"model\.attention\.{key} is part of the format, but no model computes"
    ):
        GPT(config)


def test_bad_input_gets_one_sentence():
    model = GPT(CASES["gpt2"])
    tokens, targets = tokens_of(model.config)
    with pytest.raises(ValueError, match=r"'tokens': got shape \(2, 0\), expected \(B, T\)"):
        model(tokens[:, :0])
    with pytest.raises(ValueError, match=r"'tokens': got shape \(0, 17\)"):
        model(tokens[:0])
    with pytest.raises(ValueError, match=r"'tokens': got shape \(34,\)"):
        model(tokens.reshape(-1))
    with pytest.raises(TypeError, match=r"'tokens': got torch.float32, expected torch.int64"):
        model(tokens.float())
    with pytest.raises(ValueError, match=r"'targets': got shape \(2, 16\), expected \(2, 17\)"):
        model(tokens, targets[:, 1:])
    with pytest.raises(ValueError, match="got 25 positions, expected at most the context length 24"):
        model(tokens[:1, :1].expand(1, 25))
    with pytest.raises(
        ValueError, match=r"'cu_seqlens': got \[0, 9\], expected rising from 0 to the 34 tokens"
    ):
        model(tokens, cu_seqlens=torch.tensor([0, 9], dtype=torch.int32))
    with pytest.raises(TypeError, match=r"'cu_seqlens': got torch.int64 of shape \(2,\)"):
        model(tokens, cu_seqlens=torch.tensor([0, 34]))
    with pytest.raises(ValueError, match="a document of 34 tokens, expected at most the context length 24"):
        model(tokens, cu_seqlens=torch.tensor([0, 34], dtype=torch.int32))
    with pytest.raises(ValueError, match="cache goes with neither targets nor cu_seqlens"):
        model(tokens, targets, cache=ListCache(3))
    with pytest.raises((ValueError, IndexError)):
        model(tokens + 61)


def test_nothing_falls_back_to_torch():
    for name in ("gpt2", "llama3", "bloom", "soft-cap", "gemma"):
        model = model_of(CASES[name])
        tokens, targets = tokens_of(model.config)
        backend.reset_report()
        model(tokens, targets).loss.backward()
        assert list(backend.report()) == []
