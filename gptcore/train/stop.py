"""Stops a run between two updates when the process is asked to end."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType


class StopRequest:
    """Inside ``with``, the first SIGINT or SIGTERM sets ``signal``; a second one ends the process at once.

    Signals reach only the main thread; elsewhere nothing is installed and ``signal`` stays None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()


def resume_command(run_dir: str | os.PathLike[str]) -> str:
    """What to type to go on: for the ``gptcore`` command its ``train --resume``, for a program itself again."""
    words = list(sys.orig_argv)
    if len(words) > 1 and Path(words[1]).name == "gptcore":
        words = ["gptcore", "train", "--resume", os.fspath(run_dir)]
    elif words[1:3] == ["-m", "gptcore"]:
        words = [Path(words[0]).name, "-m", "gptcore", "train", "--resume", os.fspath(run_dir)]
    elif words:
        words[0] = Path(words[0]).name
    return shlex.join(words)
