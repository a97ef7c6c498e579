"""What is asked: sessions of turns, each a prompt made of segments. Pure and seeded; contents are made elsewhere.

A segment is so many tokens that are a function of its key, so two prompts with the same segment share these tokens:

    shared prefix   [prefix 3: 1000 tokens][own 17: 200 tokens]
    Mooncake        [block 0: 512][block 14: 512][block 15: 130]
    second turn     [own 17.0: 200](answer)[own 17.1: 200]
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cli.bench.arrivals import arrivals, spread
from cli.bench.files import BLOCK_TOKENS, Asked
from cli.bench.options import LoadOptions, WorkloadOptions

_OWN, _PREFIX, _BLOCK = range(3)
_WARMUP = 1 << 40
"""Beyond every session that is measured: warm-up shares prefixes with them, and nothing else."""


class Segment(NamedTuple):
    key: tuple[int, ...]
    tokens: int


class Turn(NamedTuple):
    segments: tuple[Segment, ...]
    text: str
    """In place of segments, where a file has it."""
    output_tokens: int
    think_s: float
    """From the answer before to this."""

    @property
    def tokens(self) -> int:
        return sum(each.tokens for each in self.segments)


class Session(NamedTuple):
    number: int
    at_s: float | None
    """From the start; None: when a stream is free."""
    turns: tuple[Turn, ...]


def sessions(load: LoadOptions, workload: WorkloadOptions, seed: int, asked: list[Asked] | None) -> Iterator[Session]:
    """All that are to be measured, in order; without end, where only time ends it. `asked`: of --file."""
    bodies = _of_file(workload, asked) if asked is not None else _drawn(workload, seed)
    times = _times(load, workload, seed, asked)
    requests = 0
    for number, (at_s, turns) in enumerate(zip(times, bodies, strict=False)):
        if load.requests and requests + len(turns) > load.requests:
            turns = turns[: load.requests - requests]
        if not turns or (load.duration_s and at_s is not None and at_s >= load.duration_s):
            return
        requests += len(turns)
        yield Session(number, at_s, turns)


def warmup(load: LoadOptions, workload: WorkloadOptions, seed: int, asked: list[Asked] | None) -> Iterator[Session]:
    """Like what is measured, with other prompts behind the same prefixes."""
    if asked is None:
        bodies = _drawn(workload, seed, first=_WARMUP)
    else:  # lengths of the file; blocks and texts of it would be cached before they are measured
        bodies = (
            (Turn((Segment((_OWN, _WARMUP + number, 0), max(each.input_tokens, 1)),), "", each.output_tokens, 0.0),)
            for number, each in enumerate(itertools.cycle(asked))
        )
    requests = 0
    for number, turns in enumerate(bodies):
        turns = turns[: load.warmup - requests]
        if not turns:
            return
        requests += len(turns)
        yield Session(number, None, turns)


def _times(
    load: LoadOptions, workload: WorkloadOptions, seed: int, asked: list[Asked] | None
) -> Iterator[float | None]:
    rng = np.random.default_rng([seed, 1])
    if load.rate:
        return arrivals(load.rate, load.burstiness, rng)
    if asked is None or asked[0].at_s is None:
        return itertools.repeat(None)
    first = asked[0].at_s
    times = (((each.at_s or first) - first) for each in asked)
    on_grid = spread(times, workload.tick_s, rng) if workload.tick_s else times
    return (at_s / workload.speed for at_s in on_grid)


def _drawn(workload: WorkloadOptions, seed: int, first: int = 0) -> Iterator[tuple[Turn, ...]]:
    rng = np.random.default_rng([seed, 2, first])

    def length(mean: int) -> int:
        half = int(mean * workload.length_spread)
        return max(1, int(rng.integers(mean - half, mean + half + 1)))

    for number in itertools.count(first):
        prefix = int(rng.integers(workload.prefixes))
        shared = (Segment((_PREFIX, prefix), workload.prefix_tokens),) if workload.prefix_tokens else ()
        turns = []
        for turn in range(workload.turns):
            think_s = float(rng.exponential(workload.think_s)) if turn and workload.think_s else 0.0
            own = Segment((_OWN, number, turn), length(workload.input_tokens))
            turns.append(Turn((*(() if turn else shared), own), "", length(workload.output_tokens), think_s))
        yield tuple(turns)


def _of_file(workload: WorkloadOptions, asked: list[Asked]) -> Iterator[tuple[Turn, ...]]:
    for number, each in enumerate(asked):
        if each.texts:
            yield tuple(
                Turn((), text, tokens, 0.0)
                for text, tokens in itertools.islice(zip(each.texts, each.answers, strict=True), workload.turns)
            )
            continue
        yield (Turn(_blocks(number, each), "", each.output_tokens, 0.0),)


def _blocks(number: int, asked: Asked) -> tuple[Segment, ...]:
    """The last block is as long as what is left; what no block covers is the request's own."""
    segments, left = [], asked.input_tokens
    for block in asked.blocks:
        if left > 0:
            segments.append(Segment((_BLOCK, block), min(left, BLOCK_TOKENS)))
            left -= BLOCK_TOKENS
    if left > 0:
        segments.append(Segment((_OWN, number, 0), left))
    return tuple(segments)
