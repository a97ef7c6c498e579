"""Which workers serve a request: rules that hold under every policy, and no hand-over where it cannot pay."""

import re

import pytest
from msgspec.structs import replace
from routing_harness import Workers, decode, mixed, prefill, standby

from baton.config import CoordinatorOptions, validate
from baton.errors import ConfigurationError
from coordinator.policies import POLICIES
from coordinator.policies.base import PrefillChoice, Work
from coordinator.worker_table import IDLE

LONG = Work(num_tokens=500, total_tokens=600)
every_policy = pytest.mark.parametrize("policy", POLICIES)


def test_every_policy_can_be_asked_for_and_what_is_none_is_refused() -> None:
    for name in POLICIES:
        validate(CoordinatorOptions(routing=name))
    for wrong, says in (
        ({"routing": "nearest"}, "--routing is 'nearest'; choose one of cost_based, "),
        ({"kv_routing": "off"}, "--kv-routing is 'off'; choose one of exact, approximate"),
        ({"kv_index_blocks": 0}, "--kv-index-blocks is 0; it must be greater than 0"),
    ):
        with pytest.raises(ConfigurationError, match=re.escape(says)):
            validate(CoordinatorOptions(**wrong))  # type: ignore[arg-type]


@every_policy
def test_without_a_worker_that_decodes_there_is_no_route(policy: str) -> None:
    for workers in (Workers(), Workers(p=prefill()), Workers(small=decode(context_tokens=599))):
        assert workers.choose(LONG, workers.router(policy)) is None
    assert Workers(d=decode(accepts=0)).choose(LONG) is None


@every_policy
def test_a_prefill_worker_that_stands_by_decodes_only_while_no_decode_worker_is_there(policy: str) -> None:
    workers = Workers(p0=standby(), p1=standby(context_tokens=599))
    route = workers.route(LONG, workers.router(policy))
    assert (route.decode, route.prefill, route.choice) == ("p0", None, PrefillChoice.STAND_IN)
    workers = Workers(p0=standby(), p1=standby(), d=decode(requests=99))
    router = workers.router(policy)
    assert workers.route(LONG, router).decode == "d"
    route = workers.route(replace(LONG, avoid={"d", "p0"}), router)
    assert (route.decode, route.choice) == ("p1", PrefillChoice.STAND_IN)
    assert workers.route(replace(LONG, avoid={"d", "p0", "p1"}), router).decode == "d"


def test_a_long_prompt_is_prefilled_by_the_worker_with_the_shortest_queue() -> None:
    workers = Workers(p0=prefill(waiting_prefill_tokens=900), p1=prefill(waiting_prefill_tokens=100), d=decode())
    route = workers.route(LONG)
    assert (route.decode, route.prefill, route.choice) == ("d", "p1", PrefillChoice.REMOTE)


@every_policy
def test_a_short_uncached_part_is_prefilled_by_decode(policy: str) -> None:
    workers = Workers(p=prefill(), d=decode())
    for held, choice in ((500 - 64, PrefillChoice.LOCAL_SHORT), (500 - 65, PrefillChoice.REMOTE)):
        work = replace(LONG, cached=workers.cached(d=held))
        assert workers.route(work, workers.router(policy)).choice is choice


@every_policy
def test_without_a_fit_prefill_worker_decode_prefills(policy: str) -> None:
    for workers in (Workers(d=decode()), Workers(d=decode(), p=prefill(context_tokens=500))):
        route = workers.route(LONG, workers.router(policy))
        assert (route.prefill, route.choice) == (None, PrefillChoice.LOCAL_NO_WORKER)


@every_policy
def test_a_mixed_worker_prefills_for_itself(policy: str) -> None:
    workers = Workers(p=prefill(), m=mixed())
    route = workers.route(LONG, workers.router(policy))
    assert (route.decode, route.prefill, route.choice) == ("m", None, PrefillChoice.LOCAL_MIXED)


@every_policy
def test_a_prompt_goes_where_it_has_room_now(policy: str) -> None:
    workers = Workers(full=decode(free_tokens=31 * 16), busy=decode(requests=9))
    router = workers.router(policy)
    assert {workers.route(replace(LONG, session=at), router).decode for at in range(20)} == {"busy"}
    alone = Workers(full=decode(free_tokens=31 * 16))
    assert alone.route(LONG, alone.router(policy)).decode == "full"


def test_decode_goes_to_the_fewest_requests() -> None:
    assert Workers(busy=decode(requests=9), idle=decode(requests=1)).route(LONG).decode == "idle"


@pytest.mark.parametrize("policy", ["least_loaded", "round_robin", "prefix_aware", "cost_based"])
def test_equal_workers_take_turns(policy: str) -> None:
    workers = Workers(a=decode(), b=decode(), c=decode())
    router = workers.router(policy)
    assert sorted(workers.route(LONG, router).decode for _ in range(9)) == ["a"] * 3 + ["b"] * 3 + ["c"] * 3


@every_policy
def test_a_worker_that_failed_the_request_is_taken_only_if_it_is_the_last(policy: str) -> None:
    workers = Workers(a=decode(), b=decode(requests=50), p=prefill(), q=prefill(waiting_prefill_tokens=9000))
    router = workers.router(policy)
    for at in range(20):
        route = workers.route(replace(LONG, avoid={"a", "p"}, session=at), router)
        assert (route.decode, route.prefill) == ("b", "q")
    assert workers.route(replace(LONG, avoid={"a", "b"}), router).decode in ("a", "b")


@every_policy
def test_suspects_keep_away_from_each_other_and_trouble_weighs_more(policy: str) -> None:
    workers = Workers(a=decode(), b=decode(requests=50))
    router = workers.router(policy)
    for at in range(20):
        work = replace(LONG, crowd={"a": 2, "b": 1}, session=at)
        assert workers.route(work, router).decode == "b"
        assert workers.route(replace(work, trouble={"b": 1}), router).decode == "a"


def test_rows_of_workers_that_are_gone_are_used_again_and_nobody_is_taken_for_another() -> None:
    workers = Workers(a=decode(), b=decode(requests=5))
    table, row = workers.table, workers.rows["a"]
    again = table.add("a", table.groups[row], table_fixed(workers, row))  # type: ignore[arg-type]
    table.remove(row)  # the one before it of the same name
    assert table.ids[again] == "a"
    assert table.spread({"a": 1})[again] == 1
    assert table.add("c", table.groups[again], table_fixed(workers, again)) == row  # type: ignore[arg-type]
    table.put(again, IDLE._replace(free_tokens=1600, requests=7))
    table.put(row, IDLE._replace(free_tokens=1600, requests=6))
    assert workers.route(LONG).decode == "b"
    for _ in range(100):
        table.add(f"more {_}", table.groups[again], table_fixed(workers, again))  # type: ignore[arg-type]
    assert len(table.candidates("v").decoders) == 103
    assert len(table.candidates("other version").decoders) == 0


def table_fixed(workers: Workers, row: int) -> object:
    from coordinator.worker_table import Fixed

    return Fixed(*(float(getattr(workers.table, name)[row]) for name in Fixed._fields))
