"""How fast blocks of a peer with another layout become blocks here, beside one memcpy in the same run.

    python -m benchmarks.conversion [--quick] [--json FILE] [--repeat 15]

Every repetition converts 64 MiB of a peer's blocks, 4 MiB at a time as a hand-over does, into random places of a pool.
The memcpy is numpy's copy of the same number of bytes; the repetitions of both alternate, so that other load on the
machine hits both. One thread; a hand-over has two. The last rows are of whole pulls between two processes by lane shm,
checksums included, with and without another page size.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import xxhash

from benchmarks.report import Report, add_common_arguments
from kvtransfer.conversion import Row, plan
from kvtransfer.lanes.base import BlockRead, LaneClient, LaneEndpoint
from kvtransfer.lanes.registry import LANES
from kvtransfer.layout import BlockLayout
from kvtransfer.memory import PoolMemory
from kvtransfer.pulls import MAX_BATCH_BYTES, Part, WantedBytes, pull_and_verify
from kvtransfer.staging import MAX_STAGED_BYTES, Converters

MOVED_BYTES = 64 << 20
POOL_BYTES = 128 << 20
SHAPES = {
    "16 layers, 4 heads of 64": BlockLayout("m", "bfloat16", 16, 4, 64, 16, weights_fingerprint="w"),
    "32 layers, 8 heads of 128": BlockLayout("m", "bfloat16", 32, 8, 128, 16, weights_fingerprint="w"),
}
PAGES = (({"page_size_tokens": 16}, {"page_size_tokens": 32}), ({"page_size_tokens": 32}, {"page_size_tokens": 16}))
RANKS = (({}, {"tp_size": 2, "tp_rank": 1}),)
DTYPES = tuple(
    ({"dtype": there}, {"dtype": here})
    for there in ("bfloat16", "float16", "float32")
    for here in ("bfloat16", "float16", "float32")
    if there != here
)


def contents() -> npt.NDArray[np.uint8]:
    """The byte that each block of the offering process is full of; more than any pool here has blocks."""
    return np.random.default_rng(1).integers(0, 256, (1 << 16, 1), np.uint8)


def serve(block_bytes: int) -> None:
    """The offering process: serves a pool until its standard input ends."""
    memory = PoolMemory.create(POOL_BYTES // block_bytes, block_bytes)
    memory.blocks[:] = contents()[: memory.num_blocks]
    server = LANES["shm"].serve("127.0.0.1")
    endpoint = server.start(memory)
    print(json.dumps([endpoint.lane, endpoint.address, endpoint.token]), flush=True)
    sys.stdin.read()
    server.close()


@contextlib.contextmanager
def offering(block_bytes: int) -> Iterator[LaneEndpoint]:
    command = [sys.executable, "-m", "benchmarks.conversion", "--serve", str(block_bytes)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        if child.stdout is None or not (line := child.stdout.readline()):
            raise SystemExit("the offering process did not start")
        yield LaneEndpoint(*json.loads(line))
    finally:
        child.communicate(timeout=10)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ordinary_numbers(count: int, dtype: str) -> np.ndarray:
    """Bytes of normally distributed numbers, as KV is."""
    numbers = np.random.default_rng(0).standard_normal(count, np.float32)
    if dtype == "float32":
        return numbers.view(np.uint8)
    halves = numbers.astype(np.float16) if dtype == "float16" else numbers.view(np.uint16)[1::2].copy()
    return halves.view(np.uint8)


def measure(report: Report, name: str, here: BlockLayout, peer: BlockLayout, repeat: int) -> None:
    conversion = plan(here, peer, other_dtypes=True)
    if conversion is None:
        raise ValueError("equal layouts are not converted")
    num_there = MOVED_BYTES // peer.block_bytes
    num_here = conversion.num_touched(num_there)
    numbers = peer.block_bytes // (4 if peer.dtype == "float32" else 2)
    source = np.tile(ordinary_numbers(numbers, peer.dtype), (num_there, 1))
    pool = np.zeros((num_here, here.block_bytes), np.uint8)
    row = Row(np.random.default_rng(1).permutation(num_here).tolist())
    batch = max(1, MAX_STAGED_BYTES // peer.block_bytes)
    staged = np.zeros((batch, peer.block_bytes), np.uint8)
    original, copy = np.ones(source.nbytes, np.uint8), np.zeros(source.nbytes, np.uint8)
    conversions, copies = [], []
    for _ in range(repeat + 1):
        taken = 0.0
        for first in range(0, num_there, batch):
            part = source[first : first + batch]
            staged[: len(part)] = part  # what the lane does; not measured
            places, start = range(len(part)), first
            taken += seconds(lambda: conversion.convert(staged, places, start, pool, row))  # noqa: B023 - called at once
        conversions.append(taken)
        copies.append(seconds(lambda: np.copyto(copy, original)))
    for kind, pick in (("best", min), ("median", statistics.median)):
        speed, limit = source.nbytes / pick(conversions[1:]) / 1e9, source.nbytes / pick(copies[1:]) / 1e9
        report.row(f"{name}, {kind}", speed, "GB/s", f"memcpy {limit:.1f}", speed / limit)


def measure_pulls(report: Report, shape: str, peer: BlockLayout, repeat: int) -> None:
    """What converting adds to a pull of another process's blocks: copied as they are, and into pages twice as long."""
    here = replace(peer, page_size_tokens=2 * peer.page_size_tokens)
    num_there, moved = POOL_BYTES // peer.block_bytes, MOVED_BYTES // peer.block_bytes
    content = contents()[:num_there]
    sums = [xxhash.xxh3_64_intdigest(np.repeat(byte, peer.block_bytes)) for byte in content]
    remote = np.random.default_rng(2).permutation(num_there)[:moved].tolist()
    raw, pool = PoolMemory.create(moved, peer.block_bytes), PoolMemory.create(moved // 2, here.block_bytes)
    converters, cancelled = Converters(here, pool, other_dtypes=False), threading.Event()
    converter = converters.for_peer(peer)
    if converter is None:
        raise ValueError("equal layouts are not converted")
    wanted = [
        WantedBytes(BlockRead(block, 0, place), [Part(peer.block_bytes, sums[block])])
        for place, block in enumerate(remote)
    ]
    size, row = MAX_BATCH_BYTES // peer.block_bytes, Row(np.random.default_rng(3).permutation(moved // 2).tolist())

    def pull_raw(client: LaneClient) -> None:
        for first in range(0, moved, size):
            pull_and_verify(client, raw, wanted[first : first + size], time.monotonic() + 60, cancelled)

    def pull_converted(client: LaneClient) -> None:
        first = 0
        while first < moved:
            part = wanted[first : first + size]
            outcome = converter.pull(client, part, first, row, time.monotonic() + 60, cancelled)
            if outcome.failure is not None:
                raise SystemExit(outcome.failure)
            first += outcome.num_verified

    plain, converted = [], []
    with offering(peer.block_bytes) as endpoint:
        to_pool, to_staging = (
            LANES["shm"].connect(endpoint, memory, time.monotonic() + 10) for memory in (raw, converter.staging.memory)
        )
        for _ in range(repeat + 1):
            plain.append(seconds(lambda: pull_raw(to_pool)))
            converted.append(seconds(lambda: pull_converted(to_staging)))
        to_pool.close()
        to_staging.close()
    pages = pool.blocks[row.block_ids].reshape(moved // 2, -1, 2, peer.page_size_tokens * peer.head_dim * 2)
    if not all((pages[:, :, half] == content[remote[half::2], None]).all() for half in (0, 1)):
        raise SystemExit("a conversion delivered wrong bytes")
    name = f"{shape}: pull, check, page size doubled"
    for kind, pick in (("best", min), ("median", statistics.median)):
        speed, limit = MOVED_BYTES / pick(converted[1:]) / 1e9, MOVED_BYTES / pick(plain[1:]) / 1e9
        report.row(f"{name}, {kind}", speed, "GB/s", f"as they are {limit:.1f}", speed / limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--repeat", type=int, default=15, help="repetitions of each figure")
    parser.add_argument("--serve", type=int, metavar="BLOCK_BYTES", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    repeat = 5 if arguments.quick else arguments.repeat
    report = Report("KV blocks of another layout, 64 MiB of the peer's bytes")
    for shape, layout in list(SHAPES.items())[: 1 if arguments.quick else None]:
        for there, here in (*PAGES, *RANKS, *DTYPES):
            peer, mine = replace(layout, **there), replace(layout, **here)
            mine = replace(mine, num_kv_heads=mine.num_kv_heads // mine.tp_size)
            name = str(plan(mine, peer, other_dtypes=True))
            measure(report, f"{shape}: {name}", mine, peer, repeat)
        measure_pulls(report, shape, layout, repeat)
    report.note("GB/s count the peer's bytes; more or fewer are written where dtype or heads differ.")
    report.note("They come out of a core's cache, where a transfer leaves them; the memcpy's come from memory.")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
