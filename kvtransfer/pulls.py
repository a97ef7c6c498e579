"""One batch of blocks: copied by a lane, then checked by the bytes that really arrived. Runs in a thread."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from baton.errors import TransferError
from kvtransfer.lanes.base import BlockRead, LaneClient
from kvtransfer.memory import PoolMemory

MAX_BATCH_BYTES = 16 << 20
"""Bounds what one thread is busy with, and keeps the bytes in cache until their checksum is computed."""


class Part(NamedTuple):
    """Bytes of a block up to `end`, from where the part before ends, and the xxh3_64 that they must have."""

    end: int
    checksum: int


@dataclass(frozen=True, slots=True)
class WantedBytes:
    """Bytes of one block to pull, and how they are checked. `read` states where they begin and how many they are."""

    read: BlockRead
    parts: Sequence[Part]

    def is_right(self, block: npt.NDArray[np.uint8]) -> bool:
        """Whether the bytes of `block`, uint8 [block_bytes], are those that were offered."""
        start = self.read.offset
        for end, checksum in self.parts:
            if xxhash.xxh3_64_intdigest(block[start:end].data) != checksum:
                return False
            start = end
        return True


@dataclass(frozen=True, slots=True)
class PullOutcome:
    """`num_verified` leading entries of the batch are right; `failure` says why the rest is not, or is None."""

    num_verified: int
    num_retried: int
    """Entries that arrived with wrong bytes and were pulled once more."""
    num_mismatched: int
    """Those of them that were wrong again."""
    seconds: float
    failure: str | None


def pull_and_verify(
    client: LaneClient,
    memory: PoolMemory,
    wanted: Sequence[WantedBytes],
    deadline: float,
    cancelled: threading.Event,
) -> PullOutcome:
    """Pull a batch and check all of it; what differs is pulled once more. Raises nothing for peer trouble."""
    start = time.monotonic()
    wrong: list[WantedBytes] = []
    num_verified, num_retried, failure = 0, 0, None
    try:
        client.pull([each.read for each in wanted], deadline, cancelled)
        wrong = _mismatched(memory, wanted)
        num_retried = len(wrong)
        if wrong:
            client.pull([each.read for each in wrong], deadline, cancelled)
            wrong = _mismatched(memory, wrong)
        num_verified = wanted.index(wrong[0]) if wrong else len(wanted)
        if wrong:
            failure = f"{len(wrong)} blocks arrived twice with other bytes than were offered"
    except TransferError as error:
        failure = str(error)
    return PullOutcome(num_verified, num_retried, len(wrong), time.monotonic() - start, failure)


def _mismatched(memory: PoolMemory, wanted: Sequence[WantedBytes]) -> list[WantedBytes]:
    return [each for each in wanted if not each.is_right(memory.blocks[each.read.local_block])]
