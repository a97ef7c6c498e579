"""The pulling side of one lane as a process: `python -m tests.kvtransfer.lane_puller ENDPOINT NUM_BLOCKS BLOCK_BYTES`.

It prints a line after the first pull of the whole pool, and goes on pulling until it is killed.
"""

import json
import sys
import time

from kvtransfer.lanes.base import BlockRead, LaneEndpoint
from kvtransfer.lanes.registry import LANES
from tests.kvtransfer.world import new_memory


def main(endpoint: LaneEndpoint, num_blocks: int, block_bytes: int) -> None:
    target = new_memory(num_blocks=num_blocks, block_bytes=block_bytes)
    client = LANES[endpoint.lane].connect(endpoint, target, time.monotonic() + 10)
    client.pull([BlockRead(block, 0, block) for block in range(num_blocks)], time.monotonic() + 10)
    print("pulling", flush=True)
    while True:
        client.pull([BlockRead(block, 0, block) for block in range(num_blocks)], time.monotonic() + 10)


if __name__ == "__main__":
    main(LaneEndpoint(*json.loads(sys.argv[1])), *map(int, sys.argv[2:]))
