"""Blocks in a folder of a shared filesystem, used by several workers at once.

    <root>/<hash of the layout>/
        layout.txt           the layout in full
        sweeper              who sweeps at the moment (a lease: token; its age by the clock of the filesystem)
        3f2/3f2a…91.kv       one block: a slot as on disk (`records.py`), under the hex of its name
        3f2/3f2a…91.x8k2     a block being written; renamed when it is whole

Nobody coordinates: equal names have equal content, so whoever renames last changes nothing, and whatever is torn,
stale or foreign fails its check, is deleted and was a miss. Every call into the filesystem runs in a few threads of
the store, as it may hang there for minutes: callers leave at their deadline. Stores go through a bounded queue.
After failures in a row the store is off and probed again later.

One worker at a time deletes what is too old or too much. Two that both think they are the one, for a moment, do harm
to nobody: they delete the same files. An object store would need another client library and is not done.
"""

import contextlib
import errno
import io
import logging
import math
import os
import queue
import secrets
import threading
import time
from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from baton.errors import ConfigurationError
from kvtransfer.tiers.base import Block, Counters, Tier, TierState, TierStatus
from kvtransfer.tiers.breaker import RETRY_S, Breaker
from kvtransfer.tiers.pins import PINNED_SHARE, PrefixPins
from kvtransfer.tiers.records import RecordFormat, layout_hash
from kvtransfer.tiers.sweeping import BLOCK_SUFFIX, FOLDER_DIGITS, SPARE_S, Sweeper, Swept
from kvtransfer.tiers.tenants import NOBODY

log = logging.getLogger(__name__)

T = TypeVar("T")

SLOW_S: Final = 0.5
"""A load that its caller gave up after this long was slow; one given up earlier was merely called too late."""
SWEEP_EVERY_S: Final = 60.0
KNOWN_S: Final = SPARE_S / 2
DEFAULT_TTL_S: Final = 7 * 24 * 3600.0
"""What was seen in the store so long ago is taken to be there still; every use renews what no sweep deletes."""
_MAX_KNOWN: Final = 1 << 16
_MAX_QUEUED_READS: Final = 256


class _Threads:
    """A few threads behind a bounded queue. They are daemons: one that hangs in the kernel must not keep a process."""

    def __init__(self, num_threads: int, max_queued: int) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(max_queued)
        self._threads = [threading.Thread(target=self._run, name="shared-kv", daemon=True) for _ in range(num_threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], T], deadline: float = 0.0) -> "Future[T] | None":
        """None when too much waits already, until the deadline at least."""
        future: Future[T] = Future()

        def job() -> None:
            if future.set_running_or_notify_cancel():
                future.set_result(work())

        try:
            self._jobs.put(job, timeout=max(0.0, deadline - time.monotonic()))
        except queue.Full:
            return None
        return future

    def close(self, deadline: float) -> None:
        """Finish what is queued, as far as the deadline allows."""
        with contextlib.suppress(queue.Full):
            for _ in self._threads:
                self._jobs.put(None, timeout=max(0.0, deadline - time.monotonic()))
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


@dataclass(frozen=True, slots=True)
class _Asked(Generic[T]):
    of_store_that_is_off: bool
    asked_at: float
    future: "Future[T | None] | None"


class SharedStore(Tier):
    """`holds` knows what this worker has written or seen lately; `find` asks the store.

    One counter besides those of every tier: `switched_off`, how often. `bytes`, `evicted`, `over_share` and `expired`
    come from this worker's own sweeps.
    """

    name = "shared"

    def __init__(
        self,
        root: Path,
        capacity_bytes: int,
        block_bytes: int,
        layout_fingerprint: str,
        *,
        ttl_s: float = DEFAULT_TTL_S,
        tenant_share: float = 1.0,
        num_threads: int = 4,
        write_buffer_bytes: int = 64 << 20,
        sweep_every_s: float = SWEEP_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`root` must be there: a folder made in place of a mount that is missing would fill the wrong disk.

        capacity_bytes: what all blocks of this layout may take, for all workers together, and tenant_share what one
        tenant may have of that; exceeded for a sweep's interval at most. layout_fingerprint: as the disk tier's. The
        folder is made for the user of the first worker alone. Raises ConfigurationError.
        """
        if capacity_bytes < block_bytes or block_bytes <= 0 or ttl_s <= 0:
            raise ConfigurationError(
                f"a shared store of {capacity_bytes} bytes has no room for blocks of {block_bytes}"
            )
        self.block_bytes, self.capacity_bytes = block_bytes, capacity_bytes
        self._format = RecordFormat(layout_hash(layout_fingerprint, block_bytes), block_bytes)
        self._root, self._folder = root, root / self._format.layout.hex()
        try:
            self._device = os.stat(root).st_dev
            self._make_folder(self._folder)
            (self._folder / "layout.txt").write_text(layout_fingerprint)
        except OSError as error:
            raise ConfigurationError(f"the shared store {root} cannot be used: {error.strerror}") from error
        self.pins = PrefixPins(int(PINNED_SHARE * capacity_bytes / self._format.slot_bytes))
        self._counters = Counters("shared", ("switched_off",))
        self._clock = clock
        self._ttl_s = ttl_s
        self._known_s = min(KNOWN_S, ttl_s / 2)
        self._lock = threading.Lock()  # of what follows; never held during I/O
        self._reads, self._writes = Breaker(clock), Breaker(clock)
        self._known: OrderedDict[bytes, float] = OrderedDict()  # name -> when it was last seen there
        self._gave_up_at = -math.inf
        self._pins: Counter[bytes] = Counter()
        self._writing: set[bytes] = set()
        self._max_writing = max(1, write_buffer_bytes // self._format.slot_bytes)
        self._max_ahead = 2 * num_threads
        self._readers = _Threads(num_threads, _MAX_QUEUED_READS)
        self._writers = _Threads(num_threads, self._max_writing)
        self._sweeper = Sweeper(self._folder, self._format, capacity_bytes, ttl_s, tenant_share)
        every_s = min(sweep_every_s, max(1.0, ttl_s / 2))
        self._sweeping = threading.Thread(target=self._sweep_for_ever, args=(every_s,), name="sweep", daemon=True)
        self._sweeping.start()

    def holds(self, names: Sequence[bytes]) -> list[bool]:
        with self._lock:
            is_on = not self._reads.is_open
            return [is_on and self._knows(name) for name in names]

    def find(self, names: Sequence[bytes], deadline: float) -> int:
        """How many leading blocks of a chain the store has, by a search that takes their presence to end once.

        0 when it does not answer before the deadline.
        """

        def ask() -> int:
            return bisect_left(names, True, key=lambda name: not self._is_there(name))

        found = self._answer(self._ask(ask, deadline), deadline) or 0
        for name in names[:found]:
            self._remember(name)
        return found

    def put(self, name: bytes, block: Block, tenant: bytes = NOBODY) -> bool:
        source = self.block_view(name, block)
        with self._lock:
            is_on = not self._reads.is_open and not self._writes.is_open
            if is_on and (self._knows(name) or name in self._writing):
                return True
            is_taken = is_on and len(self._writing) < self._max_writing
            if is_taken:
                self._writing.add(name)
        if not is_taken:
            self._counters.add("refused")
            return False
        slot = memoryview(bytearray(self._format.slot_bytes))
        slot[: self.block_bytes] = source.data
        self._writers.submit(lambda: self._store(name, slot, tenant))
        return True

    def get(self, name: bytes, into: npt.NDArray[np.uint8], deadline: float) -> bool:
        return self.get_many([name], [into], deadline)[0]

    def get_many(self, names: Sequence[bytes], into: Sequence[npt.NDArray[np.uint8]], deadline: float) -> list[bool]:
        targets = [self.block_view(name, block) for name, block in zip(names, into, strict=True)]
        found: list[bool] = []
        asked: deque[_Asked[memoryview | None]] = deque()
        for name in names:
            asked.append(self._ask(partial(self._load, name), deadline))
            if len(asked) > self._max_ahead:  # answers that wait to be fetched take memory
                found.append(self._fetch(names[len(found)], targets[len(found)], asked.popleft(), deadline))
        while asked:
            found.append(self._fetch(names[len(found)], targets[len(found)], asked.popleft(), deadline))
        return found

    def pin(self, names: Sequence[bytes]) -> list[bool]:
        """As every tier's, but only this worker's sweeps respect it for as long as it lasts: others' do for SPARE_S."""
        held = self.holds(names)
        pinned = [name for name, is_held in zip(names, held, strict=True) if is_held]
        with self._lock:
            self._pins.update(pinned)
        if pinned:
            self._readers.submit(partial(self._refresh, pinned))
        return held

    def unpin(self, names: Iterable[bytes]) -> None:
        with self._lock:
            for name in names:
                if self._pins[name] == 0:
                    raise KeyError(name)
                self._pins[name] -= 1
                if self._pins[name] == 0:
                    del self._pins[name]

    def pin_prefix(self, key: str, names: Sequence[bytes], ttl_s: float) -> bool:
        """As every tier's. This worker renews what it has pinned at each of its sweeps, so no other's deletes it."""
        with self._lock:
            now = self._clock()
            self.pins.expire(now)
            is_pinned = self.pins.pin(key, names, now + ttl_s) is not None
        if is_pinned:
            self._readers.submit(partial(self._refresh, names))
        return is_pinned

    def unpin_prefix(self, key: str) -> None:
        with self._lock:
            self.pins.unpin(key)

    @property
    def counters(self) -> dict[str, float]:
        return self._counters.snapshot()

    @property
    def status(self) -> TierStatus:
        if self._reads.is_open:
            return TierStatus(TierState.OFF, self._reads.reason)
        if self._writes.is_open:
            return TierStatus(TierState.READ_ONLY, self._writes.reason)
        return TierStatus(TierState.ON)

    def close(self, deadline: float) -> None:
        self._sweeper.stop()
        self._writers.submit(lambda: self._guard(self._writes, self._sweeper.give_up_lease))
        for threads in (self._writers, self._readers):
            threads.close(deadline)
        self._sweeping.join(max(0.0, deadline - time.monotonic()))

    def sweep(self) -> Swept | None:
        """Delete what is too old or too much; None when another worker does. Raises OSError."""
        with self._lock:
            self.pins.expire(self._clock())
            prefixes = list(self.pins)
            pinned = frozenset(name.hex() for name in (*self._pins, *prefixes))
        self._refresh(prefixes)
        swept = self._sweeper.sweep(pinned)
        if swept:
            self._counters.add("expired", swept.num_expired)
            self._counters.add("evicted", swept.num_evicted)
            self._counters.add("over_share", swept.num_over_share)
            self._counters.set("bytes", swept.num_bytes)
        return swept

    def _sweep_for_ever(self, every_s: float) -> None:
        while not self._sweeper.stopped.wait(every_s):
            self._guard(self._writes, self.sweep)

    def _path(self, name: bytes) -> Path:
        digits = name.hex()
        return self._folder / digits[:FOLDER_DIGITS] / f"{digits}{BLOCK_SUFFIX}"

    def _knows(self, name: bytes) -> bool:
        return self._clock() - self._known.get(name, -math.inf) < self._known_s

    def _remember(self, name: bytes) -> None:
        with self._lock:
            self._known[name] = self._clock()
            self._known.move_to_end(name)
            if len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)

    def _guard(self, breaker: Breaker, work: Callable[[], T]) -> T | None:
        """What `work` gives; None, counted, when the filesystem refuses."""
        started = time.monotonic()
        try:
            result = work()
        except OSError as error:
            self._counters.add("io_errors")
            self._fail(breaker, f"the shared store {self._root} fails: {error.strerror or error}")
            return None
        if time.monotonic() - started < SLOW_S:  # what comes so late was given up and is no success
            with self._lock:
                breaker.succeed()
        return result

    def _fail(self, breaker: Breaker, reason: str) -> None:
        with self._lock:
            was_open = breaker.is_open
            breaker.fail(reason)
            is_open = breaker.is_open
        if is_open and not was_open:
            self._counters.add("switched_off")
            log.warning("%s; it is left alone for %d s", reason, RETRY_S)

    def _ask(self, work: Callable[[], T], deadline: float) -> "_Asked[T]":
        """Have `work` done in a thread of the store; nothing is asked of a store that is off."""
        with self._lock:
            is_off = self._reads.is_open
        asked_at = time.monotonic()
        job = partial(self._guard, self._reads, work)
        return _Asked(is_off, asked_at, None if is_off else self._readers.submit(job, deadline))

    def _answer(self, asked: "_Asked[T]", deadline: float) -> T | None:
        """What the work gave; None, counted, when that takes beyond the deadline."""
        if asked.of_store_that_is_off:
            return None
        if asked.future is not None:
            try:
                return asked.future.result(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                asked.future.cancel()
        self._counters.add("timeouts")
        now = time.monotonic()
        with self._lock:
            # What was asked side by side and is late together is one failure.
            is_slow = now - asked.asked_at >= SLOW_S and asked.asked_at >= self._gave_up_at
            if is_slow:
                self._gave_up_at = now
        if is_slow:
            self._fail(self._reads, f"the shared store {self._root} does not answer in time")
        return None

    def _fetch(
        self, name: bytes, target: npt.NDArray[np.uint8], asked: "_Asked[memoryview | None]", deadline: float
    ) -> bool:
        slot = self._answer(asked, deadline)
        if slot is None:
            self._counters.add("misses")
            return False
        target.data[:] = self._format.block(slot)
        self._counters.add("loaded")
        self._remember(name)
        return True

    def _load(self, name: bytes) -> memoryview | None:
        """The slot of a block, checked; what fails its check is deleted. Raises OSError."""
        path = self._path(name)
        slot = memoryview(bytearray(self._format.slot_bytes + 1))  # one more, to see a file that is too long
        try:
            with open(path, "rb", buffering=0) as file:
                num_bytes = _read_all(file, slot)
                age = _age(os.fstat(file.fileno()))
        except FileNotFoundError:
            num_bytes = -1
        except OSError as error:
            if error.errno != errno.ESTALE:  # deleted on another host while it was read here
                raise
            num_bytes = -1
        if num_bytes == self._format.slot_bytes and self._format.is_block(slot[:-1], name):
            if self._is_over(name, age):
                return None  # to be swept
            if abs(age) > self._known_s:  # clocks may differ: then it is renewed, too
                self._refresh([name])
            return slot
        with self._lock:
            self._known.pop(name, None)
        if num_bytes >= 0:
            self._counters.add("checksum_failures")
            self._guard(self._writes, partial(path.unlink, missing_ok=True))
        return None

    def _refresh(self, names: Sequence[bytes]) -> None:
        """Blocks were used, by the filesystem's clock. Runs in a thread of the store; one that is only read fails."""

        def renew() -> None:
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    os.utime(self._path(name))

        self._guard(self._writes, renew)

    def _store(self, name: bytes, slot: memoryview, tenant: bytes) -> None:
        """Write a block unless it is there. Runs in a thread of the store."""

        def write() -> bool:
            if self._is_there(name):
                self._refresh([name])
                return False
            self._format.seal(slot, name, 0, tenant, int(time.time()))
            self._write(self._path(name), slot)
            return True

        is_new = self._guard(self._writes, write)
        with self._lock:
            self._writing.discard(name)
        if is_new is None:
            self._counters.add("refused")
            return
        self._counters.add("stored", is_new)
        self._remember(name)

    def _is_there(self, name: bytes) -> bool:
        """And not unused for too long. Raises OSError."""
        try:
            age = _age(os.stat(self._path(name)))
        except FileNotFoundError:
            return False
        return not self._is_over(name, age)

    def _is_over(self, name: bytes, age: float) -> bool:
        return age >= self._ttl_s and name not in self.pins and name not in self._pins

    def _write(self, path: Path, slot: memoryview) -> None:
        temporary = path.with_suffix(f".{secrets.token_hex(8)}")
        if not path.parent.is_dir():
            self._make_folder(path.parent)
        try:
            with open(temporary, "xb", buffering=0) as file:
                while slot:
                    slot = slot[file.write(slot) :]
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def _make_folder(self, folder: Path) -> None:
        if os.stat(self._root).st_dev != self._device:
            raise OSError(errno.ENODEV, "another filesystem is mounted there now")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # prompts can be told from their KV


def _age(status: os.stat_result) -> float:
    """Seconds since the block was used. Below 0 where the filesystem's clock is ahead of this host's."""
    return time.time() - status.st_mtime


def _read_all(file: io.FileIO, into: memoryview) -> int:
    """Bytes read until the end of the file or of the buffer."""
    done = 0
    while done < len(into) and (count := file.readinto(into[done:])):
        done += count
    return done
