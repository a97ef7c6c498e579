"""How long running streams wait while long prompts arrive: p99 of the gaps between their tokens, in ordinary gaps.

Four streams run; then prompts of 3,500 tokens come one after another. Measured on one mixed worker with all cores, and
on separate pools where each worker has its share. Gaps are counted in the median gap of the calm second before each
prompt, as steps become longer with the streams' contexts.
"""

import argparse
import asyncio
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from baton.v1 import inference_pb2_grpc
from benchmarks import random_model
from benchmarks.relay import Arrivals, Client
from benchmarks.report import Report, add_common_arguments
from benchmarks.serving import Serving
from engine.model_config import ModelConfig

NUM_STREAMS, PROMPT_TOKENS, LONG_PROMPT_TOKENS = 4, 128, 3500
CALM_S = 1.0


@dataclass(frozen=True)
class Stall:
    ordinary_s: float
    p99: float
    """In ordinary gaps, as the longest."""
    longest: float
    ttft_s: float


async def measure(address: str, vocabulary: int, num_prompts: int) -> Stall:
    client = Client(address, vocabulary)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        running = [Arrivals(0.0, []) for _ in range(NUM_STREAMS)]
        tasks = [asyncio.create_task(client.follow(stub, client.prompt(PROMPT_TOKENS), 4000, each)) for each in running]
        while not all(len(stream.times) > 1 for stream in running):  # noqa: ASYNC110 - filled by those tasks
            await asyncio.sleep(0.01)
        calm: list[float] = []
        busy: list[float] = []
        ttfts: list[float] = []
        for _ in range(num_prompts):
            before = [len(stream.times) - 1 for stream in running]
            await asyncio.sleep(CALM_S)
            start = [len(stream.times) - 1 for stream in running]
            long = Arrivals(time.perf_counter(), [])
            await client.follow(stub, client.prompt(LONG_PROMPT_TOKENS), 1, long)
            ttfts.append(long.ttft_s)
            ordinary_s = statistics.median(gaps(running, before, start))
            calm.append(ordinary_s)
            busy += [gap / ordinary_s for gap in gaps(running, start)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    busy.sort()
    return Stall(statistics.median(calm), busy[int(0.99 * len(busy))], busy[-1], statistics.median(ttfts))


def gaps(streams: Sequence[Arrivals], start: Sequence[int], end: Sequence[int] | None = None) -> list[float]:
    """Between the tokens that came after those at `start`, up to those at `end`."""
    ends = end or [len(stream.times) - 1 for stream in streams]
    return [
        after - before
        for stream, first, last in zip(streams, start, ends, strict=True)
        for before, after in itertools.pairwise(stream.times[first : last + 1])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "baton-random-246m",
                        help="where the random model is, or is written to (0.5 GB)")  # fmt: skip
    arguments = parser.parse_args()
    folder = random_model.write(arguments.folder)
    vocabulary = ModelConfig.load(folder).vocab_size
    report = Report("Gaps of 4 running streams while prompts of 3,500 tokens arrive, random 246 M model")
    pools: tuple[tuple[str, list[str], str], ...] = (
        ("one mixed worker", ["--mixed", "1"], "<= 2.5"),
        ("separate pools", [], "<= 1.5"),
    )
    for name, words, goal in pools:
        with Serving("--model", str(folder), "--no-restart", *words) as serving:
            stall = asyncio.run(measure(serving.grpc, vocabulary, 3 if arguments.quick else 10))
        for what, ratio, bound in (("p99", stall.p99, goal), ("longest", stall.longest, None)):
            milliseconds = 1000 * ratio * stall.ordinary_s
            report.row(
                f"{name}: {what} gap", milliseconds, "ms", f"ordinary {1000 * stall.ordinary_s:.1f}", ratio, bound
            )
        report.row(f"{name}: TTFT of a long prompt", 1000 * stall.ttft_s, "ms")
    report.note(f"{os.cpu_count()} cores; the streams, the coordinator and the client share them with the workers.")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
