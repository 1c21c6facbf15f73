"""A trained model and its tokenizer, from a run's directory, one checkpoint or a Hugging Face directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore import checkpoint
from gptcore.errors import UserError

if TYPE_CHECKING:
    from gptcore.data.vocabulary import Tokenizer
    from gptcore.models import GPT

TOKENIZER_DIRECTORY = "tokenizer"
_CHECKPOINT_DIRECTORY = "checkpoints"
_BEST_DIRECTORY = "best"  # of a run that kept the best by a number of its evaluations
_WEIGHTS = (checkpoint.MODEL_PREFIX, "adapter/")


def load(
    path: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None = None,
    *,
    prepare: Callable[[GPT], GPT] | None = None,
) -> tuple[GPT, Tokenizer]:
    """The newest good model of run ``path`` (``path/best``: the best one it kept), or that of a checkpoint or Hugging
    Face directory, and its tokenizer.

    tokenizer: what ``gptcore.data.tokenizer.load`` takes; default the one kept with the model.
    prepare: makes the model what was trained, a reward model say, before the weights of a run go in.

    Raises UserError when there is no run or checkpoint, when it is damaged, when there is no tokenizer, and
    when the tokenizer is not the one the model was trained with.
    """
    if (Path(path) / "config.json").is_file() and not (Path(path) / _CHECKPOINT_DIRECTORY).is_dir():
        return _published(Path(path), tokenizer)
    run, tensors, state = _read(Path(path))
    return _model(run, tensors, state, prepare), _tokenizer(run, state, tokenizer)


def tokenizer_place(path: str | os.PathLike[str]) -> Path:
    """Where :func:`load` looks for the tokenizer of the model at ``path``."""
    place = Path(path)
    if checkpoint.is_checkpoint(place):
        return place.resolve().parent.parent / TOKENIZER_DIRECTORY
    if place.name in (_CHECKPOINT_DIRECTORY, _BEST_DIRECTORY):
        return place.parent / TOKENIZER_DIRECTORY
    return place / TOKENIZER_DIRECTORY if (place / _CHECKPOINT_DIRECTORY).is_dir() else place


def _published(directory: Path, tokenizer: str | os.PathLike[str] | None) -> tuple[GPT, Tokenizer]:
    from gptcore.data import tokenizer as tokenizers

    return checkpoint.from_hf(directory), tokenizers.load(directory if tokenizer is None else tokenizer)


def _read(path: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The run's directory, and tensors and state of the checkpoint asked for."""
    if checkpoint.is_checkpoint(path):
        return path.resolve().parent.parent, *checkpoint.load(path, only=_WEIGHTS)
    if not path.is_dir():
        raise UserError(f"no run or checkpoint at {path}")
    inside = path.name in (_CHECKPOINT_DIRECTORY, _BEST_DIRECTORY)
    run, place = (path.parent, path) if inside else (path, path / _CHECKPOINT_DIRECTORY)
    found = checkpoint.load_latest(place, only=_WEIGHTS)
    if found is None:
        raise UserError(f"{path} holds no checkpoint; give the directory of a run that 'gptcore train' made")
    return run, found.tensors, found.state


def _model(
    run: Path, tensors: dict[str, Any], state: dict[str, Any], prepare: Callable[[GPT], GPT] | None = None
) -> GPT:
    from gptcore.models import GPT, GPTConfig

    if not isinstance(state.get("model"), dict):
        raise UserError(f"the checkpoint in {run} does not say which model it is of")
    if state.get("adapters"):
        return _adapted(run, tensors, state, prepare)
    weights = checkpoint.model_tensors(tensors, state)
    dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
    model = GPT(GPTConfig.from_dict(state["model"]), dtype=dtype)
    model = model if prepare is None else prepare(model)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        name = [*missing, *unexpected][0]
        raise UserError(f"the checkpoint in {run} is of another version of the model: '{name}' differs")
    return model.eval()


def _adapted(
    run: Path, tensors: dict[str, Any], state: dict[str, Any], prepare: Callable[[GPT], GPT] | None
) -> GPT:
    """The model that a run of adapters started from, with the adapters on."""
    from gptcore.models import adapters
    from gptcore.models.vocabulary_growth import grow_vocabulary

    start = state["config"].get("start")
    if not start:
        raise UserError(
            f"the checkpoint in {run} has adapters alone, and does not say for which model (start)"
        )
    try:
        model, before = load(start)
    except UserError as error:
        raise UserError(f"the checkpoint in {run} has adapters for the model at {start}: {error}") from error
    if adapters.names(model):
        adapters.absorb(model)
    if model.config.vocab_size < state["model"]["vocab_size"]:
        model = grow_vocabulary(model, before.vocab_size, state["model"]["vocab_size"])
    own = {name.partition("/")[2]: tensor for name, tensor in tensors.items()}
    model.to(next(iter(own.values())).dtype)
    adapters.put_on_described(model, state["adapters"])
    base = set(model.state_dict()) - adapters.state_names(model)
    model = model if prepare is None else prepare(model)
    missing, unexpected = model.load_state_dict(own, strict=False)
    absent = sorted(set(missing) - base)
    if absent or unexpected:
        name = [*absent, *unexpected][0]
        raise UserError(f"the checkpoint in {run} has other adapters than it says: '{name}' differs")
    return model.eval()


def _tokenizer(run: Path, state: dict[str, Any], spec: str | os.PathLike[str] | None) -> Tokenizer:
    from gptcore.data import tokenizer as tokenizers

    place = run / TOKENIZER_DIRECTORY if spec is None else spec
    if spec is None and not (run / TOKENIZER_DIRECTORY).is_dir():
        raise UserError(f"{run} holds no tokenizer; name the one the model was trained with")
    found = tokenizers.load(place)
    trained_with = state.get("tokenizer")
    if trained_with is not None:
        tokenizers.require_same(trained_with, f"the checkpoint in {run}", found.fingerprint, str(place))
    return found
