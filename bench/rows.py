"""The cases that say where gptcore stands: what ``--rows`` measures, docs/results.md lists and the README picks from.

Patterns are as for ``--case``: a glob for the name, or for the name with the dtype behind it.
"""

from __future__ import annotations

README = (
    "train_step/*",
    "hf_train_step/*",
    "memory/*",
    "attention/qkv_*/forward_backward",
    "attention/B4_H12_T1024_D64_causal/*",
    "attention/*window256*/forward",
    "attention/decode_*/bfloat16",
    "layer_norm/4096x768/forward_backward",
    "rms_norm/2048x4096_residual/forward_backward",
    "gated_activation/gelu_tanh_1024x3072/forward_backward",
    "gated_activation/swiglu_2048x11008/forward_backward",
    "rotary/B2_T512_H12_D64_halves/forward_backward",
    "embedding/V50257_C768_N1024/forward_backward",
    "linear_cross_entropy/N1024_C768_V50257/forward_backward/bfloat16",
    "matmul/accumulate_K1024_M3072_N768/forward",
    "adamw/gpt2_124m/step",
    "adamw_8bit/gpt2_124m/step",
    "adafactor/gpt2_124m/step",
    "sgd/gpt2_124m_momentum/step/float32",
)

ROWS = (
    "train_step/gpt2_124m_B2_T512/step",
    "train_step/gpt2_124m_B4_T1024/step/bfloat16",
    "hf_train_step/*",
    "hf_generate/*",
    "memory/*/bfloat16",
    "neighbour/*",
    *README[3:],
    "attention/B4_H12_T1024_D64_*_causal/*",
    "attention/B1_H12_T4096_D64_causal/forward",
    "attention/*packed4*/*",
    "layer_norm/4096x768*/*",
    "layer_norm/16384x4096/*",
    "rms_norm/4096x768/*",
    "rms_norm/16384x4096/*",
    "rotary/B1_T2048_H32_D128_halves/*",
    "gated_activation/gelu_tanh_4096x3072/forward*",
    "embedding/V50257_C768_N8192/forward_backward",
    "linear_cross_entropy/N1024_C768_V50257_zloss/forward_backward/bfloat16",
    "matmul/accumulate_*",
    "adamw/1000_tensors_64x64/step/float32",
    "sgd/gpt2_124m_*/step/float32",
    "layer_norm/64x64*/*",
    "attention/B1_H1_T64_D64_causal/forward_backward",
    "dispatch/*",
)
