"""Token buckets: never more than the limit over a long time, never less than what is there."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.tenants.buckets import Bucket
from coordinator.tenants.gate import _duration

TAKES = st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50), st.integers(0, 100)), max_size=60)


@given(st.integers(1, 100), TAKES)
def test_over_any_time_no_more_begins_than_the_limit_and_debts_are_paid(per_minute: int, takes: list) -> None:
    """Each take: seconds before it, what it says it takes, and what it turns out to take beyond."""
    bucket, now, begun, beyond = Bucket(per_minute, 0.0), 0.0, 0, 0
    for pause_s, amount, more in takes:
        now += pause_s
        wait_s = bucket.wait_s(amount, now)
        if wait_s:
            assert bucket.wait_s(amount, now + wait_s * 0.99 - 1e-6) > 0, "not later than needed"
            now += wait_s + 1e-6
            assert bucket.wait_s(amount, now) == 0, "not earlier than said"
        # What was used before this one is covered by time, but for one minute's worth.
        assert begun + beyond <= per_minute * (1 + now / 60) + 1e-3
        bucket.take(amount, now)
        bucket.take(more, now)
        begun, beyond = begun + amount, beyond + more
        assert bucket.level(now) <= per_minute


def test_what_is_given_back_is_there_again_and_no_more_than_that() -> None:
    bucket = Bucket(60, 0.0)
    bucket.take(50, 0.0)
    bucket.take(-50, 0.0)
    bucket.take(-50, 0.0)
    assert bucket.level(0.0) == 60
    assert bucket.full_after_s(0.0) == 0


def test_a_changed_limit_forgives_nothing() -> None:
    bucket = Bucket(60, 0.0)
    bucket.take(100, 0.0)
    bucket.set_limit(600, 0.0)
    assert bucket.level(0.0) == -40
    assert bucket.wait_s(1, 0.0) == pytest.approx(4.1)
    bucket.set_limit(None, 0.0)
    assert (bucket.level(0.0), bucket.wait_s(10**9, 0.0)) == (math.inf, 0)
    bucket.set_limit(10, 5.0)
    assert bucket.level(5.0) == 10


@pytest.mark.parametrize(
    ("seconds", "says"), [(0, "0ms"), (0.0201, "21ms"), (1, "1s"), (1.5, "1.5s"), (360, "6m0s"), (61.25, "1m1.25s")]
)
def test_durations_are_written_as_openai_does(seconds: float, says: str) -> None:
    assert _duration(seconds) == says
