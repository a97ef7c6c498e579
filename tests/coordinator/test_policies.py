"""What each policy prefers among workers that are equally allowed."""

from collections import Counter

import pytest
from msgspec.structs import replace
from routing_harness import Workers, decode, mixed, prefill

from baton.token_ids import TOKEN_BYTES, pack
from coordinator.policies.base import PrefillChoice, Work
from coordinator.policies.session_affinity import BOUND
from coordinator.sessions import FIRST_TOKENS, session_of

LONG = Work(num_tokens=1000, total_tokens=1200)
FAST = {"prefill_s": 0.001}


def test_round_robin_does_not_look() -> None:
    workers = Workers(a=mixed(requests=9), b=mixed(), c=mixed(free_tokens=1100))
    router = workers.router("round_robin")
    assert Counter(workers.route(LONG, router).decode for _ in range(9)) == {"a": 3, "b": 3, "c": 3}


def test_power_of_two_never_takes_the_worst_and_spreads_over_the_others() -> None:
    workers = Workers(**{f"w{at}": mixed(requests=at) for at in range(6)})
    router = workers.router("power_of_two")
    chosen = Counter(workers.route(LONG, router).decode for _ in range(400))
    assert set(chosen) == {f"w{at}" for at in range(5)}
    assert chosen["w0"] > chosen["w2"] > chosen["w4"]
    alone = Workers(w=mixed())
    assert alone.route(LONG, alone.router("power_of_two")).decode == "w"


def test_prefix_aware_goes_to_the_longest_prefix_unless_the_load_is_too_uneven() -> None:
    workers = Workers(a=mixed(requests=20), b=mixed(requests=5), c=mixed())
    router = workers.router("prefix_aware")
    work = replace(LONG, cached=workers.cached(a=800, b=400))
    assert workers.route(work, router).decode == "a"
    assert workers.route(LONG, router).decode == "c"
    assert workers.route(replace(LONG, cached=workers.cached(a=96)), router).decode == "c", "that is next to nothing"
    uneven = Workers(a=mixed(requests=40), c=mixed())
    assert uneven.route(replace(LONG, cached=uneven.cached(a=800)), uneven.router("prefix_aware")).decode == "c"


def test_prefix_aware_chooses_prefill_workers_the_same_way() -> None:
    workers = Workers(d=decode(), p=prefill(requests=3), q=prefill())
    router = workers.router("prefix_aware")
    assert workers.route(replace(LONG, cached=workers.cached(p=800)), router).prefill == "p"
    assert workers.route(LONG, router).prefill == "q"


def test_a_session_stays_where_it_is_when_workers_come_and_go() -> None:
    names = [f"w{at}" for at in range(8)]
    all_there, one_less = Workers(**{name: mixed() for name in names}), Workers(**{name: mixed() for name in names[1:]})
    before, after = all_there.router("session_affinity"), one_less.router("session_affinity")
    moved = Counter[str]()
    homes = Counter[str]()
    for session in range(0, 2**64, 2**64 // 400):
        work = replace(LONG, session=session)
        home = all_there.route(work, before).decode
        assert home == all_there.route(work, before).decode
        homes[home] += 1
        if one_less.route(work, after).decode != home:
            moved[home] += 1
    assert set(moved) == {"w0"}, "only sessions of the one that is gone go elsewhere"
    assert min(homes.values()) > 400 / 8 / 2


def test_a_session_whose_worker_is_overloaded_goes_to_the_next() -> None:
    workers = Workers(a=mixed(), b=mixed(), c=mixed())
    router = workers.router("session_affinity")
    home = workers.route(LONG, router).decode
    row, table = workers.rows[home], workers.table
    table.requests[:] = 1
    table.requests[row] = 2
    assert workers.route(LONG, router).decode == home
    table.requests[row] = 9
    assert table.requests[row] > BOUND * table.requests.mean() + 1
    assert workers.route(LONG, router).decode != home


def test_a_user_is_a_session_and_without_one_what_a_conversation_begins_with() -> None:
    prompt = pack(range(FIRST_TOKENS))
    assert session_of("", "", prompt) == session_of("", "", prompt + pack([7, 8]))
    assert session_of("", "", prompt) != session_of("", "", prompt[TOKEN_BYTES:])
    assert session_of("me", "", prompt) == session_of("me", "", pack([1]))
    assert session_of("me", "", prompt) != session_of("me", "tenant", prompt)
    assert session_of("", "", prompt) != session_of("", "tenant", prompt)


# cost_based


def test_without_any_measurement_cost_based_is_least_loaded() -> None:
    workers = Workers(p=prefill(waiting_prefill_tokens=9), q=prefill(), d=decode(requests=3), e=decode())
    route = workers.route(LONG, workers.router("cost_based"))
    assert (route.decode, route.prefill, route.choice) == ("e", "q", PrefillChoice.REMOTE)


def test_a_long_queue_is_worth_computing_a_prefix_again() -> None:
    work_there = {"prefill_s": 0.001, "requests": 0}
    for waiting, chosen in ((500, "p"), (900, "q")):
        workers = Workers(
            d=decode(requests=9), p=prefill(waiting_prefill_tokens=waiting, **work_there), q=prefill(**FAST)
        )
        work = replace(LONG, cached=workers.cached(p=700))
        assert workers.route(work, workers.router("cost_based")).prefill == chosen


def test_what_can_be_fetched_is_no_reason_to_queue() -> None:
    for handover_s, chosen in ((0.0, "p"), (1e-5, "q")):
        workers = Workers(
            d=decode(requests=9),
            p=prefill(waiting_prefill_tokens=500, **FAST),
            q=prefill(handover_s=handover_s, **FAST),
        )
        work = replace(LONG, cached=workers.cached(p=700))
        assert workers.route(work, workers.router("cost_based")).prefill == chosen


def test_blocks_in_a_slower_tier_are_worth_less_than_those_in_the_pool() -> None:
    usual = {"kv_bytes_per_token": 200_000.0, "prefill_s": 0.001}
    workers = Workers(p=mixed(**usual), h=mixed(**usual), k=mixed(**usual))
    router = workers.router("cost_based")
    held = {"p": (500, 500, 500), "h": (0, 520, 520), "k": (0, 0, 520)}
    assert workers.route(replace(LONG, cached=workers.cached(**held)), router).decode == "p"
    del held["p"]
    assert workers.route(replace(LONG, cached=workers.cached(**held)), router).decode == "h"


def test_an_idle_decode_worker_prefills_when_the_prefill_workers_are_busy_and_not_when_it_has_streams() -> None:
    for requests, waiting, choice in (
        (0, 5000, PrefillChoice.LOCAL_SOONER),
        (20, 5000, PrefillChoice.REMOTE),
        (20, 50_000, PrefillChoice.LOCAL_SOONER),
        (1, 0, PrefillChoice.REMOTE),
        (0, 0, PrefillChoice.REMOTE),
        (0, 900, PrefillChoice.REMOTE),
        (0, 1100, PrefillChoice.LOCAL_SOONER),
    ):
        workers = Workers(p=prefill(waiting_prefill_tokens=waiting, **FAST), d=decode(requests=requests, **FAST))
        assert workers.route(LONG, workers.router("cost_based")).choice is choice, (requests, waiting)


def test_a_short_rest_is_computed_where_it_is_decoded_although_streams_run_there() -> None:
    workers = Workers(p=prefill(waiting_prefill_tokens=500, **FAST), d=decode(requests=10, **FAST))
    router = workers.router("cost_based")
    work = replace(LONG, cached=workers.cached(d=960))
    assert workers.route(work, router).choice is PrefillChoice.LOCAL_SOONER
    assert workers.route(LONG, router).choice is PrefillChoice.REMOTE


def test_a_slow_hand_over_is_waited_for_where_computing_does_not_cover_it() -> None:
    workers = Workers(
        p=prefill(**FAST), far=decode(handover_s=0.003, requests=20), near=decode(handover_s=0.0001, requests=21)
    )
    router = workers.router("cost_based")
    assert workers.route(LONG, router).decode == "near"
    has_it = replace(LONG, cached=workers.cached(far=900))
    assert workers.route(has_it, router).decode == "far", "only what a decode worker has not is moved"


def test_streams_go_where_steps_are_short() -> None:
    workers = Workers(
        p=prefill(**FAST), slow=decode(stream_s=0.004, requests=3), quick=decode(stream_s=0.001, requests=9)
    )
    assert workers.route(LONG, workers.router("cost_based")).decode == "quick"


def test_a_mixed_worker_never_takes_a_hand_over() -> None:
    workers = Workers(p=prefill(**FAST), m=mixed(waiting_prefill_tokens=5000, **FAST), d=decode(requests=30, **FAST))
    route = workers.route(LONG, workers.router("cost_based"))
    assert (route.decode, route.prefill) == ("d", "p")
    workers = Workers(p=prefill(**FAST), m=mixed(waiting_prefill_tokens=5000, **FAST))
    route = workers.route(LONG, workers.router("cost_based"))
    assert (route.decode, route.prefill, route.choice) == ("m", None, PrefillChoice.LOCAL_MIXED)


@pytest.mark.parametrize("num_workers", [3, 40])
def test_the_short_list_loses_nothing_where_hand_overs_are_covered(num_workers: int) -> None:
    described = {}
    for at in range(num_workers):
        described[f"p{at}"] = prefill(prefill_s=0.001, waiting_prefill_tokens=(at * 37) % 101 * 10)
        described[f"d{at}"] = decode(stream_s=0.001, requests=20 + (at * 53) % 97, handover_s=1e-4)
    workers = Workers(**described)
    route = workers.route(LONG, workers.router("cost_based"))
    assert route.prefill == min(
        (f"p{at}" for at in range(num_workers)), key=lambda id: described[id]["waiting_prefill_tokens"]
    )
    assert route.decode == min((f"d{at}" for at in range(num_workers)), key=lambda id: described[id]["requests"])
