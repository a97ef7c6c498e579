"""Copying blocks between two mapped pools, and joining neighbours so that each copy is as long as it can be."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from baton.errors import TransferError
from kvtransfer.lanes.base import BlockRead, check_still_wanted
from kvtransfer.memory import PoolMemory

MAX_RUN_BYTES = 8 << 20
"""Longest single copy: a few milliseconds, so that deadline and cancellation are seen in between."""


@dataclass(frozen=True, slots=True)
class Run:
    """`num_blocks` neighbours in the peer's pool that are neighbours in the same order here."""

    remote_block: int
    local_block: int
    num_blocks: int


def coalesce(reads: Sequence[BlockRead], max_blocks: int) -> Iterator[Run]:
    """The reads as runs of at most `max_blocks`, in the given order."""
    start = 0
    for end in range(1, len(reads) + 1):
        first = reads[start]
        if (
            end < len(reads)
            and end - start < max_blocks
            and reads[end].remote_block == first.remote_block + end - start
            and reads[end].local_block == first.local_block + end - start
        ):
            continue
        yield Run(first.remote_block, first.local_block, end - start)
        start = end


def max_run_blocks(block_bytes: int) -> int:
    return max(1, MAX_RUN_BYTES // block_bytes)


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
    ids = np.fromiter((read.remote_block for read in reads), np.int64, len(reads))
    expected = np.fromiter((read.remote_generation for read in reads), np.uint64, len(reads))
    if len(ids) and int(ids.max()) >= remote.num_blocks:
        raise TransferError(f"the peer's pool has {remote.num_blocks} blocks, none is number {int(ids.max())}")
    _check_generations(remote, ids, expected)
    for run in coalesce(reads, max_run_blocks(local.block_bytes)):
        check_still_wanted(deadline, cancelled)
        np.copyto(
            local.blocks[run.local_block : run.local_block + run.num_blocks],
            remote.blocks[run.remote_block : run.remote_block + run.num_blocks],
        )
    _check_generations(remote, ids, expected)


def _check_generations(remote: PoolMemory, ids: np.ndarray, expected: np.ndarray) -> None:
    stale = remote.generations[ids] != expected
    if stale.any():
        block = int(ids[int(stale.argmax())])
        raise TransferError(f"block {block} of the peer no longer holds what was offered")
