"""Which block is in which slot of which segment, and which slots are taken next. Bookkeeping alone: no I/O, no lock.

    free ──take──▶ being written ──commit──▶ live ──recycle──▶ free
                        │                     │                 ▲
                        └─ failed ─▶ dead ◀─ drop (failed check)│
                                      └───────────recycle───────┘

Slots become free a segment at a time, so that writes run through whole segments: a new one while the capacity allows,
then the least useful one that nobody reads or writes. Usefulness is the mean time of last use over its slots. In it
the blocks used more recently than the average block of the tier stay where they are, in at most half of the slots;
the others are evicted. That is the cleaning of a log-structured cache (Segcache, NSDI 2021) without its copying: fixed
slots let the survivors stay.

A time is a number that grows with every store and load. A record's sequence is the time of its store, so that after a
restart the order of storing stands in for the order of use.
"""

from collections import OrderedDict, deque
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from itertools import takewhile

from baton.name_changes import NameChanges
from kvtransfer.tiers.records import Claim
from kvtransfer.tiers.tenants import NOBODY, Tenants


@dataclass(slots=True, eq=False)
class Record:
    """One live block."""

    segment: "Segment"
    slot: int
    last_use: int
    used_at: float
    """By the clock."""


@dataclass(slots=True, eq=False)
class Segment:
    """One file. Pinned while somebody reads or writes in it, or wants its blocks kept."""

    file: str
    fd: int
    num_slots: int
    num_bytes: int
    """What it is charged for."""
    names: list[bytes | None] = field(init=False)
    """Of the live blocks."""
    num_pins: int = 0
    use_sum: int = 0
    """Sum of the last uses of its live blocks."""
    is_removed: bool = False

    def __post_init__(self) -> None:
        self.names = [None] * self.num_slots


class SegmentBook:
    """Every segment and block of one tier. The caller sees to it that one thread at a time is in here."""

    def __init__(self, tenants: Tenants) -> None:
        self.segments: list[Segment] = []
        self.num_bytes = 0
        """What all segments together are charged for."""
        self.records: OrderedDict[bytes, Record] = OrderedDict()
        """Longest unused first."""
        self.changes = NameChanges()
        self._tenants = tenants
        self._free: deque[tuple[Segment, int]] = deque()
        self._time = 0
        self._use_sum = 0

    def next_time(self) -> int:
        self._time += 1
        return self._time

    def add(self, segment: Segment, claims: Iterable[tuple[int, Claim]] = ()) -> None:
        """A new file, or one found at the start with the claims of its slots. The latest claim of a name wins; slots
        without a winner are free."""
        self.segments.append(segment)
        self.num_bytes += segment.num_bytes
        freed = set(range(segment.num_slots))
        for slot, claim in claims:
            self._time = max(self._time, claim.sequence)
            loser = self.records.get(claim.name)
            if loser is None or loser.last_use < claim.sequence:
                freed.discard(slot)
                if loser is not None:
                    self._release(claim.name)
                self._enter(claim.name, Record(segment, slot, claim.sequence, claim.stored_at), claim.tenant)
        self._free.extend((segment, slot) for slot in sorted(freed))

    def take(self) -> tuple[Segment, int] | None:
        """A free slot to write, its segment pinned; None when there is none."""
        if not self._free:
            return None
        segment, slot = self._free.popleft()
        segment.num_pins += 1
        return segment, slot

    def commit(
        self, name: bytes, segment: Segment, slot: int, sequence: int, now: float, tenant: bytes = NOBODY
    ) -> None:
        """A taken slot holds the block. Its segment is still pinned."""
        if not segment.is_removed:
            self._enter(name, Record(segment, slot, sequence, now), tenant)

    def use(self, name: bytes, now: float) -> None:
        """Raises KeyError for a block that is not here."""
        record, time = self.records[name], self.next_time()
        record.used_at = now
        self.records.move_to_end(name)
        self._tenants.use(name)
        self._add_use(record.segment, time - record.last_use)
        record.last_use = time

    def drop(self, name: bytes, record: Record) -> bool:
        """The block is lost; its slot stays unused until its segment is recycled. False when it is gone already."""
        if self.records.get(name) is not record:
            return False
        del self.records[name]
        self.changes.note(name, False)
        self._tenants.remove(name)
        record.segment.names[record.slot] = None
        self._add_use(record.segment, -record.last_use)
        return True

    def least_useful(self, spared: Container[bytes] = ()) -> Segment | None:
        """Of the segments that nobody has pinned and that are not full of spared blocks."""
        idle = [segment for segment in self.segments if not segment.num_pins]
        idle.sort(key=lambda segment: segment.use_sum / segment.num_slots)
        return next((each for each in idle if any(name is None or name not in spared for name in each.names)), None)

    def recycle(self, now: float, spared: Container[bytes] = ()) -> int | None:
        """Free the colder slots of the least useful segment; how many blocks that evicted, None when all are pinned.

        Spared blocks stay, and that counts as a use: else their segment would be the least useful one again and again.
        Only once no slot is free: a free one would be freed again.
        """
        if self._free:
            raise ValueError("there are free slots left")
        segment = self.least_useful(spared)
        if segment is None:
            return None
        mean_use = self._use_sum / max(1, len(self.records))
        staying = [name for name in segment.names if name is not None and name in spared]
        for name in staying:
            self.use(name, now)
        live = [
            (self.records[name].last_use, name) for name in segment.names if name is not None and name not in spared
        ]
        hottest = sorted(live, reverse=True)[: (segment.num_slots - len(staying)) // 2]
        kept = {name for last_use, name in hottest if last_use > mean_use}
        evicted = [name for _, name in live if name not in kept]
        for name in evicted:
            self.drop(name, self.records[name])
        self._free.extend((segment, slot) for slot, name in enumerate(segment.names) if name is None)
        return len(evicted)

    def remove(self, segment: Segment) -> int:
        """Forget a segment that nobody may use any more; how many blocks are lost with it."""
        lost = [name for name in segment.names if name is not None]
        for name in lost:
            self.drop(name, self.records[name])
        self._free = deque(free for free in self._free if free[0] is not segment)
        self.segments.remove(segment)
        self.num_bytes -= segment.num_bytes
        segment.is_removed = True
        return len(lost)

    def drop_excess(self, tenant: bytes, *spared: Container[bytes]) -> int:
        """Free slots of a tenant that has more than its share, longest unused first; how many blocks that evicted.

        A slot may be taken again while somebody still reads the block that it held: that is a failed check, a miss.
        """
        num_evicted = 0
        while self._tenants.num_over(tenant) and (name := self._tenants.oldest(tenant, *spared)) is not None:
            self._release(name)
            num_evicted += 1
        return num_evicted

    def sort(self) -> None:
        """Bring the blocks of all files that were found into the order of their last use."""
        in_order = sorted(self.records.items(), key=lambda item: (item[1].used_at, item[1].last_use))
        self.records = OrderedDict(in_order)
        for name in self.records:
            self._tenants.use(name)

    def drop_expired(self, since: float, now: float, *spared: Container[bytes]) -> int:
        """Free the slots of blocks that nobody used since then; how many. A spared one counts as used now."""
        due = list(takewhile(lambda name: self.records[name].used_at <= since, self.records))
        num_before = len(self.records)
        for name in due:
            if any(name in those for those in spared):
                self.use(name, now)
            else:
                self._release(name)
        return num_before - len(self.records)

    def _release(self, name: bytes) -> None:
        record = self.records[name]
        self.drop(name, record)
        self._free.append((record.segment, record.slot))

    def _enter(self, name: bytes, record: Record, tenant: bytes) -> None:
        self.records[name] = record
        self.changes.note(name, True)
        self._tenants.add(name, tenant)
        record.segment.names[record.slot] = name
        self._add_use(record.segment, record.last_use)

    def _add_use(self, segment: Segment, amount: int) -> None:
        segment.use_sum += amount
        self._use_sum += amount
