"""How fast the disk tier stores and loads KV blocks, beside a bare loop on the same disk, and how fast it comes back.

    python -m benchmarks.disk [--quick] [--json FILE] [--folder DIR] [--block-sizes 262144] [--threads 4] [--repeat 7]

The bare loop: as many threads, each with one page-aligned buffer, pread or pwrite whole blocks past the page cache
(O_DIRECT) at random places of one file that was written before. It neither copies, checks, looks up nor evicts. The
tier is full and evicts while it stores. Repetitions of both alternate, so that other load on the machine hits both.
Disks with a cache of their own, or of their host, are measured with it.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.report import Report, add_common_arguments
from kvtransfer.tiers.disk import DiskTier
from kvtransfer.tiers.files import aligned_bytes

GIB = 1 << 30
GOAL = ">= 0.9"


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_threads(num_threads: int, numbers: list[int], work: Callable[[list[int]], None]) -> float:
    """Seconds until every thread has done its share of the numbers."""
    threads = [threading.Thread(target=work, args=(numbers[k::num_threads],)) for k in range(num_threads)]

    def run() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return seconds(run)


class BareLoop:
    """The limit: blocks in one file, read and written by place."""

    def __init__(self, folder: Path, num_blocks: int, block_bytes: int, num_threads: int) -> None:
        self._file = os.open(folder / "bare", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        self._block_bytes = block_bytes
        self._num_threads = num_threads
        os.posix_fallocate(self._file, 0, num_blocks * block_bytes)
        self.write(list(range(num_blocks)))

    def write(self, numbers: list[int]) -> float:
        return self._run(os.pwritev, numbers)

    def read(self, numbers: list[int]) -> float:
        return self._run(os.preadv, numbers)

    def _run(self, operation: Callable[..., int], numbers: list[int]) -> float:
        def work(mine: list[int]) -> None:
            buffer = [aligned_bytes(self._block_bytes)]
            for number in mine:
                operation(self._file, buffer, number * self._block_bytes)

        return in_threads(self._num_threads, numbers, work)

    def close(self) -> None:
        os.close(self._file)


class MeasuredTier:
    """A tier with room for `num_blocks`, filled by blocks that are told apart by their first bytes."""

    def __init__(self, folder: Path, num_blocks: int, block_bytes: int, num_threads: int) -> None:
        self._num_threads = num_threads
        self._next_name = 0
        self._blocks = np.random.default_rng(0).integers(0, 256, (32, block_bytes), np.uint8)
        self.folder = folder
        self.capacity_bytes = int(num_blocks * (block_bytes + 4096) * 1.01) + (8 << 20)
        self.open()

    def open(self) -> None:
        block_bytes = self._blocks.shape[1]
        threads = self._num_threads
        self.tier = DiskTier(
            self.folder, self.capacity_bytes, block_bytes, "benchmark", num_readers=threads, num_writers=threads
        )

    def count(self, what: str) -> int:
        return int(self.tier.counters[f"kv_disk_{what}"])

    def store(self, num_blocks: int) -> float:
        """Seconds until so many new blocks are on the disk. What the tier refuses, as its buffers are full, waits."""

        def run() -> None:
            stored = self.count("stored")
            for _ in range(num_blocks):
                self._next_name += 1
                name = self._next_name.to_bytes(16, "little")
                block = self._blocks[self._next_name % len(self._blocks)]
                while not self.tier.put(name, block):
                    time.sleep(0.0005)
            while self.count("stored") < stored + num_blocks:
                time.sleep(0.0005)

        return seconds(run)

    def load(self, numbers: list[int]) -> float:
        """Seconds until the blocks stored so long ago (1: the last one) were loaded."""

        def work(mine: list[int]) -> None:
            into = np.zeros(self._blocks.shape[1], np.uint8)
            for ago in mine:
                number = self._next_name - ago
                if not self.tier.get(number.to_bytes(16, "little"), into, time.monotonic() + 30):
                    raise SystemExit(f"block {number} is lost: {self.tier.counters}")
            if not (into == self._blocks[number % len(self._blocks)]).all():
                raise SystemExit("the tier gave wrong bytes")

        return in_threads(self._num_threads, numbers, work)


def measure(report: Report, folder: Path, block_bytes: int, num_threads: int, moved: int, repeat: int) -> None:
    num_blocks = moved // block_bytes
    bare = BareLoop(folder, num_blocks, block_bytes, num_threads)
    ours = MeasuredTier(folder / "tier", 2 * num_blocks, block_bytes, num_threads)
    ours.store(2 * num_blocks)
    random = np.random.default_rng(1)
    times: dict[str, list[float]] = {"bare write": [], "write": [], "bare read": [], "read": []}
    for _ in range(repeat + 1):
        order = random.permutation(num_blocks).tolist()
        times["bare write"].append(bare.write(order))
        times["write"].append(ours.store(num_blocks))
        times["bare read"].append(bare.read(order))
        times["read"].append(ours.load(order))
    for work in ("write", "read"):
        for kind, pick in (("best", min), ("median", statistics.median)):
            speed, limit = (moved / pick(times[side][1:]) / 1e9 for side in (work, f"bare {work}"))
            name = f"{work} {block_bytes >> 10} KiB blocks, {num_threads} threads, {kind}"
            goal = GOAL if kind == "median" else None
            report.row(name, speed, "GB/s", f"bare loop {limit:.2f}", speed / limit, goal)
    ours.tier.close(time.monotonic() + 30)
    bare.close()


def measure_start(report: Report, folder: Path, num_bytes: int, num_threads: int) -> None:
    """How long a tier takes to index what it finds."""
    block_bytes = 256 << 10
    num_blocks = num_bytes // (block_bytes + 4096)
    ours = MeasuredTier(folder / "start", num_blocks, block_bytes, num_threads)
    ours.store(num_blocks)
    ours.tier.close(time.monotonic() + 60)
    took = seconds(ours.open)
    found = sum(ours.tier.holds([number.to_bytes(16, "little") for number in range(1, num_blocks + 1)]))
    if found != num_blocks:
        raise SystemExit(f"{found} of {num_blocks} blocks were found again")
    ours.tier.close(time.monotonic() + 60)
    name = f"index of {num_bytes / GIB:.0f} GiB rebuilt, {num_blocks} blocks of 256 KiB"
    report.row(name, took, "s", goal="<= 2 s" if num_bytes >= 10 * GIB else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--folder", help="where to measure (default: a temporary folder)")
    parser.add_argument("--block-sizes", default="262144,1048576", help="bytes of a block, several with commas")
    parser.add_argument("--threads", type=int, default=4, help="that read and that write, on both sides")
    parser.add_argument("--repeat", type=int, default=7, help="repetitions of each figure")
    arguments = parser.parse_args()
    moved = GIB // 4 if arguments.quick else GIB
    tier_bytes = GIB if arguments.quick else 10 * GIB
    report = Report("KV blocks on a disk")
    with tempfile.TemporaryDirectory(prefix="baton-disk-", dir=arguments.folder) as name:
        folder, free = Path(name), shutil.disk_usage(name).free
        if free < 5 * moved:
            report.note(
                f"not measured: reading and writing, as {free / GIB:.1f} GiB are free and {5 * moved / GIB} needed"
            )
        else:
            for size in arguments.block_sizes.split(","):
                measure(report, folder, int(size), arguments.threads, moved, arguments.repeat)
                shutil.rmtree(folder / "tier")
        if free < 2 * tier_bytes:
            report.note(f"not measured: the start, as {free / GIB:.1f} GiB are free and {2 * tier_bytes / GIB} needed")
        else:
            measure_start(report, folder, tier_bytes, arguments.threads)
    if arguments.quick:
        report.note("--quick: the start is measured with 1 GiB; the goal is for 10 GiB")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
