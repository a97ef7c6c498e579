from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from kvtransfer.leases import LeaseBook, LeaseChange, LeaseEvent
from kvtransfer.wire import PeerIdentity

PEERS = [PeerIdentity("decode-0", 1), PeerIdentity("decode-1", 2), PeerIdentity("decode-0", 3)]
A, B = PEERS[0], PEERS[1]
LEASE_S, QUARANTINE_S = 10.0, 4.0


def book() -> LeaseBook:
    return LeaseBook(LEASE_S, QUARANTINE_S, max_tombstones=64)


def released(handover_id: str, verified: bool = False) -> LeaseChange:
    return LeaseChange(handover_id, LeaseEvent.RELEASED, verified)


def test_the_usual_life_ends_verified_and_once():
    leases = book()
    assert leases.open("h", A, 0) is None
    assert leases.want("h", A)
    assert leases.offer("h", 0, 3)
    assert leases.offer("h", 3, 1)
    assert leases.close("h", 4)
    assert leases.release("h", A, True) == released("h", True)
    assert leases.release("h", A, True) is None
    assert not leases.offer("h", 4, 1)
    assert not leases.want("h", A)
    assert leases.tick(1000) == []
    assert len(leases) == 0


def test_a_release_before_everything_was_offered_is_never_verified():
    leases = book()
    leases.open("h", A, 0)
    assert leases.release("h", A, True) == released("h", False)


def test_an_expired_lease_is_quarantined_then_resolved_by_release_loss_or_time():
    for end, at in (("release", 11), ("lose", 11), ("time", 14.5)):
        leases = book()
        leases.open("h", A, 0)
        leases.want("h", A)
        assert leases.tick(9.9) == []
        assert leases.tick(10.1) == [LeaseChange("h", LeaseEvent.QUARANTINED)]
        assert leases.tick(11) == []
        resolved = LeaseChange("h", LeaseEvent.RESOLVED)
        if end == "release":
            assert leases.release("h", A, True) == resolved
        elif end == "lose":
            assert leases.lose(["h"]) == [resolved]
        else:
            assert leases.tick(at) == [resolved]
        assert len(leases) == 0


def test_a_renewal_prolongs_only_the_leases_of_its_sender():
    leases = book()
    leases.open("mine", A, 0)
    leases.open("theirs", B, 0)
    leases.renew(["mine", "theirs", "unknown"], A, 8)
    assert leases.tick(12) == [LeaseChange("theirs", LeaseEvent.QUARANTINED)]


def test_an_aborted_lease_ends_at_once_unless_its_peer_may_be_reading():
    leases = book()
    leases.open("unseen", A, 0)
    assert leases.abort("unseen") == released("unseen")
    leases.open("seen", A, 0)
    leases.want("seen", A)
    assert leases.abort("seen") is None
    leases.renew(["seen"], A, 9)
    assert leases.tick(10.1) == [LeaseChange("seen", LeaseEvent.QUARANTINED)]


def test_a_release_that_overtakes_the_opening_ends_it_at_once():
    leases = book()
    assert leases.release("h", A, False) is None
    assert leases.open("h", A, 0) == released("h")
    assert leases.release("other", B, False) is None
    assert leases.open("other", A, 0) is None, "a stranger's release must not count"


def test_strangers_can_neither_want_nor_release():
    leases = book()
    leases.open("h", A, 0)
    for stranger in PEERS[1:]:
        assert not leases.want("h", stranger)
        assert leases.release("h", stranger, True) is None
    assert len(leases) == 1


def test_misuse_by_the_owner_is_an_error():
    leases = book()
    leases.open("h", A, 0)
    with pytest.raises(ValueError, match="before"):
        leases.open("h", A, 0)
    with pytest.raises(ValueError, match="due"):
        leases.offer("h", 1, 1)
    with pytest.raises(ValueError, match="offered"):
        leases.close("h", 1)
    leases.lose(["h"])
    with pytest.raises(ValueError, match="before"):
        leases.open("h", A, 0)


def test_what_is_remembered_of_ended_leases_is_bounded():
    leases = book()
    for index in range(1000):
        leases.open(f"h{index}", A, 0)
        leases.release(f"h{index}", A, False)
        leases.release(f"early{index}", A, False)
    leases.release("h999", A, False)
    assert "h999" not in leases._released_early, "a repeat must not push out what came early"
    assert len(leases._ended) == 64
    assert len(leases._released_early) == 64


class LeaseMachine(RuleBasedStateMachine):
    """Any order of what owner, peers and time can do: every opened lease ends exactly once, in a legal order."""

    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.leases = LeaseBook(LEASE_S, QUARANTINE_S)
        self.now = 0.0
        self.owner_of: dict[str, PeerIdentity] = {}
        self.offered: Counter[str] = Counter()
        self.closed: set[str] = set()
        self.aborted: set[str] = set()
        self.events: dict[str, list[LeaseChange]] = {}
        self.last_sign: dict[str, float] = {}

    def learn(self, *changes: LeaseChange | None) -> None:
        for change in changes:
            if change is not None:
                self.events[change.handover_id].append(change)

    def is_live(self, handover_id: str) -> bool:
        return handover_id in self.events and not self.events[handover_id]

    @rule(target=ids, number=st.integers(0, 30))
    def name(self, number):
        return f"h{number}"

    @rule(handover_id=ids, peer=st.sampled_from(PEERS))
    def open(self, handover_id, peer):
        if handover_id in self.events:
            with pytest.raises(ValueError, match="before"):
                self.leases.open(handover_id, peer, self.now)
            return
        self.events[handover_id] = []
        self.owner_of[handover_id] = peer
        self.last_sign[handover_id] = self.now
        self.learn(self.leases.open(handover_id, peer, self.now))

    @rule(handover_id=ids, peer=st.sampled_from(PEERS))
    def want(self, handover_id, peer):
        allowed = self.leases.want(handover_id, peer)
        assert not allowed or (self.is_live(handover_id) and self.owner_of[handover_id] == peer)

    @rule(handover_id=ids, count=st.integers(0, 3))
    def offer(self, handover_id, count):
        if self.leases.offer(handover_id, self.offered[handover_id], count):
            assert self.is_live(handover_id)
            assert handover_id not in self.closed
            self.offered[handover_id] += count

    @rule(handover_id=ids)
    def close(self, handover_id):
        if self.leases.close(handover_id, self.offered[handover_id]):
            assert self.is_live(handover_id)
            self.closed.add(handover_id)

    @rule(handover_id=ids)
    def abort(self, handover_id):
        self.aborted.add(handover_id)
        self.learn(self.leases.abort(handover_id))

    @rule(handover_ids=st.lists(ids, max_size=4), peer=st.sampled_from(PEERS))
    def renew(self, handover_ids, peer):
        self.leases.renew(handover_ids, peer, self.now)
        for handover_id in handover_ids:
            if self.owner_of.get(handover_id) == peer:
                self.last_sign[handover_id] = self.now

    @rule(handover_id=ids, peer=st.sampled_from(PEERS), verified=st.booleans())
    def release(self, handover_id, peer, verified):
        change = self.leases.release(handover_id, peer, verified)
        assert change is None or self.owner_of[handover_id] == peer
        assert not (change and change.verified) or (verified and handover_id in self.closed)
        self.learn(change)

    @rule(peer=st.sampled_from(PEERS))
    def lose_peer(self, peer):
        self.learn(*self.leases.lose(self.leases.of_peer(peer)))
        assert self.leases.of_peer(peer) == []

    @rule(seconds=st.sampled_from([0.5, 3.0, LEASE_S + 1]))
    def pass_time(self, seconds):
        self.now += seconds
        changes = self.leases.tick(self.now)
        for change in changes:
            if change.event is LeaseEvent.QUARANTINED and change.handover_id not in self.aborted:
                assert self.now - self.last_sign[change.handover_id] >= LEASE_S, "ended although its peer was alive"
        self.learn(*changes)

    @invariant()
    def every_lease_ends_once_and_in_order(self):
        legal = (
            [],
            [LeaseEvent.RELEASED],
            [LeaseEvent.QUARANTINED],
            [LeaseEvent.QUARANTINED, LeaseEvent.RESOLVED],
        )
        for handover_id, events in self.events.items():
            kinds = [change.event for change in events]
            assert kinds in legal
            ended = bool(kinds) and kinds[-1] is not LeaseEvent.QUARANTINED
            assert (self.leases.get(handover_id) is None) == ended
            assert self.leases.has_ended(handover_id) == ended

    def teardown(self):
        for _ in range(2):
            self.now += LEASE_S + QUARANTINE_S
            self.learn(*self.leases.tick(self.now))
        assert len(self.leases) == 0, "a lease outlived every deadline"
        self.every_lease_ends_once_and_in_order()


LeaseMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
test_any_order_of_events_ends_every_lease_exactly_once = LeaseMachine.TestCase
