"""What a hand-over on one host takes after the last chunk of a prompt is computed: written in place, beside pulled.

    python -m benchmarks.direct [--quick] [--json FILE] [--repeat 30]

Two processes with the workers' own ends of a hand-over and no model: the prefill side offers, or has written, all but
the last chunk of 512 tokens, lets the other side catch up, then looks at the clock and hands over the rest. The decode
side looks at the clock when it could compute its first token: everything is there, checked where it was moved. Both
kinds take turns, so that other load on the machine hits both. Blocks are 256 KiB, 16 tokens of the 246 M model. The
last rows are of prompts computed in one step, where nothing was pulled before.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np

from baton.config import HandoverOptions
from benchmarks.report import Report, add_common_arguments
from kvtransfer.direct import DirectServer, Placed
from kvtransfer.intake import Intake
from kvtransfer.lanes.registry import parse_lanes
from kvtransfer.layout import BlockLayout
from kvtransfer.memory import PoolMemory
from kvtransfer.offers import OfferServer
from kvtransfer.wire import PeerIdentity, PeerRef

LAYOUT = BlockLayout("m", "bfloat16", 16, 4, 64, 16)
LENGTHS = (512, 2048, 8192, 16384)
CHUNK_TOKENS = 512
NUM_BLOCKS = LENGTHS[-1] // LAYOUT.page_size_tokens
OPTIONS = HandoverOptions(lanes="shm", direct_wait_s=1.0)
PREFILL, DECODE = PeerIdentity("prefill", 1), PeerIdentity("decode", 2)
CATCH_UP_S = 0.05


@dataclass(frozen=True)
class Task:
    """One hand-over that the prefill side is told to make."""

    id: str
    num_blocks: int
    chunk_blocks: int
    direct: bool


async def prefill_side() -> None:
    """Makes the hand-overs that come in on stdin; says when the last chunk of each was computed, CLOCK_MONOTONIC."""
    memory = PoolMemory.create(NUM_BLOCKS, LAYOUT.block_bytes, num_peer_blocks=4 * NUM_BLOCKS)
    memory.blocks[:] = 7
    blocks = np.frombuffer(memory.buffer, np.uint8).reshape(-1, LAYOUT.block_bytes)
    wants: dict[str, asyncio.Future[Placed | None]] = {}

    def on_want(handover_id: str, placed: Placed | None) -> None:
        wants[handover_id].set_result(placed)

    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    lanes = [lane.serve("127.0.0.1") for lane in parse_lanes(OPTIONS.lanes)]
    offers = OfferServer(
        PREFILL, LAYOUT, memory, lanes, OPTIONS, {}, nothing, nothing, nothing, DirectServer(memory), on_want
    )
    print(await offers.start("127.0.0.1"), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        task = Task(**json.loads(line))
        wants[task.id] = asyncio.get_running_loop().create_future()
        offers.open(task.id, PeerRef(DECODE.worker_id, DECODE.incarnation, ""))
        placed = await asyncio.wait_for(wants[task.id], 10)
        first, num_tokens = task.num_blocks - task.chunk_blocks, task.num_blocks * LAYOUT.page_size_tokens
        if task.direct:
            assert placed is not None, "the pool was not lent"
            blocks[list(placed.block_ids)] = 7
            offers.written(task.id, first, stopped=False)
        else:
            offers.written(task.id, 0, stopped=True)
            offers.offer(task.id, 0, range(first), memory.generations[:first].tolist())
        await asyncio.sleep(CATCH_UP_S + first * LAYOUT.block_bytes / 1e9)
        start = time.monotonic()
        if task.direct:
            offers.written_all(task.id, task.num_blocks, num_tokens, 5, 0)
        else:
            last = range(first, task.num_blocks)
            offers.offer(task.id, first, last, memory.generations[first : task.num_blocks].tolist())
            offers.close(task.id, task.num_blocks, num_tokens, 5, 0)
        print(start, flush=True)


class DecodeSide:
    def __init__(self, process: asyncio.subprocess.Process, intake: Intake, memory: PoolMemory, address: str) -> None:
        self._process = process
        self._intake = intake
        self._memory = memory
        self._peer = PeerRef(PREFILL.worker_id, PREFILL.incarnation, address)
        self._number = 0

    async def hand_over_s(self, num_tokens: int, chunk_tokens: int, direct: bool) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._number += 1
        num_blocks = num_tokens // LAYOUT.page_size_tokens
        task = Task(f"h{self._number}", num_blocks, chunk_tokens // LAYOUT.page_size_tokens, direct)
        ids = np.random.default_rng(self._number).permutation(NUM_BLOCKS)[:num_blocks].tolist()
        self._memory.blocks[ids, 0] = 0
        self._process.stdin.write(json.dumps(vars(task)).encode() + b"\n")
        result = await self._intake.take(task.id, self._peer, ids, 0, time.monotonic() + 60)
        end = time.monotonic()
        if result.failure or result.fence or not (self._memory.blocks[ids, 0] == 7).all():
            raise SystemExit(f"a hand-over failed: {result.failure}")
        return end - float(await asyncio.wait_for(self._process.stdout.readline(), 30))


@asynccontextmanager
async def decode_side() -> AsyncIterator[DecodeSide]:
    memory = PoolMemory.create(NUM_BLOCKS, LAYOUT.block_bytes)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.direct", "--prefill-side", stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    address = (await asyncio.wait_for(process.stdout.readline(), 60)).decode().strip()
    intake = Intake(DECODE, LAYOUT, memory, parse_lanes(OPTIONS.lanes), OPTIONS, {})
    try:
        yield DecodeSide(process, intake, memory, address)
    finally:
        await intake.stop()
        process.kill()
        await process.wait()
        memory.close()


async def measure(report: Report, repeat: int) -> None:
    async with decode_side() as side:
        for one_step in (False, True):
            for num_tokens in LENGTHS:
                chunk = num_tokens if one_step else CHUNK_TOKENS
                if one_step and num_tokens <= CHUNK_TOKENS:
                    continue
                times: dict[bool, list[float]] = {True: [], False: []}
                for _ in range(repeat + 1):
                    for direct in times:
                        times[direct].append(await side.hand_over_s(num_tokens, chunk, direct))
                name = f"{num_tokens} tokens, " + ("one step" if one_step else f"last {chunk}")
                for kind, pick in (("best", min), ("median", statistics.median)):
                    written, pulled = (1e6 * pick(times[direct][1:]) for direct in (True, False))
                    report.row(f"{name}, {kind}", written, "us", f"pulled {pulled:.0f}", written / pulled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--repeat", type=int, default=30, help="repetitions of each figure")
    parser.add_argument("--prefill-side", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prefill_side:
        asyncio.run(prefill_side())
        return
    report = Report("Hand-over on one host after the last chunk, written in place beside pulled by shm")
    asyncio.run(measure(report, 5 if arguments.quick else arguments.repeat))
    report.note("No model: what the engines' threads add, and computing into another process's memory, is not in here.")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
