"""Writes docs/metrics.md from `baton.metric_names`: `python -m baton.metric_page docs/metrics.md`."""

import sys
from collections.abc import Iterator
from pathlib import Path

from baton.metric_names import SECTIONS, Metric

_TOP = """# Metrics

`GET /metrics` of a coordinator has all of them, its workers' included, for Prometheus. Each process of a coordinator
with `--processes` answers at a port of its own. This page is made from `baton/metric_names.py` by `make docs-metrics`.

Counters and histograms begin at 0 when their process starts. Ready-made rules, alerts and a dashboard are in
`deploy/observability/`; one request's life is in [tracing.md](tracing.md).
"""


def page() -> str:
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield _TOP
    for section in SECTIONS:
        yield f"## {section.title}\n\n{section.about}\n"
        yield "| name | type | unit | labels | meaning |\n|---|---|---|---|---|"
        yield from map(_row, section.metrics)
        yield ""


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.exported}` | {metric.kind.value} | {metric.unit} | {labels} | {metric.meaning} |"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
