"""Speed and loss of a run: model FLOP/s, MFU, and the JSONL file they are written to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from gptcore.errors import UserError
from gptcore.models import accounting
from gptcore.models.config import GPTConfig
from gptcore.train.peak import Peak

FORMULA = "6N + 12·L·H·D·T"  # FLOPs per token, Chowdhery et al. 2022 (PaLM), appendix B
FORMULA_CAUSAL = "6N + 6·L·H·D·T"  # the same with the half of the scores that a causal mask discards left out


class ModelFlops(NamedTuple):
    """FLOPs of training on one token, forward and backward, by both conventions for causal attention."""

    per_token: int
    per_token_causal: int

    @classmethod
    def of(cls, config: GPTConfig, length: int) -> ModelFlops:
        """Of a model in sequences of ``length`` tokens."""
        return cls(
            accounting.flops_per_token(config, length),
            accounting.flops_per_token(config, length, causal_halved=True),
        )


def throughput(tokens: int, seconds: float, flops: ModelFlops | None, peak: Peak) -> dict[str, Any]:
    """The speed fields of a metrics line; what is unknown is None, never a guess."""
    rate = tokens / seconds if seconds > 0 else 0.0
    fields: dict[str, Any] = {"tokens_per_s": rate, "model_flops_per_s": None, "mfu": None}
    fields["mfu_causal_halved"] = None
    if flops is not None:
        fields["model_flops_per_s"] = rate * flops.per_token
        if peak.flops_per_s is not None:
            fields["mfu"] = rate * flops.per_token / peak.flops_per_s
            fields["mfu_causal_halved"] = rate * flops.per_token_causal / peak.flops_per_s
    return fields


class MetricsFile:
    """An append-only JSONL file whose lines all have ``kind`` and ``step`` (updates done).

    Opening it at ``step`` drops what lies beyond, and a line that a kill cut short: a run that goes back
    to a checkpoint writes those lines again, so none is there twice. A failed write is an error of one
    sentence, not a torn file.
    """

    def __init__(self, path: str | os.PathLike[str], step: int) -> None:
        self.path = Path(path)
        try:
            if self.path.exists():
                os.truncate(self.path, _length_up_to(self.path, step))
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise UserError(f"cannot open {self.path}: {error.strerror}") from error

    def write(self, kind: str, step: int, **fields: Any) -> None:
        """Append one line; NaN and infinity, which JSON lacks, become null."""
        line = json.dumps({"kind": kind, "step": step, **{k: _finite(v) for k, v in fields.items()}})
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error

    def go_back(self, step: int, undone: Path) -> None:
        """Move the lines beyond ``step`` to the file ``undone``: updates that the run undoes."""
        try:
            self._file.flush()
            length = _length_up_to(self.path, step)
            temporary = undone.with_suffix(".tmp")
            temporary.write_bytes(self.path.read_bytes()[length:])
            temporary.replace(undone)
            self._file.truncate(length)
        except OSError as error:
            raise UserError(f"cannot write {undone}: {error.strerror}") from error

    def sync(self) -> None:
        """Force the lines to the disk, so that a checkpoint never is ahead of its metrics."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error

    def close(self) -> None:
        """Close the file; what a full disk kept from being written was reported by ``write`` already."""
        try:
            self._file.close()
        except OSError:
            return


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All whole lines of a metrics file, in order; empty if there is no file."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    lines = (_parse(line) for line in data.splitlines(keepends=True))
    return [line for line in lines if line is not None]


def _length_up_to(path: Path, step: int) -> int:
    """Bytes of the leading whole lines of steps up to ``step``."""
    length = 0
    with open(path, "rb") as file:
        for line in file:
            parsed = _parse(line)
            if parsed is None or parsed["step"] > step:
                break
            length += len(line)
    return length


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) and isinstance(parsed.get("step"), int) else None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
