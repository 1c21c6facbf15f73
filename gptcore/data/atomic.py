"""Files and directories that appear whole or not at all.

What is written goes to a temporary name beside the target, is forced to the disk, and takes the
target's name in one step. A full disk, an exception or a kill leaves what was there before.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from gptcore.errors import UserError

_WITHIN = ".partial"  # of a directory that is filled within its target
_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h


_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file-size limit is reached",
    errno.EIO: "the disk reports an error",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "a part of the path is a file",
    errno.EISDIR: "it is a directory",
}
# What a write itself can fail with; any other OSError inside a block is not about the file being written.
_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EISDIR}


def write_error(
    error: OSError, target: Path, outcome: str = "what was there before is unchanged"
) -> UserError:
    """The sentence for a failed write to ``target``."""
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
    return UserError(f"cannot write {target}: {reason}; {outcome}")


def sync_directory(directory: Path) -> None:
    """Force a directory's entries (a rename just made) to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_exclusively(temporary: Path, target: Path) -> BinaryIO:
    """Open the temporary file, emptied, for this process alone.

    Its name is fixed, so that what a killed writer left is taken over by the next one. Between open and
    lock another writer may have renamed the file into place: then it is not ours to empty.
    """
    while True:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"cannot write {target}: another process is writing it") from None
            except OSError:
                pass  # a file system without locks: the checksum still tells a mangled file
            opened = os.fstat(descriptor)
            if not temporary.exists() or temporary.stat().st_ino != opened.st_ino:
                os.close(descriptor)
                continue
            os.ftruncate(descriptor, 0)
        except BaseException:
            os.close(descriptor)
            raise
        return os.fdopen(descriptor, "w+b")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file (seekable, readable) that becomes ``path`` when the block ends without an error.

    Missing parent directories are made. Raises ``UserError`` with the reason when the disk does not take
    it; any error of the block is passed on, and in both cases the temporary file is gone.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = _open_exclusively(temporary, target)
    except OSError as error:
        raise write_error(error, target) from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)
        sync_directory(target.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _WRITING:
            raise write_error(error, target) from error
        raise


@contextlib.contextmanager
def synced_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new binary file, forced to the disk when the block ends: for directories that appear as a whole."""
    with open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, atomically."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """A new directory to fill, which becomes ``path`` when the block ends without an error.

    An existing ``path`` must be empty, or ``replace`` must be set: then the two change places in one
    step (by two renames where the kernel has no exchange) and the old one is removed afterwards.
    """
    target = _directory_target(path)
    if not replace and target.exists() and any(target.iterdir()):
        raise UserError(f"cannot write {target}: the directory is not empty")
    with _staged(target.with_name(f".{target.name}.partial"), target) as temporary:
        yield temporary
        sync_directory(temporary)
        if target.exists():
            exchange(temporary, target)
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.rename(target)
        sync_directory(target.parent)


@contextlib.contextmanager
def merged_directory(
    path: str | os.PathLike[str], *, owned: Callable[[str], bool], key: str
) -> Iterator[Path]:
    """A new directory to fill with files, which takes the place of ``path`` when the block ends without an error.

    Of what lies in ``path``, files whose name is ``owned`` go; everything else is kept, as links to the same files,
    subdirectories included. The two change places in one step. Where the file system does not let them (a mount point,
    a parent that may not be written, no links), the new files move in one by one: ``key`` is removed first and comes
    last, so that a reader who asks for it meets the old, the new, or nothing.

    Files must be synced before the block ends.
    """
    target = _directory_target(path)
    with _staged(_staging_place(target), target) as temporary:
        aside = _aside(target)
        if aside.is_dir() and not target.exists():  # a writer was killed between two renames
            aside.rename(target)
        yield temporary
        sync_directory(temporary)
        if not target.exists():
            temporary.rename(target)
            sync_directory(target.parent)
            return
        written = sorted(os.listdir(temporary))
        if temporary.parent == target or not _take_place(temporary, target, owned):
            _move_in(temporary, target, written, owned, key)
        shutil.rmtree(temporary, ignore_errors=True)
        sync_directory(target.parent)


def _directory_target(path: str | os.PathLike[str]) -> Path:
    target = Path(path).resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"cannot write {target}: it is a file, expected a directory")
    return target


def _staging_place(target: Path) -> Path:
    """Beside the target; within it where they cannot change places, or must not: this process works in it."""
    with contextlib.suppress(FileNotFoundError):  # a working directory that is gone
        inside = Path.cwd().is_relative_to(target)
        if inside or (target.exists() and (os.path.ismount(target) or not os.access(target.parent, os.W_OK))):
            return target / _WITHIN
    return target.with_name(f".{target.name}.partial")


@contextlib.contextmanager
def _staged(temporary: Path, target: Path) -> Iterator[Path]:
    """``temporary`` as an empty directory of this process alone, gone after an error of the block."""
    try:
        if temporary.exists():  # a killed writer left it, or another one is at work
            os.close(_lock_directory(temporary, target))
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        lock = _lock_directory(temporary, target)
    except OSError as error:
        raise write_error(error, target) from error
    try:
        yield temporary
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _WRITING:
            raise write_error(error, target) from error
        raise
    finally:
        os.close(lock)


def _take_place(temporary: Path, target: Path, owned: Callable[[str], bool]) -> bool:
    """Whether ``temporary``, with links to what is kept of the target, could change places with it."""

    def leave(entry: os.DirEntry[str]) -> bool:
        if entry.is_dir(follow_symlinks=False):
            return entry.name == _WITHIN
        return owned(entry.name)

    try:
        _carry(target, temporary, leave)
        shutil.copymode(target, temporary)
        sync_directory(temporary)
        exchange(temporary, target)
    except OSError as error:
        if error.errno in _WRITING:
            raise
        return False
    with contextlib.suppress(OSError):  # files that somebody else wrote in between
        _carry(temporary, target, leave)
    return True


def _carry(source: Path, target: Path, leave: Callable[[os.DirEntry[str]], bool]) -> None:
    """Link what ``target`` lacks of ``source``, subdirectories with all they hold; not what ``leave`` is true for."""
    for entry in os.scandir(source):
        there = target / entry.name
        if leave(entry):
            continue
        if entry.is_dir(follow_symlinks=False):
            there.mkdir(exist_ok=True)
            _carry(Path(entry.path), there, lambda _: False)
            shutil.copystat(entry.path, there)
        elif not os.path.lexists(there):
            os.link(entry.path, there, follow_symlinks=False)


def _move_in(
    temporary: Path, target: Path, written: list[str], owned: Callable[[str], bool], key: str
) -> None:
    (target / key).unlink(missing_ok=True)
    try:
        sync_directory(target)
        for name in written:
            if name != key:
                os.replace(temporary / name, target / name)
        for name in os.listdir(target):
            if owned(name) and name not in written and not (target / name).is_dir():
                (target / name).unlink()
        sync_directory(target)
        os.replace(temporary / key, target / key)
        sync_directory(target)
    except OSError as error:
        raise write_error(error, target, f"it is incomplete and has no {key} now; write it again") from error


def _lock_directory(directory: Path, target: Path) -> int:
    """Hold ``directory`` for this process until the returned descriptor is closed."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"cannot write {target}: another process is writing it") from None
    except OSError:
        pass  # a file system without locks
    return descriptor


def _aside(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.replaced")


def exchange(new: Path, old: Path) -> None:
    """Swap two directories on one file system; afterwards ``new`` names what ``old`` held."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        arguments = (_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE)
        if rename(*arguments) == 0:
            return
    aside = _aside(old)
    shutil.rmtree(aside, ignore_errors=True)
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)
