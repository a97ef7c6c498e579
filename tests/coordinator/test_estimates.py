"""Predictions are plain sums, in seconds, and say 0 where nobody has measured."""

import math

import numpy as np
import pytest
from outbox import Outbox
from routing_harness import Workers, decode, mixed, prefill

from baton.v1 import worker_link_pb2 as wire
from coordinator import estimates
from coordinator.policies.base import Work
from coordinator.workers import Worker


def test_rates_that_nobody_measured_are_the_mean_of_those_that_somebody_did() -> None:
    rates = np.array([0.0, 2.0, 4.0])
    assert estimates.filled(rates).tolist() == [3.0, 2.0, 4.0]
    assert estimates.filled(np.zeros(2), rates).tolist() == [3.0, 3.0]
    assert estimates.filled(np.zeros(2)).tolist() == [0.0, 0.0]
    assert estimates.filled(rates[1:]).tolist() == [2.0, 4.0]


def test_computing_costs_what_no_cache_has_and_loading_never_costs_more() -> None:
    assert estimates.compute_s(1000, 0.01) == pytest.approx(10.0)
    assert estimates.load_s(1000, 0, 4_000_000, 0.01) == pytest.approx(1.0)  # 4 GB at 4 GB/s
    assert estimates.load_s(0, 1000, 4_000_000, 0.01) == pytest.approx(4.0)  # at 1 GB/s
    assert estimates.load_s(0, 1000, 4_000_000, 0.001) == pytest.approx(1.0), "it is computed rather than loaded"
    assert estimates.saves_s(0.01, 0.004) == pytest.approx(0.006)
    assert estimates.saves_s(0.01, 0.02) == 0.0, "computing is sooner"
    assert estimates.saves_s(0.01, 0.0) == 0.0, "nobody knows how fast they come"


def test_only_what_computing_does_not_cover_of_a_hand_over_is_waited_for() -> None:
    assert estimates.tail_s(1000, 0.001, 3.0) == 0.0
    assert estimates.tail_s(5000, 0.001, 3.0) == pytest.approx(2.0)


def test_a_step_grows_with_its_streams() -> None:
    each = estimates.stream_s(0.064, 16)
    assert estimates.itl_s(each, 16) == pytest.approx(0.064)
    assert estimates.itl_s(each, 32) == pytest.approx(0.096)
    alone = estimates.decode_s(each, 0.0, 100)
    among = estimates.decode_s(each, 16.0, 100)
    assert alone == pytest.approx(100 * 17 * 0.002)
    assert among == pytest.approx(100 * (33 * 0.002 + 16 * 0.002))


@pytest.mark.parametrize("policy", ["cost_based", "least_loaded"])
def test_a_route_says_what_it_predicts_and_nothing_where_nothing_is_known(policy: str) -> None:
    workers = Workers(p=prefill(), d=decode())
    route = workers.route(Work(1000, 1200), workers.router(policy))
    assert (route.ttft_s, route.itl_s) == (0.0, 0.0)
    workers = Workers(
        p=prefill(prefill_s=0.001, waiting_prefill_tokens=3000),
        d=decode(stream_s=0.002, requests=3, kv_bytes_per_token=1000),
        other=decode(requests=99),
    )
    route = workers.route(Work(1000, 1200, workers.cached(p=400)), workers.router(policy))
    assert (route.decode, route.prefill, route.cached_tokens) == ("d", "p", 400)
    assert route.ttft_s == pytest.approx((3000 + 600) * 0.001)
    assert route.itl_s == pytest.approx(0.002 * (4 + 16))


def test_a_worker_that_has_not_measured_is_taken_to_be_like_the_others() -> None:
    workers = Workers(new=mixed(), old=mixed(prefill_s=0.001, stream_s=0.01, requests=50))
    route = workers.route(Work(1000, 1200), workers.router("least_loaded"))
    assert route.decode == "new"
    assert route.ttft_s == pytest.approx(1.0)
    assert route.itl_s == pytest.approx(0.01 * 17)


def test_a_worker_whose_places_are_taken_says_how_many_answers_must_end_first() -> None:
    measured = {"prefill_s": 0.001, "stream_s": 0.002}
    for requests, places, turns, batch in ((3, 4, 0.0, 4), (4, 4, 0.25, 4), (9, 4, 1.5, 4), (9, math.inf, 0.0, 10)):
        workers = Workers(w=mixed(requests=requests, max_running=places, **measured))
        route = workers.route(Work(1000, 1200))
        assert (route.turns, route.ttft_s) == (turns, pytest.approx(1.0))
        assert route.itl_s == pytest.approx(0.002 * (batch + 16)), "those who wait make no step longer"
    workers = Workers(p=prefill(**measured), d=decode(requests=9, max_running=4, **measured))
    assert workers.route(Work(1000, 1200)).turns == 0.0, "its first token comes from the prefill worker"


def test_what_cannot_have_been_measured_counts_as_not_measured() -> None:
    registration = wire.Registration(
        worker_id="w", roles=[2], total_blocks=10, page_size_tokens=16, max_model_tokens=99
    )
    worker = Worker(registration, Outbox(), lambda worker: None)
    for nonsense in (float("nan"), float("inf"), -1.0):
        worker.beat(wire.WorkerHeartbeat(prefill_tokens_per_s=nonsense, step_s=nonsense, handover_bytes_per_s=nonsense))
        load = worker.load()
        assert (load.prefill_s, load.handover_s) == (0.0, 0.0)
        assert np.isfinite(load.stream_s)
        assert load.stream_s >= 0
    worker.beat(wire.WorkerHeartbeat(prefill_tokens_per_s=1e-300, step_s=1e300))
    assert worker.load().prefill_s <= 3600
    assert worker.load().stream_s <= 3600
