"""What stands between a check and the machine: namespaces where the system grants them, and limits."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from typing import Any

_NOBODY = 65534
# Of the namespace of users: the one that waits for the worker, the worker, the init, the check.
_OWN_PROCESSES = 4


class Guards:
    """What stands between a check and the machine: namespaces, or one unprivileged process without children."""

    def __init__(self, directory: str, namespaces: bool) -> None:
        self.namespaces = namespaces
        self.home = -1  # the worker's own process namespace
        self.place = directory  # where checks work
        if not sys.platform.startswith("linux"):
            if namespaces:
                raise OSError(f"no namespaces on {sys.platform}")
            return
        from gptcore.align.sandbox import linux

        self.place = os.path.join(directory, "work")
        os.mkdir(self.place)
        if os.geteuid() == 0:  # root is above the limit of processes, and may write everywhere
            if namespaces:
                _make_library_readable(directory)
            for owned in (directory, self.place):
                os.chown(owned, _NOBODY, _NOBODY)
            linux.become_nobody(_NOBODY)
        if namespaces:
            self._enter()

    def _enter(self) -> None:
        from gptcore.align.sandbox import linux

        linux.own_user_namespace(linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWPID)
        inner = os.fork()
        if (
            inner
        ):  # what goes on is process 1 of a namespace: it can leave a check's namespace, and all goes with it
            os._exit(os.waitstatus_to_exitcode(_waited(inner)) & 255)
        linux.die_with_parent()
        self.home = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        # no namespaces inside: they would give capabilities
        with contextlib.suppress(OSError), open("/proc/sys/user/max_user_namespaces", "w") as file:
            file.write("0")
        linux.make_everything_read_only()
        linux.mount_memory("/proc", 4096, 2, read_only=True)
        if _waited(self._rehearse()) != 0:
            raise OSError(f"cannot mount a directory in memory at {self.place} in a namespace of its own")

    def _rehearse(self) -> int:
        child = self.fork()
        if child == 0:
            with contextlib.suppress(OSError):
                confine({"directory": 1 << 20, "files": 8}, self.place)
                os._exit(0)
            os._exit(1)
        return child

    def fork(self) -> int:
        """As ``os.fork``, the child first in a new process namespace where there are any."""
        if not self.namespaces:
            return os.fork()
        from gptcore.align.sandbox import linux

        linux.unshare(linux.CLONE_NEWPID)
        child = os.fork()
        if child:
            linux.setns(self.home, linux.CLONE_NEWPID)
        return child


def _make_library_readable(directory: str) -> None:
    """Show the standard library, which may lie in root's own home, at a place that everyone can reach."""
    from gptcore.align.sandbox import linux

    linux.unshare(linux.CLONE_NEWNS)
    linux.make_private()
    here, there = os.path.dirname(os.__file__), os.path.join(directory, "library")
    os.mkdir(there)
    linux.bind(here, there)

    def moved(paths: list[str]) -> list[str]:
        return [there + path.removeprefix(here) if path.startswith(here) else path for path in paths]

    sys.path[:] = moved(sys.path)
    for module in list(sys.modules.values()):
        if isinstance(places := getattr(module, "__path__", None), list):
            places[:] = moved(places)


def _waited(child: int) -> int:
    return os.waitpid(child, 0)[1]


def confine(limits: dict[str, Any], place: str) -> None:
    """In the init: a directory in memory at ``place``, and from here on no capability."""
    from gptcore.align.sandbox import linux

    linux.die_with_parent()
    linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWIPC)
    linux.mount_memory(place, limits["directory"], limits["files"])
    linux.give_up_capabilities()


def limit(limits: dict[str, Any], namespaces: bool) -> None:
    """In the process that will run the code: what it may use at most, from here on."""
    processes = limits["processes"] + _OWN_PROCESSES if namespaces else 0
    cpu = max(1, -int(-limits["cpu_seconds"] // 1))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))  # SIGXCPU, which names its reason, before SIGKILL
    for kind, most in (
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_FSIZE, limits["directory"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_CORE, 0),
        (getattr(resource, "RLIMIT_NPROC", None), processes),
        (getattr(resource, "RLIMIT_MSGQUEUE", None), 0),
    ):
        if kind is not None:
            resource.setrlimit(kind, (most, most))
