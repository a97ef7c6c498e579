"""What the coordinator counts, in Prometheus' terms. What each name means is in `baton.metric_names`."""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from baton.metrics import TIER_COUNTERS, TIERS, WORKER_COUNTERS
from baton.tls import Tls
from coordinator.delivery import Choice, Request
from coordinator.metric_families import counter, counters, gauge, gauges, histograms
from coordinator.timelines import Timelines
from coordinator.version_metrics import SECONDS, Buckets, VersionMetrics
from coordinator.workers import Worker, WorkerRegistry

DECISION_SECONDS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
LENGTHS = tuple(2**power for power in range(18))
RATIOS = (0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0)
_BLOCK_STATES = ("free", "cached", "held", "leased", "quarantined")


class _Histogram(Collector):
    """`buckets` has its figures when somebody asks."""

    def __init__(self, name: str, buckets: Callable[[], Buckets], registry: CollectorRegistry) -> None:
        self._name = name
        self._buckets = buckets
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        buckets = self._buckets()
        family = histograms(self._name)
        family.add_metric([], buckets.cumulative(), buckets.sum)
        yield family


class Metrics:
    """One registry a coordinator, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = counter("baton_requests", registry)
        self.refused = counter("baton_requests_refused", registry)
        self.prompt_tokens = counter("baton_prompt_tokens", registry)
        self.completion_tokens = counter("baton_completion_tokens", registry)
        self.attempts = counter("baton_attempts", registry)
        self.attempts_failed = counter("baton_attempts_failed", registry)
        self.prefill_choice = counter("baton_prefill_choice", registry)
        self.resumed = counter("baton_requests_resumed", registry)
        self.orphans = counter("baton_orphans", registry)
        self.pins = counter("baton_cache_pins", registry)
        self.suspects = counter("baton_suspects", registry)
        self.quarantine = counter("baton_quarantine", registry)
        self.breakers = counter("baton_worker_breaker", registry)
        self.retries_delayed = counter("baton_retries_delayed", registry)
        self.waits_for_worker = counter("baton_waits_for_worker", registry)
        self.avoided_used = counter("baton_avoided_workers_used", registry)
        self.discovery_up = gauge("baton_discovery_up", registry)
        self.discovery_losses = counter("baton_discovery_losses", registry)
        self.version_absent = counter("baton_version_absent", registry)
        self.version_moves = counter("baton_version_moves", registry)
        self.rollout_errors = counter("baton_rollout_errors", registry)
        self.requests_in_line = gauge("baton_requests_in_line", registry)
        self.admission_refused = counter("baton_admission_refused", registry)
        self.admission_pressure = gauge("baton_admission_pressure", registry)
        self.class_first_tokens = counter("baton_class_first_tokens", registry)
        self.ttft_ratio = Buckets(RATIOS)
        self.finished = counter("baton_finished_choices", registry)
        self.prompt_lengths, self.completion_lengths = Buckets(LENGTHS), Buckets(LENGTHS)
        self.tokenizer_fallbacks = counter("baton_tokenizer_fallbacks", registry)
        self.slow_readers = counter("baton_slow_readers", registry)
        self.filters = counter("baton_filter", registry)
        self.shadows = counter("baton_shadows", registry)
        self.responses = counter("baton_responses", registry)
        self.traces = counter("baton_traces", registry)
        self.drains = counter("baton_drains", registry)
        self.versions = VersionMetrics()
        registry.register(self.versions)
        self.routed_tokens = counter("baton_routed_tokens", registry)
        self.cached_tokens = counter("baton_routed_cached_tokens", registry)
        match, choose, self.e2e = Buckets(DECISION_SECONDS), Buckets(DECISION_SECONDS), Buckets(SECONDS)
        self.match_s, self.choose_s = match.observe, choose.observe
        for name, buckets in (
            ("baton_ttft_seconds", self.ttft),
            ("baton_itl_seconds", self.itl),
            ("baton_request_prompt_tokens", lambda: self.prompt_lengths),
            ("baton_request_completion_tokens", lambda: self.completion_lengths),
            ("baton_request_seconds", lambda: self.e2e),
            ("baton_ttft_ratio", lambda: self.ttft_ratio),
            ("baton_routing_match_seconds", lambda: match),
            ("baton_routing_choose_seconds", lambda: choose),
        ):
            _Histogram(name, buckets, registry)
        self._first_attempts = self.attempts.labels("first")
        self._other_attempts = self.attempts.labels("again")
        self.refused.labels("unavailable")  # whoever starts workers because of it sees the first one, too
        for cause in ("diverged", "gap", "refused", "ended", "expired", "worker_lost", "moved"):
            self.attempts_failed.labels(cause)
        # What alerts look at is there from the start: what begins at 1 has no rate.
        for outcome in ("completed", "failed", "timeout", "aborted"):
            self.requests.labels(outcome)
        for event in ("kept", "not_sampled", "dropped", "failed"):
            self.traces.labels(event)
        for event in ("waited", "ran_alone", "stranded_others", "moved_others", "convicted"):
            self.quarantine.labels(event)

    def token(self, choice: "Choice", now_s: float) -> None:
        """A token of `choice` was delivered."""
        request = choice.request
        figures = request.figures
        if figures is None:
            figures = request.figures = self.versions.of(request.version, request.shadow)
        if choice.last_token_s is not None:
            figures.itl.observe(now_s - choice.last_token_s)
        elif request.first_token_s is None:
            request.first_token_s = now_s
            figures.ttft.observe(now_s - request.started_s)
        choice.last_token_s = now_s

    def cached(self, num_tokens: int, expected: int, found: int) -> None:
        """A worker has said what it found of a prompt that it computes."""
        self.routed_tokens.inc(num_tokens)
        self.cached_tokens.labels("coordinator").inc(expected)
        self.cached_tokens.labels("worker").inc(min(found, num_tokens))

    def itl_total(self) -> tuple[float, int]:
        """Of clients' streams: the sum of all times between tokens, and their number."""
        return self.itl().total()

    def latencies(self) -> dict[str, Buckets]:
        """Of clients' requests so far, in seconds."""
        return {"ttft": self.ttft(), "itl": self.itl(), "request": self.e2e}

    def ttft(self) -> Buckets:
        """Of clients' requests."""
        return self.versions.of_clients(lambda each: each.ttft)

    def itl(self) -> Buckets:
        """Of clients' streams."""
        return self.versions.of_clients(lambda each: each.itl)

    def attempt_started(self, prefill_choice: str, again: bool) -> None:
        (self._other_attempts if again else self._first_attempts).inc()
        self.prefill_choice.labels(prefill_choice).inc()

    def breaker(self, worker_id: str, event: str) -> None:
        self.breakers.labels(worker_id, event).inc()

    def request_ended(self, outcome: str, request: "Request", now_s: float) -> None:
        tokens = sum(len(choice.stream.tokens) for choice in request.choices)
        figures = self.versions.of(request.version, request.shadow)
        figures.outcomes[outcome] += 1
        figures.tokens += tokens
        if request.shadow:
            return
        self.requests.labels(outcome).inc()
        self.prompt_tokens.inc(request.prompt_tokens)
        self.completion_tokens.inc(tokens)
        self.prompt_lengths.observe(request.prompt_tokens)
        self.completion_lengths.observe(tokens)
        for choice in request.choices:
            self.finished.labels(choice.finish_reason or "error").inc()
        if outcome == "completed":
            self.e2e.observe(now_s - request.started_s)

    def watch_workers(self, workers: "WorkerRegistry") -> None:
        self.registry.register(_WorkerCollector(workers))

    def watch_timelines(self, timelines: Timelines) -> None:
        for name, buckets in (
            ("baton_queue_seconds", timelines.queue),
            ("baton_prefill_seconds", timelines.prefill),
            ("baton_decode_seconds", timelines.decode),
            ("baton_handover_wait_seconds", timelines.handover_wait),
            ("baton_handover_wire_seconds", timelines.handover_wire),
        ):
            _Histogram(name, partial(_same, buckets), self.registry)
        self.registry.register(_LaneBytes(timelines))

    def watch_tls(self, sides: Mapping[str, Tls | None]) -> None:
        self.registry.register(_TlsCollector({side: tls for side, tls in sides.items() if tls is not None}))

    async def page(self) -> bytes:
        """For Prometheus. Read here, as of one moment, and written in a thread, which takes longer: streams go on."""
        return await asyncio.to_thread(written, list(self.registry.collect()))


def written(families: Iterable[Metric]) -> bytes:
    registry = CollectorRegistry()
    registry.register(_Read(families))
    return generate_latest(registry)


class _Read(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _same(buckets: Buckets) -> Buckets:
    return buckets


class _LaneBytes(Collector):
    def __init__(self, timelines: Timelines) -> None:
        self._timelines = timelines

    def collect(self) -> Iterator[Metric]:
        family = counters("baton_handover_bytes")
        for lane, num_bytes in self._timelines.handover_bytes.items():
            family.add_metric([lane], num_bytes)
        yield family


class _TlsCollector(Collector):
    def __init__(self, sides: dict[str, Tls]) -> None:
        self._sides = sides

    def collect(self) -> Iterator[Metric]:
        for name in ("tls_refused", "tls_reloads", "tls_reload_failures"):
            family = counters(f"baton_{name}")
            for side, tls in self._sides.items():
                family.add_metric([side], tls.counters.get(name, 0.0))
            yield family
        ends = gauges("baton_tls_certificate_end_seconds")
        for side, tls in self._sides.items():
            ends.add_metric([side], tls.material.expires_at)
        yield ends


class _WorkerCollector(Collector):
    """What the workers told in their last heartbeats, read when somebody asks."""

    def __init__(self, registry: "WorkerRegistry") -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        workers = list(self._registry.workers.values())
        for name in WORKER_COUNTERS:
            family = counters(f"baton_worker_{name}")
            for worker in workers:
                family.add_metric([worker.id], worker.heartbeat.counters.get(name, 0.0))
            yield family
        for name in TIER_COUNTERS:
            family = counters(f"baton_worker_kv_tier_{name}")
            for id, tier, value in _of_tiers(workers, name):
                family.add_metric([id, tier], value)
            yield family
        yield from _gauges(workers)


def _of_tiers(workers: "list[Worker]", name: str) -> Iterator[tuple[str, str, float]]:
    """(worker, tier, value) of a figure of the tiers that there are."""
    for worker in workers:
        for tier in TIERS:
            if (value := worker.heartbeat.counters.get(f"kv_{tier}_{name}")) is not None:
                yield worker.id, tier, value


def _gauges(workers: "list[Worker]") -> Iterator[Metric]:
    blocks = gauges("baton_worker_blocks")
    total = gauges("baton_worker_blocks_total")
    running = gauges("baton_worker_running_requests")
    waiting = gauges("baton_worker_waiting_requests")
    tokens = gauges("baton_worker_waiting_prefill_tokens")
    up = gauges("baton_worker_up")
    info = gauges("baton_worker_info")
    lanes = gauges("baton_lane_in_use")
    size = gauges("baton_worker_kv_tier_bytes")
    room = gauges("baton_worker_kv_tier_capacity_bytes")
    on = gauges("baton_worker_kv_tier_on")
    pinned = gauges("baton_worker_kv_tier_pinned")
    for family, name in ((size, "bytes"), (room, "capacity_bytes"), (on, "on"), (pinned, "pinned")):
        for id, tier, value in _of_tiers(workers, name):
            family.add_metric([id, tier], value)
    for worker in workers:
        beat = worker.heartbeat
        for state in _BLOCK_STATES:
            blocks.add_metric([worker.id, state], getattr(beat.blocks, state))
        info.add_metric([worker.id, worker.version, worker.registration.software_version], 1)
        total.add_metric([worker.id], beat.blocks.total)
        running.add_metric([worker.id], beat.running_requests)
        waiting.add_metric([worker.id], beat.waiting_requests)
        tokens.add_metric([worker.id], beat.waiting_prefill_tokens)
        for role, has in (("prefill", worker.prefills), ("decode", worker.decodes)):
            if has:
                up.add_metric([worker.id, role], float(worker.accepts))
        for peer, lane in beat.lanes_in_use.items():
            lanes.add_metric([worker.id, peer, lane], 1)
    yield from (blocks, total, running, waiting, tokens, up, info, lanes, size, room, on, pinned)
