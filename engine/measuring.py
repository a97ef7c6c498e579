"""Measures steps of a runner, shape by shape, and what the machine under it can do.

Shapes are measured in rounds, each once a round, so that whatever else the machine does meanwhile hits all of them
alike; the first round only warms up. Medians count.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from baton.errors import ConfigurationError
from engine.costs import Errors, StepShape
from engine.plan import PlannedSequence, Runner, SampleSpec, StepPlan
from engine.requests import SamplingParams

MIN_ROUNDS, MAX_ROUNDS = 2, 25
SMALLEST_CHUNK = 16
DECODE_CONTEXTS = (128, 512, 2048, 8192, 32768, 131072)
PREFILL_CONTEXTS = DECODE_CONTEXTS[2:]
MIXED_BATCHES, MIXED_CHUNKS, MIXED_CONTEXT = (1, 8, 32), (32, 128), 512
READ_BYTES = 256 << 20
"""Far more than caches hold."""
PRODUCT = (2048, 1024, 5632)
"""Tokens, input and output of the matrix product that stands for a prefill's."""


class BudgetTooSmall(ConfigurationError):
    """Not enough seconds for the shapes of steps; `needed_s` would be, as far as could be told."""

    def __init__(self, needed_s: float) -> None:
        super().__init__(f"measuring the steps takes {needed_s:.1f} s")
        self.needed_s = needed_s


@dataclass(frozen=True, slots=True)
class Room:
    """What bounds a step of one engine."""

    max_batch_tokens: int
    max_running: int
    max_model_tokens: int
    num_blocks: int
    page_size: int

    def blocks_for(self, num_positions: int) -> int:
        return -(-num_positions // self.page_size)

    def holds(self, shape: StepShape) -> bool:
        sequences = [(shape.context + 1, shape.batch), *((tokens + context, 1) for tokens, context in shape.chunks)]
        return (
            shape.batch + shape.prompt_tokens <= self.max_batch_tokens
            and shape.batch + len(shape.chunks) <= self.max_running
            and all(length <= self.max_model_tokens for length, count in sequences if count)
            and sum(self.blocks_for(length) * count for length, count in sequences) <= self.num_blocks
        )


@dataclass(frozen=True, slots=True)
class Measured:
    shape: StepShape
    seconds: float
    """Median."""
    deviations: tuple[float, ...]
    """Of each repetition from the median, relative."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine can do with the threads that torch has."""

    read_bytes_per_s: float
    flops: float

    def or_better(self, other: "Limits") -> "Limits":
        """What the machine did at the better of two moments."""
        return Limits(max(self.read_bytes_per_s, other.read_bytes_per_s), max(self.flops, other.flops))


def prefill_shapes(room: Room) -> list[StepShape]:
    """Chunks in powers of two, up to the batch's bound, after as much context as fits."""
    longest = min(room.max_batch_tokens, room.max_model_tokens, room.num_blocks * room.page_size)
    sizes = [*_doubling(SMALLEST_CHUNK, longest), longest]
    most = min(room.max_model_tokens, room.num_blocks * room.page_size) - longest
    contexts = sorted({0, most // room.page_size * room.page_size, *(each for each in PREFILL_CONTEXTS if each < most)})
    return [StepShape(chunks=((size, context),)) for size in sizes for context in contexts]


def decode_shapes(room: Room) -> list[StepShape]:
    """Batches in powers of two; of each at least two contexts, or what context costs could not be told."""
    shapes: list[StepShape] = []
    most = min(room.max_running, room.max_batch_tokens)
    for batch in [*_doubling(1, most), most]:
        row = [StepShape(batch, context) for context in (room.page_size, *DECODE_CONTEXTS) if context >= room.page_size]
        row = [shape for shape in dict.fromkeys(row) if room.holds(shape)]
        shapes += row if len(row) > 1 or batch == 1 else []
    return shapes


def mixed_shapes(room: Room) -> list[StepShape]:
    """A few of running sequences beside one prompt."""
    kinds = itertools.product(MIXED_BATCHES, MIXED_CHUNKS, (0, MIXED_CONTEXT))
    shapes = [StepShape(batch, MIXED_CONTEXT, ((tokens, context),)) for batch, tokens, context in kinds]
    return [shape for shape in shapes if room.holds(shape)]


def _doubling(first: int, end: int) -> Iterator[int]:
    """first, twice that, … below `end`."""
    while first < end:
        yield first
        first *= 2


def plan_of(shape: StepShape, page_size: int) -> StepPlan:
    """A step of that shape over the first blocks of a pool, every sequence greedy."""
    spec = SampleSpec(SamplingParams(), [], [])
    sequences: list[PlannedSequence] = []
    next_block = 0
    for tokens, context in [(1, shape.context)] * shape.batch + list(shape.chunks):
        num_blocks = -(-(context + tokens) // page_size)
        blocks = list(range(next_block, next_block + num_blocks))
        next_block += num_blocks
        sequences.append(PlannedSequence(str(next_block), [0] * tokens, context, blocks, context + tokens, spec))
    return StepPlan(sequences, [])


def measure_steps(
    runner: Runner, shapes: list[StepShape], page_size: int, budget_s: float, on_progress: Callable[[str], None]
) -> list[Measured]:
    """Each shape at least MIN_ROUNDS times and, within the budget, up to MAX_ROUNDS times.

    Overwrites the first blocks of the pool. Raises BudgetTooSmall as soon as that is certain.
    """
    times: list[list[float]] = [[] for _ in shapes]
    start = time.perf_counter()
    for round_number in range(MAX_ROUNDS + 1):
        for index, shape in enumerate(shapes):
            plan = plan_of(shape, page_size)
            times[index].append(seconds(partial(runner.run, plan)))
            used = time.perf_counter() - start
            rounds = round_number + (index + 1) / len(shapes)
            if round_number <= MIN_ROUNDS and used > budget_s:
                raise BudgetTooSmall(used * (MIN_ROUNDS + 1) / rounds)
            on_progress(f"steps: {rounds:.1f} rounds of {len(shapes)} shapes, {used:.1f} of {budget_s:.1f} s")
        if round_number == 0 and used * MIN_ROUNDS > budget_s:  # even were the warm-up twice as slow as what follows
            raise BudgetTooSmall(used * (MIN_ROUNDS + 1))
        if round_number >= MIN_ROUNDS and used * (round_number + 2) / (round_number + 1) > budget_s:
            break
    return [_measured(shape, each[1:]) for shape, each in zip(shapes, times, strict=True)]


def _measured(shape: StepShape, times: list[float]) -> Measured:
    median = statistics.median(times)
    return Measured(shape, median, tuple(each / median - 1 for each in times))


def noise(measured: list[Measured]) -> Errors:
    return Errors.of(deviation for each in measured for deviation in each.deviations)


def measure_limits(dtype: torch.dtype, device: torch.device, budget_s: float) -> Limits:
    """Memory read by a reduction of a matrix far larger than any cache; matrix products of the shape of a prefill's."""
    matrix = torch.ones(READ_BYTES // 4 // 8192, 8192, device=device)
    read_s = _best(matrix.amax, device, budget_s / 2)
    tokens, columns, rows = PRODUCT
    left, right = (torch.ones(count, columns, dtype=dtype, device=device) for count in (tokens, rows))
    product_s = _best(partial(torch.nn.functional.linear, left, right), device, budget_s / 2)
    return Limits(matrix.nbytes / read_s, 2.0 * tokens * columns * rows / product_s)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _best(work: Callable[[], object], device: torch.device, budget_s: float) -> float:
    """The shortest of up to 20, at least 3, the first not counted."""

    def finished() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    finished()
    end = time.perf_counter() + budget_s
    times = [seconds(finished) for _ in range(3)]
    while len(times) < 20 and time.perf_counter() < end:
        times.append(seconds(finished))
    return min(times)
