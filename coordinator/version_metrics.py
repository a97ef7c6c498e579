"""Figures of each model version, so that a new one can be compared with the old while both serve."""

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from coordinator.metric_families import counters, histograms

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKENS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Buckets:
    """A histogram for the one thread of the event loop: a tenth of the library's cost, because it is fed per token."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts, self._sum = array("q", bytes(8 * (len(bounds) + 1))), array("d", [0.0])

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum[0] += value

    def addresses(self) -> tuple[int, int]:
        """Of int64 [bounds + 1], the counts, and of a double, the sum, for who observes in C++."""
        return self._counts.buffer_info()[0], self._sum.buffer_info()[0]

    @property
    def sum(self) -> float:
        return self._sum[0]

    def total(self) -> tuple[float, int]:
        """(sum, number) of the values."""
        return self.sum, sum(self._counts)

    def add(self, other: "Buckets") -> None:
        """What was observed there, too. Both have the same bounds."""
        for at, count in enumerate(other._counts):
            self._counts[at] += count
        self._sum[0] += other.sum

    def cumulative(self) -> list[tuple[str, float]]:
        """As Prometheus has it: (upper bound, values up to it)."""
        buckets: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        return buckets


class Figures:
    """Of one version's clients, or of its shadows."""

    __slots__ = ("answers", "fast_path_tokens", "first_difference", "itl", "outcomes", "tokens", "ttft")

    def __init__(self) -> None:
        self.ttft, self.itl = Buckets(SECONDS), Buckets(SECONDS)
        self.outcomes: Counter[str] = Counter()
        self.tokens = self.fast_path_tokens = 0
        self.answers: Counter[str] = Counter()
        """Of shadows: choices whose tokens are `equal` to those that the client got, or `different`."""
        self.first_difference = Buckets(TOKENS)


class VersionMetrics(Collector):
    def __init__(self) -> None:
        self._figures: dict[tuple[str, str], Figures] = {}

    def of(self, version: str, shadow: bool) -> Figures:
        key = version, "shadow" if shadow else "clients"
        if (figures := self._figures.get(key)) is None:
            figures = self._figures[key] = Figures()
        return figures

    def of_clients(self, of: Callable[[Figures], Buckets]) -> Buckets:
        """Of all versions together."""
        total = Buckets(SECONDS)
        for (_, traffic), figures in self._figures.items():
            if traffic == "clients":
                total.add(of(figures))
        return total

    def collect(self) -> Iterator[Metric]:
        ended = counters("baton_version_requests")
        tokens = counters("baton_version_completion_tokens")
        fast_path_tokens = counters("baton_version_fast_path_tokens")
        ttft = histograms("baton_version_ttft_seconds")
        itl = histograms("baton_version_itl_seconds")
        answers = counters("baton_shadow_answers")
        difference = histograms("baton_shadow_first_difference_tokens")
        for key, figures in self._figures.items():
            for outcome, count in figures.outcomes.items():
                ended.add_metric([*key, outcome], count)
            tokens.add_metric(key, figures.tokens)
            fast_path_tokens.add_metric(key, figures.fast_path_tokens)
            ttft.add_metric(key, figures.ttft.cumulative(), figures.ttft.sum)
            itl.add_metric(key, figures.itl.cumulative(), figures.itl.sum)
            if figures.answers:
                for result, count in figures.answers.items():
                    answers.add_metric([key[0], result], count)
                found = figures.first_difference
                difference.add_metric([key[0]], found.cumulative(), found.sum)
        yield from (ended, tokens, fast_path_tokens, ttft, itl, answers, difference)
