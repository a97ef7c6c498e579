"""What was seen of requests, and what is made of it, by the definitions of `vllm bench serve`.

    scheduled ──▶ start ──▶ first event ──▶ event ──▶ … ──▶ last event
        └ queue ──┴── TTFT ────┴── gap (ITL) ──┴────────────────┤
                  └──────────── latency (E2EL) ─────────────────┘

TPOT = (E2EL - TTFT) / (tokens - 1), of answers of more than one token. An event is one that brings something of an
answer; events that arrive in one read have one time. Goodput counts requests that kept every objective; a bound itself
is kept, and an answer of one token has a TPOT of 0. The idea is DistServe's (arXiv 2401.09670).
"""

import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

CUT_OFF = "cut off"
"""In place of an error: it ran when the benchmark was interrupted."""
REFUSED = "refused (429)"
OBJECTIVES = ("ttft", "tpot", "e2el")
_FLOOR_S, _STEP = 1e-6, math.log(1.001)
_NUM_BINS = int(math.log(1e4 / _FLOOR_S) / _STEP) + 2
_Floats = npt.NDArray[np.float64]


class Record(msgspec.Struct, array_like=True, gc=False):
    """One request. Times are seconds; those of the run count from its start."""

    number: int
    turn: int
    scheduled: float
    """When it was due; without a schedule, when it was sent."""
    start: float
    """When it was sent; before its connection was made, where it needed a new one."""
    asked_tokens: int
    """Of the prompt, as it was meant; 0: unknown."""
    ttft: float = 0.0
    latency: float = 0.0
    """Of one that failed: until it did."""
    prompt_tokens: int = 0
    """By the server's count."""
    output_tokens: int = 0
    """By the server's count, without one the number of events."""
    events: int = 0
    counted: bool = False
    """The server said how many tokens there were."""
    refusals: int = 0
    """How often it was refused before, and asked again."""
    error: str = ""
    """Its kind; empty for one that came to its end."""
    gaps: bytes = b""
    """Of 32-bit floats, where they are to be kept."""

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def tpot(self) -> float:
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


class Histogram(msgspec.Struct):
    """Of seconds, in steps of 0.1 %: however many there are, it has one size. Mean and deviation are exact."""

    bins: list[int] = msgspec.field(default_factory=lambda: [0] * _NUM_BINS)
    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    longest: float = 0.0

    def add(self, seconds: Sequence[float] | _Floats) -> None:
        values = np.asarray(seconds, dtype=np.float64)
        if not values.size:
            return
        places = (np.log(np.maximum(values, _FLOOR_S) / _FLOOR_S) / _STEP).astype(np.int64).clip(0, _NUM_BINS - 1)
        for place, number in zip(*np.unique(places, return_counts=True), strict=True):
            self.bins[place] += int(number)
        self.count += values.size
        self.total += float(values.sum())
        self.squares += float(np.square(values).sum())
        self.longest = max(self.longest, float(values.max()))

    def merge(self, other: "Histogram") -> None:
        self.bins = [a + b for a, b in zip(self.bins, other.bins, strict=True)]
        self.count += other.count
        self.total += other.total
        self.squares += other.squares
        self.longest = max(self.longest, other.longest)

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    @property
    def deviation(self) -> float:
        return math.sqrt(max(self.squares / self.count - self.mean**2, 0.0)) if self.count else 0.0

    def percentiles(self, percents: Sequence[float]) -> list[float]:
        if not self.count:
            return [0.0] * len(percents)
        until = np.cumsum(self.bins)
        places = np.searchsorted(until, np.asarray(percents) / 100 * (self.count - 1), side="right")
        middle = _FLOOR_S * np.exp((places + 0.5) * _STEP)
        return [min(float(each), self.longest) if place else 0.0 for each, place in zip(middle, places, strict=True)]


class Timeline(msgspec.Struct):
    """Tokens of answers in each second of the run: of those that came to their end, as vLLM's peak counts them."""

    tokens: list[float] = msgspec.field(default_factory=list)

    def add(self, times: "array[float] | _Floats", weight: float) -> None:
        """`times`: of events, since the start of the run; `weight`: tokens of each."""
        counts = np.bincount(np.maximum(np.asarray(times), 0.0).astype(np.int64))
        self.tokens += [0.0] * (len(counts) - len(self.tokens))
        for second in np.flatnonzero(counts):
            self.tokens[second] += float(counts[second]) * weight

    def merge(self, other: "Timeline") -> None:
        self.tokens += [0.0] * (len(other.tokens) - len(self.tokens))
        for second, number in enumerate(other.tokens):
            self.tokens[second] += number


class ClientHealth(msgspec.Struct):
    """What one client process says of itself."""

    cpu_share: float
    """Of one core, while it measured."""
    lag: Histogram
    """How much later than due its event loop came to a timer: so much later it may have seen bytes that were there."""
    connections: int
    """That were opened."""
    reconnections: int
    """Requests sent again because the server had closed an idle connection meanwhile."""


def percent_name(percent: float) -> str:
    """As in vLLM's field names: p99, p99.9."""
    return f"p{int(percent) if percent == int(percent) else percent}"


def statistics(name: str, seconds: Sequence[float] | Histogram, percents: Sequence[float]) -> dict[str, float]:
    """vLLM's fields of one latency, in milliseconds; percentiles between two values are interpolated linearly."""
    if isinstance(seconds, Histogram):
        mean, deviation, middle = seconds.mean, seconds.deviation, seconds.percentiles([50])[0]
        tails = seconds.percentiles(percents)
    else:
        values = np.asarray(seconds or [0.0])
        mean, deviation, middle = float(values.mean()), float(values.std()), float(np.median(values))
        tails = [float(each) for each in np.percentile(values, percents)]
    fields = {f"mean_{name}_ms": mean, f"median_{name}_ms": middle, f"std_{name}_ms": deviation}
    fields |= {f"{percent_name(percent)}_{name}_ms": each for percent, each in zip(percents, tails, strict=True)}
    return {key: 1e3 * value for key, value in fields.items()}


def is_good(record: Record, objectives: Mapping[str, float]) -> bool:
    """`objectives`: milliseconds of ttft, tpot or e2el."""
    seen = {"ttft": record.ttft, "tpot": record.tpot, "e2el": record.latency}
    return record.ok and all(1e3 * seen[name] <= bound_ms for name, bound_ms in objectives.items())


def peak_concurrency(done: Sequence[Record]) -> int:
    """Most of them at a time; one that ends when another starts is not beside it."""
    running = most = 0
    for _, change in sorted([(each.start, 1) for each in done] + [(each.start + each.latency, -1) for each in done]):
        running += change
        most = max(most, running)
    return most


def summarise(
    records: Sequence[Record], gaps: Histogram, timeline: Timeline, duration_s: float, percents: Sequence[float],
    objectives: Mapping[str, float], queued: bool,
) -> dict[str, Any]:  # fmt: skip
    """The fields of `vllm bench serve`. `queued`: requests may wait in the client for others to end."""
    done = [each for each in records if each.ok]
    failed = [each for each in records if each.error not in ("", CUT_OFF)]
    num_in, num_out = sum(each.prompt_tokens for each in done), sum(each.output_tokens for each in done)
    good = sum(is_good(each, objectives) for each in done)
    per_s = 1 / duration_s if duration_s else 0.0
    result: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(done),
        "failed": len(failed),
        "total_input_tokens": num_in,
        "total_output_tokens": num_out,
        "request_throughput": len(done) * per_s,
        "request_goodput": good * per_s if objectives else None,
        "output_throughput": num_out * per_s,
        "total_token_throughput": (num_in + num_out) * per_s,
        "max_output_tokens_per_s": max(timeline.tokens, default=0.0),
        "max_concurrent_requests": peak_concurrency(done),
    }
    result |= statistics("ttft", [each.ttft for each in done], percents)
    result |= statistics("tpot", [each.tpot for each in done if each.output_tokens > 1], percents)
    result |= statistics("itl", gaps, percents)
    result |= statistics("e2el", [each.latency for each in done], percents)
    if queued:
        result |= statistics("client_queue_time", [each.start - each.scheduled for each in done], percents)
        waited = [each.start - each.scheduled + each.latency for each in done]
        result |= statistics("e2el_including_client_queue", waited, percents)
    return result


def error_counts(records: Sequence[Record]) -> dict[str, int]:
    return dict(Counter(each.error for each in records if each.error).most_common())
