"""Runs one job in a process that is already confined, and reports on a descriptor of its own."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
from typing import Any

NO_MEMORY = 86  # the exit code that says so, where nothing longer can be said


def run(job: dict[str, Any], result: int) -> None:
    """Execute ``job["source"]``, then its ``test`` or ``call``; write the report to ``result`` and end the process.

    The report is ``{"outcome", "detail", "value"}``. A program that ends the process itself leaves no report.
    """
    random.seed(0)  # else a fork draws what its parent would have drawn
    # 1 is what the program prints to; Python's own buffers are those of the worker
    sys.stdin = open(os.devnull)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)  # noqa: SIM115
    sys.path[:] = [*sys.path, *job["import_from"]]
    own = os.getpid()
    try:
        report = _attempt(job)
    except MemoryError:
        os._exit(NO_MEMORY)
    if os.getpid() != own:  # a child of the program, come out of it
        os._exit(0)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    view = memoryview(json.dumps(report).encode())
    while view:
        view = view[os.write(result, view) :]
    os._exit(0)


def _attempt(job: dict[str, Any]) -> dict[str, Any]:
    value = None
    try:
        names: dict[str, Any] = {"__name__": "__program__", "__builtins__": __builtins__}
        exec(compile(job["source"], "<program>", "exec"), names)
        if job["test"]:
            exec(compile(job["test"], "<test>", "exec"), names)
        if job["call"]:
            if job["call"] not in names:
                return _report("failed", f"the program defines no {job['call']}")
            value = names[job["call"]](*job["arguments"])
            json.dumps(value)
    except MemoryError:
        raise
    except SystemExit as error:
        return _report("failed", f"SystemExit: {error.code}")
    except BaseException as error:
        return _report("failed", _told(error))
    return _report("passed", "", value)


def _told(error: BaseException) -> str:
    """The exception in one line, with the line of the program that raised it."""
    trace, line = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in ("<program>", "<test>"):
            line = f" ({trace.tb_frame.f_code.co_filename} line {trace.tb_lineno})"
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and line is None:
        line = f" ({error.filename} line {error.lineno})"
    try:
        text = str(error)
    except Exception:
        text = "?"
    return f"{type(error).__name__}: {text[:300]}{line or ''}"


def _report(outcome: str, detail: str, value: Any = None) -> dict[str, Any]:
    return {"outcome": outcome, "detail": detail, "value": value}
