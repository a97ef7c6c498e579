"""The memory of a KV pool, shaped so that a peer on the same host can map it.

    offset 0             uint64 generation[num_blocks]
                         zeros up to the next multiple of 2 MiB
    offset header_bytes  block 0      (block_bytes)
                         block 1
                         ...
                         block num_blocks - 1

It is an anonymous file (memfd): it has no name, so nothing is left behind however its processes die, and it is
freed when the last of them unmaps it. It may neither shrink nor grow, so a peer that maps it cannot be killed by
SIGBUS. A peer that still maps it after its owner died reads the last bytes written, which is harmless: checksums
decide.

The owner's pages are taken at the start: otherwise the first hand-over into each block would pay for them, 10 ms for
8 MiB instead of 0.2. They are huge pages (2 MiB) as far as the kernel has some at hand: then a peer copies scattered
64 KiB blocks a tenth faster and those of 256 KiB a twentieth, the kernel copies them between processes (lane cma) 2.6
times as fast, attention over long contexts gains 4 %, and a peer makes its page tables of 1 GiB in 7 ms instead of 57.

No setting of the machine is needed: MADV_COLLAPSE (Linux 6.1) makes a huge page out of small ones whatever
`shmem_enabled` says. Out of 512 small pages this takes 3 ms a MiB; out of a single one, with nothing to copy and the
rest zeroed in one go, 0.1, where taking small pages takes 0.7. (In a virtual machine, memory that its host has to find
first costs 2 to 3 ms a MiB more either way.) For a page table to point at a huge page, address and offset must both be
a multiple of 2 MiB: hence the padding of the header, and mappings that begin at such addresses, the owner's and its
peers'.

An owner that computes into blocks of other workers of its host (`kvtransfer.direct`) keeps addresses free behind its
own, and maps their pools there:

    own header | block 0 ... num_blocks - 1 | unused | a peer's blocks | unused ...

Each pool begins at a multiple of both a huge page and a block, so that every block of the range has a number: one row
in one tensor, whoever it belongs to. Their headers are mapped elsewhere, read-only. What is not mapped cannot be
touched.
"""

import contextlib
import ctypes
import errno
import fcntl
import logging
import math
import mmap
import os
import secrets
import time
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from baton.errors import ConfigurationError, TransferError

log = logging.getLogger(__name__)

PAGE_BYTES: Final = 4096
HUGE_PAGE_BYTES: Final = 2 << 20
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_MADV_POPULATE_WRITE: Final = 23
_MADV_COLLAPSE: Final = 25
_COLLAPSED_BYTES: Final = 64 << 20  # between two looks at the clock
_MAX_COLLAPSE_S: Final = 1.0  # for that many: several times what it takes on a machine whose memory was never used
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def physical_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def header_bytes(num_blocks: int) -> int:
    """Bytes before block 0: the generations, padded to whole huge pages."""
    return -(-num_blocks * 8 // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES


@dataclass(frozen=True, slots=True, eq=False)
class PeerBlocks:
    """A peer's pool behind the blocks of this one: its block i is block `first_block` + i here.

    generations: uint64 [num_blocks], the peer's, read-only.
    """

    first_block: int
    num_blocks: int
    generations: npt.NDArray[np.uint64]


class PoolMemory:
    """One mapping of a pool: the owner's, or a peer's view of it.

    generations: uint64 [num_blocks]. The owner adds one to a block's generation *before* its content may change, so
    that a reader who finds the same generation before and after its copy has read one content.
    blocks: uint8 [num_blocks, block_bytes].
    buffer: the slabs alone, for `torch.frombuffer`; `num_peer_blocks` places for blocks of peers included.
    epoch, token: random 64-bit numbers of this memory; the token is the secret that peers must show to read it. Both
    are 0 in an attached view.
    """

    def __init__(
        self, fd: int, num_blocks: int, block_bytes: int, *, writable: bool, epoch: int, token: int,
        num_peer_blocks: int = 0,
    ) -> None:  # fmt: skip
        """Map `fd`, which this object owns from here on, also when the constructor raises."""
        self.fd = fd
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.device_pointer: int | None = None
        """Where on a CUDA device the blocks are that this memory mirrors, if they are."""
        self.epoch = epoch
        self.token = token
        self.num_peer_blocks = num_peer_blocks
        self._peers: list[PeerBlocks] = []
        header = header_bytes(num_blocks)
        size = header + num_blocks * block_bytes
        peer_bytes = num_peer_blocks * block_bytes
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            self._mapping = _reserve(size + peer_bytes + HUGE_PAGE_BYTES, writable)
            skipped = -_address(self._mapping) % HUGE_PAGE_BYTES
            self._start = _address(self._mapping) + skipped
            _map(self._start, size, protection, mmap.MAP_SHARED, fd, 0)
            if writable:
                _take_huge_pages(self._start, size)
                _map(self._start, size, protection, mmap.MAP_SHARED | mmap.MAP_POPULATE, fd, 0)
        except (OSError, ValueError) as error:
            os.close(fd)
            raise TransferError(f"the memory of a pool cannot be mapped: {error}") from error
        mapped = memoryview(self._mapping)[skipped : skipped + size + peer_bytes]
        self.buffer: memoryview = mapped[header:]
        self.generations: npt.NDArray[np.uint64] = np.frombuffer(mapped, np.uint64, num_blocks)
        own = np.frombuffer(self.buffer, np.uint8, num_blocks * block_bytes)
        self.blocks: npt.NDArray[np.uint8] = own.reshape(num_blocks, block_bytes)

    @classmethod
    def create(cls, num_blocks: int, block_bytes: int, num_peer_blocks: int = 0) -> "PoolMemory":
        """New memory, all zero, every page of it taken from the system now. Raises ConfigurationError.

        `num_peer_blocks`: addresses to keep for `map_peer`; they take no memory.
        """
        if num_blocks <= 0 or block_bytes <= 0:
            raise ConfigurationError(f"a pool of {num_blocks} blocks of {block_bytes} bytes is empty")
        size = header_bytes(num_blocks) + num_blocks * block_bytes
        # Taking the pages of a pool that is larger than the machine would end in the kernel's out-of-memory killer.
        if size > physical_bytes():
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
        epoch, token = secrets.randbits(64), secrets.randbits(64)
        try:
            return cls(
                fd, num_blocks, block_bytes, writable=True, epoch=epoch, token=token, num_peer_blocks=num_peer_blocks
            )
        except TransferError as error:
            advice = "lower --kv-memory" + (", or set --direct-wait-s to 0" if num_peer_blocks else "")
            raise ConfigurationError(f"no memory for {num_blocks} KV blocks: {error}; {advice}") from error

    @classmethod
    def attach(cls, fd: int, num_blocks: int, block_bytes: int) -> "PoolMemory":
        """Map memory that a peer created, for reading; takes over `fd`.

        Raises TransferError when it is not what the peer says.
        """
        try:
            _check_size(fd, num_blocks, block_bytes)
        except TransferError:
            os.close(fd)
            raise
        return cls(fd, num_blocks, block_bytes, writable=False, epoch=0, token=0)

    def map_peer(self, fd: int, num_blocks: int) -> PeerBlocks:
        """Map a peer's pool, writable, behind the own blocks; the caller keeps `fd` and may close it.

        Raises TransferError when the memory is not what the peer says, or no room is left.
        """
        _check_size(fd, num_blocks, self.block_bytes)
        first_block, header = self._place_for(num_blocks), header_bytes(num_blocks)
        try:
            generations = np.frombuffer(mmap.mmap(fd, header, mmap.MAP_SHARED, mmap.PROT_READ), np.uint64, num_blocks)
            address, size = self._addresses(first_block, num_blocks)
            _map(address, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, header)
        except OSError as error:
            raise TransferError(f"the memory of a peer's pool cannot be mapped: {error}") from error
        peer = PeerBlocks(first_block, num_blocks, generations)
        self._peers.append(peer)
        return peer

    def touch_peer(self, peer: PeerBlocks) -> None:
        """Make the page tables of a peer's blocks, which the first step into them would otherwise wait for.

        For a thread of its own: 0.1 ms a MiB. It may overlap with `unmap_peer`.
        """
        _libc.madvise(*self._addresses(peer.first_block, peer.num_blocks), _MADV_POPULATE_WRITE)

    def unmap_peer(self, peer: PeerBlocks) -> None:
        """Nobody uses the peer's blocks any more, in any thread: touching them from here on ends the process."""
        self._peers.remove(peer)
        _map(*self._addresses(peer.first_block, peer.num_blocks), *_NOTHING)

    def _place_for(self, num_blocks: int) -> int:
        """The first gap that is large enough, as the number of its first block."""
        unit = HUGE_PAGE_BYTES if num_blocks * self.block_bytes >= HUGE_PAGE_BYTES else PAGE_BYTES
        step = unit // math.gcd(unit, self.block_bytes)
        place = -(-self.num_blocks // step) * step
        for peer in sorted(self._peers, key=lambda peer: peer.first_block):
            if place + num_blocks <= peer.first_block:
                break
            place = -(-(peer.first_block + peer.num_blocks) // step) * step
        if place + num_blocks > self.num_blocks + self.num_peer_blocks:
            raise TransferError(f"no addresses are left for {num_blocks} blocks of a peer")
        return place

    def _addresses(self, first_block: int, num_blocks: int) -> tuple[int, int]:
        start = self._start + header_bytes(self.num_blocks) + first_block * self.block_bytes
        return start, num_blocks * self.block_bytes

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


_NOTHING: Final = (0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)


def _reserve(size: int, writable: bool) -> mmap.mmap:
    """Addresses without memory. The object owns them, and whatever is mapped over them; views of it are `writable`."""
    protection = mmap.PROT_READ | mmap.PROT_WRITE if writable else 0
    mapping = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, protection)
    _map(_address(mapping), size, *_NOTHING)
    return mapping


def _address(mapping: mmap.mmap) -> int:
    return int(np.frombuffer(mapping, np.uint8).ctypes.data)


def _take_huge_pages(address: int, size: int) -> None:
    """Of new memory, make huge pages as far as the kernel has some at hand. Small ones do as well where it has not."""
    flat = np.ctypeslib.as_array((ctypes.c_uint8 * (size - size % HUGE_PAGE_BYTES)).from_address(address))
    for start in range(0, len(flat), _COLLAPSED_BYTES):
        began, done = time.monotonic(), start
        part = flat[start : start + _COLLAPSED_BYTES]
        part[::HUGE_PAGE_BYTES].max()  # takes one small page each: where there is none, there is nothing to collapse
        failed = _libc.madvise(part.ctypes.data, len(part), _MADV_COLLAPSE)
        if failed and ctypes.get_errno() != errno.EAGAIN:  # which says that something held single pages for a moment
            reason = os.strerror(ctypes.get_errno())
        elif time.monotonic() - began > _MAX_COLLAPSE_S:
            done, reason = start + len(part), "it takes too long to find them"
        else:
            continue
        log.info("KV pool: the kernel gave huge pages for %d of %d MiB only: %s", done >> 20, size >> 20, reason)
        return


def _map(address: int, size: int, protection: int, flags: int, fd: int, offset: int) -> None:
    """Replace what is mapped there. Raises OSError."""
    if _libc.mmap(address, size, protection, flags | _MAP_FIXED, fd, offset) != address:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _check_size(fd: int, num_blocks: int, block_bytes: int) -> None:
    """Raises TransferError unless `fd` is memory that can neither shrink nor grow, and holds such a pool."""
    sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) if _is_memfd(fd) else 0
    if sealed & _SEALS != _SEALS or os.fstat(fd).st_size != header_bytes(num_blocks) + num_blocks * block_bytes:
        raise TransferError("the memory that the peer handed over does not have the size that it states")


def _is_memfd(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True
