"""A causal language model's loss in one operation with its head, so that the logits never exist in memory."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from gptcore import backend, ops
from gptcore.integrations import torch_modules
from gptcore.integrations.huggingface.modules import is_theirs
from gptcore.integrations.swap import Rule, original_forward, runs
from gptcore.integrations.torch_modules import TIED_TABLE
from gptcore.models.tied import TiedTable
from gptcore.nn.support import is_watched, served

_CALL = "fused_linear_cross_entropy"


def _causal_lm(model: Any, *arguments: Any, **keywords: Any) -> Any:
    """transformers' forward with ``labels``: the loss, and no logits while training.

    ``skip_logits``: True or False to decide by yourself. Without labels, in evaluation and with a head that is not
    a plain linear layer, it is the model's own forward.
    """
    skip = keywords.pop("skip_logits", None)
    given = _by_name(model.original, arguments, keywords)
    wanted = given.get("labels") is not None and (model.training if skip is None else skip)
    reason = _uncovered(model, given) if wanted else None
    if reason:
        backend.note_fallback(_CALL, reason)
    if not wanted or reason:
        return original_forward(model, **given)
    labels, return_dict = given.pop("labels"), given.pop("return_dict", None)
    counted, shifted = given.pop("num_items_in_batch", None), given.pop("shift_labels", None)
    ignored = given.get("ignore_index", -100)
    given.pop("logits_to_keep", None)
    head = model.get_output_embeddings()
    with _tied_table(model, head) as table:
        outputs = model.base_model(**given, return_dict=True)
    weight = table.head() if table is not None and table.has_rows else head.weight
    if shifted is None:  # a token is predicted from those before it
        shifted = nn.functional.pad(labels, (0, 1), value=ignored)[..., 1:]
    loss = _loss(model, weight, outputs.last_hidden_state, shifted, ignored, counted)
    balance = _balance_loss(model, given, outputs)
    if balance is not None:
        loss = loss + model.router_aux_loss_coef * balance
    return _as_wanted(model, outputs, loss, balance, return_dict)


def _by_name(original: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(original.forward).parameters)[1:]
    return {**dict(zip(names, arguments, strict=False)), **keywords}


def _uncovered(model: Any, given: dict[str, Any]) -> str | None:
    """Why the loss is left to the model, or None."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    head = model.get_output_embeddings()
    if getattr(type(head), "original", type(head)) is not nn.Linear:
        return f"head of type {type(head).__name__}"
    if is_watched(head):
        return "hooks on the head"
    chosen = LOSS_MAPPING.get(str(getattr(model, "loss_type", None)), ForCausalLMLoss)
    if hasattr(model, "_loss_function") or chosen is not ForCausalLMLoss:
        return "another loss function"
    if not isinstance(given.get("logits_to_keep", 0), int) or given.get("logits_to_keep"):
        return "logits_to_keep"
    if not served("linear_cross_entropy", head.weight):
        return f"{head.weight.dtype} on {head.weight.device.type}"
    return None


@contextmanager
def _tied_table(model: Any, head: nn.Linear) -> Iterator[TiedTable | None]:
    """For a pass that ends in the loss: where the head is the token embedding too, one gradient instead of two."""
    embedding = model.get_input_embeddings()
    table = None
    ours = embedding.weight is head.weight and runs(embedding, torch_modules.embedding)
    if ours and TiedTable.serves(embedding):
        table = embedding.__dict__[TIED_TABLE] = TiedTable(head.weight)
    try:
        yield table
    finally:
        embedding.__dict__.pop(TIED_TABLE, None)


def _loss(model: Any, weight: Tensor, hidden: Tensor, targets: Tensor, ignored: int, counted: Any) -> Tensor:
    bias = model.get_output_embeddings().bias
    loss: Tensor = ops.linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), bias=bias, ignore_index=ignored,
        logit_soft_cap=getattr(model.config, "final_logit_softcapping", None),
        reduction="mean" if counted is None else "sum",
    ).loss  # fmt: skip
    return loss if counted is None else loss / counted


def _balance_loss(model: Any, given: dict[str, Any], outputs: Any) -> Tensor | None:
    """The experts' load-balancing loss, by transformers' own function, where the model is asked for it."""
    asked = given.get("output_router_logits")
    if not (getattr(model.config, "output_router_logits", False) if asked is None else asked):
        return None
    modeling = sys.modules[model.original.__module__]
    balance: Tensor = modeling.load_balancing_loss_func(
        outputs.router_logits, model.num_experts, model.num_experts_per_tok, given.get("attention_mask")
    )
    return balance


def _as_wanted(
    model: Any, outputs: Any, loss: Tensor, balance: Tensor | None, return_dict: bool | None
) -> Any:
    """The output class of the model's own forward; as a tuple with None in the place of the logits."""
    from transformers import modeling_outputs as kinds

    kind: Any = kinds.CausalLMOutputWithPast
    fields: dict[str, Any] = {"loss": loss}
    if hasattr(outputs, "router_logits"):
        kind = kinds.MoeCausalLMOutputWithPast
        fields["aux_loss"] = balance
    elif hasattr(outputs, "cross_attentions"):
        kind = kinds.CausalLMOutputWithCrossAttentions
    fields |= {name: value for name, value in outputs.items() if name in kind.__dataclass_fields__}
    result = kind(**fields)
    chosen = getattr(model.config, "return_dict", True) if return_dict is None else return_dict
    return result if chosen else (loss, None, *result.to_tuple()[1:])


def _is_causal_lm(module: Any) -> bool:
    name = type(module).__name__
    known = name.endswith(("ForCausalLM", "LMHeadModel")) and hasattr(module, "get_output_embeddings")
    return known and is_theirs(module)


RULE = Rule("linear_cross_entropy", _is_causal_lm, _causal_lm, lambda module: ())
