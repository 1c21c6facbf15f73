"""The sampler and the trainer agree on the probability of every token, after temperature and truncation."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from gptcore.align import policy
from gptcore.align.kept_logits import KeptSets, Logits, kept_logprobs
from gptcore.errors import UserError
from gptcore.infer import SamplingParams, rollout
from gptcore.models import GPT, GPTConfig

CONFIG = {
    "num_layers": 2, "width": 64, "vocab_size": 90, "context_length": 48, "init_std": 0.15,
    "attention": {"num_heads": 4},
}  # fmt: skip
FAMILIES = {
    "gpt2": {},
    "llama": {
        "attention": {"num_heads": 4, "num_kv_heads": 2}, "position": {"kind": "rotary"},
        "norm": {"kind": "rms_norm"}, "mlp": {"activation": "swiglu"}, "tied_head": False,
    },
    "capped": {"logit_soft_cap": 5.0, "logit_scale": 0.7, "tied_head": False, "head_bias": True},
}  # fmt: skip
SAMPLINGS = {
    "free": SamplingParams(1.0, 0, 1.0, 7),
    "cold": SamplingParams(0.6, 0, 1.0, 7),
    "top-k": SamplingParams(1.0, 9, 1.0, 7),
    "top-p": SamplingParams(1.0, 0, 0.8, 7),
    "all": SamplingParams(1.4, 20, 0.9, 7),
}


def model_of(family="gpt2", dtype=torch.float32, **more):
    return GPT(GPTConfig.from_dict({**CONFIG, **FAMILIES[family], **more}), seed=3, dtype=dtype)


def rollouts_of(model, params, count=40, new=20, **options):
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 90, rng.integers(1, 9)) for _ in range(count)]
    return rollout(model, prompts, max_new_tokens=new, params=params, stop_tokens=[3], **options)


class Difference(NamedTuple):
    logprobs: float
    mean: float
    entropies: float
    tokens: int


def difference(model, params, **options):
    got = rollouts_of(model, params, **options)
    own, entropies, _ = policy.evaluated(model, got, temperature=params.temperature)
    gap = np.abs(own - got.logprobs)
    return Difference(gap.max(), gap.mean(), np.abs(entropies - got.entropies).max(), len(own))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_sampler_and_trainer_agree_over_10000_tokens(sampling):
    gap = difference(model_of(), SAMPLINGS[sampling], count=560, new=40)
    assert gap.tokens >= 10_000
    assert gap.logprobs <= 1e-5 and gap.entropies <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_sampler_and_trainer_agree_in_every_family(family, sampling):
    gap = difference(model_of(family), SAMPLINGS[sampling])
    assert gap.logprobs <= 1e-5 and gap.entropies <= 1e-5


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_sampler_and_trainer_agree_in_bf16(sampling):
    # Both multiply bf16 and sum in f32: hidden states differ where a sum in another order rounds to the other side, by
    # 2^-8 of themselves. Measured over 10,000 tokens each: largest 0.028 to 0.062, mean 0.0045 to 0.0098.
    gap = difference(model_of(dtype=torch.bfloat16), SAMPLINGS[sampling], count=560, new=40)
    assert gap.tokens >= 10_000
    assert gap.logprobs <= 0.12 and gap.mean <= 0.02


def test_a_vocabulary_cut_short_is_the_trainers_too():
    model, params = model_of(), SAMPLINGS["cold"]
    got = rollouts_of(model, params, vocab_size=50)
    own = policy.evaluated(model, got, temperature=0.6, vocab_size=50).logprobs
    assert np.abs(own - got.logprobs).max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_pass_has_the_same_bits(sampling, dtype):
    """However sequences are laid end to end, with gradients or without: so KL is 0 and ratios are 1 at the start."""
    model, params = model_of(dtype=dtype), SAMPLINGS[sampling]
    got = rollouts_of(model, params, count=90)
    temperature = params.temperature
    whole = policy.evaluated(model, got, temperature=temperature).logprobs
    pieces = policy.evaluated(model, got, temperature=temperature, max_tokens=70).logprobs
    assert np.array_equal(whole, pieces)
    for rows in ([7], [3, 80, 44], list(range(89, 20, -1))):
        out = policy.scores(model, policy.packed(got.select(rows)), temperature=temperature)
        assert out.logprobs.requires_grad
        old = torch.from_numpy(whole[got.response_places_of(np.array(rows))])
        assert torch.equal(torch.exp(out.logprobs.detach() - old), torch.ones(len(old)))


def test_gradients_are_those_of_a_plain_softmax():
    model = model_of("capped")
    got = rollouts_of(model, SAMPLINGS["all"])
    for sampling in ("cold", "all"):
        params = SAMPLINGS[sampling]
        one = got if sampling == "all" else rollouts_of(model, params)
        batch = policy.packed(one)
        factors = torch.randn(len(one.logprobs), generator=torch.Generator().manual_seed(0))
        model.zero_grad()
        (policy.scores(model, batch, temperature=params.temperature).logprobs * factors).sum().backward()
        ours = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        logits = model(batch.tokens, cu_seqlens=batch.cu_seqlens)[0][batch.before] / params.temperature
        if batch.kept is not None:
            barred = torch.ones_like(logits, dtype=torch.bool)
            barred[batch.kept.rows, batch.kept.ids] = False
            logits = logits.masked_fill(barred, -torch.inf)
        chosen = batch.targets[0][batch.before][:, None]
        (logits.log_softmax(-1).gather(1, chosen)[:, 0] * factors).sum().backward()
        for name, p in model.named_parameters():
            assert (ours[name] - p.grad).abs().max() <= 1e-5 * p.grad.abs().max() + 1e-7, (sampling, name)


@pytest.mark.parametrize("vocab", [30, 4000], ids=["dense", "gathered"])
def test_kept_logprobs_in_float64(vocab):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(25, 16, generator=generator), torch.randn(vocab, 16, generator=generator)
    bias = torch.randn(vocab, generator=generator)
    counts = torch.randint(1, 9, (25,), generator=generator)
    rows = torch.repeat_interleave(torch.arange(25), counts)
    ids = torch.cat([torch.randperm(vocab, generator=generator)[:n].sort().values for n in counts.tolist()])
    sampled = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)[:-1]])
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    sets, logits = KeptSets(ids, rows, sampled), Logits(1.5, 3.0, bias)
    logprobs, entropies = kept_logprobs(x, weight, sets, logits, 0.8)
    ours = torch.autograd.grad((logprobs * torch.arange(25)).sum(), leaves)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    z = 3.0 * torch.tanh(1.5 * (doubles[0] @ doubles[1].t() + doubles[2]) / 3.0) / 0.8
    barred = torch.ones_like(z, dtype=torch.bool)
    barred[rows, ids] = False
    whole = z.masked_fill(barred, -torch.inf).log_softmax(-1)
    expected = whole[torch.arange(25), ids[sampled]]
    grads = torch.autograd.grad((expected * torch.arange(25)).sum(), doubles)
    assert (logprobs.double() - expected).abs().max() <= 1e-5
    assert (entropies.double() + (whole.exp() * whole).nan_to_num(0.0).sum(-1)).abs().max() <= 1e-5
    for one, other in zip(ours, grads, strict=True):
        assert (one.double() - other).abs().max() <= 2e-6 * other.abs().max()


def test_batches_of_tokens_cover_every_sequence_once():
    lengths = np.array([5, 9, 40, 1, 1, 3])
    got = [rows.tolist() for rows in policy.token_batches(lengths, 14)]
    assert got == [[0, 1], [2], [3, 4, 5]]


def test_temperature_zero_is_refused():
    model = model_of()
    batch = policy.packed(rollouts_of(model, SAMPLINGS["free"]))
    with pytest.raises(UserError, match="temperature is 0"):
        policy.scores(model, batch, temperature=0.0)
