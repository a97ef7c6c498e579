"""Which coordinator has a worker to itself: one at a time, and only what is provably alone is called so."""

from typing import cast

from baton.v1 import worker_link_pb2 as wire
from worker.reservation import Reservation
from worker.roles import Attempt, Link, RoleHandler

ONE, TWO = cast(Link, object()), cast(Link, object())


def attempt(link: Link, orphaned: bool = False) -> Attempt:
    made = Attempt(link, wire.AttemptId(), "", 0, wire.Assignment(), cast(RoleHandler, None))
    made.orphaned = orphaned
    return made


def test_the_first_that_asks_has_it_until_it_gives_it_back() -> None:
    reservation = Reservation()
    assert reservation.admits(ONE)
    reservation.reserve(ONE, 11)
    reservation.reserve(TWO, 22)
    assert (reservation.token, reservation.admits(ONE), reservation.admits(TWO)) == (11, True, False)
    reservation.unreserve(TWO, 22)
    assert not reservation.wanted, "that one never had it"
    reservation.unreserve(TWO, 11)
    assert (reservation.token, reservation.wanted) == (11, True)
    reservation.unreserve(ONE, 11)
    assert (reservation.token, reservation.wanted, reservation.admits(TWO)) == (0, False, True)
    reservation.unreserve(ONE, 11)
    reservation.reserve(TWO, 22)
    reservation.unreserve(ONE, 11)
    assert (reservation.token, reservation.wanted) == (22, False), "what it says of an older one counts for nothing"


def test_a_holder_whose_link_breaks_has_given_it_back() -> None:
    reservation = Reservation()
    reservation.reserve(ONE, 11)
    reservation.lost(TWO)
    assert reservation.token == 11
    reservation.clear(11)
    reservation.lost(ONE)
    assert (reservation.token, reservation.cleared) == (0, False)


def test_it_is_cleared_only_of_others_and_only_for_the_holder_that_asked() -> None:
    reservation = Reservation()
    assert not reservation.may_clear([])
    reservation.reserve(ONE, 11)
    assert not reservation.may_clear([attempt(ONE), attempt(TWO)])
    assert not reservation.may_clear([attempt(ONE, orphaned=True)]), "it was assigned over a link that broke"
    assert reservation.may_clear([attempt(ONE)])
    reservation.unreserve(ONE, 11)
    reservation.reserve(TWO, 22)
    reservation.clear(11)  # the engine was at something for as long as that
    assert not reservation.cleared
    reservation.clear(22)
    assert reservation.cleared
    assert not reservation.may_clear([]), "it is already"
