"""A rate follows what is measured, however it is cut into measurements."""

import pytest

from baton.rates import MEMORY_S, Rate


def test_nothing_is_claimed_before_something_was_measured() -> None:
    assert Rate().per_s == 0.0


def test_many_small_measurements_say_the_same_as_one_large_one() -> None:
    small, large = Rate(), Rate()
    for _ in range(100):
        small.add(5, 0.01)
    large.add(500, 1.0)
    assert small.per_s == pytest.approx(large.per_s) == pytest.approx(500)


def test_it_follows_a_change_within_seconds_of_measuring() -> None:
    rate = Rate()
    rate.add(1000, 1.0)
    for _ in range(int(3 * MEMORY_S / 0.1)):
        rate.add(10, 0.1)
    assert rate.per_s == pytest.approx(100, rel=0.6)
    for _ in range(int(3 * MEMORY_S / 0.1)):
        rate.add(10, 0.1)
    assert rate.per_s == pytest.approx(100, rel=0.05)
