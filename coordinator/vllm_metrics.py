"""The metrics of vLLM that routers and autoscalers read, made of what is counted here anyway.

Which ones: the endpoint picker of the Gateway API inference extension (proposal 003, "model server protocol"), llm-d's
autoscaler, and the KEDA examples of KServe and vLLM's production stack. To all of them a coordinator is one engine.
"""

from collections.abc import Callable, Iterator

from prometheus_client import Counter
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from baton.metric_names import VLLM_HISTOGRAMS
from coordinator.delivery import ABORTED, CONTENT_FILTER, LENGTH, STOP
from coordinator.dispatch import Dispatcher
from coordinator.metric_families import counters, gauges, histograms
from coordinator.metrics import Metrics, written
from coordinator.version_metrics import Buckets
from coordinator.workers import WorkerRegistry


class VllmMetrics(Collector):
    def __init__(self, dispatcher: Dispatcher, registry: WorkerRegistry, metrics: Metrics) -> None:
        self._dispatcher = dispatcher
        self._registry = registry
        self._metrics = metrics
        timelines = dispatcher.timelines
        self._buckets: dict[str, Callable[[], Buckets]] = {
            "baton_ttft_seconds": metrics.ttft,
            "baton_itl_seconds": metrics.itl,
            "baton_request_seconds": lambda: metrics.e2e,
            "baton_queue_seconds": lambda: timelines.queue,
            "baton_prefill_seconds": lambda: timelines.prefill,
            "baton_decode_seconds": lambda: timelines.decode,
            "baton_request_prompt_tokens": lambda: metrics.prompt_lengths,
            "baton_request_completion_tokens": lambda: metrics.completion_lengths,
        }

    async def load_page(self) -> bytes:
        """The gauges alone: pickers ask many times a second."""
        return written(self._gauges())

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        for name, of in VLLM_HISTOGRAMS.items():
            family, buckets = histograms(f"vllm:{name}"), self._buckets[of]()
            family.add_metric([self._dispatcher.model], buckets.cumulative(), buckets.sum)
            yield family

    def _gauges(self) -> Iterator[Metric]:
        model, workers = self._dispatcher.model, list(self._registry.workers.values())
        running = self._dispatcher.num_taken_up()
        decoding = [worker for worker in workers if worker.decodes]
        blocks = [worker.heartbeat.blocks for worker in decoding]
        total = sum(each.total for each in blocks)
        used = total - sum(each.free + each.cached for each in blocks)
        for name, value in (
            ("num_requests_running", running),
            ("num_requests_waiting", self._dispatcher.num_live() - running),
            ("kv_cache_usage_perc", used / total if total else 0.0),
        ):
            family = gauges(f"vllm:{name}")
            family.add_metric([model], value)
            yield family
        config = gauges("vllm:cache_config_info")
        if decoding:
            page_size = min(worker.registration.page_size_tokens for worker in decoding)
            config.add_metric([model, str(page_size), str(total)], 1)
        yield config

    def _counters(self) -> Iterator[Metric]:
        model, metrics = self._dispatcher.model, self._metrics
        for name, counted in (
            ("prompt_tokens", metrics.prompt_tokens),
            ("generation_tokens", metrics.completion_tokens),
            ("prefix_cache_queries", metrics.routed_tokens),
            ("prefix_cache_hits", metrics.cached_tokens.labels("worker")),
        ):
            family = counters(f"vllm:{name}")
            family.add_metric([model], _value(counted))
            yield family
        finished, preemptions = counters("vllm:request_success"), counters("vllm:num_preemptions")
        for reason in (STOP, LENGTH, ABORTED, CONTENT_FILTER, "error"):
            finished.add_metric([model, reason], _value(metrics.finished.labels(reason)))
        for worker in self._registry.workers.values():
            preemptions.add_metric([model, worker.id], worker.heartbeat.counters.get("preemptions", 0.0))
        yield from (finished, preemptions)


def _value(counter: Counter) -> float:
    return next(sample.value for metric in counter.collect() for sample in metric.samples if "_total" in sample.name)
