"""Every metric that a coordinator exports, once: what it is called, what it counts, and in what.

Whoever counts takes name, labels and meaning from here (`coordinator.metric_families`); docs/metrics.md, the checks of
alerts and dashboards, and the names that routers and autoscalers of vLLM know are made from the same list.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from baton.metrics import TIER_COUNTERS, WORKER_COUNTERS


class Kind(Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One family of time series."""

    name: str
    """Without the `_total` that counters end in."""
    kind: Kind
    meaning: str
    labels: tuple[str, ...] = ()
    unit: str = ""
    """Of its values; of a histogram, of what is observed."""

    @property
    def exported(self) -> str:
        """As a query has it; a histogram's time series have `_bucket`, `_sum` and `_count` behind it."""
        return self.name + "_total" if self.kind is Kind.COUNTER else self.name

    @property
    def series(self) -> tuple[str, ...]:
        """The names that time series of this family have."""
        if self.kind is Kind.HISTOGRAM:
            return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.exported,)


@dataclass(frozen=True, slots=True)
class Section:
    """Of the page that lists them."""

    title: str
    about: str
    metrics: tuple[Metric, ...]


VLLM_HISTOGRAMS = {
    "time_to_first_token_seconds": "baton_ttft_seconds",
    "inter_token_latency_seconds": "baton_itl_seconds",
    "e2e_request_latency_seconds": "baton_request_seconds",
    "request_queue_time_seconds": "baton_queue_seconds",
    "request_prefill_time_seconds": "baton_prefill_seconds",
    "request_decode_time_seconds": "baton_decode_seconds",
    "request_prompt_tokens": "baton_request_prompt_tokens",
    "request_generation_tokens": "baton_request_completion_tokens",
}
"""Names behind `vllm:`, and whose figures they are."""
_UNITS = ("seconds", "ratio", "perc", "bytes", "tokens", "blocks", "messages", "steps", "attempts", "requests")

_COUNTED = (
    "attempts",
    "blocks",
    "connections",
    "hand-overs",
    "leases",
    "names",
    "peers",
    "prefixes",
    "prompts",
    "requests",
)


def _metric(kind: Kind, name: str, meaning: str, *labels: str, unit: str = "") -> Metric:
    """The unit is given, or the one that the name has, or what the meaning begins with; else events."""
    words = name.replace(":", "_").split("_")
    begins = meaning.split()[0].lower()
    counted = begins if begins in _COUNTED else "events"
    found = unit or next((each for each in _UNITS if each in words), counted)
    return Metric(name, kind, meaning, labels, "ratio" if found == "perc" else found)


def _counter(name: str, meaning: str, *labels: str, unit: str = "") -> Metric:
    return _metric(Kind.COUNTER, name, meaning, *labels, unit=unit)


def _gauge(name: str, meaning: str, *labels: str, unit: str = "") -> Metric:
    return _metric(Kind.GAUGE, name, meaning, *labels, unit=unit)


def _histogram(name: str, meaning: str, *labels: str, unit: str = "") -> Metric:
    return _metric(Kind.HISTOGRAM, name, meaning, *labels, unit=unit)


_REQUESTS = Section("Requests", "What clients asked for and what became of it.", (
    _counter("baton_requests", "Requests ended", "outcome"),
    _counter("baton_requests_refused", "Requests refused at once", "reason"),
    _counter("baton_responses", "Calls answered, by HTTP status or gRPC code; 499: the client hung up; no probes",
             "protocol", "code", unit="calls"),
    _counter("baton_prompt_tokens", "Tokens of prompts of ended requests"),
    _counter("baton_completion_tokens", "Tokens delivered"),
    _histogram("baton_ttft_seconds", "Arrival to first token"),
    _histogram("baton_itl_seconds", "Token to next token of a stream"),
    _histogram("baton_request_seconds", "Arrival to end of completed requests"),
    _histogram("baton_request_prompt_tokens", "Tokens of the prompts of an ended request"),
    _histogram("baton_request_completion_tokens", "Tokens delivered to an ended request"),
    _counter("baton_finished_choices", "Choices of ended requests, by finish reason", "reason", unit="choices"),
    _histogram("baton_ttft_ratio", "Time to first token: measured over predicted"),
    _counter("baton_tokenizer_fallbacks", "Encoding done by the slower library: one prompt (failed), or all", "reason"),
    _counter("baton_slow_readers", "Clients hung up on: they did not read their answers", unit="clients"),
    _counter("baton_requests_resumed", "Clients that came back", "how"),
    _counter("baton_filter", "What filters did with texts: [security.md](security.md#filters)", "filter", "event"),
))  # fmt: skip
_PHASES = Section("Phases", "Where the time of a request goes; of a single one, `baton trace` says it.", (
    _histogram("baton_queue_seconds", "A prompt at the worker that computes it: assigned until taken up"),
    _histogram("baton_prefill_seconds", "A prompt taken up, until the first token from there"),
    _histogram("baton_handover_wait_seconds", "Taking a prompt over: waiting for what was not computed or offered yet"),
    _histogram("baton_handover_wire_seconds", "Taking a prompt over: blocks copied and checked"),
    _counter("baton_handover_bytes", "Of prompts that decode workers took over, as they told at attempts' ends",
             "lane"),
    _histogram("baton_decode_seconds", "First token to end of completed requests"),
))  # fmt: skip
_ADMISSION = Section("Admission", "Who is taken, by what is predicted: [admission.md](admission.md).", (
    _counter("baton_admission_refused", "Requests refused by prediction", "service_class", "cause", unit="requests"),
    _gauge("baton_requests_in_line", "Calls that wait for a turn of the event loop to begin them", unit="requests"),
    _gauge("baton_admission_pressure", "Predicted wait of a request, over its target", "service_class", unit="ratio"),
    _counter("baton_class_first_tokens", "First tokens by whether the target was met", "service_class", "in_time"),
))  # fmt: skip
_ATTEMPTS = Section("Attempts and recovery", "What was tried again, and why: [retries.md](retries.md).", (
    _counter("baton_attempts", "Attempts begun", "kind"),
    _counter("baton_attempts_failed", "Attempts abandoned", "cause"),
    _counter("baton_retries_delayed", "Retries that waited: budget", unit="attempts"),
    _counter("baton_waits_for_worker", "Times that a stream waited for any worker to come back"),
    _counter("baton_avoided_workers_used", "Attempts on workers that had failed the request before", unit="attempts"),
    _counter("baton_suspects", "Requests present at a worker's death, each time", unit="requests"),
    _counter("baton_quarantine", "Isolated requests by event", "event"),
    _counter("baton_worker_breaker", "Events of workers' breakers", "worker", "event"),
    _counter("baton_orphans", "Attempts of lost coordinators", "event", unit="attempts"),
    _counter("baton_drains", "Draining workers and their streams", "event"),
))  # fmt: skip
_ROUTING = Section("Routing", "Where requests go, and what that is decided by: [routing.md](routing.md).", (
    _gauge("baton_routing_info", "Always 1: how workers are chosen", "policy", "kv", unit="1"),
    _counter("baton_prefill_choice", "Who prefills, and why", "choice", unit="attempts"),
    _counter("baton_routed_tokens", "Of prompts sent to workers"),
    _counter("baton_routed_cached_tokens", "Of these, in caches of whoever computes them", "who"),
    _histogram("baton_routing_match_seconds", "Looking for who holds a prompt"),
    _histogram("baton_routing_choose_seconds", "Choosing workers for it"),
    _counter("baton_cache_pins", "Pins of prefixes", "event"),
    _counter("baton_kv_index_messages", "Messages of workers about their caches"),
    _counter("baton_kv_index_changes", "Blocks that these said were stored or removed", unit="blocks"),
    _counter("baton_kv_index_gaps", "Messages that came after one that did not", unit="messages"),
    _counter("baton_kv_index_snapshots", "Messages that began anew", unit="messages"),
    _counter("baton_kv_index_refused", "Blocks that are cached somewhere and not known: the index was full",
             unit="blocks"),
    _gauge("baton_kv_index_blocks", "Blocks that some worker holds"),
    _gauge("baton_kv_index_entries", "The same, by worker and tier", unit="blocks"),
    _gauge("baton_kv_index_bytes", "Estimate of the memory that this takes"),
    _gauge("baton_kv_index_lag_messages", "Sent, not applied yet", "worker"),
    _gauge("baton_kv_index_lag_seconds", "How old what is known is", "worker"),
    _gauge("baton_kv_index_worker_known", "0: it has told nothing", "worker", unit="1"),
))  # fmt: skip
_VERSIONS = Section("Model versions", "Of each version's clients, or its shadows: [upgrades.md](upgrades.md).", (
    _counter("baton_version_requests", "Requests ended", "version", "traffic", "outcome"),
    _counter("baton_version_completion_tokens", "Tokens of ended requests", "version", "traffic"),
    _counter("baton_version_fast_path_tokens", "Tokens delivered by the fast path", "version", "traffic"),
    _histogram("baton_version_ttft_seconds", "Arrival to first token", "version", "traffic"),
    _histogram("baton_version_itl_seconds", "Token to next token of a stream", "version", "traffic"),
    _counter("baton_version_absent", "Requests of a version that was not there, taken by others", "version",
             unit="requests"),
    _counter("baton_version_moves", "Requests begun anew at another version: theirs was gone", unit="requests"),
    _counter("baton_rollout_errors", "Broken --rollout files, each time"),
    _counter("baton_shadows", "Copies of requests by event", "event", unit="requests"),
    _counter("baton_shadow_answers", "Choices of shadows beside those of clients", "version", "tokens",
             unit="choices"),
    _histogram("baton_shadow_first_difference_tokens", "Equal tokens before the first other one", "version"),
))  # fmt: skip
_TENANTS = Section("Tenants", "Only with `--keys`: [tenants.md](tenants.md).", (
    _counter("baton_tenant_requests", "Requests ended", "tenant", "outcome"),
    _counter("baton_tenant_refused", "Requests not taken", "tenant", "reason", unit="requests"),
    _counter("baton_tenant_tokens", "Of ended requests; cached ones are input, too", "tenant", "kind"),
    _counter("baton_tenant_cost", "Of ended requests, by the prices of --keys", "tenant", unit="as in --keys"),
    _gauge("baton_tenant_streams", "Answers on their way", "tenant", unit="streams"),
    _counter("baton_keys_denied", "Calls without a key that is good", "reason", unit="calls"),
    _counter("baton_keys_file_errors", "Broken --keys files, each time"),
    _counter("baton_audit_lines", "Of --audit-log", "event", unit="lines"),
))  # fmt: skip
_PROCESS = Section("Connections, discovery, TLS, tracing", "Of the coordinator itself: [security.md](security.md).", (
    _counter("baton_connections_refused", "Connections turned away or closed early", "door", "reason"),
    _gauge("baton_connections_open", "Connections of clients and workers", "door"),
    _counter("baton_traces", "Traces of requests, by what became of them: [tracing.md](tracing.md)", "event",
             unit="traces"),
    _gauge("baton_discovery_up", "1 while --discovery answers, or none is used", unit="1"),
    _counter("baton_discovery_losses", "Times that --discovery was lost"),
    *(_counter(f"baton_{name}", WORKER_COUNTERS[name], "side") for name in (
        "tls_refused", "tls_reloads", "tls_reload_failures")),
    _gauge("baton_tls_certificate_end_seconds", "When it ends, since 1970", "side"),
))  # fmt: skip
_WORKERS = Section("Workers", "From their last heartbeats; a worker that is lost has none.", (
    _gauge("baton_worker_up", "1 accepts work, 0 drains", "worker", "role", unit="1"),
    _gauge("baton_worker_info", "Always 1: what it runs", "worker", "version", "software", unit="1"),
    _gauge("baton_worker_blocks", "KV blocks by state", "worker", "state"),
    _gauge("baton_worker_blocks_total", "KV blocks of the pool", "worker"),
    _gauge("baton_worker_running_requests", "Requests being computed", "worker"),
    _gauge("baton_worker_waiting_requests", "Requests not begun", "worker"),
    _gauge("baton_worker_waiting_prefill_tokens", "Prompt tokens to compute", "worker"),
    _gauge("baton_lane_in_use", "Always 1: who hands over how", "worker", "peer", "lane", unit="1"),
    *(_counter(f"baton_worker_{name}", meaning, "worker") for name, meaning in WORKER_COUNTERS.items()),
))  # fmt: skip
_TIERS = Section("Tiers", "Host memory, disk and the shared store of each worker: [kv.md](kv.md).", (
    _gauge("baton_worker_kv_tier_bytes", "What its blocks take", "worker", "tier"),
    _gauge("baton_worker_kv_tier_capacity_bytes", "What they may", "worker", "tier"),
    _gauge("baton_worker_kv_tier_on", "1 on, 0.5 read-only, 0 off", "worker", "tier", unit="1"),
    _gauge("baton_worker_kv_tier_pinned", "Blocks that pins keep", "worker", "tier", unit="blocks"),
    *(_counter(f"baton_worker_kv_tier_{name}", meaning, "worker", "tier",
               unit="events" if name in ("io_errors", "timeouts") else "blocks")
      for name, meaning in TIER_COUNTERS.items()),
))  # fmt: skip
_VLLM = Section(
    "Names of vLLM",
    "For what reads vLLM's: the endpoint picker of the Gateway API inference extension and llm-d, autoscalers (KEDA,"
    " llm-d's), dashboards. Each comes from a number above, of all workers of this coordinator together.", (
    _gauge("vllm:num_requests_running", "Streams that a worker has taken up", "model_name"),
    _gauge("vllm:num_requests_waiting", "Streams whose prompt no worker has taken up", "model_name"),
    _gauge("vllm:kv_cache_usage_perc", "KV blocks in use, of all in workers that decode: 0 to 1", "model_name"),
    _gauge("vllm:cache_config_info", "Always 1: tokens of a block, and blocks in workers that decode", "model_name",
           "block_size", "num_gpu_blocks", unit="1"),
    _counter("vllm:request_success", "As baton_finished_choices_total", "model_name", "finished_reason",
             unit="choices"),
    _counter("vllm:prompt_tokens", "As baton_prompt_tokens_total", "model_name"),
    _counter("vllm:generation_tokens", "As baton_completion_tokens_total", "model_name"),
    _counter("vllm:prefix_cache_queries", "As baton_routed_tokens_total", "model_name", unit="tokens"),
    _counter("vllm:prefix_cache_hits", "As baton_routed_cached_tokens_total of workers", "model_name", unit="tokens"),
    _counter("vllm:num_preemptions", "As baton_worker_preemptions_total", "model_name", "engine", unit="requests"),
    *(_histogram(f"vllm:{name}", f"As {of}", "model_name") for name, of in VLLM_HISTOGRAMS.items()),
))  # fmt: skip

SECTIONS = (_REQUESTS, _PHASES, _ADMISSION, _ATTEMPTS, _ROUTING, _VERSIONS, _TENANTS, _PROCESS, _WORKERS, _TIERS, _VLLM)


def _by_name(sections: Iterable[Section]) -> dict[str, Metric]:
    return {metric.name: metric for section in sections for metric in section.metrics}


METRICS = _by_name(SECTIONS)
"""By name."""
