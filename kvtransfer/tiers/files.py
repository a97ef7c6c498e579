"""The file operations of the disk tier, all in one folder: a thin layer that tests replace by a disk that fails.

Names are resolved from the folder's descriptor, so a folder that was deleted and made again by somebody else is never
mistaken for the one that was opened. Reads and writes go past the page cache (O_DIRECT) where the filesystem lets
them: the cache would keep a second copy of every block in memory, and take its pages from whoever needs them.
"""

import errno
import fcntl
import logging
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

_LOCK_FILE: Final = "lock"
_NO_WRITING: Final = (errno.EROFS, errno.EACCES, errno.EPERM)


class Files:
    """One folder. Every method raises OSError as the system does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_read_only = False
        """Whether a file had to be opened for reading alone."""
        self._directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._lock = -1
        self._is_cached = False

    def lock(self) -> bool:
        """Take the folder for this process until `close`; False when another one has it."""
        self._lock = self._open(_LOCK_FILE, os.O_CREAT)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def listdir(self) -> list[str]:
        return os.listdir(self._directory)

    def stat(self, name: str) -> os.stat_result:
        """Of the name itself, not of what a symbolic link points to."""
        return os.stat(name, dir_fd=self._directory, follow_symlinks=False)

    def is_deleted(self) -> bool:
        return os.fstat(self._directory).st_nlink == 0

    def open(self, name: str, create: bool = False) -> int:
        """A descriptor to read and write, or to read alone where the filesystem allows no more."""
        flags = os.O_CREAT | os.O_EXCL if create else 0
        try:
            return self._open(name, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        self._say_that_it_is_cached()
        if create:  # ext2 and others make the file before they refuse to open it
            flags = os.O_CREAT
        return self._open(name, flags)

    def fallocate(self, fd: int, num_bytes: int) -> None:
        os.posix_fallocate(fd, 0, num_bytes)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        try:
            return os.pwritev(fd, buffers, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._leave_direct(fd):
                raise
            return os.pwritev(fd, buffers, offset)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        try:
            return os.preadv(fd, buffers, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._leave_direct(fd):
                raise
            return os.preadv(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def fstat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def unlink(self, name: str) -> None:
        os.unlink(name, dir_fd=self._directory)

    def close_file(self, fd: int) -> None:
        os.close(fd)

    def close(self) -> None:
        """Give the folder and its lock back."""
        for fd in (self._lock, self._directory):
            if fd >= 0:
                os.close(fd)
        self._lock = self._directory = -1

    def _open(self, name: str, flags: int) -> int:
        # No symbolic link is followed out of the folder, and a pipe in it cannot keep the caller waiting.
        flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            return os.open(name, flags | os.O_RDWR, 0o600, dir_fd=self._directory)
        except OSError as error:
            if error.errno not in _NO_WRITING or flags & os.O_EXCL:
                raise
        self.is_read_only = True
        return os.open(name, (flags & ~os.O_CREAT) | os.O_RDONLY, dir_fd=self._directory)

    def _leave_direct(self, fd: int) -> bool:
        """Some filesystems refuse O_DIRECT only when it is used, or ask for more than 4 KiB of alignment."""
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if not flags & os.O_DIRECT:
            return False
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._say_that_it_is_cached()
        return True

    def _say_that_it_is_cached(self) -> None:
        if self._is_cached:
            return
        self._is_cached = True
        log.warning("%s: this filesystem has no O_DIRECT; blocks go through the page cache", self.folder)


def aligned_buffers(count: int, num_bytes: int) -> list[memoryview]:
    """Zeroed buffers that start on a page, as O_DIRECT wants them; `num_bytes` is a multiple of 4096."""
    memory = memoryview(mmap.mmap(-1, count * num_bytes))
    return [memory[start : start + num_bytes] for start in range(0, len(memory), num_bytes)]
