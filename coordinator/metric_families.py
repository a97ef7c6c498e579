"""What `baton.metric_names` lists, as the Prometheus client has it. A name that is not there is a KeyError."""

from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from baton.metric_names import METRICS


def counter(name: str, registry: CollectorRegistry) -> Counter:
    known = METRICS[name]
    made = Counter(name, known.meaning, known.labels, registry=registry)
    made.labels = cache(made.labels)  # type: ignore[method-assign]  # its own search takes a lock, and text of each
    return made


def gauge(name: str, registry: CollectorRegistry) -> Gauge:
    known = METRICS[name]
    return Gauge(name, known.meaning, known.labels, registry=registry)


# For collectors, that have their values when somebody asks. Without labels a family can be given its value at once.


def counters(name: str, value: float | None = None) -> CounterMetricFamily:
    known = METRICS[name]
    return CounterMetricFamily(name, known.meaning, value, known.labels or None)


def gauges(name: str, value: float | None = None) -> GaugeMetricFamily:
    known = METRICS[name]
    return GaugeMetricFamily(name, known.meaning, value, known.labels or None)


def histograms(name: str) -> HistogramMetricFamily:
    """Without labels it has one sample, whose labels are []."""
    known = METRICS[name]
    return HistogramMetricFamily(name, known.meaning, labels=known.labels)
