"""Who is told of a cache and of its changes knows what it holds; who is not costs nothing."""

import time

from hypothesis import given
from hypothesis import strategies as st

from baton.name_changes import Held, NameChanges
from tests.told import Told


def test_nothing_is_kept_while_nobody_watches() -> None:
    changes = NameChanges()
    changes.note(b"a", True)
    assert not changes
    assert changes.take() is None
    changes.watch()
    changes.note(b"b", True)
    assert changes
    changes.unwatch()
    assert not changes
    assert changes.take() is None


def test_a_name_that_came_and_went_between_two_looks_is_not_told() -> None:
    changes = NameChanges()
    changes.watch()
    for _ in range(3):
        changes.note(b"a", True)
        changes.note(b"a", False)
    assert changes.take() is None
    changes.note(b"b", True)
    taken = changes.take()
    assert taken is not None
    assert taken.names == {b"b": True}
    changes.note(b"b", False)
    changes.note(b"b", True)
    assert changes.take() is None


def test_whoever_waits_is_woken_once_for_all_that_comes_until_it_is_taken() -> None:
    woken: list[float] = []
    changes = NameChanges()
    changes.watch(lambda: woken.append(time.monotonic()))
    for number in range(100):
        changes.note(bytes([number]), True)
    assert len(woken) == 1
    taken = changes.take()
    assert taken is not None
    assert len(taken.names) == 100
    assert woken[0] - 1 < taken.since <= woken[0]
    changes.note(b"more", True)
    assert len(woken) == 2


@given(st.lists(st.one_of(st.integers(0, 7), st.sampled_from(["take", "watch"])), max_size=60))
def test_a_moment_and_all_changes_since_are_what_is_held(events: list[int | str]) -> None:
    changes, held = NameChanges(), set()
    changes.watch()
    told = Told(Held([], None))
    for event in events:
        if event == "take":
            told.hear(changes.take())
            assert told.names == held
        elif event == "watch":
            changes.watch()
            before = changes.take()
            told.hear(before)
            assert told.names == held
            told = Told(Held(list(held), before))
        else:
            name = bytes([int(event)])
            changes.note(name, name not in held)
            held ^= {name}
    told.hear(changes.take())
    assert told.names == held
