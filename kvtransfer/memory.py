"""The memory of a KV pool, shaped so that a peer on the same host can map it.

    offset 0             uint64 generation[num_blocks]
                         zeros up to the next multiple of 4096
    offset header_bytes  block 0      (block_bytes)
                         block 1
                         ...
                         block num_blocks - 1

It is an anonymous file (memfd): it has no name, so nothing is left behind however its processes die, and it is
freed when the last of them unmaps it. It may neither shrink nor grow, so a peer that maps it cannot be killed by
SIGBUS. A peer that still maps it after its owner died reads the last bytes written, which is harmless: checksums
decide.

The owner's pages are taken at the start (MAP_POPULATE, about 1 ms per MiB): otherwise the first hand-over into each
block would pay for them, 10 ms for 8 MiB instead of 0.2. Huge pages were measured and left out: scattered 256 KiB
blocks copy at the same speed with 4 KiB pages, transparent huge pages and MADV_COLLAPSE.
"""

import contextlib
import fcntl
import mmap
import os
import secrets
from typing import Final

import numpy as np
import numpy.typing as npt

from baton.errors import ConfigurationError, TransferError

PAGE_BYTES: Final = 4096
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def header_bytes(num_blocks: int) -> int:
    """Bytes before block 0: the generations, padded to whole pages."""
    return -(-num_blocks * 8 // PAGE_BYTES) * PAGE_BYTES


class PoolMemory:
    """One mapping of a pool: the owner's, or a peer's view of it.

    generations: uint64 [num_blocks]. The owner adds one to a block's generation *before* its content may change, so
    that a reader who finds the same generation before and after its copy has read one content.
    blocks: uint8 [num_blocks, block_bytes].
    buffer: the slabs alone, for `torch.frombuffer`.
    epoch, token: random 64-bit numbers of this memory; the token is the secret that peers must show to read it. Both
    are 0 in an attached view.
    """

    def __init__(self, fd: int, num_blocks: int, block_bytes: int, *, writable: bool, epoch: int, token: int) -> None:
        """Map `fd`, which this object owns from here on, also when the constructor raises."""
        self.fd = fd
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.epoch = epoch
        self.token = token
        header = header_bytes(num_blocks)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if writable else 0)
            self._mapping = mmap.mmap(fd, header + num_blocks * block_bytes, flags, protection)
        except (OSError, ValueError) as error:
            os.close(fd)
            raise TransferError(f"the memory of a pool cannot be mapped: {error}") from error
        self.buffer: memoryview = memoryview(self._mapping)[header:]
        self.generations: npt.NDArray[np.uint64] = np.frombuffer(self._mapping, np.uint64, num_blocks)
        self.blocks: npt.NDArray[np.uint8] = np.frombuffer(self.buffer, np.uint8).reshape(num_blocks, block_bytes)

    @classmethod
    def create(cls, num_blocks: int, block_bytes: int) -> "PoolMemory":
        """New memory, all zero, every page of it taken from the system now. Raises ConfigurationError."""
        if num_blocks <= 0 or block_bytes <= 0:
            raise ConfigurationError(f"a pool of {num_blocks} blocks of {block_bytes} bytes is empty")
        size = header_bytes(num_blocks) + num_blocks * block_bytes
        # Taking the pages of a pool that is larger than the machine would end in the kernel's out-of-memory killer.
        if size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            raise ConfigurationError(
                f"{num_blocks} KV blocks of {block_bytes} bytes are more than this machine's memory; lower --kv-memory"
            )
        try:
            fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise ConfigurationError(f"no memory for a KV pool: {error}") from error
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            os.close(fd)
            raise ConfigurationError(f"no memory for {num_blocks} KV blocks: {error}; lower --kv-memory") from error
        return cls(fd, num_blocks, block_bytes, writable=True, epoch=secrets.randbits(64), token=secrets.randbits(64))

    @classmethod
    def attach(cls, fd: int, num_blocks: int, block_bytes: int, readonly: bool = True) -> "PoolMemory":
        """Map memory that a peer created; takes over `fd`. Raises TransferError when it is not what the peer says."""
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) if _is_memfd(fd) else 0
        if sealed & _SEALS != _SEALS or os.fstat(fd).st_size != header_bytes(num_blocks) + num_blocks * block_bytes:
            os.close(fd)
            raise TransferError("the memory that the peer handed over does not have the size that it states")
        return cls(fd, num_blocks, block_bytes, writable=not readonly, epoch=0, token=0)

    def open_readonly(self) -> int:
        """A new descriptor of this memory that can only be read through; the caller closes it."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Give the memory up. A tensor or array that still views it keeps it mapped until it goes too."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        del self.generations, self.blocks
        with contextlib.suppress(BufferError):  # someone still views it
            self.buffer.release()
            self._mapping.close()


def _is_memfd(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True
