"""Runs code that a model wrote, or a checker that a user wrote, where it can do no harm, and says what came of it.

    with Verifier(workers=2) as verifier:
        verdict = verifier.run(Job("def add(a, b):\\n    return a + b", test="assert add(2, 3) == 5"))
        verdict.outcome                                              # "passed"
        verifier.run(Job(program, call="add", arguments=(2, 3)), expected=5)

Each job runs in a process of its own, forked from a warm worker: no imports to pay for, nothing left by the job before.
It has

- limits (:class:`Limits`) on wall-clock and processor time, address space, processes, open files, the size of each
  file and of all files together, and on what it may print;
- an empty directory to work in, an empty environment, an empty stdin, a session and process group of its own;
- no capabilities and no way to get any; started by root it runs as the user 65534.

On Linux with namespaces (:attr:`Verifier.isolation` is ``"namespaces"``) it further has no network; sees, signals and
leaves behind no process but its own, since all of its process namespace is killed with it; can write nothing but its
directory, which lies in memory; and finds no ``/proc``. Where the system grants no namespaces (some containers, macOS)
the isolation is ``"limits"``, with a warning, and the job may start no process at all.

What this does not protect from:

- Reading. A job can read every file that its user (65534 where the owner is root) can read, and say what it found in
  its output. It can connect to local sockets in the file system that admit that user.
- Under ``"limits"``: the network; signals to other processes of the same user, the owner of the verifier among them
  (a verdict is then ``crashed``, or there is nobody left to tell); writing where that user can write; the
  directory's size is looked at every 50 ms and may be passed for that long.
- The kernel. An error in it that breaks namespaces breaks this; a machine of its own is what holds then.
- The use of the processor and memory that the limits allow: ``workers`` jobs at a time, each with ``processes`` + 1
  times ``memory``, and its directory.
- A program that cheats the check. ``test`` and ``call`` run in the program's own process, whose code can read them,
  change what they call, and write the report itself. What a program cannot know is ``expected``: it never leaves
  the caller's process. Rewards that a policy is trained on should be made of that.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from gptcore.errors import UserError

Outcome = Literal["passed", "failed", "timeout", "memory", "crashed", "said too much"]
OUTCOMES: tuple[Outcome, ...] = ("passed", "failed", "timeout", "memory", "crashed", "said too much")

_MIB = 1 << 20
_START = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from gptcore.align.sandbox.worker import main; "
    "del sys.path[0]; main()"
)
_ANY = object()


@dataclass(frozen=True)
class Limits:
    """What one job may use.

    seconds: wall-clock time. cpu_seconds: processor time of each process, rounded up to whole seconds. memory: bytes
    of address space of each process, about 20 MiB of which are Python's. processes: how many it may start beside its
    own (threads count; none without namespaces). directory: bytes of all its files. files: how many it may create.
    open_files: descriptors. output: bytes of what it prints, and of the value it returns.
    """

    seconds: float = 2.0
    cpu_seconds: float = 2.0
    memory: int = 256 * _MIB
    processes: int = 0
    directory: int = 4 * _MIB
    files: int = 256
    open_files: int = 64
    output: int = 64 * 1024

    def __post_init__(self) -> None:
        for name, least in (
            ("seconds", 0.001), ("cpu_seconds", 0.001), ("memory", 32 * _MIB), ("processes", 0), ("directory", 4096),
            ("files", 1), ("open_files", 8), ("output", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if not least <= value < 2**53:
                raise UserError(f"Limits.{name}: got {value}, expected at least {least}")


@dataclass(frozen=True)
class Job:
    """Python source and how it is checked.

    source: executed first. test: more source, executed with its names; an exception is a failure. call: the name of a
    function of ``source``, called with ``arguments`` (what JSON can say) after the test; its value comes back.
    """

    source: str
    test: str = ""
    call: str = ""
    arguments: tuple[Any, ...] = ()


class Verdict(NamedTuple):
    """What came of a job.

    outcome: ``passed``; ``failed``, an exception, a false assertion or another value than expected; ``timeout``, of
    either clock; ``memory``; ``crashed``, killed or ended before the end of the check; ``said too much``.
    output: what it printed, to stdout and stderr, cut at the limit. detail: one line for people. value: what ``call``
    returned, as JSON gives it back. seconds: wall-clock time, forking included.
    """

    outcome: Outcome
    output: str
    detail: str
    value: Any
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the outcome is ``passed``."""
        return self.outcome == "passed"


class Verifier:
    """A pool of warm workers, each of which runs one job at a time. Threads may share it.

    workers: how many. limits: of every job that brings none. import_from: directories beside the standard library
    that jobs may import from. isolation: None takes what the system grants and warns where that is less than
    namespaces; ``"namespaces"`` refuses less; ``"limits"`` asks for no more.

    Raises:
        UserError: no worker starts, or namespaces were asked for and there are none.
    """

    def __init__(
        self,
        workers: int = 1,
        limits: Limits | None = None,
        *,
        import_from: Sequence[str | os.PathLike[str]] = (),
        isolation: Literal["namespaces", "limits"] | None = None,
    ) -> None:
        if workers < 1:
            raise UserError(f"Verifier: got {workers} workers, expected at least 1")
        self.limits = limits or Limits()
        self._import_from = [str(Path(place).resolve()) for place in import_from]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(workers, "verifier")
        self._workers: list[_Worker] = []
        self._closed = False
        first, self.isolation, self.reason = _first(isolation)
        self._workers.append(first)
        self._workers += [_Worker(self.isolation) for _ in range(workers - 1)]
        for worker in self._workers:
            self._idle.put(worker)
        if self.reason:
            warnings.warn(
                f"verifier: no namespaces here ({self.reason}); jobs keep their limits, but have the network and this "
                "user's files",
                RuntimeWarning,
                stacklevel=2,
            )

    def run(self, job: Job, *, expected: Any = _ANY, limits: Limits | None = None) -> Verdict:
        """What comes of ``job``. ``expected``: what ``call`` is to return, compared here, in this process.

        Raises:
            UserError: the verifier is closed, or ``expected`` comes without ``call``.
        """
        if self._closed:
            raise UserError("Verifier: it is closed")
        if expected is not _ANY and not job.call:
            raise UserError("Verifier.run: expected needs a job with a call, got one without")
        message = {
            **asdict(job),
            "import_from": self._import_from,
            "limits": asdict(limits or self.limits),
        }
        try:
            frame = json.dumps(message).encode()
        except (TypeError, ValueError) as error:
            raise UserError(f"Verifier.run: arguments must be what JSON can say: {error}") from None
        worker = self._idle.get()
        try:
            verdict = worker.run(frame, (limits or self.limits).seconds)
        finally:
            self._idle.put(worker)
        if expected is _ANY or not verdict.passed or _same(verdict.value, expected):
            return verdict
        return verdict._replace(outcome="failed", detail=f"returned {verdict.value!r}"[:300])

    def run_many(self, jobs: Iterable[Job], *, limits: Limits | None = None) -> list[Verdict]:
        """The verdicts of ``jobs``, in their order, by all workers together."""
        return list(self._threads.map(lambda job: self.run(job, limits=limits), jobs))

    def close(self) -> None:
        """End the workers and whatever they run. A second call does nothing."""
        if not self._closed:
            self._closed = True
            for worker in self._workers:
                worker.stop()
            self._threads.shutdown()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


def _same(value: Any, expected: Any) -> bool:
    """Equal and of the same kind, for 1 == True in Python; a tuple comes back from JSON as a list."""
    if isinstance(expected, (list, tuple)):
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(expected)
            and all(map(_same, value, expected))
        )
    if isinstance(expected, dict):
        return (
            isinstance(value, dict)
            and value.keys() == expected.keys()
            and all(_same(value[k], expected[k]) for k in expected)
        )
    return type(value) is type(expected) and bool(value == expected)


def _first(wanted: str | None) -> tuple[_Worker, Literal["namespaces", "limits"], str]:
    """The first worker, the isolation it has, and why it is less than was hoped for."""
    if wanted == "limits":
        return _Worker("limits"), "limits", ""
    try:
        return _Worker("namespaces"), "namespaces", ""
    except _Refused as refusal:
        if wanted == "namespaces":
            raise UserError(f"Verifier: this system grants no namespaces: {refusal}") from None
        return _Worker("limits"), "limits", str(refusal)


class _Refused(UserError):
    """The system does not grant what was asked for."""


@dataclass
class _Worker:
    """One worker process, started again when it is lost."""

    isolation: str
    _process: subprocess.Popen[bytes] = field(init=False)
    _directory: str = field(init=False, default="")
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)
    _stopped: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._start()

    def _start(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        self._directory = tempfile.mkdtemp(prefix="gptcore-verifier-")
        words = [sys.executable, "-S", "-s", "-B", "-c", _START, root, self._directory]
        with tempfile.TemporaryFile() as errors:
            self._process = subprocess.Popen(
                [*words, "namespaces" if self.isolation == "namespaces" else "plain"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, cwd="/", start_new_session=True,
                env={"PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"},
            )  # fmt: skip
            report = self._report()
            errors.seek(0)
            told = errors.read().decode(errors="replace").strip().splitlines()
        if report is None or not report["ready"]:
            self.stop()
            self._stopped = False
            raise _Refused(report["reason"] if report else told[-1] if told else "the worker ended at once")

    def run(self, frame: bytes, seconds: float) -> Verdict:
        """Send one job and wait for what came of it."""
        with self._lock:
            try:
                assert self._process.stdin is not None
                self._process.stdin.write(struct.pack(">I", len(frame)) + frame)
                self._process.stdin.flush()
                report = self._report()
            except (BrokenPipeError, ValueError):
                report = None
            if report is not None:
                return Verdict(**report)
            if self._stopped:
                raise UserError("Verifier: it was closed while a job ran")
            self._clear()
            self._start()
            return Verdict("crashed", "", "the job took its worker down", None, seconds)

    def _report(self) -> dict[str, Any] | None:
        """The next frame from the worker; None where it has ended."""
        assert self._process.stdout is not None
        head = _exactly(self._process.stdout, 4)
        body = None if head is None else _exactly(self._process.stdout, struct.unpack(">I", head)[0])
        return None if body is None else dict(json.loads(body))

    def stop(self) -> None:
        """End the process; with it goes, by the kernel, what it runs."""
        self._stopped = True
        self._clear()

    def _clear(self) -> None:
        process = self._process
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def _exactly(stream: IO[bytes], count: int) -> bytes | None:
    data = stream.read(count)
    return data if len(data) == count else None
