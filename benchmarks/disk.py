"""How fast the disk tier stores and loads KV blocks, beside a bare loop on the same disk, and how fast it comes back.

    python -m benchmarks.disk [--quick] [--json FILE] [--folder DIR] [--block-sizes 262144,1048576] [--threads 4]
                             [--rounds 5]

The bare loop: as many threads pread or pwrite whole blocks past the page cache (O_DIRECT) at random places of one file
that was written before. They use the tier's own buffers, as the speed of a virtual machine's memory differs from place
to place, twofold where this was written. It neither copies, checks, looks up nor evicts. The tier is full and evicts
while it stores; one thread puts, and asks for a repetition's blocks at once.

Every repetition moves 128 MiB. They alternate, and so does who begins, so that other load on the machine and limits of
bandwidth over time hit both; after four the tier is opened anew. Disks with a cache of their own, or of their host, are
measured with it.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.report import Report, add_common_arguments
from kvtransfer.tiers.disk import DiskTier
from kvtransfer.tiers.files import Files, aligned_buffers

GIB = 1 << 30
GOAL = ">= 0.9"
MOVED_BYTES = 128 << 20
POOL_BLOCKS = 64


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class WatchedFiles(Files):
    """Notes the buffers that the tier reads and writes with, so that the bare loop can use the same ones."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.read_buffers: dict[int, memoryview] = {}
        self.write_buffers: dict[int, memoryview] = {}

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.read_buffers[id(buffers[0])] = buffers[0]
        return super().preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.write_buffers[id(buffers[0])] = buffers[0]
        return super().pwritev(fd, buffers, offset)


class BareLoop:
    """The limit: blocks in one file, read and written by place."""

    def __init__(self, folder: Path, num_blocks: int, block_bytes: int, num_threads: int) -> None:
        self._file = os.open(folder / "bare", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        self._block_bytes = block_bytes
        self._num_threads = num_threads
        os.posix_fallocate(self._file, 0, num_blocks * block_bytes)
        block = aligned_buffers(1, block_bytes)
        np.frombuffer(block[0], np.uint8)[:] = np.random.default_rng(0).integers(0, 256, block_bytes, np.uint8)
        self.write(list(range(num_blocks)), block)

    def write(self, numbers: list[int], buffers: list[memoryview]) -> float:
        return self._run(os.pwritev, numbers, buffers)

    def read(self, numbers: list[int], buffers: list[memoryview]) -> float:
        return self._run(os.preadv, numbers, buffers)

    def _run(self, operation: Callable[..., int], numbers: list[int], buffers: list[memoryview]) -> float:
        def work(first: int) -> None:
            for at in range(first, len(numbers), self._num_threads):
                buffer = buffers[at % len(buffers)][: self._block_bytes]
                operation(self._file, [buffer], numbers[at] * self._block_bytes)

        threads = [threading.Thread(target=work, args=(first,)) for first in range(self._num_threads)]

        def run() -> None:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        return seconds(run)


class MeasuredTier:
    """A tier with room for `num_blocks`, filled by blocks that are told apart by their first bytes."""

    def __init__(self, folder: Path, num_blocks: int, block_bytes: int, num_threads: int) -> None:
        self._num_threads = num_threads
        self._next_name = 0
        self._blocks = np.random.default_rng(0).integers(0, 256, (POOL_BLOCKS, block_bytes), np.uint8)
        self._pool = np.zeros((POOL_BLOCKS, block_bytes), np.uint8)
        self.folder = folder
        self.capacity_bytes = int(num_blocks * (block_bytes + 4096) * 1.01) + (8 << 20)
        self.open()

    def open(self) -> None:
        block_bytes = self._blocks.shape[1]
        threads = self._num_threads
        self.tier = DiskTier(
            self.folder,
            self.capacity_bytes,
            block_bytes,
            "benchmark",
            num_readers=threads,
            num_writers=threads,
            open_files=self._watch,
        )

    def _watch(self, folder: Path) -> WatchedFiles:
        self.files = WatchedFiles(folder)
        return self.files

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
        """Seconds until the blocks stored so long ago (0: the last one) were loaded."""
        newest = self._next_name
        names = [(newest - ago).to_bytes(16, "little") for ago in numbers]
        into = [self._pool[at % POOL_BLOCKS] for at in range(len(numbers))]
        took = seconds(lambda: self.tier.get_many(names, into, time.monotonic() + 60))
        right = self._blocks[(newest - numbers[-1]) % POOL_BLOCKS]
        if self.count("misses") or not (into[-1] == right).all():
            raise SystemExit(f"blocks are lost or wrong: {self.tier.counters}")
        return took


def measure(report: Report, folder: Path, block_bytes: int, num_threads: int, held: int, rounds: int) -> None:
    num_blocks, num_moved = held // block_bytes, MOVED_BYTES // block_bytes
    ours = MeasuredTier(folder / "tier", num_blocks, block_bytes, num_threads)
    ours.store(num_blocks)
    random = np.random.default_rng(1)
    times: dict[str, list[float]] = {"bare write": [], "write": [], "bare read": [], "read": []}
    bare = BareLoop(folder, num_blocks, block_bytes, num_threads)
    for _ in range(rounds):
        ours.store(num_moved)
        ours.load(list(range(num_moved)))
        write_buffers = list(ours.files.write_buffers.values())
        read_buffers = list(ours.files.read_buffers.values())[-num_threads:]  # without those that read the record pages
        for repetition in range(4):
            # The older half may be evicted by the next repetition.
            order = random.permutation(num_blocks // 2)[:num_moved].tolist()
            sides = ["bare write", "write", "bare read", "read"]
            for side in reversed(sides) if repetition % 2 else sides:
                if side == "bare write":
                    took = bare.write(order, write_buffers)
                elif side == "write":
                    took = ours.store(num_moved)
                elif side == "bare read":
                    took = bare.read(order, read_buffers)
                else:
                    took = ours.load(order)
                times[side].append(took)
        ours.tier.close(time.monotonic() + 30)
        ours.open()
    ours.tier.close(time.monotonic() + 30)
    for kind_of_work in ("write", "read"):
        for kind, pick in (("best", min), ("median", statistics.median)):
            speed = MOVED_BYTES / pick(times[kind_of_work]) / 1e9
            limit = MOVED_BYTES / pick(times[f"bare {kind_of_work}"]) / 1e9
            name = f"{kind_of_work} {block_bytes >> 10} KiB blocks, {num_threads} threads, {kind}"
            goal = GOAL if kind == "median" else None
            report.row(name, speed, "GB/s", f"bare loop {limit:.2f}", speed / limit, goal)


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
    parser.add_argument("--rounds", type=int, default=5, help="of four repetitions each")
    arguments = parser.parse_args()
    held = GIB // 2 if arguments.quick else GIB
    tier_bytes = GIB if arguments.quick else 10 * GIB
    report = Report("KV blocks on a disk")
    with tempfile.TemporaryDirectory(prefix="baton-disk-", dir=arguments.folder) as name:
        folder, free = Path(name), shutil.disk_usage(name).free
        if free < 5 * held:
            report.note(
                f"not measured: reading and writing, as {free / GIB:.1f} GiB are free and {5 * held / GIB} needed"
            )
        else:
            for size in arguments.block_sizes.split(","):
                measure(report, folder, int(size), arguments.threads, held, 3 if arguments.quick else arguments.rounds)
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
