"""What `--deterministic` costs: steps of the engine's runner with and without it, by turns in one process.

The random 246 M model in bfloat16, the bundled model in float32 and, unless quick, the random model in float32. Decode
steps of several batches and contexts, and a prompt of 2048 tokens (or as long as the model takes) in chunks of 512. KV
is random numbers: the time does not depend on them.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from baton.config import EngineOptions
from benchmarks import random_model
from benchmarks.report import Report, add_common_arguments
from cli.model import DEMO_FOLDER, threads_for
from engine.loading import load_model
from engine.plan import PlannedSequence, SampleSpec, StepPlan
from engine.pool import BlockShape, KVPool
from engine.requests import SamplingParams
from engine.runner import ModelRunner

PAGE = 16
CHUNK_TOKENS = 512
DECODES = ((1, 128), (8, 128), (32, 128), (32, 1024))
"""(sequences, context) of each decode step."""
PROMPT_TOKENS = 2048
GOAL = "<= 1.25"


@dataclass
class Contestants:
    """One model with and without the mode, over one pool."""

    name: str
    ordinary: ModelRunner
    deterministic: ModelRunner
    context_tokens: int

    @classmethod
    def load(cls, name: str, folder: Path, dtype: str, threads: int) -> "Contestants":
        torch.set_num_threads(threads_for(EngineOptions(threads=threads), folder))
        plain, steady = (load_model(folder, dtype, deterministic=switch) for switch in (False, True))
        context = plain.config.context_tokens
        longest = max(count * (min(length, context - 1) // PAGE + 1) for count, length in DECODES)
        pool = KVPool(BlockShape.of(plain.config, PAGE, plain.dtype), max(longest, PROMPT_TOKENS // PAGE))
        pool.slabs.normal_()
        kernels = f"{name} {dtype}, {plain.ops.name.split(',')[0]} kernels"
        return cls(kernels, ModelRunner(plain, pool), ModelRunner(steady, pool), context)

    def decode(self, count: int, context: int) -> StepPlan:
        blocks = context // PAGE + 1
        spec = SampleSpec(SamplingParams(), [], [])
        return StepPlan(
            [
                PlannedSequence(str(row), [row], context, list(range(row * blocks, (row + 1) * blocks)), context, spec)
                for row in range(count)
            ],
            [],
        )

    def prompt(self, length: int) -> list[StepPlan]:
        blocks, spec = list(range(-(-length // PAGE))), SampleSpec(SamplingParams(), [], [])
        return [
            StepPlan(
                [PlannedSequence("a", list(range(min(CHUNK_TOKENS, length - start))), start, blocks, length, spec)], []
            )
            for start in range(0, length, CHUNK_TOKENS)
        ]


def compare(first: Callable[[], object], second: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Shortest time of each, by turns, for so long and at least three turns."""
    best = [float("inf"), float("inf")]
    end, turns = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turns < 3:
        for index, run in enumerate((first, second)):
            start = time.perf_counter()
            run()
            best[index] = min(best[index], time.perf_counter() - start)
        turns += 1
    return best[0], best[1]


def measure(report: Report, contestants: Contestants, seconds: float) -> None:
    def run(runner: ModelRunner, plans: list[StepPlan]) -> None:
        for plan in plans:
            runner.run(plan)

    works = []
    for count, context in DECODES:
        length = min(context, contestants.context_tokens - 1)
        works.append((f"decode {count} x {length}", count, [contestants.decode(count, length)]))
    length = min(PROMPT_TOKENS, contestants.context_tokens)
    works.append((f"prefill {length}", length, contestants.prompt(length)))
    for what, tokens, plans in works:
        plain, steady = compare(
            lambda plans=plans: run(contestants.ordinary, plans),  # type: ignore[misc]
            lambda plans=plans: run(contestants.deterministic, plans),  # type: ignore[misc]
            seconds,
        )
        versus = f"ordinary {tokens / plain:.4g}"
        report.row(f"{contestants.name}: {what}", tokens / steady, "tok/s", versus, steady / plain, GOAL)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "baton-random-246m",
                        help="where the random model is, or is written to (0.5 GB)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 takes what a lone worker would")
    arguments = parser.parse_args()
    folder = random_model.write(arguments.folder)
    report = Report("Cost of --deterministic: time with it as a multiple of the time without")
    models = [("246 M", folder, "bfloat16"), ("demo", DEMO_FOLDER, "float32"), ("246 M", folder, "float32")]
    for name, where, dtype in models[: 2 if arguments.quick else 3]:
        contestants = Contestants.load(name, where, dtype, arguments.threads)
        measure(report, contestants, 2.0 if arguments.quick else 10.0)
    report.note("Native kernels keep one order with and without the mode; with it, workers also compare processors.")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
