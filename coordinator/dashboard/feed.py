"""The figures of the dashboard: one JSON document, made when somebody asks, at most once in FRESH_S for all who do.

Counts only go up; whoever looks twice has the rates. Nothing here is of a prompt or an answer, and a request goes by
the end of its id alone: with a whole one its answer could be asked for.
"""

import heapq
import logging
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
from prometheus_client.metrics import MetricWrapperBase

from baton.metrics import TIERS
from coordinator.dashboard.alerts import alerts
from coordinator.dashboard.journal import Journal
from coordinator.dashboard.losses import Losses
from coordinator.dashboard.recent import Life, Recent
from coordinator.delivery import Choice
from coordinator.dispatch import Dispatcher
from coordinator.metrics import Metrics
from coordinator.status import summary, worker_status
from coordinator.version_metrics import Buckets
from coordinator.workers import Leg, Worker, WorkerRegistry

FRESH_S = 0.9
MAX_WORKERS = 500
MAX_STREAMS = 50
MAX_LINES = 60
ID_CHARACTERS = 6

WAITING, QUEUED, PREFILL, HAND_OVER, DECODE = "waiting", "queued", "prefill", "hand_over", "decode"
STAGES: Final = (WAITING, QUEUED, PREFILL, HAND_OVER, DECODE)

RATES: Final = ("generated_tokens", "prompt_tokens_computed", "handover_bytes_received")
"""Of each worker, per second."""
WORKER_FAULTS: Final = (
    "handover_failures", "handover_blocks_retried", "handover_checksum_failures", "handover_leases_expired",
    "handover_peer_losses", "handover_lane_fallbacks", "local_prefill_fallbacks", "prefix_fetches_failed",
    "kv_loads_missed", "requests_expired", "requests_refused", "orphans_aborted", "discovery_losses", "tls_refused",
)  # fmt: skip
"""What went otherwise than it should and was made good; each has its line in `baton.metrics`."""
WORKER_COUNTERS: Final = (
    *RATES, "prompt_tokens_cached", "prompt_tokens_loaded", "prompt_tokens_fetched", "prompt_tokens_received",
    "handover_seconds", *WORKER_FAULTS,
)  # fmt: skip
"""Of which the last minute is told: as `work/…`."""
WORKER_STATUS: Final = (
    "id", "pid", "roles", "address", "model_version", "state", "blocks", "running", "waiting",
    "waiting_prefill_tokens", "measured", "lanes_in_use", "heartbeat_age_s",
)  # fmt: skip
GROUPS: Final = (
    "requests", "refused", "admission_refused", "attempts", "attempts_failed", "work", "tokens", "breakers",
)  # fmt: skip
"""Of what the last minute is told."""
TIER_FIGURES: Final = ("bytes", "capacity_bytes", "on", "loaded", "misses")
_NEEDED: Final = (*WORKER_COUNTERS, *(f"kv_{tier}_{name}" for tier in TIERS for name in TIER_FIGURES))


def stage_of(choice: Choice, legs: Sequence[Leg]) -> str:
    """Where a stream is. Hand-over: its first token is out, of a prefill worker, and none of its decode worker yet."""
    if not legs:
        return WAITING
    new_tokens = len(choice.stream.tokens) - legs[0].first_index
    if new_tokens > 1 or (new_tokens == 1 and not (len(legs) > 1 and legs[0].paired)):
        return DECODE
    if new_tokens == 1:
        return HAND_OVER
    computing = [leg for leg in legs if leg.expected_tokens is not None] or legs
    return PREFILL if any(leg.admitted for leg in computing) else QUEUED


class Feed:
    """In the event loop's thread. Hears what happens from its making to `close`."""

    def __init__(
        self,
        model: str,
        registry: WorkerRegistry,
        dispatcher: Dispatcher,
        metrics: Metrics,
        rollout_trouble: Callable[[], str] = lambda: "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._registry = registry
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._rollout_trouble = rollout_trouble
        self._clock = clock
        self._started_unix_s = time.time()
        self._losses = Losses(registry, dispatcher)
        self._journal = Journal()
        logging.getLogger("baton.events").addHandler(self._journal)
        self._recent = Recent([f"work/{name}" for name in WORKER_COUNTERS])
        self._made: tuple[float, bytes] | None = None

    def close(self) -> None:
        logging.getLogger("baton.events").removeHandler(self._journal)

    def json(self) -> bytes:
        now = self._clock()
        if self._made is None or now - self._made[0] >= FRESH_S:
            self._made = now, msgspec.json.encode(self._document())
        return self._made[1]

    def _document(self) -> dict[str, Any]:
        workers = sorted(self._registry.workers.values(), key=self._calm)
        counted = [_needed(worker.heartbeat.counters) for worker in workers]
        shown = list(zip(workers, counted, strict=True))[:MAX_WORKERS]
        latencies, counters = self._metrics.latencies(), self._counters()
        seen = {_life(worker): [each.get(name, 0.0) for name in WORKER_COUNTERS] for worker, each in shown}
        self._recent.look(self._clock(), _figures(latencies, counters), seen)
        document = summary(self._model, self._registry, self._dispatcher, self._rollout_trouble()) | {
            "at": time.time(),
            "started": self._started_unix_s,
            "on_their_way": self._streams(),
            "quarantine": _without_ids(self._dispatcher.quarantine.status()),
            "latencies": {name: _histogram(buckets) for name, buckets in latencies.items()},
            "counters": counters,
            "recent": self._last_minute(latencies),
            "pressure": _values(self._metrics.admission_pressure),
            "num_workers": len(workers),
            "workers": [self._worker(worker, each) for worker, each in shown],
            "totals": {"faults": _sums(counted), "tiers": _tiers(counted)},
            "losses": self._losses.latest(),
            "journal": self._journal.lines(MAX_LINES),
        }
        return document | {"alerts": alerts(document)}

    def _calm(self, worker: Worker) -> tuple[bool, str]:
        """Where not all workers can be shown, those in trouble are."""
        return worker.accepts and self._dispatcher.breakers.state(worker.id) == "closed", worker.id

    # Requests on their way

    def _streams(self) -> dict[str, Any]:
        """How many there are in each stage, and those without news for the longest, of equal seconds the oldest."""
        now = self._clock()
        counts: Counter[str] = Counter()
        rows: list[tuple[int, float, int, Choice, Sequence[Leg], str]] = []
        for request in self._dispatcher.requests.values():
            for choice in () if request.shadow else request.choices:
                if choice.finish_reason is None:
                    legs = self._dispatcher.legs(choice)
                    stage = stage_of(choice, legs)  # looks at the tokens: `last_token_s` is the last one's
                    counts[stage] += 1
                    news_s = choice.last_token_s or request.started_s
                    rows.append((-int(now - news_s), request.started_s, len(rows), choice, legs, stage))
        shown = heapq.nsmallest(MAX_STREAMS, rows)
        return {
            "stages": {stage: counts[stage] for stage in STAGES},
            "shown": [self._stream(choice, legs, stage, now) for *_, choice, legs, stage in shown],
        }

    def _stream(self, choice: Choice, legs: Sequence[Leg], stage: str, now: float) -> dict[str, Any]:
        request, prompt_tokens = choice.request, choice.num_prompt_tokens
        first_s = request.first_token_s
        return {
            "id": request.id[-ID_CHARACTERS:],
            "choice": choice.number,
            "tenant": request.caller.tenant,
            "version": request.version,
            "stage": stage,
            "age_s": round(now - request.started_s, 3),
            "ttft_s": None if first_s is None else round(first_s - request.started_s, 4),
            "silent_s": None if choice.last_token_s is None else round(now - choice.last_token_s, 3),
            "prompt_tokens": prompt_tokens,
            "waiting_tokens": max((leg.waiting_tokens for leg in legs), default=0),
            "cached_tokens": choice.cached_tokens,
            "tokens": len(choice.stream.tokens),
            "max_tokens": choice.stream.max_tokens,
            "attempt": choice.stream.attempt,
            "prefill": next((leg.worker.id for leg in legs if not leg.decode), None),
            "decode": next((leg.worker.id for leg in legs if leg.decode), None),
        }

    # What is counted

    def _counters(self) -> dict[str, dict[str, float]]:
        metrics = self._metrics
        breakers: dict[str, float] = {}
        for name, number in _values(metrics.breakers).items():
            event = name.rpartition(" ")[2]  # whose, the metrics say
            breakers[event] = breakers.get(event, 0.0) + number
        return {"breakers": breakers} | {
            name: _values(metric)
            for name, metric in (
                ("requests", metrics.requests), ("refused", metrics.refused),
                ("admission_refused", metrics.admission_refused), ("first_tokens", metrics.class_first_tokens),
                ("prompt_tokens", metrics.prompt_tokens), ("attempts", metrics.attempts),
                ("attempts_failed", metrics.attempts_failed), ("prefill_choice", metrics.prefill_choice),
                ("resumed", metrics.resumed), ("orphans", metrics.orphans), ("suspects", metrics.suspects),
                ("quarantine", metrics.quarantine),
                ("retries_delayed", metrics.retries_delayed), ("waits_for_worker", metrics.waits_for_worker),
                ("slow_readers", metrics.slow_readers), ("version_moves", metrics.version_moves),
                ("drains", metrics.drains), ("shadows", metrics.shadows),
            )
        }  # fmt: skip

    def _last_minute(self, latencies: Mapping[str, Buckets]) -> dict[str, Any]:
        gains, window_s = self._recent.gains(), self._recent.window_s
        tokens_per_s = self._recent.rate("tokens/delivered")
        result: dict[str, Any] = {"window_s": round(window_s, 1), "tokens_per_s": tokens_per_s}
        for group in GROUPS:
            start = f"{group}/"
            result[group] = {name.removeprefix(start): gain for name, gain in gains.items() if name.startswith(start)}
        result["latencies"] = {
            name: _histogram(buckets, [gains.get(f"latency/{name}/{bound}", 0) for bound, _ in buckets.cumulative()])
            for name, buckets in latencies.items()
        }
        return result

    def _worker(self, worker: Worker, counted: Mapping[str, float]) -> dict[str, Any]:
        rates = dict(zip(RATES, self._recent.rates(_life(worker), len(RATES)), strict=False))
        status = worker_status(worker)
        return {name: status[name] for name in WORKER_STATUS} | {
            "breaker": self._dispatcher.breakers.state(worker.id),
            "tiers": {tier: {"on": on} for tier in TIERS if (on := counted.get(f"kv_{tier}_on")) is not None},
            "rates": {name: rates.get(name) if name in counted else None for name in RATES},
            "faults": {name: value for name in WORKER_FAULTS if (value := counted.get(name, 0.0))},
        }


def _life(worker: Worker) -> Life:
    return worker.id, f"{worker.registration.incarnation:x}"


def _figures(latencies: Mapping[str, Buckets], counters: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """By group and name, as `Recent` has them."""
    figures = {f"{group}/{name}": value for group in counters for name, value in counters[group].items()}
    for name, buckets in latencies.items():
        figures |= {f"latency/{name}/{bound}": count for bound, count in buckets.cumulative()}
    figures["tokens/delivered"] = sum(latencies[name].total()[1] for name in ("ttft", "itl"))
    return figures


def _without_ids(quarantine: dict[str, Any]) -> dict[str, Any]:
    cells = {worker: id and id[-ID_CHARACTERS:] for worker, id in quarantine["cells"].items()}
    return quarantine | {"cells": cells}


def _needed(counters: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name in _NEEDED if (value := counters.get(name)) is not None}


def _sums(counted: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of all workers, those that are not shown included."""
    return {name: sum(each.get(name, 0.0) for each in counted) for name in WORKER_FAULTS}


def _tiers(counted: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Of each tier that some worker has, their figures together: the least `on`, and what a shared store holds once."""
    tiers: dict[str, dict[str, float]] = {}
    for tier in TIERS:
        having = [each for each in counted if f"kv_{tier}_bytes" in each]
        if not having:
            continue
        once = ("bytes", "capacity_bytes") if tier == "shared" else ()
        values = {name: [each.get(f"kv_{tier}_{name}", 0.0) for each in having] for name in TIER_FIGURES}
        tiers[tier] = {
            name: min(each) if name == "on" else max(each) if name in once else sum(each)
            for name, each in values.items()
        } | {"workers": len(having)}
    return tiers


def _histogram(buckets: Buckets, counts: Sequence[float] = ()) -> dict[str, Any]:
    """Seconds; `counts[i]` are at most `bounds[i]`, the last one is all. Given counts stand for those of `buckets`."""
    pairs = buckets.cumulative()
    bounds, counts = [float(bound) for bound, _ in pairs[:-1]], counts or [count for _, count in pairs]
    quantiles = {f"p{percent}": quantile(bounds, counts, percent / 100) for percent in (50, 90, 99)}
    return {"bounds": bounds, "counts": counts, **quantiles}


def quantile(bounds: Sequence[float], counts: Sequence[float], q: float) -> float | None:
    """What share `q` of the values is at most, as far as buckets tell; within one by proportion, on a log scale."""
    rank = q * counts[-1]
    if not rank:
        return None
    index = bisect_left(counts, rank)
    if index >= len(bounds):
        return bounds[-1]
    below, low = (counts[index - 1], bounds[index - 1]) if index else (0.0, bounds[0] / 2)
    return float(low * (bounds[index] / low) ** ((rank - below) / (counts[index] - below)))


def _values(metric: MetricWrapperBase) -> dict[str, float]:
    """By its labels' values; "" where it has none."""
    found: Iterable[Any] = (sample for family in metric.collect() for sample in family.samples)
    return {" ".join(each.labels.values()): each.value for each in found if not each.name.endswith("_created")}
