"""The offering side of one lane as a process: `python -m tests.kvtransfer.lane_server ucx SEED NUM_BLOCKS BLOCK_BYTES`.

It prints its endpoint, then answers each line of its standard input with a line: ["bump", block] raises a block's
generation, ["bump late", block] does so when the next request has been sent and not yet judged.
"""

import json
import sys

from kvtransfer.lanes import ucx
from kvtransfer.lanes.registry import LANES
from kvtransfer.memory import PoolMemory
from tests.kvtransfer.world import new_memory


def main(lane: str, seed: int, num_blocks: int, block_bytes: int) -> None:
    memory = new_memory(seed, num_blocks, block_bytes)
    server = LANES[lane].serve("127.0.0.1")
    endpoint = server.start(memory)
    print(json.dumps([endpoint.lane, endpoint.address, endpoint.token]), flush=True)
    for line in sys.stdin:
        command, block = json.loads(line)
        if command == "bump":
            memory.generations[block] += 1
        elif command == "bump late":
            bump_late(memory, block)
        print("done", flush=True)
    server.close()


def bump_late(memory: PoolMemory, block: int) -> None:
    judge = ucx._Peer._end

    def bump_then_judge(peer: ucx._Peer) -> None:
        memory.generations[block] += 1
        ucx._Peer._end = judge
        judge(peer)

    ucx._Peer._end = bump_then_judge


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
