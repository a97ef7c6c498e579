"""Which entry of a tier goes when room is needed. Bookkeeping only: no bytes, no lock, no clock of its own.

A `Policy` orders entries of one size; a `Retention` is one tier's use of it: chains, pins, idle time and shares of
tenants. KV blocks form chains: a block is of no use once one before it in its prompt is gone. So all names of a call
come in the order of their chain, head first, and reach the policy tail first: of two blocks used equally, the deeper
one is older and goes first. Whoever inserts a prompt in several calls begins with its tail. Where `benchmarks/
retention.py` looked, that order alone left at most 0.06 % of the entries without their parent, and was worth up to 0.6
points of what is found; evicting nothing but ends of chains was tried and found no more.

S3-FIFO is the default by that benchmark: at 1 and 3 M tokens it finds 1.02 to 1.9 times what LRU does, and always more
than LFU; at 10 M it is up to 2.3 points above LRU and within a point of LFU; in larger tiers all find the same.
"""

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Final

from baton.errors import ConfigurationError
from baton.name_changes import NameChanges
from kvtransfer.tiers.pins import PINNED_SHARE, PrefixPins
from kvtransfer.tiers.tenants import NOBODY, Tenants


class Policy(ABC):
    """An order of eviction. Every call is O(1), amortised, plus the spared entries that `victim` has to pass."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def insert(self, name: bytes) -> None:
        """A name that is not in the order enters it."""

    @abstractmethod
    def touch(self, name: bytes) -> None:
        """An entry was used."""

    @abstractmethod
    def remove(self, name: bytes) -> None:
        """An entry leaves the order for another reason than lack of room. Raises KeyError for a stranger."""

    @abstractmethod
    def victim(self, spared: Container[bytes]) -> bytes | None:
        """The entry to evict next, left in place; None when all are spared."""

    def evict(self, name: bytes) -> None:
        """Remove a victim; a policy may remember its name for a while."""
        self.remove(name)


class Lru(Policy):
    """Least recently used."""

    def __init__(self) -> None:
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def insert(self, name: bytes) -> None:
        self._order[name] = None

    def touch(self, name: bytes) -> None:
        self._order.move_to_end(name)

    def remove(self, name: bytes) -> None:
        del self._order[name]

    def victim(self, spared: Container[bytes]) -> bytes | None:
        return next((name for name in self._order if name not in spared), None)


class Lfu(Policy):
    """Least frequently used, with the dynamic ageing of Arlitt et al. (LFU-DA, 2000).

    An entry's rank is its number of uses plus the age at its last one; the age is the rank of the latest victim, so
    what was popular long ago falls behind. Ranks never lie below the age, which is why the search for the lowest one
    only ever moves on.
    """

    def __init__(self) -> None:
        self._age = 0
        self._uses: dict[bytes, int] = {}
        self._rank: dict[bytes, int] = {}
        self._by_rank: dict[int, OrderedDict[bytes, None]] = {}

    def __len__(self) -> int:
        return len(self._uses)

    def insert(self, name: bytes) -> None:
        self._uses[name] = 0
        self._use(name)

    def touch(self, name: bytes) -> None:
        self._unrank(name)
        self._use(name)

    def remove(self, name: bytes) -> None:
        del self._uses[name]
        self._unrank(name)

    def victim(self, spared: Container[bytes]) -> bytes | None:
        if not self._uses:
            return None
        while self._age not in self._by_rank:
            self._age += 1
        # The lowest rank serves alone unless all of it is spared.
        ranks = (self._age, *(sorted(self._by_rank) if spared else ()))
        return next((name for rank in ranks for name in self._by_rank[rank] if name not in spared), None)

    def _use(self, name: bytes) -> None:
        self._uses[name] += 1
        rank = self._rank[name] = self._age + self._uses[name]
        self._by_rank.setdefault(rank, OrderedDict())[name] = None

    def _unrank(self, name: bytes) -> None:
        rank = self._rank.pop(name)
        names = self._by_rank[rank]
        del names[name]
        if not names:
            del self._by_rank[rank]


class S3Fifo(Policy):
    """Three FIFO queues (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023).

        insert ──▶ small ──used──▶ main ◀─┐ used: round again
                     │               └────┘
                   unused ──▶ ghost (names only) ──inserted again──▶ main

    The small queue has SMALL_SHARE of the entries, so what is used once passes quickly and leaves main alone. The
    paper's tenth is too little here: the next turn of a conversation comes late, and the ghosts remember GHOSTS times
    as many names as there are entries for the same reason.
    """

    SMALL_SHARE: Final = 0.3
    GHOSTS: Final = 2
    MAX_USES: Final = 3

    def __init__(self) -> None:
        self._small: OrderedDict[bytes, int] = OrderedDict()  # name -> uses since it came in, at most MAX_USES
        self._main: OrderedDict[bytes, int] = OrderedDict()
        self._ghost: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def insert(self, name: bytes) -> None:
        if name in self._ghost:
            del self._ghost[name]
            self._main[name] = 0
        else:
            self._small[name] = 0

    def touch(self, name: bytes) -> None:
        queue = self._queue_of(name)
        queue[name] = min(queue[name] + 1, self.MAX_USES)

    def remove(self, name: bytes) -> None:
        del self._queue_of(name)[name]

    def evict(self, name: bytes) -> None:
        if name in self._small:
            self._ghost[name] = None
            while len(self._ghost) > self.GHOSTS * len(self):
                self._ghost.popitem(last=False)
        self.remove(name)

    def victim(self, spared: Container[bytes]) -> bytes | None:
        # An entry is looked at once in small and MAX_USES + 1 times in main before none of it is left to wear off.
        for _ in range(len(self) * (self.MAX_USES + 2)):
            from_small = len(self._small) > self.SMALL_SHARE * len(self) or not self._main
            queue = self._small if from_small else self._main
            name, uses = next(iter(queue.items()))
            if name not in spared and not uses:
                return name
            del queue[name]
            self._main[name] = 0 if from_small else max(uses - 1, 0)
        return None

    def _queue_of(self, name: bytes) -> OrderedDict[bytes, int]:
        return self._small if name in self._small else self._main


POLICIES: Final[Mapping[str, type[Policy]]] = {"lru": Lru, "lfu": Lfu, "s3fifo": S3Fifo}
DEFAULT_POLICY: Final = "s3fifo"


class Retention:
    """Which entries a tier keeps. Times are seconds of one clock, passed in, and never go back.

    - An entry that nobody used for `ttl_s` is due to go, room or no room (`expired`).
    - A pinned prefix stays until it is unpinned or its time is over; together they take `pinned_share` at most.
    - A tenant that has `tenant_share` of the capacity makes room for its next entry itself, with what it used longest
      ago. An entry that tenants share belongs to the one that brought it.
    """

    def __init__(
        self,
        capacity: int,
        policy: str = DEFAULT_POLICY,
        *,
        ttl_s: float = math.inf,
        pinned_share: float = PINNED_SHARE,
        tenant_share: float = 1.0,
    ) -> None:
        """`capacity` in entries. Raises ConfigurationError."""
        if policy not in POLICIES:
            raise ConfigurationError(f"no retention policy is called '{policy}'; there are {', '.join(POLICIES)}")
        if capacity <= 0 or ttl_s <= 0 or not 0 <= pinned_share <= 1 or not 0 < tenant_share <= 1:
            raise ConfigurationError(
                "a tier needs room for a block, a time to live above 0, a pinned share in 0..1 and a share of tenants "
                "above 0 and at most 1"
            )
        self.capacity = capacity
        self._ttl_s = ttl_s
        self.pins = PrefixPins(int(pinned_share * capacity))
        self._tenants = Tenants(capacity, tenant_share)
        self._order = POLICIES[policy]()
        """Of what is not pinned."""
        self._used_at: OrderedDict[bytes, float] = OrderedDict()
        """Of the same, oldest first."""
        self._entries: set[bytes] = set()
        self.changes = NameChanges()

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: bytes) -> bool:
        return name in self._entries

    def insert(self, names: Sequence[bytes], now: float, tenant: bytes = NOBODY) -> None:
        """Entries come in; those that are here already count as used. Raises ValueError beyond the capacity."""
        for name in reversed(names):
            if name in self._entries:
                self._touch(name, now)
                continue
            if len(self) >= self.capacity:
                raise ValueError("an entry more than the capacity; evict one first")
            self._entries.add(name)
            self.changes.note(name, True)
            self._tenants.add(name, tenant)
            if name not in self.pins:
                self._enter(name, now)

    def touch(self, names: Sequence[bytes], now: float) -> None:
        """Entries were used; names that are not here are passed over."""
        for name in reversed(names):
            if name in self._entries:
                self._touch(name, now)

    def remove(self, name: bytes) -> None:
        """An entry goes for another reason than lack of room. Raises KeyError for a stranger."""
        self._leave(name)
        if name not in self.pins:
            self._order.remove(name)
            del self._used_at[name]

    def evict(self, name: bytes) -> None:
        """A victim goes; the policy may remember it."""
        self._leave(name)
        self._order.evict(name)
        del self._used_at[name]

    def num_over(self, tenant: bytes, num_more: int = 0) -> int:
        """Entries that the tenant would have beyond its share if it brought so many more."""
        return self._tenants.num_over(tenant, num_more)

    def victim(self, tenant: bytes = NOBODY, spared: Container[bytes] = ()) -> bytes | None:
        """What should go so that `tenant` can bring an entry; None when nothing may. It is left in place."""
        if self._tenants.num_over(tenant, 1):
            return self._tenants.oldest(tenant, spared, self.pins)
        return self._order.victim(spared)

    def expired(self, now: float, spared: Container[bytes] = ()) -> list[bytes]:
        """Entries unused for too long, to be removed. Prefix pins whose time is over are dropped."""
        self._release(self.pins.expire(now), now)
        names = []
        for name, used_at in self._used_at.items():
            if now - used_at < self._ttl_s:
                break
            if name not in spared:
                names.append(name)
        return names

    def pin_prefix(self, key: str, names: Sequence[bytes], until: float, now: float) -> bool:
        """Keep these names, here already or still to come, until `until`; a pin of the same key is replaced.

        False, and nothing changes, when pinned prefixes would take more than their part of the tier.
        """
        released = self.pins.pin(key, names, until)
        if released is None:
            return False
        for name in names:
            if name in self._used_at:
                self._order.remove(name)
                del self._used_at[name]
        self._release(released, now)
        return True

    def unpin_prefix(self, key: str, now: float) -> None:
        """Let the names of a pin go the way of all others, as just used. Nothing happens for an unknown key."""
        self._release(self.pins.unpin(key), now)

    def _release(self, names: Sequence[bytes], now: float) -> None:
        for name in reversed(names):
            if name in self._entries:
                self._enter(name, now)

    def _leave(self, name: bytes) -> None:
        self._entries.remove(name)
        self.changes.note(name, False)
        self._tenants.remove(name)

    def _enter(self, name: bytes, now: float) -> None:
        self._order.insert(name)
        self._used_at[name] = now

    def _touch(self, name: bytes, now: float) -> None:
        self._tenants.use(name)
        if name in self._used_at:
            self._order.touch(name)
            self._used_at[name] = now
            self._used_at.move_to_end(name)
