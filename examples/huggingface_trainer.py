"""transformers' Trainer on a small GPT-2 that runs on gptcore's kernels; nothing is downloaded."""

from __future__ import annotations

import tempfile

import torch

try:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
except ImportError:
    print("needs transformers and accelerate: pip install 'gptcore[hf]'")
    raise SystemExit from None

from gptcore.integrations import huggingface

huggingface.apply_gptcore_to_gpt2()  # the one line: every GPT-2 built from here on

text = torch.tensor(list((__doc__ * 40).encode()))
rows = [{"input_ids": row, "labels": row} for row in text[: len(text) // 64 * 64].view(-1, 64)]
model = GPT2LMHeadModel(
    GPT2Config(vocab_size=256, n_embd=128, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None)
)

with tempfile.TemporaryDirectory() as directory:
    arguments = TrainingArguments(
        directory, max_steps=40, per_device_train_batch_size=16, learning_rate=3e-3, logging_steps=10,
        use_cpu=True, bf16=True, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows).train()

model.eval()
prompt = torch.tensor([list(b"transformers' ")])
out = model.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)
print(bytes(out[0].tolist()).decode(errors="replace"))
