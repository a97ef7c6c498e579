"""Figures of `baton bench` are those that a hand computes by vLLM's definitions."""

import math

import numpy as np
import pytest

from cli.bench.measuring import (
    CUT_OFF,
    REFUSED,
    Histogram,
    Record,
    Timeline,
    error_counts,
    is_good,
    peak_concurrency,
    statistics,
    summarise,
)


def record(start: float, ttft: float, latency: float, output_tokens: int, error: str = "") -> Record:
    return Record(0, 0, start, start, 10, ttft, latency, 10, output_tokens, output_tokens, True, error=error)


# Two good ones and a failed one, in 10 s: TPOTs are (1.0 - 0.2) / 4 = 0.2 and (2.4 - 0.4) / 10 = 0.2.
SEEN = [record(0, 0.2, 1.0, 5), record(1, 0.4, 2.4, 11), record(2, 0.0, 3.0, 0, "HTTP 500")]


def summary(records: list[Record], **objectives: float) -> dict[str, float]:
    return summarise(records, Histogram(), Timeline(), 10.0, [90.0, 99.9], objectives, queued=False)


def test_throughput_counts_what_came_to_its_end() -> None:
    result = summary(SEEN)
    assert (result["completed"], result["failed"]) == (2, 1)
    assert result["request_throughput"] == pytest.approx(0.2)
    assert result["output_throughput"] == pytest.approx(1.6)
    assert result["total_token_throughput"] == pytest.approx((20 + 16) / 10)
    assert result["request_goodput"] is None, "nobody asked for it"


def test_latencies_are_in_milliseconds_and_percentiles_are_interpolated() -> None:
    result = summary(SEEN)
    assert result["mean_ttft_ms"] == pytest.approx(300)
    assert result["median_ttft_ms"] == pytest.approx(300)
    assert result["std_ttft_ms"] == pytest.approx(100)
    assert result["p90_ttft_ms"] == pytest.approx(200 + 0.9 * 200)
    assert result["p99.9_ttft_ms"] == pytest.approx(200 + 0.999 * 200)
    assert result["mean_e2el_ms"] == pytest.approx(1700)


def test_tpot_leaves_out_the_first_token_and_answers_that_have_no_other() -> None:
    result = summary([*SEEN, record(3, 0.5, 0.5, 1)])
    assert result["mean_tpot_ms"] == pytest.approx(200)
    assert result["std_tpot_ms"] == pytest.approx(0, abs=1e-9)


def test_goodput_wants_every_objective_and_a_bound_itself_is_kept() -> None:
    assert summary(SEEN, ttft=200.0)["request_goodput"] == pytest.approx(0.1)
    assert summary(SEEN, ttft=400.0)["request_goodput"] == pytest.approx(0.2)
    assert summary(SEEN, ttft=400.0, e2el=2399.0)["request_goodput"] == pytest.approx(0.1)
    assert summary(SEEN, tpot=199.0)["request_goodput"] == 0.0
    assert is_good(record(0, 9.0, 9.0, 1), {"tpot": 0.0}), "one token: its TPOT counts as 0"
    assert not is_good(SEEN[2], {"ttft": 1e9}), "failed"


def test_waiting_in_the_client_has_its_own_figures() -> None:
    late = Record(0, 0, 1.0, 1.5, 10, 0.1, 1.0, 10, 5, 5, True)
    result = summarise([late], Histogram(), Timeline(), 10.0, [99.0], {}, queued=True)
    assert result["mean_client_queue_time_ms"] == pytest.approx(500)
    assert result["p99_e2el_including_client_queue_ms"] == pytest.approx(1500)
    assert result["mean_ttft_ms"] == pytest.approx(100), "from when it was sent"


def test_most_at_once_does_not_count_one_that_ends_when_another_starts() -> None:
    assert peak_concurrency([record(0, 0.1, 1.0, 2), record(1.0, 0.1, 1.0, 2)]) == 1
    assert peak_concurrency([record(0, 0.1, 1.1, 2), record(1.0, 0.1, 1.0, 2)]) == 2


def test_what_was_cut_off_is_counted_and_is_no_failure() -> None:
    seen = [record(0, 0, 1, 0, CUT_OFF), record(0, 0, 1, 0, REFUSED), record(0, 0, 1, 0, REFUSED)]
    assert summary(seen)["failed"] == 2
    assert error_counts(seen) == {REFUSED: 2, CUT_OFF: 1}


def test_nothing_measured_gives_zeros_and_no_error() -> None:
    result = summary([], ttft=1.0)
    assert result["completed"] == result["request_goodput"] == result["mean_itl_ms"] == result["p90_ttft_ms"] == 0


@pytest.mark.parametrize("percent", [0, 1, 50, 90, 99, 99.9, 100])
def test_the_histogram_knows_percentiles_to_a_thousandth(percent: float) -> None:
    values = np.random.default_rng(4).lognormal(-4, 1.5, 20_000)
    histogram = Histogram()
    for part in np.array_split(values, 7):
        histogram.add(part)
    exact = float(np.percentile(values, percent, method="lower"))
    assert histogram.percentiles([percent])[0] == pytest.approx(exact, rel=0.0011)


def test_the_histogram_has_exact_means_and_merges() -> None:
    values = np.random.default_rng(5).exponential(0.02, 5000)
    one, other = Histogram(), Histogram()
    one.add(values[:2000])
    other.add(values[2000:])
    one.merge(other)
    assert (one.count, one.longest) == (5000, values.max())
    assert one.mean == pytest.approx(values.mean())
    assert one.deviation == pytest.approx(values.std())


def test_gaps_of_nothing_and_of_hours_have_a_place() -> None:
    histogram = Histogram()
    histogram.add([0.0, 0.0, 0.0, 20_000.0])
    assert histogram.percentiles([50])[0] == 0.0
    assert histogram.percentiles([100])[0] == pytest.approx(10_000, rel=0.01), "the last bin takes all that is longer"


def test_tokens_are_counted_in_the_second_they_came_in() -> None:
    timeline = Timeline()
    timeline.add(np.array([0.1, 0.9, 2.5]), 2.0)
    timeline.add(np.array([0.2]), 1.0)
    assert timeline.tokens == [5.0, 0.0, 2.0]
    other = Timeline()
    other.add(np.array([3.5]), 1.0)
    timeline.merge(other)
    assert timeline.tokens == [5.0, 0.0, 2.0, 1.0]


def test_field_names_are_those_of_vllm() -> None:
    assert set(statistics("itl", Histogram(), [99.0, 99.9])) == {
        "mean_itl_ms", "median_itl_ms", "std_itl_ms", "p99_itl_ms", "p99.9_itl_ms",
    }  # fmt: skip
    assert not any(math.isnan(each) for each in statistics("ttft", [], [99.0]).values())
