"""The whole relay through its front door: decode and prefill speed, and what a hand-over costs the first token.

Measured on `baton serve` with separate pools and, in the same run, on one mixed worker (the colocated baseline), on
`transformers` with the same weights, and beside what the machine can do: bytes of weights over its memory bandwidth,
and the arithmetic of bf16 matrix products.

Sharing: with separate pools each worker has its share of the cores; the mixed worker and transformers have them all.
"""

import argparse
import asyncio
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import grpc
import torch

from baton.v1 import inference_pb2, inference_pb2_grpc
from benchmarks import random_model
from benchmarks.lanes import measure_lanes, seconds
from benchmarks.report import Report, add_common_arguments
from benchmarks.serving import Serving
from cli.model import DEMO_FOLDER
from engine.model_config import ModelConfig

Stub: TypeAlias = "inference_pb2_grpc.InferenceAsyncStub"
PROMPT_TOKENS, LONG_PROMPT_TOKENS = 128, 2048
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Size:
    """How much of everything a run does."""

    batches: tuple[int, ...]
    new_tokens: int
    repeats: int
    peer_tokens: int


FULL = Size(batches=(1, 8, 32), new_tokens=96, repeats=5, peer_tokens=16)
QUICK = Size(batches=(1, 8, 32), new_tokens=32, repeats=2, peer_tokens=6)


@dataclass(frozen=True)
class Arrivals:
    """When the tokens of one stream came, `time.perf_counter()` seconds; more than one may come at a time."""

    sent: float
    times: list[float]

    @property
    def ttft_s(self) -> float:
        return self.times[0] - self.sent


class Client:
    """Greedy streams over gRPC, by token ids."""

    def __init__(self, address: str, vocabulary: int) -> None:
        self._address = address
        self._random = random.Random(1)
        self._vocabulary = vocabulary

    def prompt(self, length: int) -> list[int]:
        return [self._random.randrange(3, self._vocabulary) for _ in range(length)]

    def streams(self, prompts: Sequence[list[int]], max_tokens: int) -> list[Arrivals]:
        """All at once; returns when all have ended."""

        async def run() -> list[Arrivals]:
            async with grpc.aio.insecure_channel(self._address) as channel:
                stub = inference_pb2_grpc.InferenceStub(channel)
                return await asyncio.gather(*(self._stream(stub, prompt, max_tokens) for prompt in prompts))

        return asyncio.run(run())

    async def _stream(self, stub: Stub, prompt: list[int], max_tokens: int) -> Arrivals:
        arrivals = Arrivals(time.perf_counter(), [])
        await self.follow(stub, prompt, max_tokens, arrivals)
        if len(arrivals.times) != max_tokens:
            raise RuntimeError(f"{len(arrivals.times)} tokens came, {max_tokens} were asked for")
        return arrivals

    @staticmethod
    async def follow(stub: Stub, prompt: list[int], max_tokens: int, arrivals: Arrivals) -> None:
        """One greedy stream; the times of its tokens go into `arrivals` as they come."""
        sampling = inference_pb2.Sampling(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        request = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=prompt), sampling=sampling)
        async for response in stub.Generate(request, timeout=TIMEOUT_S):
            arrivals.times.extend([time.perf_counter()] * len(response.token_ids))

    def decode_rate(self, batch: int, max_tokens: int) -> float:
        """Tokens a second while all streams run: from the last first token to the first last token.

        The prompts have been answered once, so that the prefix caches let all streams begin at the same time.
        """
        prompts = [self.prompt(PROMPT_TOKENS) for _ in range(batch)]
        self.streams(prompts, 2)
        arrivals = self.streams(prompts, max_tokens)
        start = max(stream.times[0] for stream in arrivals)
        end = min(stream.times[-1] for stream in arrivals)
        return sum(sum(start < moment <= end for moment in stream.times) for stream in arrivals) / (end - start)

    def ttft_s(self, prompt_tokens: int) -> float:
        return self.streams([self.prompt(prompt_tokens)], 1)[0].ttft_s

    def first_gap_s(self, prompt_tokens: int) -> tuple[float, float]:
        """From the first token to the second, where a hand-over would show, and the median gap after that."""
        times = self.streams([self.prompt(prompt_tokens)], 16)[0].times
        gaps = [after - before for before, after in itertools.pairwise(times[1:])]
        return times[1] - times[0], statistics.median(gaps)


@dataclass
class Figures:
    """What one deployment did."""

    decode: dict[int, float]
    prefill_rate: float
    ttft_s: dict[int, float]
    first_gap_s: float
    gap_s: float


def measure_serving(words: Sequence[str], vocabulary: int, size: Size) -> Figures:
    """Best of several for rates, medians for times; warm before anything counts."""
    with Serving(*words, "--no-restart", "--max-requests", "64", "--routing", "least_loaded") as serving:
        client = Client(serving.grpc, vocabulary)
        client.streams([client.prompt(PROMPT_TOKENS)] * 2, 4)
        decode = {
            batch: max(client.decode_rate(batch, size.new_tokens) for _ in range(min(size.repeats, 3)))
            for batch in size.batches
        }
        times = {length: [client.ttft_s(length) for _ in range(size.repeats)] for length in (512, LONG_PROMPT_TOKENS)}
        gaps = [client.first_gap_s(LONG_PROMPT_TOKENS) for _ in range(size.repeats)]
    return Figures(
        decode=decode,
        prefill_rate=LONG_PROMPT_TOKENS / min(times[LONG_PROMPT_TOKENS]),
        ttft_s={length: statistics.median(each) for length, each in times.items()},
        first_gap_s=statistics.median(first for first, _ in gaps),
        gap_s=statistics.median(rest for _, rest in gaps),
    )


def measure_transformers(folder: Path, vocabulary: int, size: Size) -> Figures:
    """The peer: greedy generate with its default cache, all cores."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    def generate_s(batch: int, length: int, new_tokens: int) -> float:
        prompt = torch.randint(3, vocabulary, (batch, length))
        start = time.perf_counter()
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
            max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0,
        )  # fmt: skip
        return time.perf_counter() - start

    generate_s(1, 16, 2)
    decode = {}
    for batch in size.batches:
        prefill = min(generate_s(batch, PROMPT_TOKENS, 1) for _ in range(2))
        decode[batch] = batch * size.peer_tokens / (generate_s(batch, PROMPT_TOKENS, size.peer_tokens + 1) - prefill)
    ttft = min(generate_s(1, LONG_PROMPT_TOKENS, 1) for _ in range(2))
    return Figures(decode, LONG_PROMPT_TOKENS / ttft, {LONG_PROMPT_TOKENS: ttft}, 0.0, 0.0)


@dataclass(frozen=True)
class Limits:
    """What the machine can do, all cores."""

    read_bytes_s: float
    flops: float


def measure_limits() -> Limits:
    """Memory read by a reduction of a matrix far larger than any cache; bf16 products of the shapes of a prefill."""
    matrix = torch.ones(16384, 8192)
    read_s = min(seconds(matrix.amax) for _ in range(5))
    left, right = torch.ones(2048, 1024, dtype=torch.bfloat16), torch.ones(5632, 1024, dtype=torch.bfloat16)
    product_s = min(seconds(lambda: torch.nn.functional.linear(left, right)) for _ in range(10))
    return Limits(matrix.nbytes / read_s, 2.0 * 2048 * 1024 * 5632 / product_s)


def read_bytes(folder: Path, config: ModelConfig) -> int:
    """Bytes of weights that a step reads: all but the rows of the embedding that it does not look up."""
    embedding = 0 if config.tie_word_embeddings else 2 * config.vocab_size * config.hidden_size
    return (folder / "model.safetensors").stat().st_size - embedding


def report_model(report: Report, name: str, folder: Path, size: Size, limits: Limits) -> None:
    config = ModelConfig.load(folder)
    options = ["--model", str(folder), "--dtype", "bfloat16", "--max-batch-tokens", "512"]
    separate = measure_serving(options, config.vocab_size, size)
    mixed = measure_serving([*options, "--mixed", "1"], config.vocab_size, size)
    peer = measure_transformers(folder, config.vocab_size, size)
    weight_bytes = read_bytes(folder, config)
    goals = {8: ">= 120 tok/s"} if name != "demo" else {}
    for batch in size.batches:
        for what, figures in (("separate pools", separate), ("mixed", mixed)):
            rate = figures.decode[batch]
            report.row(f"{name}: decode, batch {batch}, {what}", rate, "tok/s", "transformers",
                       rate / peer.decode[batch], goals.get(batch))  # fmt: skip
        limit = batch * limits.read_bytes_s / weight_bytes
        report.row(f"{name}: decode, batch {batch}, transformers", peer.decode[batch], "tok/s")
        report.row(f"{name}: decode, batch {batch}, weights read once a step", limit, "tok/s", "mixed",
                   limit / mixed.decode[batch])  # fmt: skip
    for what, figures in (("separate pools", separate), ("mixed", mixed), ("transformers", peer)):
        rate = figures.prefill_rate
        report.row(f"{name}: prefill of {LONG_PROMPT_TOKENS}, {what}", rate, "tok/s", "transformers",
                   rate / peer.prefill_rate,
                   ">= 500 tok/s" if name != "demo" and figures is not peer else None)  # fmt: skip
    limit = limits.flops / weight_bytes  # two operations a parameter, two bytes a parameter
    report.row(f"{name}: prefill, limit of bf16 products", limit, "tok/s", "mixed", limit / mixed.prefill_rate)
    for length in separate.ttft_s:
        with_s, without_s = separate.ttft_s[length], mixed.ttft_s[length]
        report.row(f"{name}: TTFT of {length}, handed over", 1000 * with_s, "ms", "mixed", with_s / without_s)
        report.row(f"{name}: TTFT of {length}, mixed", 1000 * without_s, "ms")
    report.row(f"{name}: first gap after {LONG_PROMPT_TOKENS}, handed over", 1000 * separate.first_gap_s, "ms",
               "an ordinary gap", separate.first_gap_s / separate.gap_s)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--model", choices=("demo", "random", "both"), default="both")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "baton-random-246m",
                        help="where the random model is, or is written to (0.5 GB)")  # fmt: skip
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    report = Report("The relay: separate pools beside one mixed worker, transformers and the machine")
    limits = measure_limits()
    report.row("memory read, all cores", limits.read_bytes_s / 1e9, "GB/s")
    report.row("bf16 matrix product, all cores", limits.flops / 1e9, "GFLOP/s")
    if arguments.model in ("random", "both"):
        report_model(report, "random 246 M", random_model.write(arguments.folder), size, limits)
    if arguments.model in ("demo", "both"):
        report_model(report, "demo", DEMO_FOLDER, size, limits)
    measure_lanes(report, "shm,tcp", 256 << 10, repeat=5 if arguments.quick else 15)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
