"""Look into checkpoints, verify them, and turn them into other shapes.

PATH is a checkpoint, or a run or a directory of checkpoints: then its newest one is meant, and for 'verify'
all of them.

  verify    compare every file and checksum; says everything that is damaged and exits with 1
  show      step, sizes, settings and versions; with --tensors every tensor and its pieces
  reshard   write it anew as --shards files, in place or into the directory --out
  export    its weights as one safetensors file, or all of it for torch.distributed.checkpoint (dcp)
  import    a torch.distributed.checkpoint directory as a checkpoint in the directory --out

Nothing needs more memory than the largest tensor.

Examples:
  gptcore checkpoint verify runs/a
  gptcore checkpoint show runs/a/checkpoints/step-00001000 --tensors
  gptcore checkpoint reshard runs/a/checkpoints/step-00001000 --shards 8 --out /fast/checkpoints
  gptcore checkpoint export runs/a --out weights.safetensors
  gptcore checkpoint export runs/a --format dcp --out runs/a-dcp
  gptcore checkpoint import runs/a-dcp --out runs/b/checkpoints
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.errors import UserError

if TYPE_CHECKING:
    from gptcore.checkpoint import Checkpoint

_ACTIONS = ("verify", "show", "reshard", "export", "import")
_DAMAGED = 1  # exit code of 'verify'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=_ACTIONS, help="see above")
    parser.add_argument(
        "path", help="a checkpoint, a directory of checkpoints or a run; for 'import' a dcp directory"
    )
    parser.add_argument("--out", metavar="PATH", help="what to write")
    parser.add_argument("--shards", type=int, metavar="N", help="reshard, import: files to write (import: 1)")
    parser.add_argument("--format", choices=("safetensors", "dcp"), help="export: as what (safetensors)")
    parser.add_argument(
        "--only", metavar="PREFIX", help="reshard, export: tensors whose name begins so (safetensors: model/)"
    )
    parser.add_argument("--step", type=int, metavar="N", help="import: where the source does not say it")
    parser.add_argument("--tensors", action="store_true", help="show: list every tensor")
    parser.add_argument("--json", action="store_true", help="show: print one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress line")


# Options that mean something to some actions only.
_OPTIONS = {
    "out": {"reshard", "export", "import"},
    "shards": {"reshard", "import"},
    "format": {"export"},
    "only": {"reshard", "export"},
    "step": {"import"},
    "tensors": {"show"},
    "json": {"show"},
}


def run(args: argparse.Namespace) -> int:
    for option, its_actions in _OPTIONS.items():
        if getattr(args, option) not in (None, False) and args.action not in its_actions:
            raise UserError(f"--{option} is not for 'gptcore checkpoint {args.action}'")
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "verify": _verify, "show": _show, "reshard": _reshard, "export": _export, "import": _import,
    }  # fmt: skip
    return actions[args.action](args)


def _verify(args: argparse.Namespace) -> int:
    from gptcore import checkpoint

    code = 0
    for path in _all(Path(args.path)):
        try:
            opened = checkpoint.open(path)
            problems = opened.file_problems()
            with _progress("verify", _nbytes(opened), args.quiet) as done:
                for name in opened.names:
                    problems += opened.problems(name)
                    done(opened.nbytes(name))
            size = f"{len(opened.names)} tensors, {_size(_nbytes(opened))} in {_files(opened)}"
        except checkpoint.CheckpointError as error:
            problems, size = [str(error)], ""
        for problem in dict.fromkeys(problems):
            print(problem)
        if problems:
            code = _DAMAGED
        else:
            print(f"{path}: good, {size}")
    return code


def _show(args: argparse.Namespace) -> int:
    opened = _newest(Path(args.path))
    print(json.dumps(_facts(opened), indent=2) if args.json else _described(opened, args.tensors))
    return 0


def _reshard(args: argparse.Namespace) -> int:
    from gptcore import checkpoint

    if args.shards is None:
        raise UserError("say into how many files: gptcore checkpoint reshard PATH --shards N")
    opened = _newest(Path(args.path))
    only = args.only or ""
    with _progress("reshard", 2 * _nbytes(opened, only), args.quiet) as done:
        written = checkpoint.reshard(opened.path, args.shards, args.out, only=only, done=done)
    print(f"{opened.path} -> {written}, {_files(checkpoint.open(written))}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from gptcore import checkpoint

    out = _needed(args)
    opened = _newest(Path(args.path))
    only = args.only if args.only is not None else "" if args.format == "dcp" else checkpoint.MODEL_PREFIX
    with _progress("export", _nbytes(opened, only), args.quiet) as done:
        if args.format == "dcp":
            checkpoint.to_dcp(opened.path, out, only=only, done=done)
        else:
            checkpoint.to_safetensors(opened.path, out, prefix=only, done=done)
    print(f"{opened.path} -> {out}, {_size(_nbytes(opened, only))}")
    return 0


def _import(args: argparse.Namespace) -> int:
    from gptcore import checkpoint

    out = _needed(args)
    with _progress("import", None, args.quiet) as done:
        written = checkpoint.from_dcp(args.path, out, step=args.step, shards=args.shards or 1, done=done)
    print(f"{args.path} -> {written}, {_size(_nbytes(checkpoint.open(written)))}")
    return 0


def _needed(args: argparse.Namespace) -> str:
    if args.out is None:
        raise UserError(f"say where to: gptcore checkpoint {args.action} {args.path} --out PATH")
    return str(args.out)


def _all(path: Path) -> list[Path]:
    """The checkpoint at ``path``, or all of the directory or run there."""
    from gptcore import checkpoint

    if checkpoint.is_checkpoint(path):
        return [path]
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = [checkpoint.path_of(directory, step) for step in checkpoint.steps(directory)]
    if not found:
        raise UserError(f"no checkpoint in {path}" if path.is_dir() else f"no checkpoint at {path}")
    return found


def _newest(path: Path) -> Checkpoint:
    from gptcore import checkpoint

    return checkpoint.open(_all(path)[-1])


def _nbytes(opened: Checkpoint, prefix: str = "") -> int:
    return sum(opened.nbytes(name) for name in opened.names if name.startswith(prefix))


def _size(nbytes: int) -> str:
    from gptcore.report.progress import format_count

    return f"{format_count(nbytes)}B"


def _files(opened: Checkpoint) -> str:
    count = len(opened.manifest.shards)
    return f"{count} file{'s' * (count > 1)}"


def _facts(opened: Checkpoint) -> dict[str, Any]:
    """Everything but the digests."""
    tensors = {
        name: {
            "dtype": str(opened.dtype(name)).removeprefix("torch."),
            "shape": list(opened.shape(name)),
            "pieces": [
                [piece.shard, piece.start, piece.stop] for piece in opened.manifest.tensors[name].pieces
            ],
        }
        for name in opened.names
    }
    files = {shard.file: shard.nbytes for shard in opened.manifest.shards}
    return {
        "path": str(opened.path), "step": opened.step, "versions": opened.manifest.versions, "files": files,
        "tensors": tensors, "state": opened.state,
    }  # fmt: skip


def _described(opened: Checkpoint, tensors: bool) -> str:
    made = ", ".join(f"{name} {version}" for name, version in opened.manifest.versions.items())
    lines = [
        f"path      {opened.path}",
        f"step      {opened.step}",
        f"size      {_size(_nbytes(opened))} in {_files(opened)}",
        f"made by   {made}",
    ]
    for prefix in dict.fromkeys(name.partition("/")[0] for name in opened.names):
        names = [name for name in opened.names if name.partition("/")[0] == prefix]
        pieces = sum(len(opened.manifest.tensors[name].pieces) for name in names)
        size = _size(sum(opened.nbytes(name) for name in names))
        lines.append(f"{prefix:<9} {len(names)} tensors, {size} in {pieces} pieces")
    lines += [f"{key:<9} {json.dumps(value)}" for key, value in opened.state.items() if key != "step"]
    return "\n".join([*lines, *(_rows(opened) if tensors else [])])


def _rows(opened: Checkpoint) -> Iterator[str]:
    """A line per tensor: dtype, shape, and where its pieces lie."""
    width = max(map(len, opened.names), default=0)
    yield f"\n{'NAME':<{width}}  {'DTYPE':<9}  {'SHAPE':<16}  FILE[FROM:TO]"
    for name in opened.names:
        whole = opened.manifest.tensors[name]
        pieces = " ".join(f"{piece.shard}[{piece.start}:{piece.stop}]" for piece in whole.pieces)
        dtype = str(opened.dtype(name)).removeprefix("torch.")
        yield f"{name:<{width}}  {dtype:<9}  {json.dumps(whole.shape):<16}  {pieces}"


@contextmanager
def _progress(label: str, total: int | None, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Takes the bytes that are done; shows them where that takes long."""
    from gptcore.report.progress import Progress

    with Progress(total, unit="B", label=label, quiet=quiet, stream=sys.stderr) as progress:
        yield progress.update
