"""NIXL between two processes: `run_nixl.py NUM_BLOCKS BLOCK_BYTES MOVED REPEAT` prints the figures as one line of JSON.

As its documentation says: UCX backend, both pools registered and described once, then for each pull a prepared READ of
`MOVED` random blocks into random places, started and polled until it is done. The peer is this script as `serve`.
"""

import json
import random
import subprocess
import sys
import time

import numpy as np
from nixl._api import nixl_agent, nixl_agent_config
from protocol import claim_output

SMALL_READS = 200
TIMEOUT_S = 60.0


def agent_with_pool(name, num_blocks, block_bytes, fill):
    agent = nixl_agent(name, nixl_agent_config(backends=[]))
    agent.create_backend("UCX")
    pool = np.full((num_blocks, block_bytes), fill, np.uint8)
    agent.register_memory([(pool.ctypes.data, pool.nbytes, 0, "")], "DRAM")
    return agent, pool


def blocks_of(start, num_blocks, block_bytes):
    return [(start + block * block_bytes, block_bytes, 0) for block in range(num_blocks)]


def serve(num_blocks, block_bytes, output):
    agent, pool = agent_with_pool("server", num_blocks, block_bytes, 7)
    print(json.dumps([agent.get_agent_metadata().hex(), pool.ctypes.data]), file=output, flush=True)
    sys.stdin.read()


def read(agent, local, local_ids, remote, remote_ids):
    start = time.perf_counter()
    handle = agent.make_prepped_xfer("READ", local, local_ids, remote, remote_ids, b"")
    state = agent.transfer(handle)
    while state != "DONE":
        if state == "ERR" or time.perf_counter() - start > TIMEOUT_S:
            raise SystemExit(f"the transfer ended in {state}")
        state = agent.check_xfer_state(handle)
    took = time.perf_counter() - start
    agent.release_xfer_handle(handle)
    return took


def pull(num_blocks, block_bytes, moved, repeat, output):
    command = [sys.executable, __file__, "serve", str(num_blocks), str(block_bytes)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    metadata, start = json.loads(child.stdout.readline())
    agent, pool = agent_with_pool("puller", num_blocks, block_bytes, 0)
    peer = agent.add_remote_agent(bytes.fromhex(metadata))
    local = agent.prep_xfer_dlist("NIXL_INIT_AGENT", blocks_of(pool.ctypes.data, num_blocks, block_bytes), "DRAM")
    remote = agent.prep_xfer_dlist(peer, blocks_of(start, num_blocks, block_bytes), "DRAM")
    draw, pulls = random.Random(0), []
    for _ in range(repeat + 2):
        ours, theirs = draw.sample(range(num_blocks), moved), draw.sample(range(num_blocks), moved)
        pulls.append(read(agent, local, ours, remote, theirs))
    if not (pool[ours] == 7).all():
        raise SystemExit("wrong bytes arrived")
    small = [read(agent, local, [0], remote, [0]) for _ in range(SMALL_READS)]
    print(json.dumps({"pulls": pulls[2:], "small": small}), file=output, flush=True)
    child.stdin.close()
    child.wait(10)


def main():
    output = open(claim_output(), "w")  # noqa: SIM115 - for the life of the process
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]), int(sys.argv[3]), output)
    else:
        pull(*map(int, sys.argv[1:]), output)


if __name__ == "__main__":
    main()
