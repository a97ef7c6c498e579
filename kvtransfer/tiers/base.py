"""What a tier is: a place that keeps KV blocks by name, may lose any of them, and never gives back a wrong byte.

A name is `baton.block_names.NAME_BYTES` bytes and stands for one content, so a block that is held already need not be
stored again. All blocks of a tier have `block_bytes` bytes.

    put(name, block, tenant)    -> True: taken; held at once, or soon where writes are queued; False: refused
    holds([name, ...])          -> which of them a get would find now
    pin([name, ...]), unpin     -> no eviction in between
    pin_prefix(key, [name, ...], ttl_s), unpin_prefix -> the same for what may still have to come, for a time
    get(name, into, deadline)   -> True: `into` is the block; False: a miss, and `into` may hold anything
    get_many                    -> the same for several at once

Whatever goes wrong below a tier ends as a miss or a refusal with a counter, and in `status`.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from baton.block_names import NAME_BYTES
from baton.name_changes import Changed, Held, NameChanges
from kvtransfer.tiers.pins import PrefixPins
from kvtransfer.tiers.tenants import NOBODY

Block = npt.NDArray[np.uint8] | memoryview
"""The bytes of one block: contiguous, `block_bytes` long."""


class TierState(Enum):
    ON = "on"
    READ_ONLY = "read-only"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class TierStatus:
    """What a tier does at the moment, and why it does not do more."""

    state: TierState
    reason: str = ""


COUNTED = (
    "stored",
    "loaded",
    "misses",
    "checksum_failures",
    "evicted",
    "over_share",
    "expired",
    "refused",
    "io_errors",
    "timeouts",
    "bytes",
)
"""What every tier counts, in blocks and since it was opened. `bytes` is what its blocks take at the moment."""


class Counters:
    """Numbers named `kv_<tier>_<what>`, added up by several threads."""

    def __init__(self, tier: str, more: Iterable[str] = ()) -> None:
        self._prefix = f"kv_{tier}_"
        self._values: dict[str, float] = dict.fromkeys((*COUNTED, *more), 0)
        self._lock = threading.Lock()

    def add(self, what: str, amount: float = 1) -> None:
        with self._lock:
            self._values[what] += amount

    def set(self, what: str, value: float) -> None:
        with self._lock:
            self._values[what] = value

    def snapshot(self) -> dict[str, float]:
        with self._lock:
            return {self._prefix + what: value for what, value in self._values.items()}


class Tier(ABC):
    """Several threads may call everything but `close` at the same time."""

    name: str
    block_bytes: int
    capacity_bytes: int
    """What `bytes` may come to; of a shared store for all workers together."""
    pins: PrefixPins
    """What pinned prefixes keep, for others to look at."""

    @abstractmethod
    def holds(self, names: Sequence[bytes]) -> list[bool]:
        """Which blocks a get would find now. Waits for nothing. A later get may miss all the same."""

    def find(self, names: Sequence[bytes], deadline: float) -> int:
        """How many leading blocks of a chain are there. May ask, until the deadline, where `holds` only remembers."""
        held = self.holds(names)
        return held.index(False) if False in held else len(held)

    @abstractmethod
    def put(self, name: bytes, block: Block, tenant: bytes = NOBODY) -> bool:
        """Take a copy of a block; the caller may change its memory afterwards. Never waits for a device.

        It counts against the share of `tenant`, whose own blocks go when that is used up.

        False when it is refused: no room, too much to write already, or the tier is not on. Raises ValueError when
        name or block do not have their size.
        """

    @abstractmethod
    def get(self, name: bytes, into: npt.NDArray[np.uint8], deadline: float) -> bool:
        """Copy a block into `into`, uint8 [block_bytes]; `deadline` in `time.monotonic()` seconds.

        False for a miss of any kind: not held, unreadable, failed its check, or the deadline passed. Once it
        returned, nothing writes `into`. Raises ValueError when name or `into` do not have their size.
        """

    def get_many(self, names: Sequence[bytes], into: Sequence[npt.NDArray[np.uint8]], deadline: float) -> list[bool]:
        """Get several blocks, each into the array at its place. Tiers with latency have many on their way at once."""
        return [self.get(name, block, deadline) for name, block in zip(names, into, strict=True)]

    @abstractmethod
    def pin(self, names: Sequence[bytes]) -> list[bool]:
        """Keep blocks from being evicted; False for those not held. Each True asks for one `unpin` of that name."""

    @abstractmethod
    def unpin(self, names: Iterable[bytes]) -> None:
        """Give pins back. Raises KeyError for a name that is not pinned."""

    @abstractmethod
    def pin_prefix(self, key: str, names: Sequence[bytes], ttl_s: float) -> bool:
        """Keep the blocks of a prefix for `ttl_s`, those here and those still to come; the same key renews it.

        False, and nothing changes, when pinned prefixes would keep more than `pins.max_names` blocks.
        """

    @abstractmethod
    def unpin_prefix(self, key: str) -> None:
        """Let a pinned prefix go the way of all others. Nothing happens for an unknown key."""

    @property
    @abstractmethod
    def counters(self) -> dict[str, float]:
        """`kv_<tier>_<what>` for everything in `COUNTED`, and what the tier counts besides."""

    @property
    @abstractmethod
    def status(self) -> TierStatus: ...

    @abstractmethod
    def close(self, deadline: float) -> None:
        """Write out what was taken, as far as the deadline allows, and give everything back. Nobody calls any more."""

    def block_view(self, name: bytes, block: Any) -> npt.NDArray[np.uint8]:
        """The block as uint8 [block_bytes], without a copy. Raises ValueError when it or the name has another size."""
        if len(name) != NAME_BYTES:
            raise ValueError(f"a block name of {len(name)} bytes; it has {NAME_BYTES}")
        view = np.frombuffer(block, np.uint8)
        if len(view) != self.block_bytes:
            raise ValueError(f"a block of {len(view)} bytes in a tier of blocks of {self.block_bytes}")
        return view


class OwnTier(Tier):
    """One that a single worker has to itself: what is in it changes by what that worker does, and can be watched.

    What it holds is what `holds` says while it is on. One that fails for a while is not told to have lost everything.
    """

    _lock: threading.Lock
    _changes: NameChanges
    """Of `_names`; both are touched with the lock held."""

    def watch(self, on_first: Callable[[], None]) -> Held:
        """What it holds. From then on its changes are kept for `take_changes`, until `unwatch`.

        `on_first` is called in some thread, while others wait, when there comes to be something to take.
        """
        with self._lock:
            self._drop_expired()
            self._changes.watch(on_first)
            return Held(list(self._names()), self._changes.take())

    def take_changes(self) -> Changed | None:
        with self._lock:
            return self._changes.take()

    def unwatch(self) -> None:
        with self._lock:
            self._changes.unwatch()

    @abstractmethod
    def _names(self) -> Iterable[bytes]: ...

    @abstractmethod
    def _drop_expired(self) -> None:
        """Let go of what nobody used for too long. Called with the lock held."""
