"""Blocks in host memory: a slab of slots, and which name lies in which slot.

    slab[num_slots, block_bytes]

    free ──put──▶ filling ──▶ held ──evicted, expired, or wrong and no longer pinned──▶ free

A slot gets new content only when nobody copies out of it: whoever does has pinned its name, and pinned names are not
evicted. Bookkeeping happens under one lock, copies and checksums outside of it.
"""

import math
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from baton.errors import ConfigurationError
from kvtransfer.tiers.admission import Admission
from kvtransfer.tiers.base import Block, Counters, OwnTier, TierState, TierStatus
from kvtransfer.tiers.pins import PINNED_SHARE
from kvtransfer.tiers.retention import DEFAULT_POLICY, Retention
from kvtransfer.tiers.tenants import NOBODY


@dataclass(slots=True)
class _Entry:
    slot: int
    checksum: int
    is_wrong: bool = False
    """Its bytes failed their check; it goes when its last pin does."""


class HostTier(OwnTier):
    """Bounded by `capacity_bytes`, all of it taken at the start. A prompt's blocks are best put tail first.

    One counter besides those of every tier: `not_admitted`, blocks that the admission filter kept out, which also count
    as refused.
    """

    name = "host"

    def __init__(
        self,
        capacity_bytes: int,
        block_bytes: int,
        *,
        policy: str = DEFAULT_POLICY,
        admission: bool = False,
        ttl_s: float = math.inf,
        pinned_share: float = PINNED_SHARE,
        tenant_share: float = 1.0,
        buffer: memoryview | mmap.mmap | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`admission`: put the filter of `admission.py` in front; it says when that pays. `buffer`: writable memory
        of at least `capacity_bytes` to use, such as pinned memory of a GPU's driver; it stays the caller's. The others
        as in `Retention`. Raises ConfigurationError when there is no room for a block, or no such memory.
        """
        num_slots = capacity_bytes // max(block_bytes, 1)
        if block_bytes <= 0 or num_slots <= 0:
            raise ConfigurationError(f"a host tier of {capacity_bytes} bytes has no room for blocks of {block_bytes}")
        self.block_bytes, self.capacity_bytes = block_bytes, num_slots * block_bytes
        self._retention = Retention(
            num_slots, policy, ttl_s=ttl_s, pinned_share=pinned_share, tenant_share=tenant_share
        )
        self.pins = self._retention.pins
        self._changes = self._retention.changes
        self._admission = Admission(num_slots) if admission else None
        self._clock = clock
        self._counters = Counters("host", ("not_admitted",))
        self._slab = _slab(num_slots, block_bytes, buffer)
        self._lock = threading.Lock()
        self._entries: dict[bytes, _Entry] = {}
        self._filling: set[bytes] = set()
        self._pins: dict[bytes, int] = {}
        self._free = list(range(num_slots - 1, -1, -1))

    def holds(self, names: Sequence[bytes]) -> list[bool]:
        with self._lock:
            self._drop_expired()
            return [self._find(name) is not None for name in names]

    def put(self, name: bytes, block: Block, tenant: bytes = NOBODY) -> bool:
        source = self.block_view(name, block)
        with self._lock:
            self._drop_expired()
            self._record(name)
            if name in self._entries or name in self._filling:
                self._retention.touch([name], self._clock())
                return name in self._filling or not self._entries[name].is_wrong
            slot = self._make_room(name, tenant)
            if slot is None:
                self._counters.add("refused")
                return False
            self._filling.add(name)
        checksum = xxhash.xxh3_64_intdigest(source.data)
        np.copyto(self._slab[slot], source)
        with self._lock:
            self._filling.remove(name)
            self._entries[name] = _Entry(slot, checksum)
            self._retention.insert([name], self._clock(), tenant)
            self._drop_excess(tenant)
        self._counters.add("stored")
        self._counters.add("bytes", self.block_bytes)
        return True

    def get(self, name: bytes, into: npt.NDArray[np.uint8], deadline: float) -> bool:
        target = self.block_view(name, into)
        if time.monotonic() > deadline:
            self._counters.add("timeouts")
            self._counters.add("misses")
            return False
        with self._lock:
            self._drop_expired()
            self._record(name)
            entry = self._find(name)
            if entry is not None:
                if name not in self._pins:  # else the pin has counted as the use, for its whole row in order
                    self._retention.touch([name], self._clock())
                self._pins[name] = self._pins.get(name, 0) + 1
        if entry is None:
            self._counters.add("misses")
            return False
        np.copyto(target, self._slab[entry.slot])
        is_right = xxhash.xxh3_64_intdigest(target.data) == entry.checksum
        with self._lock:
            if not is_right and not entry.is_wrong:
                entry.is_wrong = True
                self._retention.remove(name)
            self._unpin(name)
        for what in ("loaded",) if is_right else ("checksum_failures", "misses"):
            self._counters.add(what)
        return is_right

    def pin(self, names: Sequence[bytes]) -> list[bool]:
        """As every tier's. It counts as a use of the row, so the names come in the order of their chain."""
        with self._lock:
            self._drop_expired()
            held = [self._find(name) is not None for name in names]
            pinned = [name for name, is_held in zip(names, held, strict=True) if is_held]
            for name in pinned:
                self._pins[name] = self._pins.get(name, 0) + 1
            self._retention.touch(pinned, self._clock())
        return held

    def unpin(self, names: Iterable[bytes]) -> None:
        with self._lock:
            for name in names:
                self._unpin(name)

    def pin_prefix(self, key: str, names: Sequence[bytes], ttl_s: float) -> bool:
        with self._lock:
            self._drop_expired()
            now = self._clock()
            return self._retention.pin_prefix(key, names, now + ttl_s, now)

    def unpin_prefix(self, key: str) -> None:
        with self._lock:
            self._retention.unpin_prefix(key, self._clock())

    @property
    def counters(self) -> dict[str, float]:
        return self._counters.snapshot()

    @property
    def status(self) -> TierStatus:
        return TierStatus(TierState.ON)

    def close(self, deadline: float) -> None:
        self._entries.clear()
        del self._slab

    def _names(self) -> Iterable[bytes]:
        return self._retention

    def _find(self, name: bytes) -> _Entry | None:
        entry = self._entries.get(name)
        return None if entry is None or entry.is_wrong else entry

    def _record(self, name: bytes) -> None:
        if self._admission:
            self._admission.record(name)

    def _make_room(self, name: bytes, tenant: bytes) -> int | None:
        """A slot for new content, where there is one or a victim worth less."""
        is_over = self._retention.num_over(tenant, 1) > 0
        if self._free and not is_over:
            return self._free.pop()
        victim = self._retention.victim(tenant, self._pins)
        if victim is None:
            return None
        if self._admission and not self._admission.admits(name, victim):
            self._counters.add("not_admitted")
            return None
        self._retention.evict(victim)
        self._counters.add("over_share" if is_over else "evicted")
        self._give_back(victim)
        return self._free.pop()

    def _drop_excess(self, tenant: bytes) -> None:
        """Of a tenant that brought several blocks at the same moment."""
        while self._retention.num_over(tenant) and (name := self._retention.victim(tenant, self._pins)):
            self._retention.evict(name)
            self._counters.add("over_share")
            self._give_back(name)

    def _drop_expired(self) -> None:
        for name in self._retention.expired(self._clock(), self._pins):
            self._retention.remove(name)
            self._counters.add("expired")
            self._give_back(name)

    def _unpin(self, name: bytes) -> None:
        self._pins[name] -= 1
        if not self._pins[name]:
            del self._pins[name]
            if self._entries[name].is_wrong:
                self._give_back(name)

    def _give_back(self, name: bytes) -> None:
        self._free.append(self._entries.pop(name).slot)
        self._counters.add("bytes", -self.block_bytes)


def _slab(num_slots: int, block_bytes: int, buffer: memoryview | mmap.mmap | None) -> npt.NDArray[np.uint8]:
    """uint8 [num_slots, block_bytes], in `buffer` or in memory whose pages are all taken from the system now."""
    num_bytes = num_slots * block_bytes
    if buffer is None:
        if num_bytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            raise ConfigurationError(f"a host tier of {num_bytes} bytes is more than this machine's memory; lower it")
        try:
            buffer = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        except OSError as error:
            raise ConfigurationError(f"no memory for a host tier of {num_bytes} bytes: {error}; lower it") from error
    slab = np.frombuffer(buffer, np.uint8)
    if len(slab) < num_bytes or not slab.flags.writeable:
        raise ConfigurationError(f"a host tier of {num_bytes} bytes cannot write to the {len(slab)} bytes it is given")
    return slab[:num_bytes].reshape(num_slots, block_bytes)
