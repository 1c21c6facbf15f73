"""Speed and loss of a run: model FLOP/s, MFU, and the JSONL file they are written to."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from gptcore.errors import UserError
from gptcore.models import accounting
from gptcore.models.config import GPTConfig
from gptcore.train.line_file import LineFile, leading_lines, lines, parse
from gptcore.train.peak import Peak

FORMULA = "6N + 12·L·H·D·T"  # FLOPs per token, Chowdhery et al. 2022 (PaLM), appendix B
FORMULA_CAUSAL = "6N + 6·L·H·D·T"  # the same with the half of the scores that a causal mask discards left out


class ModelFlops(NamedTuple):
    """FLOPs of training on one token, forward and backward, by both conventions for causal attention; ``remade`` are
    those of forward passes of blocks a second time, which are the hardware's work and not the model's."""

    per_token: int
    per_token_causal: int
    remade: int = 0

    @classmethod
    def of(cls, config: GPTConfig, length: int, remade: Iterable[int] = ()) -> ModelFlops:
        """Of a model in sequences of ``length`` tokens, whose layers ``remade`` are computed anew in backward."""
        return cls(
            accounting.flops_per_token(config, length),
            accounting.flops_per_token(config, length, causal_halved=True),
            accounting.remade_flops_per_token(config, length, remade),
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
            if flops.remade:
                fields["hfu"] = rate * (flops.per_token + flops.remade) / peak.flops_per_s
        if peak.product is not None:
            fields["mfu_of_product"] = rate * flops.per_token / peak.product
            fields["mfu_causal_halved_of_product"] = rate * flops.per_token_causal / peak.product
    return fields


class MetricsFile(LineFile):
    """The metrics of a run, whose lines all have ``kind`` and ``step`` (updates done).

    Opening it at ``step`` drops what lies beyond, and a line that a kill cut short: a run that goes back
    to a checkpoint writes those lines again, so none is there twice.
    """

    def __init__(self, path: str | os.PathLike[str], step: int) -> None:
        super().__init__(path, _length_up_to(Path(path), step))

    def write(self, kind: str, step: int, **fields: Any) -> None:
        """Append one line; NaN and infinity, which JSON lacks, become null."""
        self.append({"kind": kind, "step": step, **{k: _finite(v) for k, v in fields.items()}})

    def go_back(self, step: int, undone: Path) -> None:
        """Move the lines beyond ``step`` to the file ``undone``: updates that the run undoes."""
        length = _length_up_to(self.path, step)
        try:
            temporary = undone.with_suffix(".tmp")
            temporary.write_bytes(self.path.read_bytes()[length:])
            temporary.replace(undone)
        except OSError as error:
            raise UserError(f"cannot write {undone}: {error.strerror}") from error
        self.cut(length)


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All whole lines of a metrics file, in order; empty if there is no file."""
    return [values for line in lines(Path(path)) if (values := parse(line)) is not None]


def _length_up_to(path: Path, step: int) -> int:
    """Bytes of the leading whole lines of steps up to ``step``."""
    return sum(map(len, leading_lines(path, lambda values: values["step"] <= step)))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
