"""One batch of blocks: copied by a lane, then checked by the bytes that really arrived. Runs in a thread."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from baton.errors import TransferError
from kvtransfer.lanes.base import BlockRead, LaneClient
from kvtransfer.memory import PoolMemory

MAX_BATCH_BYTES = 16 << 20
"""Bounds what one thread is busy with, and keeps the bytes in cache until their checksum is computed."""


@dataclass(frozen=True, slots=True)
class WantedBlock:
    """One block to pull, and the xxh3_64 that its bytes must have."""

    read: BlockRead
    checksum: int


@dataclass(frozen=True, slots=True)
class PullOutcome:
    """`num_verified` leading blocks of the batch are right; `failure` says why the rest is not, or is None."""

    num_verified: int
    num_retried: int
    """Blocks that arrived with wrong bytes and were pulled once more."""
    num_mismatched: int
    """Those of them that were wrong again."""
    seconds: float
    failure: str | None


def pull_and_verify(
    client: LaneClient,
    memory: PoolMemory,
    wanted: Sequence[WantedBlock],
    deadline: float,
    cancelled: threading.Event,
) -> PullOutcome:
    """Pull a batch and check every block; what differs is pulled once more. Raises nothing for peer trouble."""
    start = time.monotonic()
    wrong: list[WantedBlock] = []
    num_verified, num_retried, failure = 0, 0, None
    try:
        client.pull([block.read for block in wanted], deadline, cancelled)
        wrong = _mismatched(memory, wanted)
        num_retried = len(wrong)
        if wrong:
            client.pull([block.read for block in wrong], deadline, cancelled)
            wrong = _mismatched(memory, wrong)
        num_verified = wanted.index(wrong[0]) if wrong else len(wanted)
        if wrong:
            failure = f"{len(wrong)} blocks arrived twice with other bytes than were offered"
    except TransferError as error:
        failure = str(error)
    return PullOutcome(num_verified, num_retried, len(wrong), time.monotonic() - start, failure)


def _mismatched(memory: PoolMemory, wanted: Sequence[WantedBlock]) -> list[WantedBlock]:
    return [
        block for block in wanted if xxhash.xxh3_64_intdigest(memory.blocks[block.read.local_block]) != block.checksum
    ]
