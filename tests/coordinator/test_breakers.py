"""Workers that keep failing get no work for a while, never nobody does, and retries are paced."""

import pytest
from routing_harness import Workers, decode

from coordinator.breakers import FAILURES, FIRST_BACKOFF_S, MAX_BACKOFF_S, PROBE_S, Breakers
from coordinator.policies.base import Work
from coordinator.retries import BURST, FLOOR_PER_S, MAX_DELAY_S, RETRIES_PER_ADMISSION, RetryBudget


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def events() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def breakers(clock: Clock, events: list[tuple[str, str]]) -> Breakers:
    return Breakers(lambda worker_id, event: events.append((worker_id, event)), clock)


def trip(breakers: Breakers, worker_id: str) -> None:
    for _ in range(FAILURES):
        breakers.failure(worker_id)


def test_failures_in_a_row_open_a_breaker_and_a_success_between_them_does_not(breakers: Breakers) -> None:
    for _ in range(10):
        for _ in range(FAILURES - 1):
            breakers.failure("w")
        breakers.success("w")
    assert breakers.state("w") == "closed"
    trip(breakers, "w")
    assert breakers.state("w") == "open"
    assert list(breakers.trouble()) == ["w"]


def test_after_its_back_off_one_probe_is_let_through_and_closes_it(
    breakers: Breakers, clock: Clock, events: list[tuple[str, str]]
) -> None:
    trip(breakers, "w")
    clock.now_s += FIRST_BACKOFF_S + 0.01
    assert breakers.state("w") == "half_open"
    assert breakers.trouble() == {}
    breakers.chosen("w")
    assert list(breakers.trouble()) == ["w"], "one probe at a time"
    breakers.success("w")
    assert breakers.state("w") == "closed"
    assert events == [("w", "opened"), ("w", "half_open"), ("w", "closed")]


def test_a_probe_that_fails_opens_it_for_longer_up_to_a_bound(breakers: Breakers, clock: Clock) -> None:
    trip(breakers, "w")
    backoff_s = FIRST_BACKOFF_S
    for _ in range(12):
        clock.now_s += backoff_s - 0.01
        assert breakers.state("w") == "open"
        clock.now_s += 0.02
        assert breakers.state("w") == "half_open"
        breakers.chosen("w")
        breakers.failure("w")
        backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)
    assert backoff_s == MAX_BACKOFF_S


def test_a_probe_that_says_nothing_is_followed_by_another(breakers: Breakers, clock: Clock) -> None:
    trip(breakers, "w")
    clock.now_s += FIRST_BACKOFF_S + 0.01
    breakers.chosen("w")
    clock.now_s += PROBE_S + 0.01
    assert breakers.trouble() == {}


def test_what_began_before_it_opened_neither_closes_it_nor_opens_it_longer(breakers: Breakers, clock: Clock) -> None:
    trip(breakers, "w")
    breakers.failure("w")
    breakers.success("w")
    assert breakers.state("w") == "open"
    clock.now_s += FIRST_BACKOFF_S + 0.01
    assert breakers.state("w") == "half_open"


def test_an_open_breaker_sends_work_elsewhere_and_where_all_are_open_the_least_bad_worker_works(
    breakers: Breakers, clock: Clock, events: list[tuple[str, str]]
) -> None:
    workers = Workers(a=decode(), b=decode(requests=50))

    def chosen() -> str:
        route = workers.route(Work(10, 20, trouble=breakers.trouble()))
        breakers.chosen(route.decode)
        return route.decode

    trip(breakers, "a")
    assert chosen() == "b"
    clock.now_s += FIRST_BACKOFF_S + 0.01
    assert chosen() == "a", "the probe"
    breakers.failure("a")
    trip(breakers, "b")
    assert chosen() == "b", "it opened once, the other twice"
    assert events[-1] == ("b", "overridden")


def test_retries_in_a_burst_are_free_and_then_wait_for_their_share(clock: Clock) -> None:
    budget = RetryBudget(clock)
    assert [budget.take() for _ in range(int(BURST))] == [0.0] * int(BURST)
    waits = [budget.take() for _ in range(3)]
    assert waits == [pytest.approx(number / FLOOR_PER_S) for number in (1, 2, 3)]


def test_no_retry_waits_longer_than_the_bound(clock: Clock) -> None:
    budget = RetryBudget(clock)
    assert max(budget.take() for _ in range(10_000)) == MAX_DELAY_S


def test_time_and_admissions_earn_retries(clock: Clock) -> None:
    budget = RetryBudget(clock)
    for _ in range(int(BURST)):
        budget.take()
    budget.admitted(round(2 / RETRIES_PER_ADMISSION))
    assert [budget.take(), budget.take()] == [0.0, 0.0]
    assert budget.take() > 0
    clock.now_s += 2 / FLOOR_PER_S
    assert budget.take() == 0.0
