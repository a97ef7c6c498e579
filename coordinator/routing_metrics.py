"""How requests are routed, and how good the knowledge of caches is that this is done with: read when somebody asks."""

import time
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from coordinator.knowledge import CacheKnowledge, Told


class RoutingMetrics(Collector):
    def __init__(self, policy: str, knowledge: CacheKnowledge) -> None:
        self._policy = policy
        self._knowledge = knowledge

    def collect(self) -> Iterator[Metric]:
        info = GaugeMetricFamily("baton_routing_info", "Always 1: how workers are chosen", labels=["policy", "kv"])
        info.add_metric([self._policy, self._knowledge.mode], 1)
        yield info
        if isinstance(self._knowledge, Told):
            yield from _of_index(self._knowledge)


def _of_index(told: Told) -> Iterator[Metric]:
    index, now_s = told.index, time.monotonic()
    for name, help, count in (
        ("messages", "Messages of workers about their caches", index.messages),
        ("changes", "Blocks that these said were stored or removed", index.changes),
        ("gaps", "Messages that came after one that did not", index.gaps),
        ("snapshots", "Messages that began anew", index.snapshots),
        ("refused", "Blocks that are cached somewhere and not known: the index was full", index.refused),
    ):
        yield CounterMetricFamily(f"baton_kv_index_{name}", help, value=count)
    for name, help, value in (
        ("blocks", "Blocks that some worker holds", len(index)),
        ("entries", "The same, by worker and tier", index.num_entries),
        ("bytes", "Estimate of the memory that this takes", index.num_bytes),
    ):
        yield GaugeMetricFamily(f"baton_kv_index_{name}", help, value=value)
    lag = GaugeMetricFamily("baton_kv_index_lag_messages", "Sent, not applied yet", labels=["worker"])
    lag_s = GaugeMetricFamily("baton_kv_index_lag_seconds", "How old what is known is", labels=["worker"])
    is_known = GaugeMetricFamily("baton_kv_index_worker_known", "0: it has told nothing", labels=["worker"])
    for id, caches in told.workers():
        lag.add_metric([id], caches.lag)
        lag_s.add_metric([id], caches.lag_s(now_s))
        is_known.add_metric([id], float(caches.told))
    yield from (lag, lag_s, is_known)
