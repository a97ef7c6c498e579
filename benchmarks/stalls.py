"""How long running streams wait while long prompts arrive: p99 of the gaps between their tokens, in ordinary gaps.

Four streams run; then prompts of 4096 tokens come one after another. Measured on one mixed worker with all cores, on
separate pools where each worker has its share, and under the same arrivals on vLLM's asynchronous engine on CPU with
the defaults of its server, in the environment that `benchmarks.peers.environments` makes.
"""

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import grpc

from baton.v1 import inference_pb2_grpc
from benchmarks import random_model
from benchmarks.peers.arrivals import Shape, Stall, measure
from benchmarks.peers.environments import VLLM, Unavailable, add_peers_argument, ensure, find
from benchmarks.peers.process import run_script
from benchmarks.relay import Arrivals, Client
from benchmarks.report import Report, add_common_arguments
from benchmarks.serving import Serving
from engine.model_config import ModelConfig

NUM_STREAMS, PROMPT_TOKENS, LONG_PROMPT_TOKENS = 4, 128, 4096
POOLS: tuple[tuple[str, list[str], str], ...] = (
    ("one mixed worker", ["--mixed", "1"], "<= 2.5"),
    ("separate pools", [], "<= 1.5"),
)
PEER_TIMEOUT_S = 900.0


async def measure_baton(address: str, shape: Shape) -> Stall:
    client = Client(address, shape.vocabulary)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)

        async def follow(prompt: list[int], max_tokens: int, times: list[float]) -> None:
            await client.follow(stub, prompt, max_tokens, Arrivals(0.0, times))

        return await measure(follow, shape)


def measure_vllm(folder: Path, root: Path, shape: Shape, install: bool) -> Stall:
    """Raises Unavailable."""
    environment = (ensure if install else find)(VLLM, root)
    words = [str(folder.absolute()), str(len(os.sched_getaffinity(0))), json.dumps(asdict(shape))]
    return Stall(**json.loads(run_script(environment, "run_vllm_stalls.py", *words, timeout_s=PEER_TIMEOUT_S)))


def add_rows(report: Report, name: str, stall: Stall, goal: str | None = None) -> None:
    ordinary = f"ordinary {1000 * stall.ordinary_s:.1f}"
    for what, ratio, bound in (
        ("p99 gap with no prompt", stall.calm_p99, None),
        ("p99 gap", stall.p99, goal),
        ("longest gap", stall.longest, None),
    ):
        report.row(f"{name}: {what}", 1000 * ratio * stall.ordinary_s, "ms", ordinary, ratio, bound)
    report.row(f"{name}: TTFT of a long prompt", 1000 * stall.ttft_s, "ms")


def compare(report: Report, ours: Sequence[tuple[str, Stall]], peer: Stall) -> None:
    """How many times longer the peer's streams and prompts wait."""
    for name, stall in ours:
        mine, theirs = stall.p99 * stall.ordinary_s, peer.p99 * peer.ordinary_s
        report.row(f"{VLLM.name} beside {name}: p99 gap", 1000 * theirs, "ms", f"{1000 * mine:.1f}", theirs / mine)
        report.row(f"{VLLM.name} beside {name}: p99 in ordinary gaps", peer.p99, "gaps", f"{stall.p99:.2f}",
                   peer.p99 / stall.p99)  # fmt: skip
        report.row(f"{VLLM.name} beside {name}: TTFT of a long prompt", 1000 * peer.ttft_s, "ms",
                   f"{1000 * stall.ttft_s:.0f}", peer.ttft_s / stall.ttft_s)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_common_arguments(parser)
    add_peers_argument(parser)
    parser.add_argument("--long-prompt", type=int, default=LONG_PROMPT_TOKENS, metavar="TOKENS",
                        help="length of the prompts that arrive (default: %(default)s)")  # fmt: skip
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "baton-random-246m",
                        help="where the random model is, or is written to (0.5 GB)")  # fmt: skip
    arguments = parser.parse_args()
    folder = random_model.write(arguments.folder)
    config = ModelConfig.load(folder)
    shape = Shape(
        NUM_STREAMS, PROMPT_TOKENS, config.context_tokens - PROMPT_TOKENS - 1, arguments.long_prompt,
        3 if arguments.quick else 10, config.vocab_size,
    )  # fmt: skip
    report = Report(f"Gaps of {NUM_STREAMS} running streams while prompts of {shape.long_tokens} tokens arrive, "
                    "random 246 M model")  # fmt: skip
    stalls: list[tuple[str, Stall]] = []
    for name, words, goal in POOLS:
        # Plain decode: guesses that come true arrive as gaps of nothing.
        with Serving("--model", str(folder), "--no-restart", "--speculate", "off", *words) as serving:
            stalls.append((name, asyncio.run(measure_baton(serving.grpc, shape))))
        add_rows(report, *stalls[-1], goal)
    try:
        peer = measure_vllm(folder, arguments.peers, shape, install=not arguments.quick)
        add_rows(report, VLLM.name, peer)
        compare(report, stalls, peer)
    except Unavailable as reason:
        report.row(f"{VLLM.name} skipped: {reason}", 0, "rows")
    report.note(f"{os.cpu_count()} cores; the streams, the coordinator and the client share them with the workers.")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
