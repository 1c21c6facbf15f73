"""PEFT's LoRA on a small LLaMA whose modules run on gptcore's kernels; nothing is downloaded."""

from __future__ import annotations

import torch

try:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
except ImportError:
    print("needs transformers and peft: pip install 'gptcore[hf]'")
    raise SystemExit from None

import gptcore

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
model = get_peft_model(
    LlamaForCausalLM(config),
    LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM"),
)
gptcore.replace(model)  # attention, norms, feed-forward; the adapters stay PEFT's
model.print_trainable_parameters()

tokens = torch.tensor(list((__doc__ * 9).encode()))[:768].view(12, 64)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
for step in range(30):
    loss = model(input_ids=tokens, labels=tokens).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 9:
        print(f"step {step + 1:2}  loss {loss.item():.3f}")

merged = model.merge_and_unload()
print("merged:", type(merged).__name__, "with", sum(p.numel() for p in merged.parameters()), "parameters")
