"""The short form of `benchmarks.gateway_soak`: a coordinator keeps nothing of requests that are over."""

from benchmarks.gateway_soak import soak
from benchmarks.report import Report

REQUESTS = 2000


def test_a_coordinator_keeps_nothing_of_requests_that_are_over() -> None:
    report = Report("short")
    soak(report, REQUESTS, num_streams=16, window_s=0.5)
    rows = {row.name: row for row in report.rows}
    assert rows["requests completed"].value >= REQUESTS
    assert rows["clients that hung up"].value > 0
    assert rows["clients that were refused"].value > 0
    assert rows["streams left"].met
    assert rows["descriptors"].met
    last = [row for row in report.rows if row.name.startswith("memory after")][-1]
    assert last.ratio is not None
    assert last.ratio < 1.1, f"{last.value:.1f} MiB, {last.versus}"
