"""Slots have one owner each, and what was used last is evicted last."""

import random
from collections import OrderedDict

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.name_changes import Held
from kvtransfer.tiers.records import Claim
from kvtransfer.tiers.segments import Segment, SegmentBook
from kvtransfer.tiers.tenants import NOBODY, Tenants
from tests.told import Told

SLOTS = 4
names = st.integers(0, 30).map(lambda number: number.to_bytes(16, "little"))


class SlotsHaveOneOwner(RuleBasedStateMachine):
    """Any order of stores, loads, failures, pins, evictions and lost files."""

    def __init__(self) -> None:
        super().__init__()
        self.book = SegmentBook(Tenants(16, 0.5))
        self.writing: list[tuple[bytes, Segment, int, int]] = []
        self.pinned: list[Segment] = []
        self.num_files = 0
        self.now = 500.0
        self.told: Told | None = None

    @rule()
    def watch(self):
        self.book.changes.watch()
        before = self.book.changes.take()
        assert self.told is not None or before is None
        self.told = Told(Held(list(self.book.records), before))

    @rule()
    def hear(self):
        if self.told is not None:
            self.told.hear(self.book.changes.take())
            assert self.told.names == self.book.records.keys()

    def teardown(self):
        self.hear()

    @precondition(lambda self: len(self.book.segments) < 4)
    @rule(claims=st.lists(st.tuples(st.integers(0, SLOTS - 1), names, st.integers(1, 500)), max_size=SLOTS))
    def add(self, claims):
        being_written = {name for name, *_ in self.writing}
        of_slots = {slot: (slot, Claim(name, sequence, b"", NOBODY, sequence)) for slot, name, sequence in claims}
        claims = [(slot, claim) for slot, claim in of_slots.values() if claim.name not in being_written]
        before = {name: record.last_use for name, record in self.book.records.items()}
        self.book.add(Segment(f"file-{self.num_files}", self.num_files, SLOTS, 100), claims)
        self.num_files += 1
        for _, claim in claims:
            assert self.book.records[claim.name].last_use >= max(claim.sequence, before.get(claim.name, 0))

    @rule(name=names)
    def take(self, name):
        if name in self.book.records or any(name == other for other, *_ in self.writing):
            return
        place = self.book.take()
        if place is not None:
            self.writing.append((name, *place, self.book.next_time()))

    @precondition(lambda self: self.writing)
    @rule(is_written=st.booleans(), tenant=st.sampled_from([NOBODY, b"a", b"b"]), data=st.data())
    def finish(self, is_written, tenant, data):
        write = self.writing.pop(data.draw(st.integers(0, len(self.writing) - 1)))
        if is_written:
            self.now += 1
            self.book.commit(*write, self.now, tenant)
            before = len(self.book.records)
            assert self.book.drop_excess(tenant) == before - len(self.book.records)
            assert not self.book._tenants.num_over(tenant)
        write[1].num_pins -= 1

    @rule(name=names, is_lost=st.booleans())
    def use_or_drop(self, name, is_lost):
        record = self.book.records.get(name)
        if record is not None and is_lost:
            assert self.book.drop(name, record)
            assert not self.book.drop(name, record)
        elif record is not None:
            self.now += 1
            self.book.use(name, self.now)

    @rule(age=st.integers(0, 10), spared=st.sets(names))
    def expire(self, age, spared):
        self.book.sort()
        before = {name: record.used_at for name, record in self.book.records.items()}
        due = {name for name, used_at in before.items() if used_at <= self.now - age}
        assert self.book.drop_expired(self.now - age, self.now, spared) == len(due - spared)
        assert set(self.book.records) == set(before) - (due - spared)
        assert all(self.book.records[name].used_at == self.now for name in due & spared)

    @precondition(lambda self: self.book.segments)
    @rule(data=st.data())
    def pin(self, data):
        segment = data.draw(st.sampled_from(self.book.segments))
        segment.num_pins += 1
        self.pinned.append(segment)

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self):
        self.pinned.pop().num_pins -= 1

    @precondition(lambda self: not self.book._free)
    @rule()
    def recycle(self):
        before = {name: (record.segment, record.slot) for name, record in self.book.records.items()}
        num_evicted = self.book.recycle(self.now)
        gone = {segment for name, (segment, _) in before.items() if name not in self.book.records}
        assert len(before) - len(self.book.records) == (num_evicted or 0)
        assert len(gone) <= 1
        assert not any(segment.num_pins for segment in gone)
        assert (num_evicted is None) == (not self.book._free)
        assert num_evicted is None or len(self.book._free) >= SLOTS // 2

    @precondition(lambda self: self.book.segments)
    @rule(data=st.data())
    def remove(self, data):
        self.book.remove(data.draw(st.sampled_from(self.book.segments)))

    @invariant()
    def every_slot_has_at_most_one_owner_and_the_sums_are_right(self):
        owners = list(self.book._free)
        owners += [(record.segment, record.slot) for record in self.book.records.values()]
        owners += [(segment, slot) for _, segment, slot, _ in self.writing if not segment.is_removed]
        assert len(owners) == len(set(owners))
        assert all(segment in self.book.segments for segment, _ in owners)
        for segment in self.book.segments:
            live = [record for record in self.book.records.values() if record.segment is segment]
            assert segment.use_sum == sum(record.last_use for record in live)
            assert sorted(record.slot for record in live) == [
                slot for slot, name in enumerate(segment.names) if name is not None
            ]
        assert self.book._use_sum == sum(segment.use_sum for segment in self.book.segments)
        assert self.book.num_bytes == 100 * len(self.book.segments)


TestSlotsHaveOneOwner = SlotsHaveOneOwner.TestCase


def test_free_slots_are_used_up_before_anything_is_evicted():
    book = SegmentBook(Tenants(16, 0.5))
    book.add(Segment("file", 3, SLOTS, 100))
    with pytest.raises(ValueError, match="free"):
        book.recycle(0.0)


@pytest.mark.parametrize("skew", [0.6, 1.0])
def test_evicting_by_segments_hits_nearly_as_often_as_evicting_the_least_recently_used_block(skew):
    """Zipf-distributed loads; a miss stores the block. 16 segments of 32 slots for 4096 names."""
    draw = random.Random(1)
    weights = [1 / rank**skew for rank in range(1, 4097)]
    numbers = draw.choices(range(4096), weights, k=40000)
    book, exact = SegmentBook(Tenants(16, 0.5)), OrderedDict[int, None]()
    for file in range(16):
        book.add(Segment(str(file), file, 32, 1))
    hits = exact_hits = 0
    for number in numbers:
        exact_hits += number in exact
        exact[number] = None
        exact.move_to_end(number)
        if len(exact) > 16 * 32:
            exact.popitem(last=False)
        name = number.to_bytes(16, "little")
        if name in book.records:
            hits += 1
            book.use(name, 0.0)
            continue
        place = book.take()
        while place is None:
            assert book.recycle(0.0) is not None
            place = book.take()
        book.commit(name, *place, book.next_time(), 0.0)
        place[0].num_pins -= 1
    assert hits >= 0.97 * exact_hits
