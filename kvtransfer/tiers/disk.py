"""A tier on a local disk: blocks in slots of preallocated segment files, their index in memory.

    put ── copy ──▶ write buffers ──▶ writer threads ── pwritev ──▶ slot, then the index
    get ──▶ reader threads ── preadv ──▶ read buffer ── checksum ── copy ──▶ the caller's memory

The index is built at the start from the record pages, so the cache survives a restart, and nothing has to be written
in any order or made durable: what a crash tears is found by its checksum. Loads go through a buffer of their thread
because a read that hangs in the kernel cannot be called back: the caller leaves at its deadline with its memory safe.

    <folder>/<hash of the layout>-0/     one worker at a time (flock); the next one takes -1, and so on
        layout.txt                       the layout in full
        lock
        segment-00000000.kv ...

What fails is counted, and after failures in a row not tried again for a while (RETRY_S): failing reads switch the
tier off, failing writes make it read-only. A full disk keeps it at the size that it has.
"""

import errno
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from baton.errors import ConfigurationError
from kvtransfer.tiers.base import Block, Counters, OwnTier, TierState, TierStatus
from kvtransfer.tiers.breaker import RETRY_S, Breaker
from kvtransfer.tiers.files import Files, aligned_buffers
from kvtransfer.tiers.opening import (
    SMALL_FILES_BYTES,
    charge,
    find_segments,
    next_number,
    segment_file,
    slots_of_a_segment,
    take_seat,
)
from kvtransfer.tiers.pins import PINNED_SHARE, PrefixPins
from kvtransfer.tiers.records import RecordFormat, layout_hash
from kvtransfer.tiers.segments import Record, Segment, SegmentBook
from kvtransfer.tiers.tenants import NOBODY, Tenants

log = logging.getLogger(__name__)

MAX_WAITING_LOADS: Final = 1024
"""More than any caller has threads for: with as many the disk hangs, and nobody waits for the older ones any more."""
STALL_S: Final = 1.0
"""A load that misses a deadline this far away says something about the disk; a nearer one only about the caller."""


@dataclass(slots=True, eq=False)
class _Store:
    name: bytes
    tenant: bytes
    buffer: memoryview


@dataclass(slots=True, eq=False)
class _Load:
    """One get, between its caller and a reader thread. The guard decides who is first: the copy or the deadline."""

    name: bytes
    record: Record
    into: npt.NDArray[np.uint8]
    finished: threading.Lock = field(default_factory=threading.Lock)
    guard: threading.Lock = field(default_factory=threading.Lock)
    is_given_up: bool = False
    is_loaded: bool = False

    def __post_init__(self) -> None:
        self.finished.acquire()

    def wait(self, deadline: float) -> bool:
        """Until the load is done, or can never again touch its caller's memory: False."""
        if self.finished.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return True
        with self.guard:
            self.is_given_up = not self.is_loaded
        return self.is_loaded


class DiskTier(OwnTier):
    name = "disk"

    def __init__(
        self,
        folder: Path,
        capacity_bytes: int,
        block_bytes: int,
        layout_fingerprint: str,
        *,
        num_readers: int = 4,
        num_writers: int = 4,
        write_buffer_bytes: int = 32 << 20,
        segment_bytes: int | None = None,
        ttl_s: float = math.inf,
        tenant_share: float = 1.0,
        open_files: Callable[[Path], Files] = Files,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the tier and index what it holds: one read of 4 KiB a block.

        capacity_bytes: what its files may take on the disk. layout_fingerprint: everything that two blocks of the same
        name must have in common to be interchangeable: model and weights, dtype, layout, page size, TP rank and size.
        ttl_s: blocks unused for so long are misses; at the start a block was last used when it was stored, as nobody
        wrote down more. tenant_share: of its slots, what one tenant may have.
        Raises ConfigurationError when the folder cannot be used at all, or the capacity is below one segment.
        """
        self.block_bytes = block_bytes
        self._format = RecordFormat(layout_hash(layout_fingerprint, block_bytes), block_bytes)
        self.capacity_bytes = self._usable_bytes = capacity_bytes - SMALL_FILES_BYTES
        self._num_slots = slots_of_a_segment(self._usable_bytes, self._format.slot_bytes, segment_bytes)
        num_segments = self._usable_bytes // charge(self._num_slots * self._format.slot_bytes)
        self.pins = PrefixPins(int(PINNED_SHARE * num_segments * self._num_slots))
        self._clock, self._wall_clock = clock, wall_clock
        self._ttl_s = ttl_s
        self._counters = Counters("disk", ("duplicates", "load_seconds", "store_seconds"))
        self._lock = threading.Lock()  # of everything below; held for microseconds, never during I/O
        self._tenants = Tenants(num_segments * self._num_slots, tenant_share)
        self._book = SegmentBook(self._tenants)
        self._changes = self._book.changes
        self._pinned: dict[bytes, list[Segment]] = {}
        self._pending: set[bytes] = set()
        self._reads, self._writes = Breaker(clock), Breaker(clock)
        self._off_reason = ""
        self._end_at = float("inf")
        self._next_file = 0
        self._grow_from = 0.0
        self._making_room = threading.Lock()  # one writer makes room, the others wait for it
        self._files = take_seat(folder, self._format.layout.hex(), layout_fingerprint, open_files)
        try:
            self._open_segments()
        except OSError as error:
            self._files.close()
            raise ConfigurationError(f"{self._files.folder} cannot be read: {error.strerror}") from error
        slot_bytes = self._format.slot_bytes
        num_buffers = max(num_writers + 1, write_buffer_bytes // slot_bytes)
        self._idle_buffers = aligned_buffers(num_buffers, slot_bytes)
        self._stores: queue.SimpleQueue[_Store | None] = queue.SimpleQueue()  # bounded by the buffers
        self._loads: queue.SimpleQueue[_Load | None] = queue.SimpleQueue()  # bounded by MAX_WAITING_LOADS
        self._writers = [threading.Thread(target=self._write_all, daemon=True) for _ in range(num_writers)]
        self._readers = [
            threading.Thread(target=self._read_all, args=(buffer,), daemon=True)
            for buffer in aligned_buffers(num_readers, slot_bytes)
        ]
        for thread in (*self._writers, *self._readers):
            thread.start()
        log.info(
            "disk tier %s: %d blocks in %d segments, %.2f of %.2f GiB",
            self._files.folder,
            len(self._book.records),
            len(self._book.segments),
            self._book.num_bytes / 2**30,
            capacity_bytes / 2**30,
        )

    # What callers see

    def holds(self, names: Sequence[bytes]) -> list[bool]:
        if self._is_off:
            return [False] * len(names)
        with self._lock:
            self._drop_expired()
            return [name in self._book.records for name in names]

    def put(self, name: bytes, block: Block, tenant: bytes = NOBODY) -> bool:
        view = self.block_view(name, block)
        with self._lock:
            self._drop_expired()
            record = self._book.records.get(name)
            if record is not None:
                self._book.use(name, self._wall_clock())
            if record is not None or name in self._pending:
                self._counters.add("duplicates")
                return True
            if not self._idle_buffers or self.status.state is not TierState.ON:
                self._counters.add("refused")
                return False
            buffer = self._idle_buffers.pop()
            self._pending.add(name)
        np.copyto(np.frombuffer(self._format.block(buffer), np.uint8), view)  # numpy lets other threads run meanwhile
        self._stores.put(_Store(name, tenant, buffer))
        return True

    def get(self, name: bytes, into: npt.NDArray[np.uint8], deadline: float) -> bool:
        return self.get_many([name], [into], deadline)[0]

    def get_many(self, names: Sequence[bytes], into: Sequence[npt.NDArray[np.uint8]], deadline: float) -> list[bool]:
        views = [self.block_view(name, block) for name, block in zip(names, into, strict=True)]
        started = time.monotonic()
        is_served = not self._is_off and deadline > started and self._loads.qsize() < MAX_WAITING_LOADS
        loads = [self._begin(*wanted) if is_served else None for wanted in zip(names, views, strict=True)]
        # Beginning at the end, which is waking up once for all of them and not once for each.
        in_time = [load.wait(deadline) for load in reversed(loads) if load is not None]
        if not all(in_time):
            self._counters.add("timeouts", in_time.count(False))
            if not any(in_time) and deadline - started >= STALL_S:
                self._fail(self._reads, "loads do not end before their deadline")
        are_loaded = [load is not None and load.is_loaded for load in loads]
        self._counters.add("loaded", are_loaded.count(True))
        self._counters.add("misses", are_loaded.count(False))
        return are_loaded

    def _begin(self, name: bytes, into: npt.NDArray[np.uint8]) -> _Load | None:
        with self._lock:
            self._drop_expired()
            record = self._book.records.get(name)
            if record is None:
                return None
            self._book.use(name, self._wall_clock())
            record.segment.num_pins += 1
        load = _Load(name, record, into)
        self._loads.put(load)
        return load

    def pin(self, names: Sequence[bytes]) -> list[bool]:
        with self._lock:
            records = [self._book.records.get(name) for name in names]
            for name, record in zip(names, records, strict=True):
                if record is not None:
                    record.segment.num_pins += 1
                    self._pinned.setdefault(name, []).append(record.segment)
        return [record is not None for record in records]

    def unpin(self, names: Iterable[bytes]) -> None:
        for name in names:
            with self._lock:
                segments = self._pinned[name]
                segment = segments.pop()
                if not segments:
                    del self._pinned[name]
            self._release(segment)

    def pin_prefix(self, key: str, names: Sequence[bytes], ttl_s: float) -> bool:
        with self._lock:
            now = self._clock()
            self.pins.expire(now)
            return self.pins.pin(key, names, now + ttl_s) is not None

    def unpin_prefix(self, key: str) -> None:
        with self._lock:
            self.pins.unpin(key)

    @property
    def counters(self) -> dict[str, float]:
        return self._counters.snapshot()

    @property
    def status(self) -> TierStatus:
        if self._off_reason:
            return TierStatus(TierState.OFF, self._off_reason)
        if self._reads.is_open:
            return TierStatus(TierState.OFF, self._reads.reason)
        if self._files.is_read_only:
            return TierStatus(TierState.READ_ONLY, "the filesystem lets nothing be written")
        if self._writes.is_open:
            return TierStatus(TierState.READ_ONLY, self._writes.reason)
        return TierStatus(TierState.ON)

    def close(self, deadline: float) -> None:
        self._end_at = deadline
        for threads, jobs in ((self._writers, self._stores), (self._readers, self._loads)):
            for _ in threads:
                jobs.put(None)
        for thread in (*self._writers, *self._readers):
            thread.join(max(0.0, deadline - time.monotonic()))
        self._off_reason = "closed"
        if any(thread.is_alive() for thread in (*self._writers, *self._readers)):
            # Closing a file that a thread still writes would let the write land in the next file of that number.
            log.warning("disk tier %s: an operation hangs; its files stay open", self._files.folder)
            return
        for segment in self._book.segments:
            try:
                self._files.fdatasync(segment.fd)
            except OSError as error:
                self._io_error("made durable", error)
            self._files.close_file(segment.fd)
        self._files.close()

    # Storing: everything below runs in writer threads

    def _write_all(self) -> None:
        while (store := self._stores.get()) is not None:
            is_stored = time.monotonic() < self._end_at and self._write(store)
            self._counters.add("stored" if is_stored else "refused")
            with self._lock:
                self._pending.discard(store.name)
                self._idle_buffers.append(store.buffer)

    def _write(self, store: _Store) -> bool:
        place = self._free_slot()
        if place is None:
            return False
        segment, slot = place
        with self._lock:
            sequence = self._book.next_time()
        self._format.seal(store.buffer, store.name, sequence, store.tenant, int(self._wall_clock()))
        started = time.monotonic()
        try:
            written = self._files.pwritev(segment.fd, [store.buffer], slot * self._format.slot_bytes)
            if written != len(store.buffer):
                raise OSError(errno.EIO, f"{written} of {len(store.buffer)} bytes were written")
        except OSError as error:
            self._io_error("written", error)
            # Nothing but EIO may differ for the next slot.
            self._fail(self._writes, f"writing fails: {error.strerror}", is_final=error.errno != errno.EIO)
            self._release(segment)
            return False
        self._counters.add("store_seconds", time.monotonic() - started)
        with self._lock:
            self._writes.succeed()
            self._book.commit(store.name, segment, slot, sequence, self._wall_clock(), store.tenant)
            num_over = self._book.drop_excess(store.tenant, self.pins, self._pinned)
        self._counters.add("over_share", num_over)
        self._release(segment)
        return True

    def _free_slot(self) -> tuple[Segment, int] | None:
        """A slot to write, its segment pinned; None when no room can be made."""
        with self._lock:
            place = self._book.take()
        if place is None:
            with self._making_room:
                with self._lock:
                    place = self._book.take()
                if place is None and self._make_room():
                    with self._lock:
                        place = self._book.take()
        return place

    def _make_room(self) -> bool:
        self._forget_deleted()
        if self._off_reason:
            return False
        if self._clock() >= self._grow_from and self._grow():
            return True
        with self._lock:
            self.pins.expire(self._clock())
            num_evicted = self._book.recycle(self._wall_clock(), self.pins)
        self._counters.add("evicted", num_evicted or 0)
        return num_evicted is not None

    def _grow(self) -> bool:
        """Another segment, its room taken from the filesystem before anything is written into it."""
        num_bytes = self._num_slots * self._format.slot_bytes
        if self._book.num_bytes + charge(num_bytes) > self._usable_bytes:
            return False
        file = segment_file(self._next_file)
        self._next_file += 1
        fd = -1
        try:
            fd = self._files.open(file, create=True)
            self._files.fallocate(fd, num_bytes)
            allocated = self._files.fstat(fd).st_blocks * 512
        except OSError as error:
            self._io_error("made larger", error)
            self._grow_from = self._clock() + RETRY_S
            if not self._book.segments:
                self._fail(self._writes, f"no room can be taken: {error.strerror}", is_final=True)
            if fd >= 0:
                self._files.close_file(fd)
                self._unlink(file)
            return False
        with self._lock:
            self._book.add(Segment(file, fd, self._num_slots, charge(max(num_bytes, allocated))))
        self._counters.add("bytes", charge(max(num_bytes, allocated)))
        return True

    def _forget_deleted(self) -> None:
        """Give up files that somebody removed: they take room on the disk as long as they are open."""
        try:
            if self._files.is_deleted():
                self._off_reason = "its folder was deleted"
                log.warning("disk tier %s is off: %s", self._files.folder, self._off_reason)
            gone = [
                segment
                for segment in self._book.segments
                if self._off_reason or self._files.fstat(segment.fd).st_nlink == 0
            ]
        except OSError as error:
            self._io_error("looked at", error)
            return
        for segment in gone:
            self._remove(segment)

    # Loading: everything below runs in reader threads

    def _read_all(self, buffer: memoryview) -> None:
        while (load := self._loads.get()) is not None:
            if not load.is_given_up:
                self._read(load, buffer)
            self._release(load.record.segment)
            load.finished.release()

    def _read(self, load: _Load, buffer: memoryview) -> None:
        record, started = load.record, time.monotonic()
        try:
            num_read = self._files.preadv(record.segment.fd, [buffer], record.slot * self._format.slot_bytes)
        except OSError as error:
            self._io_error("read", error)
            self._fail(self._reads, f"reading fails: {error.strerror}")
            with self._lock:
                self._book.drop(load.name, record)
            return
        self._counters.add("load_seconds", time.monotonic() - started)
        if num_read != len(buffer) or not self._format.is_block(buffer, load.name):
            with self._lock:
                is_news = self._book.drop(load.name, record)
            if is_news:
                self._counters.add("checksum_failures")
                log.warning(
                    "disk tier %s: slot %d of %s is corrupt", self._files.folder, record.slot, record.segment.file
                )
            return
        with load.guard:
            if not load.is_given_up:
                np.copyto(load.into, np.frombuffer(self._format.block(buffer), np.uint8))
                load.is_loaded = True
        with self._lock:
            self._reads.succeed()

    # Opening

    def _open_segments(self) -> None:
        self._next_file = next_number(self._files)
        found = find_segments(self._files, self._format, self._io_error)
        self._usable_bytes -= found.unused_bytes
        for segment, claims in found.segments:
            self._book.add(segment, claims)
        self._counters.add("bytes", self._book.num_bytes)
        self._book.sort()
        self._drop_expired()
        for tenant in self._tenants.tenants():
            self._counters.add("over_share", self._book.drop_excess(tenant))
        while self._book.num_bytes > self._usable_bytes and not self._files.is_read_only:
            least_useful = self._book.least_useful()
            if least_useful is None or not self._unlink(least_useful.file):
                break
            self._remove(least_useful)

    # For all of them

    @property
    def _is_off(self) -> bool:
        return bool(self._off_reason) or self._reads.is_open

    def _names(self) -> Iterable[bytes]:
        return self._book.records

    def _drop_expired(self) -> None:
        now = self._wall_clock()
        num_expired = self._book.drop_expired(now - self._ttl_s, now, self.pins, self._pinned)
        if num_expired:
            self._counters.add("expired", num_expired)

    def _release(self, segment: Segment) -> None:
        with self._lock:
            segment.num_pins -= 1
            is_last = segment.is_removed and segment.num_pins == 0
        if is_last:
            self._files.close_file(segment.fd)

    def _remove(self, segment: Segment) -> None:
        with self._lock:
            num_lost = self._book.remove(segment)
            segment.num_pins += 1
        self._counters.add("evicted", num_lost)
        self._counters.add("bytes", -segment.num_bytes)
        self._release(segment)

    def _unlink(self, file: str) -> bool:
        try:
            self._files.unlink(file)
        except OSError as error:
            self._io_error("removed", error)
            return False
        return True

    def _io_error(self, what: str, error: OSError) -> None:
        self._counters.add("io_errors")
        log.warning("disk tier %s could not be %s: %s", self._files.folder, what, error)

    def _fail(self, breaker: Breaker, reason: str, is_final: bool = False) -> None:
        with self._lock:
            was_open = breaker.is_open
            breaker.fail(reason, is_final)
            is_open = breaker.is_open
        if is_open and not was_open:
            status = self.status
            log.warning("disk tier %s is %s for %g s: %s", self._files.folder, status.state.value, RETRY_S, reason)
