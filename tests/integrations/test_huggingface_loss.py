"""The loss without logits under everything that trainers, users and adapters do with a model's loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gptcore
from gptcore import backend
from tests.integrations.huggingface_models import batch, gradients_of, model_of, put_on, unlabelled
from tests.integrations.huggingface_training import adapted, trained

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from gptcore.integrations import huggingface  # noqa: E402

FUSED = "fused_linear_cross_entropy"


def pair(name: str = "llama", **changes: Any) -> tuple[Any, Any]:
    """The same model twice in training, eager and ours."""
    theirs, ours = (model_of(name, **changes).train() for _ in range(2))
    put_on(ours, "apply")
    return theirs, ours


def assert_same_step(theirs: Any, ours: Any, inputs: dict[str, Any]) -> Any:
    """Loss and gradients of what is trained, to 1e-5; returns our output."""
    outputs = []
    for model in (theirs, ours):
        model.zero_grad()
        outputs.append(model(**inputs))
        outputs[-1].loss.backward()
    assert abs(outputs[1].loss - outputs[0].loss) <= 1e-5 * outputs[0].loss.abs()
    wanted, got = gradients_of(theirs), gradients_of(ours)
    assert wanted and got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (got[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max().clamp(min=1e-4), name
    return outputs[1]


def custom_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return 0.5 * torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())


def accuracy(prediction: Any) -> dict[str, float]:
    kept = prediction.label_ids[:, 1:] >= 0
    hits = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
    return {"accuracy": float(hits[kept].mean())}


class Unpadded(torch.utils.data.Dataset[dict[str, list[int]]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": [(7 * index + 3 * place) % 59 + 1 for place in range(9 + index % 5)]}


@pytest.mark.parametrize(
    ("option", "value"),
    [("label_smoothing_factor", 0.2), ("compute_loss_func", custom_loss), ("compute_metrics", accuracy),
     ("average_tokens_across_devices", False), ("gradient_checkpointing", True)],
)  # fmt: skip
def test_trainers_options(option: str, value: Any, tmp_path: Path):
    theirs, ours = pair()
    own = option.startswith("compute_")  # the Trainer's, not its arguments'
    options = {option: value} if own else {"settings": {option: value}}
    wanted, figures = trained(theirs, tmp_path, updates=4, **options)
    got, others = trained(ours, tmp_path, updates=4, **options)
    assert len(wanted) == 5 and got == pytest.approx(wanted, rel=2e-4)
    assert others.get("eval_accuracy") == figures.get("eval_accuracy")
    assert FUSED not in backend.report()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize(
    "settings", [{}, {"return_flash_attn_kwargs": True}], ids=["positions", "cu_seq_lens"]
)
def test_texts_laid_end_to_end(name: str, settings: dict[str, Any]):
    theirs, ours = pair(name)
    data = transformers.DataCollatorWithFlattening(return_tensors="pt", **settings)(
        [Unpadded()[i] for i in range(3)]
    )
    assert_same_step(theirs, ours, {**data, "use_cache": False})
    assert assert_same_step(theirs, ours, dict(data)).logits is None


def test_a_loss_function_of_the_users():
    theirs, ours = pair()
    for model in (theirs, ours):
        model.loss_function = lambda logits, labels, vocab_size, **_: logits[labels >= 0].square().mean()
    assert assert_same_step(theirs, ours, batch("left")).logits is not None
    assert backend.report()[FUSED] == {"another loss function": 1}


def test_another_index_to_ignore():
    theirs, ours = pair()
    inputs = batch("none")
    inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] < 20, 0)
    assert assert_same_step(theirs, ours, {**inputs, "ignore_index": 0}).logits is None


@pytest.mark.parametrize("kind", ["forward", "full_backward"])
def test_hooks_on_the_head_are_run(kind: str):
    theirs, ours = pair()
    for model in (theirs, ours):
        if kind == "forward":
            model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
        else:
            model.lm_head.register_full_backward_hook(lambda module, dx, dy: (2 * dx[0],))
    assert_same_step(theirs, ours, batch("right"))
    assert backend.report()[FUSED] == {"hooks on the head": 1}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "opt"])
def test_tuples_and_outputs_are_those_of_the_model(name: str):
    theirs, ours = pair(name, **({"hidden_dropout": 0.0} if name == "bloom" else {}))
    inputs = {**batch("left"), "output_hidden_states": True}
    wanted, got = theirs(**inputs), ours(**inputs)
    assert type(got) is type(wanted) and got.logits is None
    assert got.keys() == wanted.keys() - {"logits"}
    assert len(got.hidden_states) == len(wanted.hidden_states)
    as_tuple = ours(**inputs, return_dict=False)
    assert len(as_tuple) == len(theirs(**inputs, return_dict=False))
    assert torch.equal(as_tuple[0], got.loss) and as_tuple[1] is None


def test_what_routes_experts_balances_them():
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 61, "num_local_experts": 4}  # fmt: skip
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        config = transformers.MixtralConfig(**sizes)
        models.append(
            transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
        )
    huggingface.apply_gptcore_to_mixtral(model=models[1])
    plain = assert_same_step(*models, batch("left"))
    assert plain.logits is None and plain.aux_loss is None
    routed = assert_same_step(*models, {**batch("left"), "output_router_logits": True})
    assert routed.aux_loss is not None and routed.logits is None and len(routed.router_logits) == 2


@pytest.mark.parametrize("padding", ["no mask", "left"])
@pytest.mark.parametrize(
    ("kind", "settings", "fused"),
    [
        ("LoraConfig", {"r": 4, "target_modules": ["q_proj", "lm_head"]}, False),
        ("LoraConfig", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
        ("LoraConfig", {"r": 4, "target_modules": "all-linear", "use_dora": True}, True),
        ("PromptTuningConfig", {"num_virtual_tokens": 5}, True),
        ("PrefixTuningConfig", {"num_virtual_tokens": 5}, True),
        (
            "IA3Config",
            {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
            True,
        ),
    ],
    ids=["lora-head", "saved-head", "dora", "prompt", "prefix", "ia3"],
)
def test_adapters_of_peft(kind: str, settings: dict[str, Any], fused: bool, padding: str):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **settings)
    theirs, ours = (adapted(model, config).train() for model in pair())
    out = assert_same_step(theirs, ours, batch(padding))
    assert (out.logits is None) == fused and (FUSED in backend.report()) == (not fused)


def test_replacing_what_peft_wrapped_and_back():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = adapted(model_of("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    inputs = batch("left")
    wanted = model(**inputs).logits
    report = gptcore.replace(model, verbose=False)
    assert report.swapped["attention"] == ["base_model.model"] and report.left == {}
    kept = inputs["labels"] >= 0
    assert (model(**inputs).logits - wanted)[kept].abs().max() <= 1e-5 * wanted[kept].abs().max()
    tokens = unlabelled("left")
    generated = model.generate(**tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)
    gptcore.restore(model)
    assert torch.equal(model(**inputs).logits, wanted)
    assert torch.equal(model.generate(**tokens, max_new_tokens=6, do_sample=False, pad_token_id=0), generated)
