"""The pulling side as a process: `python -m tests.kvtransfer.puller ADDRESS NUM_BLOCKS`.

It takes hand-over "h" from the offerer at ADDRESS, prints a line once NUM_BLOCKS blocks are verified, and waits for
more until it is killed.
"""

import asyncio
import sys
import time

from kvtransfer.intake import Intake
from kvtransfer.lanes.registry import parse_lanes
from kvtransfer.wire import PeerRef
from tests.kvtransfer.world import DECODE, LAYOUT, NUM_BLOCKS, OPTIONS, PREFILL, new_memory


async def main(address: str, num_blocks: int) -> None:
    counters: dict[str, float] = {}
    intake = Intake(DECODE, LAYOUT, new_memory(), parse_lanes("shm"), OPTIONS, counters)
    peer = PeerRef(PREFILL.worker_id, PREFILL.incarnation, address)
    task = asyncio.create_task(intake.take("h", peer, range(NUM_BLOCKS), 0, time.monotonic() + 60))
    while counters.get("handover_blocks_received", 0) < num_blocks:
        await asyncio.sleep(0.005)
    print("verified", flush=True)
    await task


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
