"""Long prompts arriving beside running streams: the same procedure for Baton and for peers. Standard library only."""

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

CALM_S = 1.0
FIRST_TOKENS_TIMEOUT_S = 120.0

Follow: TypeAlias = Callable[[list[int], int, list[float]], Awaitable[None]]
"""Generates that many tokens behind a prompt, greedily; appends `time.perf_counter()` for each as it comes."""


@dataclass(frozen=True)
class Shape:
    """What runs and what arrives, in tokens."""

    num_streams: int
    stream_tokens: int
    """Prompt of each running stream."""
    stream_new_tokens: int
    """More than they get to: a stream that ends early would hide gaps."""
    long_tokens: int
    num_long: int
    vocabulary: int


@dataclass(frozen=True)
class Stall:
    ordinary_s: float
    calm_p99: float
    """Of the calm seconds: what the machine alone does to gaps, in ordinary gaps as all that follow."""
    p99: float
    longest: float
    ttft_s: float
    """Of the long prompts, median."""


async def measure(follow: Follow, shape: Shape) -> Stall:
    """Gaps while a long prompt is computed, in the median gap of the calm second before it.

    Raises RuntimeError when a stream does not begin, or ends before the last long prompt is answered.
    """
    numbers = random.Random(1)

    def prompt(length: int) -> list[int]:
        return [numbers.randrange(3, shape.vocabulary) for _ in range(length)]

    running: list[list[float]] = [[] for _ in range(shape.num_streams)]
    tasks = [
        asyncio.ensure_future(follow(prompt(shape.stream_tokens), shape.stream_new_tokens, times)) for times in running
    ]
    try:
        await _all_begun(running)
        calm: list[float] = []
        ordinary: list[float] = []
        busy: list[float] = []
        ttfts: list[float] = []
        for _ in range(shape.num_long):
            before = _places(running)
            await asyncio.sleep(CALM_S)
            start, sent = _places(running), time.perf_counter()
            first: list[float] = []
            await follow(prompt(shape.long_tokens), 1, first)
            if any(task.done() for task in tasks):
                raise RuntimeError("a stream ended before the last long prompt was answered")
            ttfts.append(first[0] - sent)
            undisturbed = gaps(running, before, start)
            ordinary.append(statistics.median(undisturbed))
            calm += [gap / ordinary[-1] for gap in undisturbed]
            busy += [gap / ordinary[-1] for gap in gaps(running, start, _places(running))]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    calm.sort()
    busy.sort()
    return Stall(
        statistics.median(ordinary), calm[int(0.99 * len(calm))], busy[int(0.99 * len(busy))], busy[-1],
        statistics.median(ttfts),
    )  # fmt: skip


async def _all_begun(running: Sequence[list[float]]) -> None:
    deadline = time.monotonic() + FIRST_TOKENS_TIMEOUT_S
    while not all(len(times) > 1 for times in running):
        if time.monotonic() > deadline:
            raise RuntimeError(f"not all streams had begun after {FIRST_TOKENS_TIMEOUT_S:.0f} s")
        await asyncio.sleep(0.01)


def _places(running: Sequence[list[float]]) -> list[int]:
    """Of the newest token of each stream."""
    return [len(times) - 1 for times in running]


def gaps(running: Sequence[list[float]], start: Sequence[int], end: Sequence[int]) -> list[float]:
    """Between the tokens that came after those at `start`, up to those at `end`."""
    return [
        after - before
        for times, first, last in zip(running, start, end, strict=True)
        for before, after in itertools.pairwise(times[first : last + 1])
    ]
