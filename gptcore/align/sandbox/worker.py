"""A warm worker: reads jobs, forks a confined process for each, reports what became of it.

Frames on stdin and stdout: four bytes of length (big-endian), then JSON. The first frame out says whether
the system grants what was asked for. The worker itself never runs what a job brings; it ends when stdin closes.

With namespaces a check is two processes: an init of its own process namespace, which only waits, and the one that
runs the code. When the init ends the kernel kills whatever is left in the namespace, and the directory in memory goes
with its mount. Without namespaces the check is one process that may start no other.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import shutil
import signal
import struct
import sys
import tempfile
import time
from typing import Any

from gptcore.align.sandbox import harness
from gptcore.align.sandbox.guards import Guards, confine, limit
from gptcore.align.sandbox.watch import Watch

# Imported once, so that a check that needs them does not pay for it.
_AT_HAND = (
    "bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "fractions", "functools", "heapq",
    "itertools", "math", "operator", "random", "re", "statistics", "string", "textwrap", "time", "typing",
)  # fmt: skip


def main() -> None:
    """Serve jobs from stdin until it closes. Arguments: the directory to work in, ``namespaces`` or ``plain``."""
    directory, way = sys.argv[1:]
    jobs, reports = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(null, descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that owns the worker
    for name in _AT_HAND:  # before root is given up, who may be the only one that can read them
        importlib.import_module(name)
    try:
        guards = Guards(directory, namespaces=way == "namespaces")
    except OSError as error:
        _write(reports, {"ready": False, "reason": str(error)})
        return
    os.environ.clear()
    gc.freeze()
    _write(reports, {"ready": True, "reason": ""})
    with contextlib.suppress(BrokenPipeError):
        while (job := _read(jobs)) is not None:
            _write(reports, _check(job, guards, jobs))


def _check(job: dict[str, Any], guards: Guards, jobs: int) -> dict[str, Any]:
    """Run one job; nothing of it is left when this returns."""
    place = guards.place if guards.namespaces else tempfile.mkdtemp(dir=guards.place)
    pipes = {name: os.pipe() for name in ("output", "result", "status")}
    began = time.monotonic()
    try:
        child = guards.fork()
        if child == 0:
            _become_check(job, guards, place, {name: ends[1] for name, ends in pipes.items()})
        for _, end in pipes.values():
            os.close(end)
        watch = Watch(job["limits"], {name: ends[0] for name, ends in pipes.items()}, jobs)
        ended = watch.until_end(child, began, "" if guards.namespaces else place)
        return {**_verdict(job, watch, ended), "seconds": time.monotonic() - began}
    finally:
        for begin, _ in pipes.values():
            os.close(begin)
        if not guards.namespaces:
            shutil.rmtree(place, ignore_errors=True)


def _verdict(job: dict[str, Any], watch: Watch, status: int) -> dict[str, Any]:
    """What the check came to, from what it reported and how it ended."""
    told = bytes(watch.said["status"]).decode(errors="replace").split()
    if len(told) == 2:  # the init's word about the process that ran the code
        status, watch.cpu = int(told[0]), float(told[1])
    report: dict[str, Any] = {
        "output": bytes(watch.said["output"]).decode("utf-8", "replace"),
        "detail": "",
        "value": None,
    }
    if watch.verdict:
        outcome, report["detail"] = _explained(watch.verdict, watch.limits)
    elif watch.said["result"]:
        outcome, report["detail"], report["value"] = _reported(bytes(watch.said["result"]))
    elif os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        spent = watch.cpu >= watch.limits["cpu_seconds"] - 0.1
        late = number == signal.SIGXCPU or (number == signal.SIGKILL and spent)
        outcome = "timeout" if late else "crashed"
        report["detail"] = f"killed by {signal.Signals(number).name}"
    else:
        code = os.WEXITSTATUS(status)
        outcome = "memory" if code == harness.NO_MEMORY else "crashed"
        report["detail"] = f"ended with exit code {code} before the end of the check"
    return {"outcome": outcome, **report}


def _explained(verdict: str, limits: dict[str, Any]) -> tuple[str, str]:
    """The outcome and one line, for a check that was ended."""
    if verdict == "disk":
        return "failed", f"more than {limits['directory']} bytes of files"
    if verdict == "timeout":
        return verdict, f"no end after {limits['seconds']} s"
    return verdict, f"more than {limits['output']} bytes of output" if verdict == "said too much" else ""


def _reported(result: bytes) -> tuple[str, str, Any]:
    try:
        told = json.loads(result)
        return str(told["outcome"]), str(told["detail"]), told["value"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "crashed", "the report is not whole", None


def _become_check(job: dict[str, Any], guards: Guards, place: str, ends: dict[str, int]) -> None:
    """In the child: confine this process, run the job, never return."""
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        limits = job["limits"]
        if guards.namespaces:
            confine(limits, place)
            child = os.fork()
            if child:
                _serve_as_init(child, ends)
        elif sys.platform.startswith("linux"):
            from gptcore.align.sandbox import linux

            linux.die_with_parent()
        os.chdir(place)
        limit(limits, guards.namespaces)
        os.dup2(ends["output"], 1)
        os.dup2(ends["output"], 2)
        os.dup2(ends["result"], 3)
        os.closerange(4, 4096)
        harness.run(job, 3)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(2, f"the sandbox itself failed: {error!r}\n".encode())
    finally:
        os._exit(125)


def _serve_as_init(child: int, ends: dict[str, int]) -> None:
    """Process 1 of the namespace: bury every process, pass on how ``child`` ended, and take the rest along."""
    from gptcore.align.sandbox import linux

    linux.hide_from_debuggers()
    os.close(ends["output"])
    os.close(ends["result"])
    while True:
        gone, status, usage = os.wait3(0)
        if gone == child:
            os.write(ends["status"], f"{status} {usage.ru_utime + usage.ru_stime}".encode())
            os._exit(0)


def _read(descriptor: int) -> dict[str, Any] | None:
    head = _exactly(descriptor, 4)
    body = None if head is None else _exactly(descriptor, struct.unpack(">I", head)[0])
    return None if body is None else json.loads(body)


def _exactly(descriptor: int, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        piece = os.read(descriptor, count - len(parts))
        if not piece:
            return None
        parts += piece
    return bytes(parts)


def _write(descriptor: int, report: dict[str, Any]) -> None:
    body = json.dumps(report).encode()
    view = memoryview(struct.pack(">I", len(body)) + body)
    while view:
        view = view[os.write(descriptor, view) :]
