"""What a checkpoint of a run holds: collected from live objects, and put back into them bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gptcore.checkpoint import CheckpointError
from gptcore.checkpoint.loading import MODEL_PREFIX
from gptcore.checkpoint.safetensors_file import bytes_of
from gptcore.errors import UserError
from gptcore.models import adapters
from gptcore.models.config import GPTConfig
from gptcore.train.config import TrainConfig
from gptcore.train.optimizers import OptimizerSpec

OPTIMIZER_PREFIX = "optimizer/"
ADAPTER_PREFIX = "adapter/"
RNG_PREFIX = "rng/"


def stored(model: torch.nn.Module) -> dict[str, str]:
    """What a checkpoint calls each entry of ``model.state_dict()`` that it holds.

    All of them, but beside adapters no parameter that does not train: those come from where the run started.
    """
    own = adapters.state_names(model)
    frozen = {
        name for name, p in model.named_parameters(remove_duplicate=False) if own and not p.requires_grad
    }
    names = {
        name: ADAPTER_PREFIX if name in own else MODEL_PREFIX for name in model.state_dict(keep_vars=True)
    }
    return {name: prefix + name for name, prefix in names.items() if name in own or name not in frozen}


def base_fingerprint(model: torch.nn.Module) -> str | None:
    """Of the weights under adapters, bit for bit; None where there are no adapters."""
    held = stored(model)
    left = [(name, p) for name, p in model.named_parameters() if name not in held]
    if not left:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for name, p in left:
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        digest.update(bytes_of(p.detach().cpu().contiguous()))
    return digest.hexdigest()


def collect(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and JSON state of model, optimizer and random generators.

    Optimizer state goes by the parameter's name, so a checkpoint outlives a new order of parameters.
    """
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[int, str] = {}
    held = stored(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in held:
            continue
        if id(tensor) in seen:
            tied[name] = seen[id(tensor)]
            continue
        seen[id(tensor)] = name
        tensors[held[name]] = tensor.detach()
    numbers: dict[str, dict[str, float]] = {}
    saved = saved_state(optimizer)
    for name, p in model.named_parameters():
        for key, value in saved.get(p, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{OPTIMIZER_PREFIX}{name}/{key}"] = value
            else:
                numbers.setdefault(name, {})[key] = value
    tensors |= generators()
    return tensors, {"tied": tied, "optimizer": numbers}


def generators() -> dict[str, torch.Tensor]:
    """The states of torch's generators."""
    found = {RNG_PREFIX + "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found[RNG_PREFIX + "cuda"] = torch.cuda.get_rng_state()
    return found


def saved_state(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, dict[str, Any]]:
    """What ``state_dict`` tells of each parameter, which need not be what the optimizer works with."""
    saved = optimizer.state_dict()
    groups = zip(optimizer.param_groups, saved["param_groups"], strict=True)
    return {
        p: saved["state"].get(i, {})
        for group, packed in groups
        for p, i in zip(group["params"], packed["params"], strict=True)
    }


def restore(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
) -> None:
    """Put back what :func:`collect` returned.

    Raises:
        CheckpointError: the checkpoint is of another model; names the first difference.
    """
    _restore_model(model, tensors, state)
    _restore_optimizer(model, optimizer, tensors, state)
    torch.set_rng_state(tensors[RNG_PREFIX + "torch"])
    if RNG_PREFIX + "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[RNG_PREFIX + "cuda"])


def _restore_model(
    model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> None:
    from gptcore.checkpoint import model_tensors

    saved = model_tensors(tensors, state)
    held = stored(model)
    saved |= {name: tensors[full] for name, full in held.items() if full in tensors}
    own = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name in held}
    refuse_other_model({name: (tuple(t.shape), t.dtype) for name, t in saved.items()}, own)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def refuse_other_model(
    saved: Mapping[str, tuple[tuple[int, ...], torch.dtype]], own: Mapping[str, torch.Tensor]
) -> None:
    """CheckpointError where shapes and dtypes by name are not those of the model's tensors; names the first."""
    if saved.keys() != own.keys():
        name = min(saved.keys() ^ own.keys())
        where = "checkpoint" if name in saved else "model"
        raise CheckpointError(f"the checkpoint is of another model: only the {where} has '{name}'")
    for name, tensor in own.items():
        shape, dtype = saved[name]
        if shape != tensor.shape or dtype != tensor.dtype:
            raise CheckpointError(
                f"the checkpoint is of another model: '{name}' is {dtype} {shape}, the model has {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )


def _restore_optimizer(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
) -> None:
    names = {p: name for name, p in model.named_parameters()}
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    found: dict[str, dict[str, Any]] = {name: dict(v) for name, v in state["optimizer"].items()}
    for key, tensor in tensors.items():
        if key.startswith(OPTIMIZER_PREFIX):
            name, _, field = key[len(OPTIMIZER_PREFIX) :].rpartition("/")
            found.setdefault(name, {})[field] = tensor
    live = optimizer.state_dict()
    states = {i: found[name] for i, name in enumerate(order) if name in found}
    optimizer.load_state_dict({"state": states, "param_groups": live["param_groups"]})


def identity(
    config: TrainConfig, model: torch.nn.Module, loader: Any, tokenizer: Any = None
) -> dict[str, Any]:
    """What a run and the checkpoint it resumes must agree on, and the settings it was made with.

    Raises:
        UserError: tokens of another tokenizer, or of a larger vocabulary than the model's.
    """
    own = getattr(model, "config", None)
    served = getattr(loader, "fingerprint", None)
    known = getattr(tokenizer, "fingerprint", served)
    if served is not None and known != served:
        raise UserError(
            f"the data was prepared with tokenizer {served}, this run has {known}; prepare it anew"
        )
    vocabulary = getattr(loader, "vocab_size", 0)
    if isinstance(own, GPTConfig) and vocabulary > own.vocab_size:
        raise UserError(
            f"model.vocab_size: {own.vocab_size} is less than the {vocabulary} of the data's tokenizer"
        )
    order = loader.state() if hasattr(loader, "state") else {}
    return {
        "model": own.to_dict() if isinstance(own, GPTConfig) else None,
        "tokenizer": known,
        "adapters": adapters.describe(model),
        "base": base_fingerprint(model),
        "config": {**config.to_dict(), "loader": {k: v for k, v in order.items() if k != "step"}},
    }


def compare(path: Path, saved: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another model or tokenizer, with a sentence that names the difference."""
    if saved["tokenizer"] != identity["tokenizer"]:
        raise CheckpointError(
            f"checkpoint {path} was trained with tokenizer {saved['tokenizer']}, "
            f"this run has {identity['tokenizer']}; use the same tokenizer or another run_dir"
        )
    if saved["model"] != identity["model"]:
        changed = changes(saved["model"] or {}, identity["model"] or {})
        raise CheckpointError(
            f"checkpoint {path} is of another model ({', '.join(changed)}); "
            "use the same [model] settings or another run_dir"
        )
    _compare_adapters(path, saved, identity)
    before, now = (
        OptimizerSpec(name=table.get("name", "adamw"), variant=table.get("variant")).kind
        for table in (made["config"].get("optimizer", {}) for made in (saved, identity))
    )
    if before != now:
        raise CheckpointError(
            f"checkpoint {path} holds the state of optimizer {before}, this run has {now}; use the same "
            f'optimizer, or begin a new run with these weights (start = "{path}")'
        )


def _compare_adapters(path: Path, saved: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse other adapters, or other weights under them."""
    before, now = saved.get("adapters") or {}, identity["adapters"]
    if before != now:
        told = ", ".join(changes(before, now)) or "another order"
        raise CheckpointError(
            f"checkpoint {path} is of other adapters ({told}); use the same [adapter] settings or another run_dir"
        )
    if saved.get("base") != identity["base"]:
        raise CheckpointError(
            f"checkpoint {path} has adapters for other weights than the model's; start from the model that the run "
            "started from"
        )


def changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``key old -> new`` for every setting that differs."""
    found: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found.extend(changes(a, b, f"{prefix}{key}."))
        elif a != b and prefix + key != "run_dir":
            found.append(f"{prefix}{key} {a} -> {b}")
    return found
