"""Generation with the real GPT: the cache changes nothing, neither does the batch, whatever the architecture."""

import pytest
import torch

from gptcore.infer import KVCache, generate_batch
from gptcore.infer.engine import decode_step, new_cache, prefill
from gptcore.models import GPT, GPTConfig

from .toy import ByteTokenizer

BASE = {"num_layers": 2, "width": 32, "vocab_size": 257, "context_length": 48, "init_std": 0.3}
FAMILIES = {
    "learned": {"attention": {"num_heads": 4}},
    "rotary-gqa": {
        "attention": {"num_heads": 4, "num_kv_heads": 2},
        "position": {"kind": "rotary"},
        "norm": {"kind": "rms_norm"},
        "mlp": {"activation": "swiglu"},
    },
    "alibi": {"attention": {"num_heads": 4}, "position": {"kind": "alibi"}},
    "banded": {"attention": {"num_heads": 4, "pattern": ["dense", "banded"], "window": 5}},
}
PROMPTS = ["one", "another one", "two", "a third, longer than the others"]


def model_of(family, dtype=torch.float32):
    return GPT(GPTConfig.from_dict({**BASE, **FAMILIES[family]}), seed=3, dtype=dtype).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_steps_give_the_logits_of_one_forward(family):
    model = model_of(family)
    ids = list(b"the cache must not change anything")
    with torch.inference_mode():
        whole = model(torch.tensor([ids]))[0]
        cache = new_cache(model, 1, len(ids))
        rows = [prefill(model, ids[:7], cache)[0]]
        rows += [decode_step(model, [token], cache)[0] for token in ids[7:]]
    # f32 sums of a few hundred terms in another order: some ulps of logits of size about 10
    assert torch.allclose(torch.stack(rows), whole[6:], rtol=0, atol=2e-4)
    assert cache.length == len(ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_in_pieces_after_a_truncation(family):
    model = model_of(family)
    ids = list(b"the cache must not change anything")
    with torch.inference_mode():
        cache = new_cache(model, 1, len(ids))
        prefill(model, ids[:20], cache)
        cache.truncate(12)
        in_pieces = prefill(model, ids[12:], cache)
        whole = prefill(model, ids, new_cache(model, 1, len(ids)))
    assert torch.allclose(in_pieces, whole, rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_step_have_the_same_bits_in_every_batch(family, dtype):
    model = model_of(family, dtype)
    with torch.inference_mode():
        caches = []
        for seed in range(7):
            ids = torch.randint(257, (9,), generator=torch.Generator().manual_seed(seed)).tolist()
            caches.append(new_cache(model, 1, 16))
            prefill(model, ids, caches[-1])
        together = KVCache.gather([(cache, 0) for cache in caches])
        tokens = list(range(7))
        for _ in range(3):
            batch = decode_step(model, tokens, together)
            for row, (token, cache) in enumerate(zip(tokens, caches, strict=True)):
                assert torch.equal(batch[row], decode_step(model, [token], cache)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_texts_are_the_same_alone_in_a_batch_and_among_samples(dtype):
    model, options = model_of("rotary-gqa", dtype), {"max_new_tokens": 14, "temperature": 1.0, "seed": 2}
    together = generate_batch(model, ByteTokenizer(), PROMPTS, num_samples=3, **options)
    for place, prompt in enumerate(PROMPTS):
        alone = generate_batch(model, ByteTokenizer(), [prompt], num_samples=1, **options)[0]
        assert alone.token_ids == together[3 * place].token_ids
    assert len({tuple(result.token_ids) for result in together}) == len(together)
