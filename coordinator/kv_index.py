"""What each worker's caches hold, as the workers tell: `KvEvents`, a snapshot first and then every change. No I/O.

    tier ─▶ dict: key of a block ─▶ int, one bit a slot            a slot is one worker, as of one snapshot
                                      ...0010110
    prompt: key 0, key 1, key 2 ...   mask &= bits of the key;  who drops out at depth n has the first n blocks

So matching a prompt costs one look-up a block, however many workers there are, and ends where the last one drops out.
The names of blocks are chained hashes (`baton.block_names`), which makes this the radix tree of SGLang and Dynamo
without the tree. A key is the first eight bytes of a name: two blocks may share one by chance, which costs a
wrong guess and never a wrong answer, because whoever is sent to looks with the whole name.

1. A message out of sequence is a gap: a snapshot is asked for. What was known stays, and what comes meanwhile is
   applied: each change is true by itself, while forgetting would send a worker's prompts elsewhere just when it is too
   busy to tell.
2. A snapshot, a loss or a new life voids a slot at once. Its bits go a few at a time (`tidy`): nobody waits for that.
3. At `max_entries` nothing more is stored; it is counted. Caches churn, so what is removed makes room for what comes.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from operator import or_

import numpy as np
import numpy.typing as npt

from baton.errors import PeerError
from baton.v1 import worker_link_pb2 as wire
from coordinator.block_keys import KEY_BYTES

TIERS = (wire.KV_TIER_POOL, wire.KV_TIER_HOST, wire.KV_TIER_DISK)
"""From the fastest to the slowest."""
ENTRY_BYTES = 140
"""About what one entry takes: its part of a dict and a set, and the key."""
TIDY_KEYS = 1024
ASK_AGAIN_S = 5.0
"""After so long without the snapshot that was asked for."""
_FEW = 8
_ZEROS = repeat(0)

Get = Callable[[int, int], int]
Vectors = npt.NDArray[np.float64]


class WorkerCaches:
    """What one worker told on one link."""

    def __init__(self, row: int, slot: int, now_s: float) -> None:
        self.row = row
        self.slot = slot
        self.sequence = 0
        """Of the last message that was applied."""
        self.told = False
        """There was a snapshot."""
        self.joined_s = now_s
        self.asked_s: float | None = None
        """When a snapshot was asked for that has not come yet."""
        self.announced = 0
        """Of the last message that was sent, or waits to be, by the last heartbeat."""
        self.behind_since_s: float | None = None
        """Since when nothing came although there is something."""
        self.age_s = 0.0
        """Of the oldest change in the last message, when that was made."""

    @property
    def lag(self) -> int:
        """Messages."""
        return max(0, self.announced - self.sequence)

    def lag_s(self, now_s: float) -> float:
        return self.age_s if self.behind_since_s is None else now_s - self.behind_since_s


class KvIndex:
    """Rows are the caller's numbers of workers: that of a worker which was closed may be used again."""

    def __init__(self, max_entries: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_entries = max_entries
        self._clock = clock
        self._tiers: tuple[dict[int, int], ...] = tuple({} for _ in TIERS)
        self._bits: list[int] = []
        """By slot: the one object that all blocks share which only this slot has."""
        self._own: list[tuple[set[int], ...]] = []
        """By slot and tier."""
        self._rows = np.zeros(0, np.intp)
        """By slot."""
        self._live = 0
        """Slots that count."""
        self._rows_live: np.ndarray | None = None
        """Theirs, once they were needed."""
        self._free: list[int] = []
        self._void: deque[int] = deque()
        """Slots whose bits are still to be cleared."""
        self.num_entries = 0
        """Blocks of workers and tiers, with those that are void."""
        self.messages = self.changes = self.gaps = self.snapshots = self.refused = 0
        """Counted since the start. `refused`: stored by a worker, but here only `max_entries` are."""

    def __len__(self) -> int:
        """Blocks that somebody holds, in any tier."""
        return sum(map(len, self._tiers))

    @property
    def num_bytes(self) -> int:
        """An estimate of the memory that is used."""
        return ENTRY_BYTES * self.num_entries

    def open(self, row: int) -> WorkerCaches:
        """A worker is there, of which nothing is known yet."""
        return WorkerCaches(row, self._take_slot(row), self._clock())

    def close(self, caches: WorkerCaches) -> None:
        """It is gone, and with it all that it had."""
        self._void_slot(caches.slot)

    def apply(self, caches: WorkerCaches, message: wire.KvEvents) -> bool:
        """Whether the worker is to be asked for a snapshot. Raises PeerError for what is no list of keys."""
        changes = [(each.tier, _keys(each.removed), _keys(each.stored)) for each in message.changes]
        self.messages += 1
        if message.snapshot:
            self.snapshots += 1
            self._void_slot(caches.slot)
            caches.slot = self._take_slot(caches.row)
            caches.told, caches.asked_s = True, None
        in_order = message.snapshot or message.sequence == caches.sequence + 1 > 1
        self.gaps += not in_order
        caches.sequence, caches.age_s, caches.behind_since_s = message.sequence, message.age_s, None
        for tier, removed, stored in changes:
            self.changes += len(removed) + len(stored)
            while self._void and self.num_entries + len(stored) > self._max_entries:
                self.tidy()
            if tier in TIERS:  # a tier that this software does not know is a miss
                self._remove(TIERS.index(tier), caches.slot, removed)
                self._store(TIERS.index(tier), caches.slot, stored)
        self.tidy()
        return self._asks(caches, not in_order)

    def beat(self, caches: WorkerCaches, announced: int) -> bool:
        """A heartbeat came. Whether the worker is to be asked for a snapshot: what the one before announced has not
        come, and a link keeps the order."""
        self.tidy()
        is_stuck = caches.lag > 0
        caches.announced = announced
        if not caches.lag:
            caches.behind_since_s = None
        elif caches.behind_since_s is None:
            caches.behind_since_s = self._clock()
        return self._asks(caches, is_stuck)

    def _asks(self, caches: WorkerCaches, is_needed: bool) -> bool:
        """Once, and again if it does not come."""
        now_s = self._clock()
        if caches.asked_s is None and not is_needed:
            return False
        if caches.asked_s is not None and now_s - caches.asked_s <= ASK_AGAIN_S:
            return False
        caches.asked_s = now_s
        return True

    def match(self, prompt: Iterable[Sequence[int]], num_rows: int) -> Vectors:
        """[3, num_rows]: leading blocks that each worker holds in its pool, in pool or host tier, in any tier; or
        [1, num_rows] where all that is held is in pools. `prompt` is its keys, in parts, and is read once a tier, as
        far as somebody holds them."""
        depths = np.zeros((len(TIERS) if any(self._tiers[1:]) else 1, num_rows))
        gets: list[Get] = []
        for tier, its in zip(self._tiers, depths, strict=False):
            gets.append(tier.get)
            self._walk(prompt, gets, its)
        return depths

    def _walk(self, prompt: Iterable[Sequence[int]], gets: Sequence[Get], depths: Vectors) -> None:
        mask, depth, same = self._live, 0, -1
        for part in prompt:
            held = list(map(gets[0], part, _ZEROS))
            for get in gets[1:]:
                held = list(map(or_, held, map(get, part, _ZEROS)))
            # Neighbours mostly share the object: nobody drops out between them.
            count = len(held) if held.count(held[0]) == len(held) else 1
            for bits in held[::count]:
                if bits is not same:
                    same = bits
                    left = mask & bits
                    if left != mask:
                        if depth:
                            # Those who stay are seen again: so at first, when most drop out, all may be written.
                            depths[self._live_rows() if mask is self._live else self._rows_of(mask ^ left)] = depth
                        mask = left
                        if not mask:
                            return
                depth += count
        if depth:
            depths[self._rows_of(mask)] = depth

    def _live_rows(self) -> np.ndarray:
        if self._rows_live is None:
            self._rows_live = np.asarray(self._rows_of(self._live), np.intp)
        return self._rows_live

    def _rows_of(self, mask: int) -> np.ndarray | list[int]:
        if mask.bit_count() > _FEW:
            octets = np.frombuffer(mask.to_bytes((len(self._bits) + 7) // 8, "little"), np.uint8)
            return self._rows[np.unpackbits(octets, bitorder="little").nonzero()]
        rows = []
        while mask:
            slot = mask.bit_length() - 1
            rows.append(int(self._rows[slot]))
            mask ^= self._bits[slot]
        return rows

    def _store(self, tier: int, slot: int, keys: list[int]) -> None:
        held, own, bit = self._tiers[tier], self._own[slot][tier], self._bits[slot]
        before = after = 0
        for key in keys:
            if key in own:
                continue
            if self.num_entries >= self._max_entries:
                self.refused += 1
                continue
            own.add(key)
            self.num_entries += 1
            old = held.get(key)
            if old is None:
                held[key] = bit
                continue
            if old is not before:
                before, after = old, old | bit
            held[key] = after  # blocks with the same holders share one object

    def _remove(self, tier: int, slot: int, keys: Iterable[int]) -> None:
        held, own, bit = self._tiers[tier], self._own[slot][tier], self._bits[slot]
        before = after = 0
        for key in keys:
            if key not in own:
                continue
            own.remove(key)
            self.num_entries -= 1
            old = held[key]
            if old is not before:
                before, after = old, old ^ bit
            if after:
                held[key] = after
            else:
                del held[key]

    def _take_slot(self, row: int) -> int:
        if self._free:
            slot = self._free.pop()
        else:
            slot = len(self._bits)
            self._bits.append(1 << slot)
            self._own.append(tuple(set() for _ in TIERS))
            self._rows = np.append(self._rows, 0)
        self._rows[slot] = row
        self._live |= self._bits[slot]
        self._rows_live = None
        return slot

    def _void_slot(self, slot: int) -> None:
        self._live &= ~self._bits[slot]
        self._rows_live = None
        self._void.append(slot)

    def tidy(self) -> None:
        """Clear some bits of slots that are void."""
        room = TIDY_KEYS
        while self._void and room > 0:
            slot = self._void[0]
            for tier, own in enumerate(self._own[slot]):
                some = [own_key for own_key, _ in zip(own, range(room), strict=False)]
                room -= len(some)
                self._remove(tier, slot, some)
            if not any(self._own[slot]):
                self._free.append(self._void.popleft())


def _keys(packed: bytes) -> list[int]:
    if len(packed) % KEY_BYTES:
        raise PeerError(f"it sent {len(packed)} bytes as names of blocks, which are {KEY_BYTES} bytes each")
    return np.frombuffer(packed, "<u8").tolist()  # type: ignore[no-any-return]
