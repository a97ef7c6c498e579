"""How long running streams wait while long prompts arrive: p99 of the gaps between their tokens, in ordinary gaps.

Four streams run; then prompts of 3,500 tokens come one after another. Measured on one mixed worker with all cores, and
on separate pools where each worker has its share. An ordinary gap is the median before the first long prompt.
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
CALM_S = 2.0


@dataclass(frozen=True)
class Stall:
    ordinary_s: float
    p99_s: float
    longest_s: float
    ttft_s: float


async def measure(address: str, vocabulary: int, num_prompts: int) -> Stall:
    client = Client(address, vocabulary)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        running = [Arrivals(0.0, []) for _ in range(NUM_STREAMS)]
        tasks = [asyncio.create_task(client.follow(stub, client.prompt(PROMPT_TOKENS), 4000, each)) for each in running]
        while not all(len(stream.times) > 1 for stream in running):  # noqa: ASYNC110 - filled by those tasks
            await asyncio.sleep(0.01)
        await asyncio.sleep(CALM_S)
        calm = [gap for stream in running for gap in gaps(stream.times)]
        seen = [len(stream.times) - 1 for stream in running]
        ttfts = []
        for _ in range(num_prompts):
            long = Arrivals(time.perf_counter(), [])
            await client.follow(stub, client.prompt(LONG_PROMPT_TOKENS), 1, long)
            ttfts.append(long.ttft_s)
        busy = [gap for stream, start in zip(running, seen, strict=True) for gap in gaps(stream.times[start:])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    ordered = sorted(busy)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return Stall(statistics.median(calm), p99, ordered[-1], statistics.median(ttfts))


def gaps(times: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "baton-random-246m",
                        help="where the random model is, or is written to (0.5 GB)")  # fmt: skip
    arguments = parser.parse_args()
    folder = random_model.write(arguments.folder)
    vocabulary = ModelConfig.load(folder).vocab_size
    report = Report("Gaps of 4 running streams while prompts of 3,500 tokens arrive, random 246 M model")
    pools = (("one mixed worker", ["--mixed", "1"], "<= 2.5"), ("separate pools", [], "<= 1.5"))
    for name, words, goal in pools:
        with Serving("--model", str(folder), "--no-restart", *words) as serving:
            stall = asyncio.run(measure(serving.grpc, vocabulary, 3 if arguments.quick else 10))
        report.row(f"{name}: p99 gap", 1000 * stall.p99_s, "ms", f"ordinary {1000 * stall.ordinary_s:.1f}",
                   stall.p99_s / stall.ordinary_s, goal)  # fmt: skip
        report.row(f"{name}: longest gap", 1000 * stall.longest_s, "ms", "ordinary", stall.longest_s / stall.ordinary_s)
        report.row(f"{name}: TTFT of a long prompt", 1000 * stall.ttft_s, "ms")
    report.note(f"{os.cpu_count()} cores; the streams, the coordinator and the client share them with the workers.")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
