"""A disk that fails on purpose: real files in a real folder, and in between what a test wants to go wrong."""

import errno
import os
import random
import threading
from pathlib import Path

from kvtransfer.tiers.files import Files

SECTOR_BYTES = 512
"""What a disk writes in one piece."""


class FaultyFiles(Files):
    """`fail[operation] = errno` lets every such operation fail; `hold(operation)` lets it wait.

    `crash_after` lets so many operations change something. The next one is cut off at a random byte, and nothing
    reaches the disk any more. `lose_unsynced` then takes back what was never made durable, sector by sector.
    """

    def __init__(self, folder: Path, seed: int = 0, crash_after: int | None = None) -> None:
        super().__init__(folder)
        self.fail: dict[str, int] = {}
        self.num_calls: dict[str, int] = {}
        self.random = random.Random(seed)
        self.crashed = False
        self._changes_left = crash_after
        self._held: dict[str, threading.Event] = {}
        self._entered: dict[str, threading.Event] = {}
        self._names: dict[int, str] = {}
        self._unsynced: list[tuple[str, int, bytes]] = []
        self._new_files: set[str] = set()

    def hold(self, operation: str) -> threading.Event:
        """Operations of that kind wait until the event that this returns is set."""
        self._entered[operation] = threading.Event()
        self._held[operation] = threading.Event()
        return self._held[operation]

    def wait_until_held(self, operation: str) -> None:
        assert self._entered[operation].wait(10)

    def lose_unsynced(self, kept_share: float) -> None:
        """The power is gone: each unsynced sector survives with that probability, whatever was written before it."""
        for name, offset, old in reversed(self._unsynced):
            if not (self.folder / name).exists():
                continue
            with open(self.folder / name, "r+b") as file:
                for start in range(0, len(old), SECTOR_BYTES):
                    if self.random.random() >= kept_share:
                        file.seek(offset + start)
                        file.write(old[start : start + SECTOR_BYTES])
        for name in self._new_files:
            path = self.folder / name
            if path.exists() and self.random.random() < 0.2:
                if self.random.random() < 0.5:
                    path.unlink()
                else:
                    os.truncate(path, self.random.randrange(path.stat().st_size + 1))

    def open(self, name, create=False):
        if create:
            self._change("open")
            self._new_files.add(name)
        fd = super().open(name, create)
        self._leave_direct(fd)  # so that writes can be torn at any byte
        self._names[fd] = name
        return fd

    def fallocate(self, fd, num_bytes):
        if self._change("fallocate"):
            super().fallocate(fd, self.random.randrange(1, num_bytes))
            raise OSError(errno.EIO, "crashed in fallocate")
        super().fallocate(fd, num_bytes)

    def pwritev(self, fd, buffers, offset):
        data = b"".join(bytes(buffer) for buffer in buffers)
        torn = self._change("pwritev")
        if torn:
            data = data[: self.random.randrange(len(data))]
        self._unsynced.append((self._names[fd], offset, os.pread(fd, len(data), offset)))
        written = os.pwrite(fd, data, offset)
        if torn:
            raise OSError(errno.EIO, "crashed in pwritev")
        return written

    def preadv(self, fd, buffers, offset):
        self._enter("preadv")
        return super().preadv(fd, buffers, offset)

    def fdatasync(self, fd):
        self._change("fdatasync")
        super().fdatasync(fd)
        self._unsynced = [write for write in self._unsynced if write[0] != self._names[fd]]

    def unlink(self, name):
        self._change("unlink")
        super().unlink(name)

    def close_file(self, fd):
        del self._names[fd]
        super().close_file(fd)

    def _enter(self, operation: str) -> None:
        self.num_calls[operation] = self.num_calls.get(operation, 0) + 1
        if operation in self._held:
            self._entered[operation].set()
            assert self._held[operation].wait(20)
        if operation in self.fail:
            raise OSError(self.fail[operation], os.strerror(self.fail[operation]))

    def _change(self, operation: str) -> bool:
        """Whether this is the operation in which the process dies."""
        self._enter(operation)
        if self.crashed:
            raise OSError(errno.EIO, "this process is dead")
        if self._changes_left is None:
            return False
        self._changes_left -= 1
        self.crashed = self._changes_left < 0
        return self.crashed
