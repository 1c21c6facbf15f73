"""The generation loop on toy models: equal to recomputing everything, whatever the batch; streams; stops."""

import pytest
import torch

from gptcore.errors import UserError
from gptcore.infer import KVCache, SamplingParams, generate, generate_batch
from gptcore.infer.sampling import sample

from .toy import ByteTokenizer, ScriptedModel, ToyModel

TOKENIZER = ByteTokenizer()


def recomputed(model, prompt, count, params, number=0):
    """``count`` tokens with a fresh cache for every one of them."""
    ids = list(prompt.encode())
    with torch.no_grad():
        for position in range(count):
            config = model.config
            cache = KVCache(config.num_layers, 1, config.num_kv_heads, config.head_dim, len(ids))
            row = model(torch.tensor([ids]), cache=cache)[0, :257].numpy()
            ids.append(sample(row, params, number, position))
    return ids[len(prompt.encode()) :]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_cached_decoding_equals_recomputing(temperature):
    model = ToyModel()
    options = {"temperature": temperature, "top_k": 50, "top_p": 0.9, "seed": 4}
    result = generate(model, TOKENIZER, "abc", max_new_tokens=20, ignore_end=True, **options)
    assert result.token_ids == recomputed(model, "abc", 20, SamplingParams(**options))
    assert result.finish_reason == "length" and result.slides == 0
    assert model.forwards[0] == (1, 3) and model.forwards[1:20] == [(1, 1)] * 19


def test_a_prompt_gets_the_same_tokens_alone_and_in_any_batch():
    prompts = ["abc", "a longer one", "xyz", "abc", "q"]
    options = {"max_new_tokens": 15, "temperature": 1.2, "seed": 9}
    together = generate_batch(ToyModel(), TOKENIZER, prompts, **options)
    for prompt, result in zip(prompts, together, strict=True):
        alone = generate(ToyModel(), TOKENIZER, prompt, **options)
        assert (result.prompt, result.token_ids, result.text) == (prompt, alone.token_ids, alone.text)
    other = generate_batch(ToyModel(), TOKENIZER, prompts, **{**options, "seed": 10})
    assert [r.token_ids for r in other] != [r.token_ids for r in together]


def test_samples_of_a_prompt_differ_share_one_prefill_and_do_not_depend_on_their_number():
    model = ToyModel()
    options = {"max_new_tokens": 12, "temperature": 1.5, "seed": 1}
    four = generate_batch(model, TOKENIZER, ["hello"], num_samples=4, **options)
    assert model.forwards.count((1, 5)) == 1
    assert len({tuple(r.token_ids) for r in four}) == 4
    two = generate_batch(ToyModel(), TOKENIZER, ["hello"], num_samples=2, **options)
    assert [r.token_ids for r in two] == [r.token_ids for r in four[:2]]


def test_sequences_that_finish_early_leave_the_batch():
    class Ending(ToyModel):
        """Sequences that start with 'x' end after their first token."""

        def forward(self, tokens, cache=None):
            logits = super().forward(tokens, cache)
            ends = (tokens[:, 0] == ord("x")) & (tokens.shape[1] > 1)
            logits[ends] = -50.0
            logits[ends, 256] = 50.0
            return logits

    model = Ending()
    results = generate_batch(model, TOKENIZER, ["xa", "xb", "yc", "xd"], max_new_tokens=10, temperature=1.0)
    assert [r.finish_reason for r in results] == ["end", "end", "length", "end"]
    assert [r.text for r in results if r.finish_reason == "end"] == ["", "", ""]
    assert results[0].token_ids == [256]
    assert (4, 1) not in model.forwards and (1, 1) in model.forwards
    alone = generate(Ending(), TOKENIZER, "yc", max_new_tokens=10, temperature=1.0)
    assert results[2].token_ids == alone.token_ids


def scripted(text_or_bytes, **options):
    script = text_or_bytes.encode() if isinstance(text_or_bytes, str) else text_or_bytes
    pieces = []
    options = {"max_new_tokens": 24, "temperature": 0.0, **options}
    model = ScriptedModel([*script, *[46] * 40], prompt_length=1)
    return generate(model, TOKENIZER, ">", stream=lambda piece: pieces.append(piece), **options), pieces


def test_pieces_of_a_batch_come_with_their_place():
    shown = {}
    results = generate_batch(
        ToyModel(),
        TOKENIZER,
        ["abc", "other", "xyz"],
        num_samples=2,
        max_new_tokens=9,
        stream=lambda place, piece: shown.setdefault(place, []).append(piece),
    )
    assert ["".join(shown[place]) for place in range(6)] == [result.text for result in results]
    assert [result.prompt for result in results] == ["abc", "abc", "other", "other", "xyz", "xyz"]
    assert generate_batch(ToyModel(), TOKENIZER, []) == []


def test_streaming_never_shows_half_a_character():
    text = "né 漢字 🙂 done"
    result, pieces = scripted(text, max_new_tokens=len(text.encode()))
    assert result.text == text and "".join(pieces) == text
    assert pieces == list(text)  # each character as soon as its last byte is there


def test_a_character_cut_off_by_the_length_shows_as_a_replacement():
    result, pieces = scripted("a漢", max_new_tokens=3)
    assert result.text == "a\ufffd" == "".join(pieces)


def test_stop_strings_span_tokens_and_are_neither_streamed_nor_returned():
    result, pieces = scripted("one END two", stop=["END"])
    assert (result.text, result.finish_reason) == ("one ", "stop")
    assert "".join(pieces) == "one "
    assert bytes(result.token_ids) == b"one END"
    result, _ = scripted("one EN", stop="END", max_new_tokens=6)
    assert (result.text, result.finish_reason) == ("one EN", "length")


def test_end_of_text_ends_or_not():
    script = [*b"hi", 256, *b"yo"]
    result, _ = scripted(script)
    assert (result.text, result.finish_reason, result.token_ids) == ("hi", "end", [*b"hi", 256])


def test_an_empty_prompt_starts_at_the_end_of_text_token():
    model = ToyModel()
    result = generate(model, TOKENIZER, "", max_new_tokens=3)
    assert model.forwards[0] == (1, 1) and result.prompt == ""

    class NoEnd(ByteTokenizer):
        eot = None

    with pytest.raises(UserError, match="the prompt is empty"):
        generate(model, NoEnd(), "", max_new_tokens=3)


def test_context_overflow_is_refused_with_the_numbers_or_slides():
    model = ToyModel(context_length=8)
    with pytest.raises(UserError, match=r"5 tokens and 20 more .* context is 8; .* at most 4"):
        generate(model, TOKENIZER, "hello", max_new_tokens=20)
    assert model.forwards == []
    assert len(generate(model, TOKENIZER, "hello", max_new_tokens=4, ignore_end=True).token_ids) == 4

    options = {"max_new_tokens": 20, "temperature": 0.0, "ignore_end": True, "overflow": "slide"}
    model = ToyModel(context_length=8)
    result = generate(model, TOKENIZER, "hello", **options)
    # by hand: the same greedy tokens, always from the cache's window
    ids, window = list(b"hello"), 5
    with torch.no_grad():
        for _ in range(20):
            cache = KVCache(2, 1, 2, 8, 8)
            ids.append(int(model(torch.tensor([ids[-window:]]), cache=cache)[0, :257].argmax()))
            window = window + 1 if window < 8 else 4
    assert result.token_ids == ids[5:]
    assert result.slides == 4
    long = generate(ToyModel(context_length=8), TOKENIZER, "longer than eight", **options)
    assert long.slides >= 1 and len(long.token_ids) == 20
    both = generate_batch(ToyModel(context_length=8), TOKENIZER, ["hello", "world"], **options)
    assert both[0].token_ids == result.token_ids


def test_padding_of_the_models_vocabulary_is_never_sampled():
    model = ToyModel(vocab_size=400)
    result = generate(
        model, TOKENIZER, "abc", max_new_tokens=25, temperature=100.0, top_p=1.0, ignore_end=True
    )
    assert max(result.token_ids) < 257


def test_nothing_asked_for_computes_nothing():
    model = ToyModel()
    result = generate(model, TOKENIZER, "abc", max_new_tokens=0)
    assert (result.text, result.token_ids, result.finish_reason) == ("", [], "length")
    assert model.forwards == []


def test_the_model_is_left_in_its_mode_even_after_an_error():
    model = ToyModel().train()
    model.embedding.data[5] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        generate(model, TOKENIZER, "\x05", max_new_tokens=5)
    assert model.training
    generate(model.eval(), TOKENIZER, "a", max_new_tokens=0)
    assert not model.training


def test_timing_counts_what_was_computed():
    result = generate(ToyModel(), TOKENIZER, "abcd", max_new_tokens=6, ignore_end=True)
    timing = result.timing
    assert (timing.prefill_tokens, timing.decode_tokens) == (4, 5)
    assert timing.prefill_rate > 0 and timing.decode_rate > 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"overflow": "slid"}, "did you mean 'slide'"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"stop": [""]}, "a stop string is empty"),
    ],
)
def test_bad_options_are_refused_before_anything_is_computed(options, sentence):
    model = ToyModel()
    with pytest.raises(UserError, match=sentence):
        generate_batch(model, TOKENIZER, ["abc"], **options)
    assert model.forwards == []


def test_a_tokenizer_larger_than_the_model_is_refused():
    with pytest.raises(UserError, match="vocabulary mismatch: the tokenizer has 257 tokens, the model 100"):
        generate(ToyModel(vocab_size=100), TOKENIZER, "abc")
