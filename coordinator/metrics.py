"""What the coordinator counts, in Prometheus' terms. Names begin with baton_, units are in the name."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.metrics import TIER_COUNTERS, TIERS, WORKER_COUNTERS
from baton.tls import Tls
from coordinator.delivery import Choice, Request
from coordinator.version_metrics import SECONDS, Buckets, VersionMetrics
from coordinator.workers import Worker, WorkerRegistry

DECISION_SECONDS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
RATIOS = (0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0)
_BLOCK_STATES = ("free", "cached", "held", "leased", "quarantined")


class _Histogram(Collector):
    """`buckets` has its figures when somebody asks."""

    def __init__(self, name: str, help: str, buckets: Callable[[], Buckets], registry: CollectorRegistry) -> None:
        self._name, self._help = name, help
        self._buckets = buckets
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        buckets = self._buckets()
        yield HistogramMetricFamily(self._name, self._help, buckets=buckets.cumulative(), sum_value=buckets.sum)


class Metrics:
    """One registry a coordinator, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("baton_requests", "Requests ended", ["outcome"], registry=registry)
        self.refused = Counter("baton_requests_refused", "Requests refused at once", ["reason"], registry=registry)
        self.prompt_tokens = Counter("baton_prompt_tokens", "Tokens of prompts of ended requests", registry=registry)
        self.completion_tokens = Counter("baton_completion_tokens", "Tokens delivered", registry=registry)
        self.attempts = Counter("baton_attempts", "Attempts begun", ["kind"], registry=registry)
        self.attempts_failed = Counter("baton_attempts_failed", "Attempts abandoned", ["cause"], registry=registry)
        self.prefill_choice = Counter("baton_prefill_choice", "Who prefills, and why", ["choice"], registry=registry)
        self.resumed = Counter("baton_requests_resumed", "Clients that came back", ["how"], registry=registry)
        self.orphans = Counter("baton_orphans", "Attempts of lost coordinators", ["event"], registry=registry)
        self.pins = Counter("baton_cache_pins", "Pins of prefixes", ["event"], registry=registry)
        self.suspects = Counter("baton_suspects", "Requests present at a worker's death, each time", registry=registry)
        self.quarantine = Counter("baton_quarantine", "Isolated requests by event", ["event"], registry=registry)
        self.breakers = Counter(
            "baton_worker_breaker", "Events of workers' breakers", ["worker", "event"], registry=registry
        )
        self.retries_delayed = Counter("baton_retries_delayed", "Retries that waited: budget", registry=registry)
        self.waits_for_worker = Counter(
            "baton_waits_for_worker", "Times that a stream waited for any worker to come back", registry=registry
        )
        self.avoided_used = Counter(
            "baton_avoided_workers_used", "Attempts on workers that had failed the request before", registry=registry
        )
        self.discovery_up = Gauge(
            "baton_discovery_up", "1 while --discovery answers, or none is used", registry=registry
        )
        self.discovery_losses = Counter("baton_discovery_losses", "Times that etcd was lost", registry=registry)
        self.version_absent = Counter(
            "baton_version_absent", "Requests of a version that was not there, taken by others", ["version"],
            registry=registry,
        )  # fmt: skip
        self.version_moves = Counter(
            "baton_version_moves", "Requests begun anew at another version: theirs was gone", registry=registry
        )
        self.rollout_errors = Counter("baton_rollout_errors", "Broken --rollout files, each time", registry=registry)
        self.admission_refused = Counter(
            "baton_admission_refused", "Requests refused by prediction", ["service_class", "cause"], registry=registry
        )
        self.admission_pressure = Gauge(
            "baton_admission_pressure", "Predicted wait of a request, over its target", ["service_class"],
            registry=registry,
        )  # fmt: skip
        self.class_first_tokens = Counter(
            "baton_class_first_tokens", "First tokens by whether the target was met", ["service_class", "in_time"],
            registry=registry,
        )  # fmt: skip
        self.ttft_ratio = Buckets(RATIOS)
        self.slow_readers = Counter(
            "baton_slow_readers", "Clients hung up on: they did not read their answers", registry=registry
        )
        self.filters = Counter("baton_filter", "What filters did", ["filter", "event"], registry=registry)
        self.shadows = Counter("baton_shadows", "Copies of requests by event", ["event"], registry=registry)
        self.drains = Counter("baton_drains", "Draining workers and their streams", ["event"], registry=registry)
        self.versions = VersionMetrics()
        registry.register(self.versions)
        self._routed_tokens = Counter("baton_routed_tokens", "Of prompts sent to workers", registry=registry)
        self._cached_tokens = Counter(
            "baton_routed_cached_tokens", "Of these, in caches of whoever computes them", ["who"], registry=registry
        )
        match, choose, self._e2e = Buckets(DECISION_SECONDS), Buckets(DECISION_SECONDS), Buckets(SECONDS)
        self.match_s, self.choose_s = match.observe, choose.observe
        for name, help, buckets in (
            ("baton_ttft_seconds", "Arrival to first token", lambda: self.versions.of_clients(lambda each: each.ttft)),
            ("baton_itl_seconds", "Token to next token of a stream", self._itl),
            ("baton_request_seconds", "Arrival to end of completed requests", lambda: self._e2e),
            ("baton_ttft_ratio", "Time to first token: measured over predicted", lambda: self.ttft_ratio),
            ("baton_routing_match_seconds", "Looking for who holds a prompt", lambda: match),
            ("baton_routing_choose_seconds", "Choosing workers for it", lambda: choose),
        ):
            _Histogram(name, help, buckets, registry)
        self._first_attempts = self.attempts.labels("first")
        self._other_attempts = self.attempts.labels("again")
        for cause in ("diverged", "gap", "refused", "ended", "expired", "worker_lost", "moved"):
            self.attempts_failed.labels(cause)
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
        self._routed_tokens.inc(num_tokens)
        self._cached_tokens.labels("coordinator").inc(expected)
        self._cached_tokens.labels("worker").inc(min(found, num_tokens))

    def itl_total(self) -> tuple[float, int]:
        """Of clients' streams: the sum of all times between tokens, and their number."""
        return self._itl().total()

    def _itl(self) -> Buckets:
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
        if outcome == "completed":
            self._e2e.observe(now_s - request.started_s)

    def watch_workers(self, workers: "WorkerRegistry") -> None:
        self.registry.register(_WorkerCollector(workers))

    def watch_tls(self, sides: Mapping[str, Tls | None]) -> None:
        self.registry.register(_TlsCollector({side: tls for side, tls in sides.items() if tls is not None}))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _TlsCollector(Collector):
    def __init__(self, sides: dict[str, Tls]) -> None:
        self._sides = sides

    def collect(self) -> Iterator[Metric]:
        for name in ("tls_refused", "tls_reloads", "tls_reload_failures"):
            family = CounterMetricFamily(f"baton_{name}", WORKER_COUNTERS[name], labels=["side"])
            for side, tls in self._sides.items():
                family.add_metric([side], tls.counters.get(name, 0.0))
            yield family
        ends = GaugeMetricFamily("baton_tls_certificate_end_seconds", "When it ends, since 1970", labels=["side"])
        for side, tls in self._sides.items():
            ends.add_metric([side], tls.material.expires_at)
        yield ends


class _WorkerCollector(Collector):
    """What the workers told in their last heartbeats, read when somebody asks."""

    def __init__(self, registry: "WorkerRegistry") -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        workers = list(self._registry.workers.values())
        for name, help in WORKER_COUNTERS.items():
            family = CounterMetricFamily(f"baton_worker_{name}", help, labels=["worker"])
            for worker in workers:
                family.add_metric([worker.id], worker.heartbeat.counters.get(name, 0.0))
            yield family
        for name, help in TIER_COUNTERS.items():
            family = CounterMetricFamily(f"baton_worker_kv_tier_{name}", help, labels=["worker", "tier"])
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
    blocks = GaugeMetricFamily("baton_worker_blocks", "KV blocks by state", labels=["worker", "state"])
    total = GaugeMetricFamily("baton_worker_blocks_total", "KV blocks of the pool", labels=["worker"])
    running = GaugeMetricFamily("baton_worker_running_requests", "Requests being computed", labels=["worker"])
    waiting = GaugeMetricFamily("baton_worker_waiting_requests", "Requests not begun", labels=["worker"])
    tokens = GaugeMetricFamily("baton_worker_waiting_prefill_tokens", "Prompt tokens to compute", labels=["worker"])
    up = GaugeMetricFamily("baton_worker_up", "1 accepts work, 0 drains", labels=["worker", "role"])
    info = GaugeMetricFamily("baton_worker_info", "Always 1: what it runs", labels=["worker", "version", "software"])
    lanes = GaugeMetricFamily("baton_lane_in_use", "Always 1: who hands over how", labels=["worker", "peer", "lane"])
    size = GaugeMetricFamily("baton_worker_kv_tier_bytes", "What its blocks take", labels=["worker", "tier"])
    on = GaugeMetricFamily("baton_worker_kv_tier_on", "1 on, 0.5 read-only, 0 off", labels=["worker", "tier"])
    pinned = GaugeMetricFamily("baton_worker_kv_tier_pinned", "Blocks that pins keep", labels=["worker", "tier"])
    for family, name in ((size, "bytes"), (on, "on"), (pinned, "pinned")):
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
    yield from (blocks, total, running, waiting, tokens, up, info, lanes, size, on, pinned)
