"""When requests come in an open loop: seconds from the start, never earlier than the one before. Seeded."""

import itertools
import math
from collections.abc import Iterator

import numpy as np

_AT_ONCE = 4096
"""Gaps that are drawn together."""


def arrivals(rate: float, burstiness: float, rng: np.random.Generator) -> Iterator[float]:
    """Without end. `rate`: a second, in the mean; infinite: all at once.

    Gaps have a gamma distribution of shape `burstiness`: 1 is a Poisson process, less comes in bursts (the variance of
    a gap is 1 / (burstiness * rate**2)), infinite is a metronome. So does `vllm bench serve`.
    """
    if math.isinf(rate):
        return itertools.repeat(0.0)
    if math.isinf(burstiness):
        return (number / rate for number in itertools.count(1))
    return _drawn(rate, burstiness, rng)


def _drawn(rate: float, burstiness: float, rng: np.random.Generator) -> Iterator[float]:
    now = 0.0
    while True:
        for each in now + np.cumsum(rng.gamma(burstiness, 1 / (rate * burstiness), _AT_ONCE)):
            now = float(each)
            yield now


def spread(times: Iterator[float], tick_s: float, rng: np.random.Generator) -> Iterator[float]:
    """Times that a trace has on a grid of `tick_s`, each anywhere within its tick; in order."""
    for _, same in itertools.groupby(times, key=lambda at: math.floor(at / tick_s)):
        tick = list(same)
        yield from sorted(
            float(each) for each in math.floor(tick[0] / tick_s) * tick_s + rng.random(len(tick)) * tick_s
        )
