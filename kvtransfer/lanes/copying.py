"""Copying blocks between two mapped pools, and joining neighbours so that each copy is as long as it can be."""

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from baton.errors import TransferError
from kvtransfer.lanes.base import BlockRead, check_still_wanted
from kvtransfer.memory import PoolMemory

BlockIds = npt.NDArray[np.integer[Any]]

MAX_RUN_BYTES = 8 << 20
"""Longest single copy, and what is copied between two looks at the clock: a few milliseconds."""


class Run(NamedTuple):
    """`num_blocks` neighbours in the peer's pool that are neighbours in the same order here."""

    remote_block: int
    local_block: int
    num_blocks: int


def coalesce(remote: BlockIds, local: BlockIds, max_blocks: int) -> list[Run]:
    """Blocks to copy, as two rows of ids, in runs of at most `max_blocks` and in the given order."""
    if not len(remote):
        return []
    is_start = np.ones(len(remote), np.bool_)
    is_start[1:] = (remote[1:] != remote[:-1] + 1) | (local[1:] != local[:-1] + 1)
    starts = np.flatnonzero(is_start)
    lengths = np.diff(starts, append=len(remote))
    runs = map(Run, remote[starts].tolist(), local[starts].tolist(), lengths.tolist())
    if lengths.max() <= max_blocks:
        return list(runs)
    return [
        Run(run.remote_block + done, run.local_block + done, min(max_blocks, run.num_blocks - done))
        for run in runs
        for done in range(0, run.num_blocks, max_blocks)
    ]


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
    check_still_wanted(deadline, cancelled)
    remote_ids = np.array([read.remote_block for read in reads], np.int64)
    local_ids = np.array([read.local_block for read in reads], np.int64)
    expected = np.array([read.remote_generation for read in reads], np.uint64)
    if len(reads) and remote_ids.max() >= remote.num_blocks:
        raise TransferError(f"the peer's pool has {remote.num_blocks} blocks, none is number {remote_ids.max()}")
    _check_generations(remote, remote_ids, expected)
    runs = coalesce(remote_ids, local_ids, max_run_blocks(local.block_bytes))
    _copy_runs(remote, local, runs, deadline, cancelled)
    _check_generations(remote, remote_ids, expected)


def _copy_runs(
    remote: PoolMemory, local: PoolMemory, runs: list[Run], deadline: float, cancelled: threading.Event | None
) -> None:
    source, target, unchecked = remote.blocks, local.blocks, 0
    limit = max_run_blocks(local.block_bytes)
    for theirs, ours, count in runs:
        if count == 1:  # half the overhead of two slices, which shows where memory is fast
            target[ours] = source[theirs]
        else:
            target[ours : ours + count] = source[theirs : theirs + count]
        unchecked += count
        if unchecked >= limit:
            check_still_wanted(deadline, cancelled)
            unchecked = 0


def _check_generations(remote: PoolMemory, ids: BlockIds, expected: npt.NDArray[np.uint64]) -> None:
    stale = remote.generations[ids] != expected
    if stale.any():
        block = int(ids[int(stale.argmax())])
        raise TransferError(f"block {block} of the peer no longer holds what was offered")
