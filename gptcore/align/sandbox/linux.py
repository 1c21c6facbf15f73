"""The Linux calls that confinement needs and that Python (before 3.12) has no name for.

Manual pages: unshare(2), setns(2), mount(2), mount_setattr(2), capset(2), prctl(2), user_namespaces(7).
"""

from __future__ import annotations

import ctypes
import os
import struct

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x00020000, 0x08000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_SET_PDEATHSIG = 4, 38, 1
_SYS_MOUNT_SETATTR = 442  # the same on every architecture
_AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY = -100, 0x8000, 1
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, call: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Namespaces of one's own; those of processes take effect with the next child."""
    _checked(_libc.unshare(flags), "unshare")


def setns(descriptor: int, kind: int) -> None:
    """Back into the namespace that ``descriptor`` names."""
    _checked(_libc.setns(descriptor, kind), "setns")


def become_nobody(number: int) -> None:
    """Give up root for the user and group ``number``, with no groups beside."""
    os.setgroups([])
    os.setresgid(number, number, number)
    os.setresuid(number, number, number)
    _prctl(_PR_SET_DUMPABLE, 1)  # else /proc/self belongs to root, and the maps below cannot be written


def own_user_namespace(flags: int) -> None:
    """Enter new namespaces, one of users among them, in which this user has the number it has outside."""
    user, group = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER | flags)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def make_private() -> None:
    """Nothing mounted from here on is seen outside this mount namespace."""
    _checked(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "mount private")


def bind(source: str, target: str) -> None:
    """The directory ``source`` at ``target`` too."""
    _checked(_libc.mount(source.encode(), target.encode(), None, _MS_BIND, None), "mount bind")


def make_everything_read_only() -> None:
    """No file outside the mounts made later can be written."""
    make_private()
    attributes = struct.pack("QQQQ", _ATTR_RDONLY, 0, 0, 0)
    _checked(
        _libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, len(attributes)),
        "mount_setattr",
    )


def mount_memory(path: str, size: int, files: int, *, read_only: bool = False) -> None:
    """An empty directory in memory at ``path`` for ``size`` bytes in at most ``files`` files."""
    flags = _MS_NOSUID | _MS_NODEV | (_MS_RDONLY if read_only else 0)
    options = f"size={size},nr_inodes={files},mode=700".encode()
    _checked(_libc.mount(b"tmpfs", path.encode(), b"tmpfs", flags, options), "mount tmpfs")


def give_up_capabilities() -> None:
    """None from here on, not even for a program with the set-user-id bit."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    _checked(_libc.capset(header, bytes(24)), "capset")


def hide_from_debuggers() -> None:
    """Nobody of the same user may read or change this process's memory."""
    _prctl(_PR_SET_DUMPABLE, 0)


def die_with_parent() -> None:
    """SIGKILL when the process that forked this one ends."""
    _prctl(_PR_SET_PDEATHSIG, 9)


def _prctl(option: int, value: int) -> None:
    _checked(_libc.prctl(option, value, 0, 0, 0), "prctl")
