"""Presets against the published tables."""

from __future__ import annotations

import pytest

from gptcore.errors import UserError
from gptcore.models import accounting, presets


@pytest.mark.parametrize("name", [name for name in presets.names() if presets.describe(name).published])
def test_parameter_count_as_published(name: str):
    preset = presets.describe(name)
    count = accounting.parameter_counts(preset.config).total
    assert preset.published is not None
    if isinstance(preset.published, int):  # counted in released weights: exact
        assert count == preset.published
    else:  # printed with two to four digits, and names such as 66B round a little further
        assert count == pytest.approx(preset.published, rel=0.0105)


def test_palm_counts_to_four_digits():
    for name, published in (("palm-8b", 8.63e9), ("palm-62b", 62.50e9), ("palm-540b", 540.35e9)):
        # half a unit of the last digit, and the 2.2M gains that the paper may or may not count
        assert accounting.parameter_counts(presets.get(name)).total == pytest.approx(published, abs=0.0075e9)


# Brown et al. 2020, Table D.1: total training compute in FLOPs over 300B tokens, three digits printed.
GPT3_COMPUTE = {
    "gpt3-small": 2.25e20,
    "gpt3-medium": 6.41e20,
    "gpt3-large": 1.37e21,
    "gpt3-xl": 2.38e21,
    "gpt3-2.7b": 4.77e21,
    "gpt3-6.7b": 1.20e22,
    "gpt3-13b": 2.31e22,
    "gpt3-175b": 3.14e23,
}


@pytest.mark.parametrize("name", GPT3_COMPUTE)
def test_gpt3_training_compute(name: str):
    compute = 6 * accounting.parameter_counts(presets.get(name)).total * 300e9
    assert compute == pytest.approx(GPT3_COMPUTE[name], rel=0.006)  # the table rounds N and the result


def test_flops_of_palm_540b():
    """PaLM appendix B: attention's own width is 48 heads of 256, not C."""
    config = presets.get("palm-540b")
    attention = 12 * 118 * 48 * 256 * 2048
    n = accounting.parameter_counts(config).total
    assert accounting.flops_per_token(config, 2048) == 6 * n + attention
    assert accounting.flops_per_token(config, 2048, causal_halved=True) == 6 * n + attention // 2
    encoder = config.merged({"attention": {"causal": False}})
    assert accounting.flops_per_token(encoder, 2048, causal_halved=True) == 6 * n + attention


def test_state_is_sixteen_bytes_per_parameter():
    config = presets.get("gpt2")
    for width in (2, 4):
        state = accounting.state_bytes(config, parameter_bytes=width)
        assert state.total == 16 * 124_439_808
    assert accounting.state_bytes(config, parameter_bytes=2).master == 4 * 124_439_808


def test_cache_bytes():
    # LLaMA-2-70B in bf16: 2 (k, v) * 80 * 8 * 128 * 2 bytes = 320 KiB per token
    assert accounting.kv_cache_bytes(presets.get("llama2-70b"), 1) == 320 * 1024


def test_kaplan_count_leaves_tables_out():
    counts = accounting.parameter_counts(presets.get("gpt2"))
    assert counts.without_embeddings == counts.total - 50257 * 768 - 1024 * 768


def test_names_aliases_and_the_nearest_name():
    assert presets.get("GPT2_124M") is presets.get("gpt2")
    assert presets.get("gpt3-13b-5140").width == 5120
    assert presets.get("gpt3-xl-24-heads").num_heads == 16
    with pytest.raises(UserError, match="unknown preset 'gpt2-mediun'; did you mean 'gpt2-medium'"):
        presets.get("gpt2-mediun")


def test_printed_values_are_taken_as_the_ones_that_run():
    with pytest.warns(UserWarning, match="5140 taken as 5120"):
        assert presets.get("gpt3-13b", {"width": 5140}) == presets.get("gpt3-13b")
    with pytest.warns(UserWarning, match="24 taken as 16"):
        assert presets.get("gpt3-xl", {"attention": {"num_heads": 24}}) == presets.get("gpt3-xl")
    assert presets.get("gpt3-xl", {"attention": {"num_heads": 32}}).head_dim == 64
    assert "5140" in presets.describe("gpt3-13b").note
    assert "24 heads" in presets.describe("gpt3-xl").note


def test_small_presets_are_small():
    character = accounting.parameter_counts(presets.get("shakespeare-char")).total
    assert 0.79e6 < character < 0.82e6
    assert accounting.parameter_counts(presets.get("quickstart")).total < 8e6
