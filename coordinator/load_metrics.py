"""What routers and autoscalers read of a model server, by the names that vLLM gave it: read when somebody asks.

They are the names that the endpoint picker of the Gateway API Inference Extension looks for by itself. Requests are the
streams of this coordinator; the share of KV is that of all workers, which every coordinator has. Pickers ask many times
a second, so these are a page of their own as well.
"""

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from coordinator.dispatch import Dispatcher
from coordinator.metrics import written
from coordinator.workers import WorkerRegistry


class LoadMetrics(Collector):
    def __init__(self, model: str, dispatcher: Dispatcher, workers: WorkerRegistry) -> None:
        self._model = model
        self._dispatcher = dispatcher
        self._workers = workers

    async def page(self) -> bytes:
        return written(self.collect())

    def collect(self) -> Iterator[Metric]:
        live = [
            choice
            for request in self._dispatcher.requests.values()
            if not request.shadow
            for choice in request.choices
            if choice.finish_reason is None
        ]
        running = sum(1 for choice in live if choice.stream.tokens)
        for name, help, value in (
            ("running", "Streams that have tokens and wait for more", running),
            ("waiting", "Streams that wait for their first token", len(live) - running),
        ):
            yield self._gauge(f"vllm:num_requests_{name}", help, value)
        yield self._gauge("vllm:kv_cache_usage_perc", "KV blocks in use, of all there are: 0 to 1", self._kv_in_use())

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(name, help, labels=["model_name"])
        gauge.add_metric([self._model], value)
        return gauge

    def _kv_in_use(self) -> float:
        blocks = [worker.heartbeat.blocks for worker in self._workers.workers.values() if worker.decodes]
        total = sum(each.total for each in blocks)
        return 1 - sum(each.free + each.cached for each in blocks) / total if total else 0.0
