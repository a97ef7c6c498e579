"""Which workers serve a request: the least loaded that fit, and no hand-over where it cannot pay."""

from dataclasses import replace
from typing import Any

from coordinator.routing import LeastLoaded, PrefillChoice, Work, WorkerLoad


def worker(id: str, *, prefills: bool = False, decodes: bool = False, **changes: Any) -> WorkerLoad:
    usual = {
        "stands_in": False,
        "requests": 0,
        "waiting_prefill_tokens": 0,
        "free_blocks": 100,
        "context_tokens": 1600,
        "page_size_tokens": 16,
    }
    return WorkerLoad(id=id, prefills=prefills, decodes=decodes, **(usual | changes))


def decode(id: str, **changes: Any) -> WorkerLoad:
    return worker(id, decodes=True, **changes)


def prefill(id: str, **changes: Any) -> WorkerLoad:
    return worker(id, prefills=True, **changes)


LONG = Work(num_tokens=500, total_tokens=600, uncached_tokens=500)
policy = LeastLoaded(local_prefill_tokens=64)


def test_without_a_worker_that_decodes_there_is_no_route() -> None:
    assert policy.choose(LONG, []) is None
    assert policy.choose(LONG, [prefill("p")]) is None
    assert policy.choose(LONG, [decode("too small", context_tokens=599)]) is None


def test_a_prefill_worker_that_stands_by_decodes_only_while_no_decode_worker_is_there() -> None:
    standby = [prefill("p0", stands_in=True, requests=3), prefill("p1", stands_in=True)]
    route = policy.choose(LONG, standby)
    assert route is not None
    assert (route.decode, route.prefill, route.choice) == ("p1", None, PrefillChoice.STAND_IN)
    route = policy.choose(LONG, [*standby, decode("d", requests=99)])
    assert route is not None
    assert route.decode == "d"
    failed_once = replace(LONG, avoid={"d"})
    route = policy.choose(failed_once, [*standby, decode("d")])
    assert route is not None
    assert (route.decode, route.choice) == ("p1", PrefillChoice.STAND_IN)
    failed_everywhere = replace(LONG, avoid={"d", "p0", "p1"})
    route = policy.choose(failed_everywhere, [*standby, decode("d")])
    assert route is not None
    assert route.decode == "d"


def test_a_long_prompt_is_prefilled_by_the_worker_with_the_shortest_queue() -> None:
    workers = [prefill("p0", waiting_prefill_tokens=900), prefill("p1", waiting_prefill_tokens=100), decode("d")]
    route = policy.choose(LONG, workers)
    assert route is not None
    assert (route.decode, route.prefill, route.choice) == ("d", "p1", PrefillChoice.REMOTE)


def test_a_short_uncached_part_is_prefilled_by_decode() -> None:
    workers = [prefill("p"), decode("d")]
    for uncached, choice in ((64, PrefillChoice.LOCAL_SHORT), (65, PrefillChoice.REMOTE)):
        route = policy.choose(Work(500, 600, uncached), workers)
        assert route is not None
        assert route.choice is choice


def test_without_a_fit_prefill_worker_decode_prefills() -> None:
    for others in ([], [prefill("p", context_tokens=500)]):
        route = policy.choose(LONG, [decode("d"), *others])
        assert route is not None
        assert (route.prefill, route.choice) == (None, PrefillChoice.LOCAL_NO_WORKER)


def test_a_mixed_worker_prefills_for_itself() -> None:
    route = policy.choose(LONG, [prefill("p"), worker("m", prefills=True, decodes=True)])
    assert route is not None
    assert (route.decode, route.prefill, route.choice) == ("m", None, PrefillChoice.LOCAL_MIXED)


def test_decode_goes_to_the_fewest_requests_but_first_to_where_the_prompt_fits() -> None:
    busy, idle = decode("busy", requests=9), decode("idle", requests=1)
    full = decode("full", free_blocks=31)
    assert policy.choose(LONG, [busy, idle]).decode == "idle"  # type: ignore[union-attr]
    assert policy.choose(LONG, [busy, full]).decode == "busy"  # type: ignore[union-attr]
    assert policy.choose(LONG, [full]).decode == "full"  # type: ignore[union-attr]


def test_equal_workers_take_turns() -> None:
    workers = [decode("a"), decode("b"), decode("c")]
    chosen = [policy.choose(LONG, workers).decode for _ in range(9)]  # type: ignore[union-attr]
    assert sorted(chosen) == ["a"] * 3 + ["b"] * 3 + ["c"] * 3


def test_a_worker_that_failed_the_request_is_taken_only_if_it_is_the_last() -> None:
    work = Work(500, 600, 500, avoid={"a"})
    assert policy.choose(work, [decode("a"), decode("b", requests=50)]).decode == "b"  # type: ignore[union-attr]
    assert policy.choose(work, [decode("a")]).decode == "a"  # type: ignore[union-attr]
