"""Files written past the page cache, from memory that the disk reads itself.

An ordinary write copies into the cache, from which the kernel writes later. For a file that nobody reads soon both are
work for nothing, taken from whoever computes beside it, and the cache loses what it held. Where a file system has no
direct writes (``O_DIRECT``) they are ordinary ones.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sys
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

# Direct writes are of whole blocks, from and to multiples of their size; no disk asks for more than a page.
BLOCK = 4096
# Bytes of one call: long enough for any disk, short enough that who watches the file sees it grow.
AT_ONCE = 8 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)


def blocks(nbytes: int, *, pinned: bool = False) -> Tensor:
    """Memory for ``nbytes`` rounded up to whole blocks, uint8, at a multiple of a block; it goes back when it is freed.

    ``pinned``: for copies from a GPU.
    """
    size = -(-nbytes // BLOCK) * BLOCK
    if pinned:
        memory = torch.empty(size + BLOCK, dtype=torch.uint8, pin_memory=True)
        skip = -memory.data_ptr() % BLOCK
        return memory[skip : skip + size]
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    pages = mmap.mmap(-1, size)
    if sys.platform == "linux":  # which then has 512 times fewer of them to zero, and to hand to the disk
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


class DirectFile:
    """A new file at ``path``. ``write`` appends; nothing is safe before ``finish``.

    Raises:
        OSError: from the disk, in every method.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._direct = bool(_DIRECT)
        try:
            self._descriptor = os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._direct = False
            path.unlink(missing_ok=True)  # some file systems make it before they refuse
            self._descriptor = os.open(path, flags, 0o666)

    def write(self, data: Tensor) -> None:
        """Append whole blocks of memory that :func:`blocks` gave."""
        left = data.numpy().data
        while len(left):
            try:
                done = os.write(self._descriptor, left[:AT_ONCE])
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                done = self._go_on_ordinarily()
            left = left[done:]
            if done % BLOCK and self._direct:
                self._go_on_ordinarily()

    def finish(self, size: int) -> None:
        """Cut the file to ``size`` bytes and wait until it is on the disk."""
        os.ftruncate(self._descriptor, size)
        os.fsync(self._descriptor)

    def _go_on_ordinarily(self) -> int:
        """After a write that the file system would not take directly, or took a part of."""
        self._direct = False
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
        return 0

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
