"""What moving and checking blocks takes, lane by lane. Both pools are in this process; sockets and copies release
Python's lock, so that a lane's two sides run side by side as they do in two processes."""

import logging
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import xxhash

from baton.errors import ConfigurationError, TransferError
from engine.costs import TransferCost
from engine.measuring import seconds
from kvtransfer.lanes.base import BlockRead
from kvtransfer.lanes.registry import Lane
from kvtransfer.memory import PoolMemory

log = logging.getLogger(__name__)

MAX_BYTES = 64 << 20
CONNECT_S = PULL_S = 10.0
MIN_REPEATS, MAX_REPEATS = 3, 25
CHECKSUM = "checksum"


def measure_transfers(lanes: Sequence[Lane], block_bytes: int, budget_s: float) -> list[TransferCost]:
    """Medians for 1, 4, 16, … scattered blocks up to MAX_BYTES. A lane that this host does not have is left out."""
    num_blocks = max(4, MAX_BYTES // block_bytes)
    remote, local = PoolMemory.create(num_blocks, block_bytes), PoolMemory.create(num_blocks, block_bytes)
    try:
        share = budget_s / (len(lanes) + 1)
        costs = _measured(CHECKSUM, partial(_check, local), num_blocks, block_bytes, share)
        for lane in lanes:
            costs += _measure_lane(lane, remote, local, share)
        return costs
    finally:
        remote.close()
        local.close()


def _measure_lane(lane: Lane, remote: PoolMemory, local: PoolMemory, budget_s: float) -> list[TransferCost]:
    server = lane.serve("127.0.0.1")
    try:
        client = lane.connect(server.start(remote), local, time.monotonic() + CONNECT_S)
    except (ConfigurationError, TransferError) as error:
        log.warning("lane %s is left out: %s", lane.name, error)
        server.close()
        return []

    def pull(block_ids: list[int]) -> None:
        reads = [BlockRead(block, 0, block) for block in block_ids]
        client.pull(reads, time.monotonic() + PULL_S)

    try:
        return _measured(lane.name, pull, local.num_blocks, local.block_bytes, budget_s)
    finally:
        client.close()
        server.close()


def _check(memory: PoolMemory, block_ids: list[int]) -> None:
    for block in block_ids:
        xxhash.xxh3_64_intdigest(memory.blocks[block])


def _measured(
    name: str, work: Callable[[list[int]], None], num_blocks: int, block_bytes: int, budget_s: float
) -> list[TransferCost]:
    """Sizes take turns. The blocks are random ones, as a busy pool's are."""
    counts = [count for count in (4**power for power in range(16)) if count < num_blocks] + [num_blocks]
    times: dict[int, list[float]] = {count: [] for count in counts}
    numbers = random.Random(3)
    end = time.perf_counter() + budget_s
    for repeat in range(MAX_REPEATS):
        if repeat >= MIN_REPEATS and time.perf_counter() > end:
            break
        for count in counts:
            times[count].append(seconds(partial(work, numbers.sample(range(num_blocks), count))))
    return [TransferCost(name, count * block_bytes, statistics.median(each)) for count, each in times.items()]
