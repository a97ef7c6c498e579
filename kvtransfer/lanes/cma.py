"""Lane `cma`: blocks are copied out of a peer's memory on this host by the kernel (process_vm_readv), one copy in all.

For peers that cannot map each other's pool: containers with networks of their own that share process ids, for one.
The endpoint says which process it is and where in its memory everything lies; the peer itself takes no part in a pull.

    boot id/pid/start time/address of the probe/of the generations/of block 0/num_blocks/block_bytes

The probe is one word that holds the token for as long as the pool is served. Every pull reads it first and last. A
process id may be used again by a stranger: the start time and a pidfd tell the peer from others, the pidfd is looked
at before every call of the kernel, and a stranger has no such word in that place.

The kernel allows it to processes of one user, unless kernel.yama.ptrace_scope or a container's filter of system calls
forbids it. That is tried, never assumed.
"""

import ctypes
import errno
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from baton.errors import ConfigurationError, TransferError
from kvtransfer.lanes.base import BlockRead, LaneClient, LaneEndpoint, LaneServer, OtherHostError, check_still_wanted
from kvtransfer.lanes.copying import MAX_RUN_BYTES, Integers, Pieces, batches, check_blocks, check_generations, coalesce
from kvtransfer.lanes.host import boot_id
from kvtransfer.memory import PoolMemory

NAME: Final = "cma"
MAX_RANGES: Final = 1024
"""In one call of the kernel, its IOV_MAX."""
_NEAR: Final = 512
"""Generations of blocks that are no further apart are read as one range: a page's worth."""
_RANGE: Final = np.dtype([("address", np.uint64), ("length", np.uint64)])  # struct iovec
_DENIED: Final = (
    "the kernel does not let this process read the peer's memory: both must run as the same user, with "
    "kernel.yama.ptrace_scope 0 or the capability SYS_PTRACE, and no filter on process_vm_readv"
)

Ranges = npt.NDArray[np.void]

_vm_readv = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)
if _vm_readv is not None:
    _vm_readv.restype = ctypes.c_ssize_t
    _vm_readv.argtypes = (
        ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong,
    )  # fmt: skip


def ranges(addresses: Integers, lengths: Integers) -> Ranges:
    row = np.empty(len(addresses), _RANGE)
    row["address"], row["length"] = addresses, lengths
    return row


def read_memory(pid: int, remote: Ranges, local: Ranges) -> int:
    """Copy out of another process; both rows have the same lengths. Returns how many leading bytes were copied.

    Raises TransferError when it was not even one.
    """
    if _vm_readv is None:
        raise TransferError("this system has no process_vm_readv")
    done: int = _vm_readv(pid, local.ctypes.data, len(local), remote.ctypes.data, len(remote), 0)
    if done <= 0:
        code = ctypes.get_errno() if done < 0 else errno.EFAULT
        if code in (errno.EPERM, errno.EACCES):
            raise TransferError(_DENIED)
        raise TransferError(f"the peer's memory cannot be read: {os.strerror(code)}")
    return done


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since the boot. Raises OSError."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[19])


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a served pool is: the endpoint's address in parts."""

    boot_id: str
    pid: int
    start_time: int
    probe: int
    generations: int
    blocks: int
    num_blocks: int
    block_bytes: int

    def __str__(self) -> str:
        numbers = (self.probe, self.generations, self.blocks, self.num_blocks, self.block_bytes)
        return "/".join([self.boot_id, *map(str, (self.pid, self.start_time, *numbers))])

    @classmethod
    def parse(cls, address: str) -> "_Place":
        """Raises ValueError."""
        host, *numbers = address.split("/")
        place = cls(host, *map(int, numbers))  # a wrong number of them is a TypeError
        if min(map(int, numbers)) <= 0 or max(map(int, numbers)) >= 1 << 62 or place.pid >= 1 << 31:
            raise ValueError("a number is out of range")
        return place


class CmaLaneServer(LaneServer):
    name = NAME

    def __init__(self) -> None:
        self._probe = np.zeros(1, np.uint64)

    def start(self, memory: PoolMemory) -> LaneEndpoint:
        self._probe[0] = memory.token
        place = _Place(
            boot_id(),
            os.getpid(),
            start_time(os.getpid()),
            self._probe.ctypes.data,
            memory.generations.ctypes.data,
            memory.blocks.ctypes.data,
            memory.num_blocks,
            memory.block_bytes,
        )
        word = np.zeros(1, np.uint64)
        try:  # whether the kernel has the call, and a container's filter lets it through
            _read_words(place.pid, place.probe, word)
        except TransferError as error:
            raise ConfigurationError(f"lane cma cannot be served on this host: {error}") from error
        return LaneEndpoint(NAME, str(place), memory.token)

    def close(self) -> None:
        self._probe[0] = 0


def _read_words(pid: int, address: int, words: npt.NDArray[np.uint64]) -> None:
    one = np.array([words.nbytes], np.uint64)
    done = read_memory(
        pid, ranges(np.array([address], np.uint64), one), ranges(np.array([words.ctypes.data], np.uint64), one)
    )
    if done < words.nbytes:
        raise TransferError("the peer's memory ends where words of the pool should be")


class CmaLaneClient(LaneClient):
    name = NAME

    def __init__(self, place: _Place, token: int, local: PoolMemory, pidfd: int) -> None:
        """Takes over `pidfd`."""
        self._place = place
        self._token = token
        self._local = local
        self._pidfd = pidfd

    @classmethod
    def connect(cls, endpoint: LaneEndpoint, local: PoolMemory, deadline: float) -> "CmaLaneClient":
        """Find the process and read its probe. Raises TransferError where that is not possible."""
        try:
            place = _Place.parse(endpoint.address)
        except (ValueError, TypeError) as error:
            raise TransferError(f"lane cma: '{endpoint.address}' is not where a pool is") from error
        if place.boot_id != boot_id():
            raise OtherHostError("lane cma: the peer is on another host")
        if place.block_bytes != local.block_bytes:
            raise TransferError(f"a block has {place.block_bytes} bytes at the peer and {local.block_bytes} here")
        try:
            client = cls(place, endpoint.token, local, os.pidfd_open(place.pid))
        except OSError as error:
            raise TransferError(f"lane cma does not find the peer's process: {error}") from error
        try:
            if start_time(place.pid) != place.start_time:
                raise TransferError("lane cma: the process with the peer's number is another one")
            client._check_probe()
        except OSError as error:
            client.close()
            raise TransferError(f"lane cma does not find the peer's process: {error}") from error
        except TransferError:
            client.close()
            raise
        return client

    def pull(self, reads: Sequence[BlockRead], deadline: float, cancelled: threading.Event | None = None) -> None:
        check_still_wanted(deadline, cancelled)
        pieces = Pieces.of(reads, self._local)
        check_blocks(pieces.blocks, self._place.num_blocks)
        self._check(pieces)
        runs = coalesce(pieces.remote_starts, pieces.local_starts, pieces.lengths, MAX_RUN_BYTES)
        base = self._local.blocks.ctypes.data
        for part in batches(runs.lengths, MAX_RANGES, MAX_RUN_BYTES):
            check_still_wanted(deadline, cancelled)
            lengths = runs.lengths[part]
            remote = ranges(runs.remote_starts[part] + self._place.blocks, lengths)
            self._read(remote, ranges(runs.local_starts[part] + base, lengths))
        self._check(pieces)

    def close(self) -> None:
        os.close(self._pidfd)

    def _check(self, pieces: Pieces) -> None:
        """Raises TransferError when the pool is no longer served, or a block is not what was offered."""
        self._check_probe()
        if not len(pieces.blocks):
            return
        ids = np.unique(pieces.blocks)
        first = np.flatnonzero(np.diff(ids, prepend=-2 * _NEAR) > _NEAR)
        counts = np.append(ids[first[1:] - 1], ids[-1]) - ids[first] + 1
        before = np.cumsum(counts) - counts
        found = np.empty(int(counts.sum()), np.uint64)
        remote = ranges(ids[first] * 8 + self._place.generations, counts * 8)
        local = ranges(before * 8 + found.ctypes.data, counts * 8)
        for start in range(0, len(remote), MAX_RANGES):
            part = slice(start, start + MAX_RANGES)
            self._read(remote[part], local[part])
        span = np.searchsorted(ids[first], pieces.blocks, "right") - 1
        check_generations(found[before[span] + pieces.blocks - ids[first][span]], pieces)

    def _check_probe(self) -> None:
        self._check_process()
        word = np.zeros(1, np.uint64)
        _read_words(self._place.pid, self._place.probe, word)
        if word[0] != self._token:
            raise TransferError("lane cma: the peer no longer serves its pool, or the token is wrong")

    def _read(self, remote: Ranges, local: Ranges) -> None:
        """Copy all of it; the kernel may stop in the middle and then goes on where it stopped."""
        while len(remote):
            self._check_process()
            done = np.uint64(read_memory(self._place.pid, remote, local))
            ends = np.cumsum(remote["length"])
            if done == ends[-1]:
                return
            whole = int(np.searchsorted(ends, done, "right"))
            inside = done - (ends[whole - 1] if whole else np.uint64(0))
            remote, local = remote[whole:].copy(), local[whole:].copy()
            for row in (remote, local):
                row["address"][0] += inside
                row["length"][0] -= inside

    def _check_process(self) -> None:
        """The number still belongs to the peer: it is not given away before the process is gone, a zombie included."""
        try:
            signal.pidfd_send_signal(self._pidfd, 0)
        except OSError as error:
            raise TransferError(f"the peer's process has ended: {error.strerror}") from error
