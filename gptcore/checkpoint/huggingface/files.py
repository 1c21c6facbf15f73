"""Reads and writes the files of a Hugging Face checkpoint, one tensor at a time.

A tensor is mapped from its file, copied to its place in the model and unmapped before the next, so that loading
needs the memory of the model and of one tensor.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.checkpoint.huggingface import layout
from gptcore.checkpoint.huggingface.configuration import family_of, language_part, read_config, write_config
from gptcore.checkpoint.safetensors_file import write_safetensors
from gptcore.data.atomic import atomic_file, merged_directory, synced_file
from gptcore.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gptcore.models import GPT

# What belongs to a tokenizer or to generation, and is carried from one directory to another unchanged.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip
# The weights of a model in any of its forms, with their indices: what a new model must not meet.
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
_SCORE = "score.weight"  # of a model for sequence classification
_SHARD_BYTES = 5 * 10**9


def from_hf(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> GPT:
    """The model in directory ``path``, or that of this name on the hub, as a ``gptcore.models.GPT``.

    Reads ``model.safetensors``, its shards with their index, or ``pytorch_model.bin``. Peak memory is the model
    and its largest tensor. The model is in evaluation mode, so that its dropout waits for ``train()``.

    Args:
        path: a directory with config.json and weights; or a name "owner/model", which is downloaded (or taken
            from the hub's cache) by huggingface_hub.
        dtype: f32 or bf16; default the checkpoint's own, f32 for float16.
        device: where the parameters go.

    Raises:
        UserError: no such model, a family or setting that ``GPT`` does not compute, weights that are missing, of
            another shape, left over, or a damaged file.
    """
    from gptcore.models import GPT
    from gptcore.torch_required import torch

    directory = directory_of(path)
    hf = language_part(_read_json(directory / "config.json"))
    config = read_config(hf)
    model = GPT(config, dtype=dtype or _dtype(hf), device="meta")
    model.to_empty(device=device)
    with _Weights(directory) as weights, torch.no_grad():
        _fill(model, family_of(hf), weights)
    return model.eval()


def from_hf_classifier(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> tuple[GPT, Tensor]:
    """The trunk of a ``...ForSequenceClassification`` of one label, and the (1, C) matrix that scores its last token.

    As :func:`from_hf` otherwise; the words' head, which such a model has not, is the embedding.
    """
    from gptcore.models import GPT
    from gptcore.torch_required import torch

    directory = directory_of(path)
    hf = {**language_part(_read_json(directory / "config.json")), "tie_word_embeddings": True}
    model = GPT(read_config(hf), dtype=dtype or _dtype(hf), device="meta")
    model.to_empty(device=device)
    with _Weights(directory) as weights, torch.no_grad():
        if _SCORE not in weights.names():
            raise UserError(f"{directory}: holds no '{_SCORE}'; expected a model for sequence classification")
        _fill(model, family_of(hf), weights, beside={_SCORE})
        with weights.tensor(_SCORE) as tensor:
            score = tensor.to(model.token_embedding.weight, copy=True)
    if tuple(score.shape) != (1, model.config.width):
        raise UserError(
            f"'{_SCORE}' has shape {tuple(score.shape)}, expected (1, {model.config.width}): one label"
        )
    return model.eval(), score


def to_hf(
    model: GPT,
    path: str | os.PathLike[str],
    *,
    family: str | None = None,
    like: str | os.PathLike[str] | None = None,
    eos_token_id: int | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write ``model`` to directory ``path`` as transformers' ``from_pretrained`` reads it.

    The weights are those of ``model``, bit for bit. A model that was there before goes, and other files of the
    directory stay; whatever kills the process in between, one of the two models is there as a whole (see
    docs/checkpoints.md for file systems that cannot).

    Args:
        family: transformers' model_type; default the first that can express the model.
        like: a Hugging Face directory whose tokenizer files and ids of special tokens are taken over; also the
            family, unless given.
        eos_token_id: the token that ends a text; default that of ``like``.
        shard_bytes: weights beyond this are split over several files with an index.

    Raises:
        UserError: no family computes this model, or a directory that cannot be written.
    """
    given = {} if like is None else language_part(_read_json(Path(like) / "config.json"))
    family = family or (None if like is None else family_of(given))
    hf = write_config(model.config, family)
    parameters = dict(model.named_parameters())
    dtype = next(iter(parameters.values())).dtype
    if eos_token_id is not None:
        given = {**given, "eos_token_id": eos_token_id}
    hf = {**hf, **_special_tokens(given), "dtype": str(dtype).removeprefix("torch.")}
    plan = _shards(layout.pieces(hf["model_type"], model.config, parameters), parameters, shard_bytes)
    tokenizer = {} if like is None else _tokenizer_files(like)
    goes = {"config.json", *(TOKENIZER_FILES if tokenizer else ())}
    with merged_directory(
        path, owned=lambda name: name in goes or bool(_WEIGHTS.fullmatch(name)), key="config.json"
    ) as directory:
        _write_shards(directory, plan, parameters)
        for name, content in tokenizer.items():
            _write(directory / name, content)
        _write_json(directory / "config.json", hf)


def copy_tokenizer(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> list[str]:
    """Copy the tokenizer's files, byte for byte; returns the names of those that were there."""
    found = _tokenizer_files(source)
    for name, content in found.items():
        if Path(source).resolve() != Path(target).resolve():
            with atomic_file(Path(target) / name) as file:
                file.write(content)
    return list(found)


def _tokenizer_files(directory: str | os.PathLike[str]) -> dict[str, bytes]:
    files = (Path(directory) / name for name in TOKENIZER_FILES)
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def directory_of(path: str | os.PathLike[str]) -> Path:
    """``path`` itself, or, for a name on the hub, where the hub's client keeps its snapshot.

    Raises UserError when there is no such directory and the hub gives none.
    """
    directory = Path(path)
    if directory.is_dir():
        return directory
    if not isinstance(path, str) or path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise UserError(
            f"no directory at {path}; give one that holds config.json, or a name such as 'owner/model'"
        )
    try:
        from huggingface_hub import snapshot_download

        kinds = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        directory = Path(snapshot_download(path, allow_patterns=kinds))
        if not any(directory.glob("*.safetensors")):  # an older repository has pickled weights only
            snapshot_download(path, allow_patterns=["pytorch_model*.bin"])
        return directory
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"no directory at {path}, and the hub does not give it: {reason}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; expected the directory of a Hugging Face model") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a JSON object")
    return values


def _dtype(hf: Mapping[str, Any]) -> torch.dtype:
    import torch

    name = hf.get("dtype", hf.get("torch_dtype")) or "float32"
    return torch.bfloat16 if str(name).endswith("bfloat16") else torch.float32


class _Weights:
    """The tensors of a checkpoint by name, each mapped only while it is in use."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file_of: dict[str, Path] = {}
        self._pickled: dict[str, Tensor] = {}

    def __enter__(self) -> _Weights:
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self._pickled.clear()

    def _open(self) -> None:
        for stem in ("model.safetensors", "pytorch_model.bin"):
            index = self._directory / f"{stem}.index.json"
            if index.is_file():
                table = _read_json(index).get("weight_map")
                if not isinstance(table, dict):
                    raise UserError(f"{index}: has no 'weight_map'")
                files = sorted({self._directory / str(name) for name in table.values()})
            elif (self._directory / stem).is_file():
                files = [self._directory / stem]
            else:
                continue
            for file in files:
                self._add(file)
            return
        raise UserError(f"{self._directory}: holds neither model.safetensors nor pytorch_model.bin")

    def _add(self, file: Path) -> None:
        if not file.is_file():
            raise UserError(f"{file}: the index names this file, but it is not there")
        if file.suffix == ".bin":
            import torch

            try:
                self._pickled |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:
                raise UserError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from error
            return
        with _opened(file) as tensors:
            self._file_of |= dict.fromkeys(tensors.keys(), file)

    def names(self) -> set[str]:
        return {*self._file_of, *self._pickled}

    @contextmanager
    def tensor(self, name: str) -> Iterator[Tensor]:
        """The tensor, for the duration of the block."""
        if name in self._pickled:
            yield self._pickled[name]
            return
        with _opened(self._file_of[name]) as tensors:
            yield tensors.get_tensor(name)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error


def _fill(model: GPT, family: str, weights: _Weights, beside: AbstractSet[str] = frozenset()) -> None:
    """Copy every tensor to its place; refuse what is missing, misshapen or left over, but for ``beside``."""
    parameters = dict(model.named_parameters())
    stored = _stored_names(family, weights.names() - beside)
    used: set[str] = set()
    for piece in layout.pieces(family, model.config, parameters):
        for index, name in enumerate(piece.theirs):
            if name not in stored:
                raise UserError(f"the checkpoint holds no '{name}', which this configuration needs")
            used.add(name)
            with weights.tensor(stored[name]) as tensor:
                if tuple(tensor.shape) != piece.shapes[index]:
                    raise UserError(
                        f"'{name}' has shape {tuple(tensor.shape)}, the configuration asks for {piece.shapes[index]}"
                    )
                piece.write(index, tensor, parameters[piece.ours])
    tied = {layout.head_weight(family)} if model.config.tied_head else set()
    left = sorted(name for name in stored if name not in used | tied and not layout.CONSTANTS.search(name))
    if left:
        raise UserError(
            f"the checkpoint holds '{left[0]}' and {len(left) - 1} more that this configuration lacks"
        )


# A model that also sees holds the language model under either prefix, and the rest beside it.
_LANGUAGE = re.compile(r"^(model\.)?language_model\.(model\.)?")


def _stored_names(family: str, names: set[str]) -> dict[str, str]:
    """Full name to the name in the file, which lacks the base prefix where the model was saved without a head."""
    base, head = layout.base_prefix(family), layout.head_weight(family)
    language = {name for name in names if _LANGUAGE.match(name)}
    if language:
        return {_LANGUAGE.sub(base, name).replace(base + head, head): name for name in language}
    bare = head not in names and not any(name.startswith(base) for name in names)
    return {base + name if bare else name: name for name in names}


def _special_tokens(given: Mapping[str, Any]) -> dict[str, Any]:
    """Their ids, null where they are not known: a family's default would be an id of the published vocabulary."""
    return {key: given.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


_Shard = list[tuple[layout.Piece, int]]


def _shards(pieces: list[layout.Piece], parameters: Mapping[str, Tensor], limit: int) -> list[_Shard]:
    """The tensors in order, in as few files as hold at most ``limit`` bytes (but at least a tensor) each."""
    shards: list[_Shard] = [[]]
    size = 0
    for piece in pieces:
        for index, shape in enumerate(piece.shapes):
            count = parameters[piece.ours].element_size()
            for extent in shape:
                count *= extent
            if shards[-1] and size + count > limit:
                shards.append([])
                size = 0
            shards[-1].append((piece, index))
            size += count
    return shards


def _write_shards(directory: Path, shards: list[_Shard], parameters: Mapping[str, Tensor]) -> None:
    single = len(shards) == 1
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            piece.theirs[index]: piece.read(index, parameters[piece.ours].detach().cpu())
            for piece, index in shard
        }
        with synced_file(directory / name) as file:
            write_safetensors(file, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if single:
        return
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    _write(file, (json.dumps(values, indent=2) + "\n").encode())


def _write(file: Path, content: bytes) -> None:
    with synced_file(file) as opened:
        opened.write(content)
