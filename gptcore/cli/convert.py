"""Convert a model between gptcore's format and Hugging Face's.

The direction follows from SOURCE: a Hugging Face directory (config.json and weights; or a name on the hub,
which is downloaded) becomes a run's directory, a run or one of its checkpoints a Hugging Face directory.
Weights stay as they are, bit for bit; the tokenizer's files go along.

Examples:
  gptcore convert models/gpt2 runs/gpt2                 for 'gptcore generate runs/gpt2'
  gptcore convert runs/mine models/mine                 for transformers' from_pretrained
  gptcore convert runs/mine models/mine --family llama   where several families would do
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.errors import UserError

if TYPE_CHECKING:
    from gptcore.models import GPT

_DTYPES = ("float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="a Hugging Face directory or hub name, a run's directory, or a checkpoint"
    )
    parser.add_argument("target", help="directory to write; made if absent, refused if it holds a model")
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="of the weights (as they are; float16 becomes float32)"
    )
    parser.add_argument(
        "--family", metavar="NAME", help="Hugging Face model_type to write (the first that fits)"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the one kept with the source")


def run(args: argparse.Namespace) -> int:
    target = Path(args.target)
    for name in ("config.json", "checkpoints"):
        if (target / name).exists():
            raise UserError(f"{target} already holds a model; give another directory or remove it")
    if _is_run(Path(args.source)):
        written = _to_hugging_face(args, target)
    else:
        if args.family:
            raise UserError(f"--family is for writing a Hugging Face model, but {args.source} is one already")
        written = _to_run(args, target)
    print(f"{args.source} -> {written}")
    return 0


def _is_run(source: Path) -> bool:
    from gptcore.checkpoint import is_checkpoint

    return is_checkpoint(source) or source.name == "checkpoints" or (source / "checkpoints").is_dir()


def _to_hugging_face(args: argparse.Namespace, target: Path) -> str:
    from gptcore.checkpoint import huggingface
    from gptcore.infer import trained

    model, tokenizer = trained.load(args.source, args.tokenizer)
    huggingface.to_hf(_cast(model, args.dtype), target, family=args.family, eos_token_id=tokenizer.eot)
    tokenizer.save(target)
    return f"{target}, {_described(model)}"


def _to_run(args: argparse.Namespace, target: Path) -> str:
    from gptcore import checkpoint
    from gptcore.checkpoint import huggingface
    from gptcore.data import tokenizer as tokenizers
    from gptcore.infer import trained

    directory = huggingface.directory_of(args.source)
    place = args.tokenizer or (directory if tokenizers.is_there(directory) else None)
    found = None if place is None else tokenizers.load(place)
    model = _cast(huggingface.from_hf(directory), args.dtype)
    state: dict[str, Any] = {"model": model.config.to_dict()}
    if found is not None:
        state["tokenizer"] = found.fingerprint
    tensors = {checkpoint.MODEL_PREFIX + name: tensor for name, tensor in model.state_dict().items()}
    checkpoint.save(target / "checkpoints", 0, tensors, state)
    if found is None:
        return f"{target}, {_described(model)}, without a tokenizer: none was there"
    found.save(target / trained.TOKENIZER_DIRECTORY)
    return f"{target}, {_described(model)}"


def _cast(model: GPT, dtype: str | None) -> GPT:
    import torch

    return model if dtype is None else model.to(getattr(torch, dtype))


def _described(model: GPT) -> str:
    from gptcore.report.progress import format_count

    dtype = str(model.token_embedding.weight.dtype).removeprefix("torch.")
    return f"{format_count(model.num_parameters())} parameters in {dtype}"
