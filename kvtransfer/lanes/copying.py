"""Which bytes a pull moves, joined into runs as long as they can be; and moving them between two mapped pools."""

import ctypes
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from baton.errors import TransferError
from kvtransfer.lanes.base import ANY_GENERATION, TO_END, BlockRead, check_still_wanted
from kvtransfer.memory import PoolMemory

Integers = npt.NDArray[np.integer[Any]]

MAX_RUN_BYTES = 8 << 20
"""What the kernel moves between two looks at the clock: a few milliseconds."""
_COPY_BYTES = 512 << 10
"""Longest memcpy. Above the size of a second-level cache the C library changes to stores that were measured a fifth
slower when both sides are new to the cache."""

_memcpy = ctypes.CDLL(None).memcpy  # lets go of the interpreter's lock
_memcpy.restype = None
_memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Pieces(NamedTuple):
    """Reads as columns, one entry a read. Starts are bytes from block 0 of each pool."""

    blocks: Integers
    generations: Integers
    remote_starts: Integers
    local_starts: Integers
    lengths: Integers

    def part(self, where: slice) -> "Pieces":
        return Pieces(*(column[where] for column in self))

    @classmethod
    def of(cls, reads: Sequence[BlockRead], local: PoolMemory) -> "Pieces":
        """Raises TransferError for a read that is not inside of a block, here or (where it shows) at the peer."""
        columns = list(zip(*reads, strict=True)) if reads else [()] * len(BlockRead._fields)
        blocks, local_blocks = np.array(columns[0], np.int64), np.array(columns[2], np.int64)
        offsets, lengths = _column(columns[3]), _column(columns[4])
        lengths = np.where(lengths == TO_END, local.block_bytes - offsets, lengths)
        if len(reads) and (lengths.min() <= 0 or offsets.min() < 0 or (offsets + lengths).max() > local.block_bytes):
            raise TransferError(f"a read reaches outside of its block of {local.block_bytes} bytes")
        check_blocks(local_blocks, local.num_blocks, "this")
        return cls(
            blocks,
            np.array(columns[1], np.uint64),
            blocks * local.block_bytes + offsets,
            local_blocks * local.block_bytes + offsets,
            lengths,
        )


def _column(values: Sequence[int]) -> Integers:
    """Mostly one value over and over, which makes for a faster way into an array."""
    if values and values.count(values[0]) == len(values):
        return np.full(len(values), values[0], np.int64)
    return np.array(values, np.int64)


def check_blocks(ids: Integers, num_blocks: int, whose: str = "the peer's") -> None:
    """Raises TransferError for a block that the pool does not have."""
    if len(ids) and not 0 <= ids.min() <= ids.max() < num_blocks:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise TransferError(f"{whose} pool has {num_blocks} blocks, none is number {wrong}")


def check_generations(found: Integers, pieces: Pieces) -> None:
    """`found`: the generation of every piece's block. Raises TransferError when one is not the expected."""
    stale = (found != pieces.generations) & (pieces.generations != ANY_GENERATION)
    if stale.any():
        block = int(pieces.blocks[int(stale.argmax())])
        raise TransferError(f"block {block} of the peer no longer holds what was offered")


class Runs(NamedTuple):
    """Ranges as columns: `lengths` bytes that follow each other in the peer's pool and, in the same order, here."""

    remote_starts: Integers
    local_starts: Integers
    lengths: Integers


def coalesce(remote_starts: Integers, local_starts: Integers, lengths: Integers, max_bytes: int) -> Runs:
    """Bytes to copy in runs of at most `max_bytes` and in the given order; what touches in both pools is joined."""
    if not len(lengths):
        return Runs(remote_starts, local_starts, lengths)
    is_start = np.ones(len(lengths), np.bool_)
    is_start[1:] = remote_starts[1:] != remote_starts[:-1] + lengths[:-1]
    is_start[1:] |= local_starts[1:] != local_starts[:-1] + lengths[:-1]
    starts = np.flatnonzero(is_start)
    joined = Runs(remote_starts[starts], local_starts[starts], np.add.reduceat(lengths, starts))
    return joined if joined.lengths.max() <= max_bytes else _split(joined, max_bytes)


def _split(runs: Runs, max_bytes: int) -> Runs:
    counts = -(-runs.lengths.astype(np.int64) // max_bytes)
    whole = np.repeat(np.arange(len(counts)), counts)
    done = (np.arange(len(whole)) - np.repeat(np.cumsum(counts) - counts, counts)) * max_bytes
    done = done.astype(runs.lengths.dtype)
    lengths = np.minimum(runs.lengths[whole] - done, max_bytes)
    return Runs(runs.remote_starts[whole] + done, runs.local_starts[whole] + done, lengths)


def batches(lengths: Integers, max_count: int, max_bytes: int) -> Iterator[slice]:
    """Cut a row of ranges into rows of at most `max_count` and `max_bytes`; a longer range stands alone."""
    ends = np.cumsum(lengths)
    start = 0
    while start < len(lengths):
        end = int(np.searchsorted(ends, ends[start] - lengths[start] + max_bytes, "right"))
        end = min(max(end, start + 1), start + max_count)
        yield slice(start, end)
        start = end


def copy_blocks(
    remote: PoolMemory,
    local: PoolMemory,
    reads: Sequence[BlockRead],
    deadline: float,
    cancelled: threading.Event | None,
) -> None:
    """Copy every read from one mapped pool into another, between two looks at the generations (a seqlock's reader).

    The second look needs no fence here: x86 keeps loads in order, and on other machines the checksum decides.
    """
    check_still_wanted(deadline, cancelled)
    pieces = Pieces.of(reads, local)
    check_blocks(pieces.blocks, remote.num_blocks)
    check_generations(remote.generations[pieces.blocks], pieces)
    _copy_runs(remote, local, pieces, deadline, cancelled)
    check_generations(remote.generations[pieces.blocks], pieces)


def _copy_runs(
    remote: PoolMemory, local: PoolMemory, pieces: Pieces, deadline: float, cancelled: threading.Event | None
) -> None:
    source, target = remote.blocks, local.blocks  # held, so that both stay mapped
    runs = coalesce(
        pieces.remote_starts + source.ctypes.data, pieces.local_starts + target.ctypes.data, pieces.lengths, _COPY_BYTES
    )
    for part in batches(runs.lengths, len(runs.lengths), MAX_RUN_BYTES):
        check_still_wanted(deadline, cancelled)
        theirs, ours, lengths = (column[part].tolist() for column in runs)
        deque(map(_memcpy, ours, theirs, lengths), maxlen=0)  # a loop in Python is a tenth slower for 64 KiB blocks
