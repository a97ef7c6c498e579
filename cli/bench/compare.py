"""Two runs beside each other: each figure, its ratio, and gates that make a command fail."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from baton.errors import ConfigurationError
from cli.bench.options import parse_gates

LATENCIES = ("ttft", "tpot", "itl", "e2el", "client_queue_time", "e2el_including_client_queue")
MORE_IS_BETTER = (
    "completed", "request_throughput", "request_goodput", "output_throughput", "total_token_throughput",
    "max_output_tokens_per_s",
)  # fmt: skip
_SAME = 0.02
"""Ratios as near to 1 as this are not coloured: a run repeated differs by as much."""


class Row(NamedTuple):
    name: str
    before: float
    after: float

    @property
    def ratio(self) -> float | None:
        return self.after / self.before if self.before else None

    @property
    def verdict(self) -> str:
        """better, worse, or nothing."""
        if self.ratio is None or abs(self.ratio - 1) < _SAME or not is_judged(self.name):
            return ""
        return "better" if (self.ratio > 1) == (self.name in MORE_IS_BETTER) else "worse"


def is_judged(name: str) -> bool:
    """Whether one direction of it is better."""
    return name in MORE_IS_BETTER or name == "failed" or is_latency(name)


def is_latency(name: str) -> bool:
    return name.endswith("_ms") and any(name.endswith(f"_{each}_ms") for each in LATENCIES)


def figures(result: Mapping[str, Any]) -> dict[str, float]:
    """Those at the top of a result that are numbers."""
    names = [name for name, value in result.items() if isinstance(value, int | float) and not isinstance(value, bool)]
    return {name: float(result[name]) for name in names}


def compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Row]:
    """Figures that both have, throughput first, as the first one has them."""
    here, there = figures(before), figures(after)
    skipped = {"num_prompts", "request_rate", "burstiness", "max_concurrency"}
    return [Row(name, here[name], there[name]) for name in here if name in there and name not in skipped]


class Gate(NamedTuple):
    row: Row
    bound: float

    @property
    def failed(self) -> bool:
        """A ratio that cannot be had fails where there was nothing before, and now is."""
        ratio = self.row.ratio
        if ratio is None:
            return self.row.after > 0 and self.row.name not in MORE_IS_BETTER
        return ratio < self.bound if self.row.name in MORE_IS_BETTER else ratio > self.bound

    def __str__(self) -> str:
        row, side = self.row, "at least" if self.row.name in MORE_IS_BETTER else "at most"
        ratio = "no ratio" if row.ratio is None else f"{row.ratio:.3f} times"
        return f"{row.name}: {row.before:.4g} -> {row.after:.4g} is {ratio}, {side} {self.bound:g} was asked"


def gates(words: list[str], rows: list[Row]) -> list[Gate]:
    """'p99_ttft_ms:1.1' is at most 1.1 times, 'request_throughput:0.95' at least. Raises ConfigurationError."""
    by_name = {row.name: row for row in rows if is_judged(row.name)}
    if words and not by_name:
        raise ConfigurationError("--fail-if has nothing to judge: the two files have no figure in common")
    return [Gate(by_name[name], bound) for name, bound in parse_gates(words, tuple(by_name)).items()]


def settings_that_differ(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """In words; what the two runs were asked to do differently makes their ratio say less."""
    mine, other = ({**each.get("baton", {}).get("settings", {})} for each in (before, after))
    for each, settings in ((before, mine), (after, other)):
        settings |= {name: each.get(name) for name in ("request_rate", "burstiness", "max_concurrency", "model_id")}
    ignored = {"seed", "url", "rate", "model"}
    return [
        f"{name}: {mine[name]} / {other[name]}"
        for name in mine
        if name in other and name not in ignored and mine[name] != other[name]
    ]
