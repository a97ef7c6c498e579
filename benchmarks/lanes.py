"""How fast each lane moves scattered KV blocks from one process to another, beside one memcpy in the same run.

    python -m benchmarks.lanes [--quick] [--json FILE] [--block-sizes 65536,262144] [--lanes shm,tcp] [--repeat 15]

Every repetition moves 64 MiB: blocks in random order out of one 128 MiB pool into random places of another. The
memcpy is numpy's copy of 64 MiB from one array into another in the pulling process. Repetitions of both alternate,
so that other load on the machine hits both.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.report import Report, add_common_arguments
from kvtransfer.lanes.base import BlockRead, LaneClient, LaneEndpoint
from kvtransfer.lanes.registry import LANES
from kvtransfer.memory import PoolMemory

MOVED_BYTES = 64 << 20
POOL_BYTES = 128 << 20
GOALS = {"shm": ">= 0.9", "tcp": ">= 3 GB/s"}


def serve(lane: str, num_blocks: int, block_bytes: int) -> None:
    """The offering process: serves a pool until its standard input ends."""
    memory = PoolMemory.create(num_blocks, block_bytes)
    memory.blocks[:] = np.random.default_rng(1).integers(0, 256, (num_blocks, 1), np.uint8)
    server = LANES[lane].serve("127.0.0.1")
    endpoint = server.start(memory)
    print(json.dumps([endpoint.lane, endpoint.address, endpoint.token]), flush=True)
    sys.stdin.read()
    server.close()


@contextlib.contextmanager
def connected(lane: str, local: PoolMemory) -> Iterator[LaneClient]:
    command = [sys.executable, "-m", "benchmarks.lanes", "--serve", lane]
    command += ["--block-sizes", str(local.block_bytes)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        if child.stdin is None or child.stdout is None:
            raise RuntimeError("the offering process has no pipes")
        endpoint = LaneEndpoint(*json.loads(child.stdout.readline()))
        client = LANES[lane].connect(endpoint, local, time.monotonic() + 10)
        yield client
        client.close()
    finally:
        child.communicate(timeout=10)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(report: Report, lane: str, block_bytes: int, repeat: int) -> None:
    num_blocks, moved = POOL_BYTES // block_bytes, MOVED_BYTES // block_bytes
    local = PoolMemory.create(num_blocks, block_bytes)
    local.blocks[:] = 0
    source, target = np.ones(MOVED_BYTES, np.uint8), np.zeros(MOVED_BYTES, np.uint8)
    random = np.random.default_rng(0)
    pulls, copies = [], []
    with connected(lane, local) as client:
        for _ in range(repeat + 2):
            remote_ids = random.permutation(num_blocks)[:moved].tolist()
            local_ids = random.permutation(num_blocks)[:moved].tolist()
            reads = [BlockRead(there, 0, here) for there, here in zip(remote_ids, local_ids, strict=True)]
            pulls.append(seconds(lambda reads=reads: client.pull(reads, time.monotonic() + 60)))
            copies.append(seconds(lambda: np.copyto(target, source)))
    expected = np.random.default_rng(1).integers(0, 256, (num_blocks, 1), np.uint8)
    if not (local.blocks[local_ids] == expected[remote_ids]).all():
        raise SystemExit(f"lane {lane} delivered wrong bytes")
    local.close()
    name = f"{lane}, {block_bytes >> 10} KiB blocks"
    for kind, pick in (("best", min), ("median", statistics.median)):
        speed, limit = MOVED_BYTES / pick(pulls[2:]) / 1e9, MOVED_BYTES / pick(copies[2:]) / 1e9
        goal = GOALS.get(lane) if kind == "best" and block_bytes == 256 << 10 else None
        report.row(f"{name}, {kind}", speed, "GB/s", f"memcpy {limit:.1f}", speed / limit, goal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--block-sizes", default="", help="bytes of a block, several separated by commas")
    parser.add_argument("--lanes", default="shm,tcp", help="lanes to measure")
    parser.add_argument("--repeat", type=int, default=15, help="repetitions of each figure")
    parser.add_argument("--serve", metavar="LANE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.block_sizes.split(",") if size]
    if arguments.serve:
        serve(arguments.serve, POOL_BYTES // sizes[0], sizes[0])
        return
    sizes = sizes or ([256 << 10] if arguments.quick else [4 << 10, 64 << 10, 256 << 10, 1 << 20])
    report = Report("KV blocks between two processes, 64 MiB scattered")
    for lane in arguments.lanes.split(","):
        for block_bytes in sizes:
            measure(report, lane, block_bytes, arguments.repeat)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
