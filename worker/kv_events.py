"""Tells coordinators what this worker's caches hold: the pool's prefix cache, and the tiers that are its own.

Told is who asks, for as long as its link lasts:

1. `wanted`: between two steps the engine copies the names in its prefix cache, and when the copy is here the tiers do.
2. That snapshot goes out in messages of at most MAX_NAMES names. Changes since then wait behind it, net: a name that
   came and went is told to nobody.
3. Every BATCH_S the link gets one message at most, and none while MAX_UNSENT_BYTES wait to be read from it.
4. Where more than MAX_WAITING changes wait, all are left out and the sequence skips a number. The coordinator sees the
   gap, in the next heartbeat at the latest, and asks again, which is 1. Whoever asks again and again is answered every
   SNAPSHOT_INTERVAL_S.

Messages have the first eight bytes of each name. Two blocks of a worker that have them in common are a mistake in a
hint, once in 2**64 pairs.
"""

import asyncio
import math
import time
from typing import Final, TypeAlias

from baton.name_changes import Changed, Held, NameChanges
from baton.v1 import worker_link_pb2 as wire
from engine.engine import Engine
from kvtransfer.tiers.store import BlockStore
from worker.roles import KvLink, Link
from worker.step_loop import StepLoop

MAX_NAMES: Final = 8192
"""In a message: 64 KiB, and less than a millisecond to make it."""
BATCH_S: Final = 0.015
MAX_UNSENT_BYTES: Final = 1 << 20
MAX_WAITING: Final = 65536
SNAPSHOT_INTERVAL_S: Final = 1.0
SHORT_NAME_BYTES: Final = 8

KvTier: TypeAlias = "wire.KvTier.ValueType"
_TIERS: Final[dict[str, KvTier]] = {"host": wire.KV_TIER_HOST, "disk": wire.KV_TIER_DISK}


class _Part:
    """Names of one tier that are still to be told."""

    __slots__ = ("are_held", "names", "tier")

    def __init__(self, tier: KvTier, names: list[bytes], are_held: bool) -> None:
        self.tier = tier
        self.names = names
        self.are_held = are_held

    def cut(self, most: int) -> wire.KvChange:
        names = b"".join([name[:SHORT_NAME_BYTES] for name in self.names[-most:]])
        del self.names[-most:]
        if self.are_held:
            return wire.KvChange(tier=self.tier, stored=names)
        return wire.KvChange(tier=self.tier, removed=names)


class _Listener:
    """What waits to be told on one link."""

    def __init__(self, link: KvLink) -> None:
        self.link = link
        self.asked_at = -math.inf
        """When its latest snapshot was asked for."""
        self.asking: asyncio.TimerHandle | None = None
        self.follows = False
        """It has a snapshot, or will have: changes concern it."""
        self._opens = False
        """The next message is the first of a snapshot."""
        self._parts: list[_Part] = []
        """What is being told, and since when it has been so. Changes wait until all of it has been sent."""
        self._since = 0.0
        self._waiting: dict[KvTier, NameChanges] = {}

    @property
    def num_waiting(self) -> int:
        return sum(len(changes) for changes in self._waiting.values())

    @property
    def num_untold(self) -> int:
        return self.num_waiting + sum(len(part.names) for part in self._parts)

    @property
    def has_news(self) -> bool:
        return self._opens or self.num_untold > 0

    def begin(self, snapshot: dict[KvTier, list[bytes]]) -> None:
        """With what is held now; what waited is part of it, or was undone."""
        self.forget()
        self.follows = self._opens = True
        self._since = time.monotonic()
        self._parts = [_Part(tier, names, are_held=True) for tier, names in snapshot.items() if names]

    def hear(self, tier: KvTier, changed: Changed) -> None:
        if tier not in self._waiting:
            self._waiting[tier] = NameChanges()
            self._waiting[tier].watch()
        self._waiting[tier].add(changed)

    def forget(self) -> None:
        self.follows = self._opens = False
        self._parts = []
        self._waiting = {}

    def cut(self) -> wire.KvEvents:
        """The next message, without its number."""
        if not self._opens and not self._parts:
            self._take_waiting()
        message = wire.KvEvents(snapshot=self._opens, age_s=time.monotonic() - self._since)
        self._opens = False
        room = MAX_NAMES
        while self._parts and room:
            part = self._parts[-1]
            size = min(room, len(part.names))
            message.changes.append(part.cut(size))
            room -= size
            if not part.names:
                self._parts.pop()
        return message

    def _take_waiting(self) -> None:
        self._since = math.inf
        for tier, changes in self._waiting.items():
            if (changed := changes.take()) is None:
                continue
            self._since = min(self._since, changed.since)
            for are_held in (True, False):
                if names := [name for name, is_held in changed.names.items() if is_held is are_held]:
                    self._parts.append(_Part(tier, names, are_held))


class KvReporter:
    """Runs on the asyncio thread."""

    def __init__(self, steps: StepLoop, store: BlockStore | None, counters: dict[str, float]) -> None:
        self._steps = steps
        self._store = store
        self._counters = counters
        self._loop = asyncio.get_running_loop()
        self._listeners: dict[Link, _Listener] = {}
        self._timer: asyncio.TimerHandle | None = None

    def wanted(self, link: KvLink) -> None:
        """Its coordinator wants to know what the caches hold: all of it, soon, and then what changes."""
        listener = self._listeners.get(link)
        if listener is None:
            listener = self._listeners[link] = _Listener(link)
        if listener.asking is None:
            wait_s = max(0.0, listener.asked_at + SNAPSHOT_INTERVAL_S - time.monotonic())
            listener.asking = self._loop.call_later(wait_s, self._ask, listener)

    def lost(self, link: Link) -> None:
        listener = self._listeners.pop(link, None)
        if listener is None:
            return
        if listener.asking is not None:
            listener.asking.cancel()
        if not self._listeners:
            self._steps.submit(Engine.unwatch_cache)
            if self._store is not None:
                self._store.unwatch()

    def on_cached(self, changed: Changed | None) -> None:
        """The prefix cache has changed, as a step has said."""
        self._spread(wire.KV_TIER_POOL, changed)
        self._schedule()

    def _ask(self, listener: _Listener) -> None:
        listener.asking = None
        listener.asked_at = time.monotonic()

        def copy(engine: Engine) -> None:
            # Comes in its place among the outputs of steps: those behind it tell what has changed since.
            self._loop.call_soon_threadsafe(self._begin, listener, engine.watch_cache())

        self._steps.submit(copy)

    def _begin(self, listener: _Listener, pool: Held) -> None:
        self.on_cached(pool.before)
        if self._listeners.get(listener.link) is not listener:
            return  # lost meanwhile
        snapshot = {wire.KV_TIER_POOL: pool.names}
        for name, held in self._store.watch(self._wake).items() if self._store is not None else ():
            self._spread(_TIERS[name], held.before)
            snapshot[_TIERS[name]] = held.names
        listener.begin(snapshot)
        self._counters["kv_snapshots_sent"] += 1

    def _wake(self) -> None:
        """Called in a thread of a tier."""
        self._loop.call_soon_threadsafe(self._schedule)

    def _schedule(self) -> None:
        if self._timer is None and self._listeners:
            self._timer = self._loop.call_later(BATCH_S, self._flush)

    def _flush(self) -> None:
        self._timer = None
        if self._store is not None:
            for name, changed in self._store.take_changes().items():
                self._spread(_TIERS[name], changed)
        for listener in self._listeners.values():
            if listener.has_news and listener.link.unsent_bytes < MAX_UNSENT_BYTES:
                self._tell(listener)
        if any(listener.has_news for listener in self._listeners.values()):
            self._schedule()

    def _spread(self, tier: KvTier, changed: Changed | None) -> None:
        if changed is None:
            return
        for listener in [each for each in self._listeners.values() if each.follows]:
            listener.hear(tier, changed)
            if listener.num_waiting > MAX_WAITING:
                self._counters["kv_events_dropped"] += listener.num_untold
                listener.forget()
                listener.link.kv_sequence += 1

    def _tell(self, listener: _Listener) -> None:
        num_before = listener.num_untold
        message = listener.cut()
        listener.link.kv_sequence = message.sequence = listener.link.kv_sequence + 1
        listener.link.send(wire.WorkerMessage(kv_events=message))
        self._counters["kv_events_sent"] += num_before - listener.num_untold
