"""How requests are routed, and how good the knowledge of caches is that this is done with: read when somebody asks."""

import time
from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from coordinator.knowledge import CacheKnowledge, Told
from coordinator.metric_families import counters, gauges


class RoutingMetrics(Collector):
    def __init__(self, policy: str, knowledge: CacheKnowledge) -> None:
        self._policy = policy
        self._knowledge = knowledge

    def collect(self) -> Iterator[Metric]:
        info = gauges("baton_routing_info")
        info.add_metric([self._policy, self._knowledge.mode], 1)
        yield info
        if isinstance(self._knowledge, Told):
            yield from _of_index(self._knowledge)


def _of_index(told: Told) -> Iterator[Metric]:
    index, now_s = told.index, time.monotonic()
    for name, count in (
        ("messages", index.messages),
        ("changes", index.changes),
        ("gaps", index.gaps),
        ("snapshots", index.snapshots),
        ("refused", index.refused),
    ):
        yield counters(f"baton_kv_index_{name}", count)
    for name, value in (
        ("blocks", len(index)),
        ("entries", index.num_entries),
        ("bytes", index.num_bytes),
    ):
        yield gauges(f"baton_kv_index_{name}", value)
    lag = gauges("baton_kv_index_lag_messages")
    lag_s = gauges("baton_kv_index_lag_seconds")
    is_known = gauges("baton_kv_index_worker_known")
    for id, caches in told.workers():
        lag.add_metric([id], caches.lag)
        lag_s.add_metric([id], caches.lag_s(now_s))
        is_known.add_metric([id], float(caches.told))
    yield from (lag, lag_s, is_known)
