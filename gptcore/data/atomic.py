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
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gptcore.errors import UserError

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


def write_error(error: OSError, target: Path) -> UserError:
    """The sentence for a failed write to ``target``; what was there before is still there."""
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
    return UserError(f"cannot write {target}: {reason}; what was there before is unchanged")


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
    target = Path(path).resolve()
    temporary = target.with_name(f".{target.name}.partial")
    if target.exists() and not target.is_dir():
        raise UserError(f"cannot write {target}: it is a file, expected a directory")
    if not replace and target.exists() and any(target.iterdir()):
        raise UserError(f"cannot write {target}: the directory is not empty")
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
        sync_directory(temporary)
        if target.exists():
            _exchange(temporary, target)
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.rename(target)
        sync_directory(target.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _WRITING:
            raise write_error(error, target) from error
        raise
    finally:
        os.close(lock)


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


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories on one file system; afterwards ``new`` names what ``old`` held."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        arguments = (_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE)
        if rename(*arguments) == 0:
            return
    aside = old.with_name(f".{old.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)
