"""The shared store: several workers in one folder, and a filesystem that tears, lies, hangs, fills up or goes away."""

import contextlib
import errno
import multiprocessing
import os
import shutil
import threading
import time
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

from baton.errors import ConfigurationError
from kvtransfer.tiers import shared, sweeping
from kvtransfer.tiers.base import COUNTED, TierState
from kvtransfer.tiers.breaker import FAILURES_IN_A_ROW, RETRY_S
from kvtransfer.tiers.shared import KNOWN_S, SharedStore
from kvtransfer.tiers.sweeping import LEASE_S, SPARE_S

BLOCK = 5000


def name(number: int) -> bytes:
    return blake2b(number.to_bytes(8, "little"), digest_size=16).digest()


def row(first: int, count: int) -> list[bytes]:
    return [name(first + index) for index in range(count)]


def content(of: bytes) -> np.ndarray:
    return np.random.default_rng(int.from_bytes(of, "little")).integers(0, 256, BLOCK, np.uint8)


def soon() -> float:
    return time.monotonic() + 30


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def opened(tmp_path, clock):
    """Opens stores in one folder and closes them."""
    stores = []

    def open_store(layout: str = "layout", capacity: int = 1 << 30, **options) -> SharedStore:
        stores.append(
            SharedStore(tmp_path, capacity, BLOCK, layout, **{"sweep_every_s": 3600, "clock": clock, **options})
        )
        return stores[-1]

    yield open_store
    for store in stores:
        store.close(time.monotonic() + 5)


def wait_for(condition) -> None:
    deadline = soon()
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def counter(store: SharedStore, what: str) -> float:
    return store.counters[f"kv_shared_{what}"]


def put(store: SharedStore, *names: bytes) -> None:
    """Put and wait until it is written."""
    before = counter(store, "stored") + counter(store, "io_errors")
    for entry in names:
        assert store.put(entry, content(entry))
    wait_for(lambda: counter(store, "stored") + counter(store, "io_errors") >= before + len(names))


def has(store: SharedStore, entry: bytes) -> bool:
    into = np.zeros(BLOCK, np.uint8)
    found = store.get(entry, into, soon())
    assert not found or (into == content(entry)).all()
    return found


def file_of(root: Path, entry: bytes) -> Path:
    (path,) = root.glob(f"*/*/{entry.hex()}.kv")
    return path


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_block_that_one_worker_stored_is_found_by_another(opened):
    one, two = opened(), opened()
    block = content(name(1))
    assert one.put(name(1), block)
    block[:] = 0
    wait_for(lambda: counter(one, "stored") == 1)
    assert one.holds([name(1), name(2)]) == [True, False]
    assert two.holds([name(1)]) == [False], "it has not looked yet"
    assert has(two, name(1))
    assert two.holds([name(1)]) == [True]
    assert not has(two, name(2))
    assert (counter(two, "loaded"), counter(two, "misses")) == (1, 1)
    assert {f"kv_shared_{what}" for what in COUNTED} <= set(one.counters)
    assert one.status.state is TierState.ON


def test_blocks_outlive_the_worker(opened):
    first = opened()
    assert first.put(name(1), content(name(1)))
    first.close(soon())
    assert has(opened(), name(1)), "what was taken is written before a close returns"


def test_layouts_never_see_each_others_blocks(opened, tmp_path):
    one, two = opened("float32"), opened("bfloat16")
    put(one, name(1))
    assert not has(two, name(1))
    assert has(one, name(1))
    texts = {path.read_text() for path in tmp_path.glob("*/layout.txt")}
    assert texts == {"float32", "bfloat16"}


def test_a_block_that_is_there_is_not_written_again(opened, tmp_path):
    one, two = opened(), opened()
    put(one, name(1))
    before = file_of(tmp_path, name(1)).stat().st_ino
    age(file_of(tmp_path, name(1)), 5000)
    two.put(name(1), content(name(1)))
    wait_for(lambda: two.holds([name(1)]) == [True])
    assert counter(two, "stored") == 0
    assert file_of(tmp_path, name(1)).stat().st_ino == before
    assert time.time() - file_of(tmp_path, name(1)).stat().st_mtime < 100, "it counts as used"


@pytest.mark.parametrize("num_held", [0, 1, 7, 19, 20])
def test_a_chain_is_found_as_far_as_it_goes(opened, num_held):
    one, two = opened(), opened()
    put(one, *row(0, num_held))
    assert two.find(row(0, 20), soon()) == num_held
    assert two.holds(row(0, 20)) == [True] * num_held + [False] * (20 - num_held)


def test_many_blocks_are_loaded_at_once_and_each_miss_is_its_own(opened):
    one, two = opened(), opened(num_threads=2)
    put(one, *row(0, 5), *row(6, 14))
    into = [np.zeros(BLOCK, np.uint8) for _ in range(20)]
    assert two.get_many(row(0, 20), into, soon()) == [True] * 5 + [False] + [True] * 14
    for number in {*range(20)} - {5}:
        assert (into[number] == content(name(number))).all()
    assert two.get_many([], [], soon()) == []


def test_blocks_that_are_late_together_are_one_failure(opened, trouble, monkeypatch):
    monkeypatch.setattr(shared, "SLOW_S", 0.02)
    store = opened()
    put(store, *row(0, 12))
    trouble.hangs = True
    into = [np.zeros(BLOCK, np.uint8) for _ in range(12)]
    assert store.get_many(row(0, 12), into, time.monotonic() + 0.05) == [False] * 12
    assert counter(store, "timeouts") == counter(store, "misses") == 12
    assert store.status.state is TierState.ON
    trouble.released.set()


def damage(kind: str, path: Path, other: Path) -> None:
    whole = path.read_bytes()
    if kind == "a flipped bit":
        path.write_bytes(whole[:99] + bytes([whole[99] ^ 1]) + whole[100:])
    elif kind == "cut off":
        path.write_bytes(whole[:-1])
    elif kind == "too long":
        path.write_bytes(whole + b"\0")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "zeros":
        path.write_bytes(bytes(len(whole)))
    elif kind == "half old":
        path.write_bytes(whole[:2500] + other.read_bytes()[2500:])
    else:
        path.write_bytes(other.read_bytes())


@pytest.mark.parametrize(
    "kind", ["a flipped bit", "cut off", "too long", "empty", "zeros", "half old", "another block's file"]
)
def test_a_damaged_file_is_a_miss_goes_and_can_be_stored_again(opened, tmp_path, kind):
    store = opened()
    put(store, name(1), name(2))
    damage(kind, file_of(tmp_path, name(1)), file_of(tmp_path, name(2)))
    assert not has(store, name(1))
    assert counter(store, "checksum_failures") == counter(store, "misses") == 1
    assert not list(tmp_path.glob(f"*/*/{name(1).hex()}.kv"))
    assert store.status.state is TierState.ON, "the store is not to blame for one file"
    put(store, name(1))
    assert has(store, name(1))
    assert has(store, name(2))


def hammer(root: str, seed: int, start) -> None:
    chance = np.random.default_rng(seed)
    store = SharedStore(Path(root), 1 << 30, BLOCK, "layout")
    start.wait(30)
    wrong = 0
    for number in chance.integers(0, 12, 300):
        entry, into = name(int(number)), np.zeros(BLOCK, np.uint8)
        store._known.clear()
        if chance.random() < 0.3:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(store._path(entry))
        store.put(entry, content(entry))
        if store.get(entry, into, time.monotonic() + 30):
            wrong += not (into == content(entry)).all()
    store.close(time.monotonic() + 30)
    failures = store.counters["kv_shared_checksum_failures"] + store.counters["kv_shared_io_errors"]
    os._exit(0 if not wrong and not failures and store.counters["kv_shared_loaded"] > 50 else 1)


def test_processes_that_write_the_same_names_at_once_never_see_a_wrong_or_torn_block(tmp_path):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    workers = [context.Process(target=hammer, args=(str(tmp_path), seed, start)) for seed in range(2)]
    for worker in workers:
        worker.start()
    start.wait(30)
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert not [path for path in tmp_path.glob("*/*/*") if path.suffix != ".kv"], "a temporary file was left behind"


class Trouble:
    """Makes the files of the store fail, or hang until `release`."""

    def __init__(self, monkeypatch):
        self.released = threading.Event()
        self.error = 0
        self.hangs = False
        self.writes_only = False
        self.hits = 0
        monkeypatch.setattr(shared, "open", self._open, raising=False)

    def _open(self, path, mode, buffering=-1):
        if not (self.writes_only and mode == "rb"):
            if self.error:
                self.hits += 1
                raise OSError(self.error, os.strerror(self.error))
            if self.hangs:
                self.hits += 1
                self.released.wait(30)
        return open(path, mode, buffering=buffering)


@pytest.fixture
def trouble(monkeypatch):
    trouble = Trouble(monkeypatch)
    yield trouble
    trouble.released.set()


def test_a_store_that_fails_is_left_alone_and_tried_again_later(opened, trouble, clock):
    store = opened()
    put(store, name(1))
    trouble.error = errno.EIO
    for _ in range(FAILURES_IN_A_ROW):
        assert not has(store, name(1))
    assert trouble.hits == FAILURES_IN_A_ROW
    assert store.status.state is TierState.OFF
    assert "fails" in store.status.reason
    assert not has(store, name(1))
    assert not store.put(name(2), content(name(2)))
    assert store.holds([name(1)]) == [False]
    assert store.find([name(1)], soon()) == 0
    assert trouble.hits == FAILURES_IN_A_ROW, "nobody asks a store that is off"
    assert (counter(store, "switched_off"), counter(store, "io_errors")) == (1, FAILURES_IN_A_ROW)
    clock.now += RETRY_S + 1
    assert not has(store, name(1))
    assert store.status.state is TierState.OFF, "one more failure is enough"
    trouble.error = 0
    clock.now += RETRY_S + 1
    assert has(store, name(1))
    assert store.status.state is TierState.ON


def test_a_store_that_hangs_costs_nobody_more_than_the_deadline(opened, trouble, monkeypatch, clock):
    monkeypatch.setattr(shared, "SLOW_S", 0.02)
    store = opened()
    put(store, name(1))
    trouble.hangs = True
    into = np.zeros(BLOCK, np.uint8)
    started = time.monotonic()
    for _ in range(FAILURES_IN_A_ROW):
        assert not store.get(name(1), into, time.monotonic() + 0.03)
    assert time.monotonic() - started < 5
    assert counter(store, "timeouts") == FAILURES_IN_A_ROW
    assert store.status.state is TierState.OFF
    assert "in time" in store.status.reason
    trouble.hangs = False
    trouble.released.set()
    clock.now += RETRY_S + 1
    assert has(store, name(1))
    assert not into.any(), "a load that comes late must not write into memory given back"


def test_a_store_that_answers_but_always_too_late_is_left_alone(opened, monkeypatch):
    monkeypatch.setattr(shared, "SLOW_S", 0.02)
    store = opened(num_threads=1)
    put(store, name(1))
    late = threading.Semaphore(0)
    load = store._load

    def late_load(entry):
        late.acquire(timeout=30)
        return load(entry)

    monkeypatch.setattr(store, "_load", late_load)
    for _ in range(FAILURES_IN_A_ROW):
        assert not store.get(name(1), np.zeros(BLOCK, np.uint8), time.monotonic() + 0.03)
        late.release()
        assert store._readers.submit(lambda: True).result(30), "the late answer has come"
    assert store.status.state is TierState.OFF


def test_a_store_that_may_only_be_read_is_read(opened, tmp_path, monkeypatch):
    store = opened()
    put(store, name(1), name(2))
    age(file_of(tmp_path, name(1)), 1000)
    damage("cut off", file_of(tmp_path, name(2)), file_of(tmp_path, name(1)))

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    for _ in range(FAILURES_IN_A_ROW):
        assert has(store, name(1))
        assert not has(store, name(2))
    assert store.status.state is TierState.READ_ONLY


def test_nobody_but_its_user_can_look_into_the_folder(opened, tmp_path):
    put(opened(), name(1))
    assert all(folder.stat().st_mode & 0o077 == 0 for folder in tmp_path.iterdir())


def test_a_deadline_that_is_too_near_is_no_failure_of_the_store(opened, trouble):
    store = opened()
    put(store, name(1))
    trouble.hangs = True
    for _ in range(FAILURES_IN_A_ROW + 1):
        assert not store.get(name(1), np.zeros(BLOCK, np.uint8), time.monotonic() + 0.001)
    assert store.status.state is TierState.ON


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_store_is_still_read(opened, trouble, tmp_path, clock, error):
    store = opened()
    put(store, name(1))
    trouble.error, trouble.writes_only = error, True
    put(store, *row(2, FAILURES_IN_A_ROW))
    assert store.status.state is TierState.READ_ONLY
    assert not store.put(name(9), content(name(9)))
    assert has(store, name(1))
    assert store.holds(row(2, 1)) == [False]
    assert not [path for path in tmp_path.glob("*/*/*") if path.suffix != ".kv"]
    trouble.error = 0
    clock.now += RETRY_S + 1
    put(store, name(9))
    assert has(store, name(9))
    assert store.status.state is TierState.ON


def test_writes_that_hang_fill_a_bounded_queue_and_no_more(opened, trouble):
    store = opened(write_buffer_bytes=4 * 16384)
    trouble.hangs, trouble.writes_only = True, True
    taken = [store.put(entry, content(entry)) for entry in row(0, 10)]
    assert sum(taken) < 10
    assert counter(store, "refused") == 10 - sum(taken) > 0
    trouble.hangs = False
    trouble.released.set()
    wait_for(lambda: counter(store, "stored") == sum(taken))
    put(store, name(99))


def test_a_store_whose_folder_is_gone_misses_and_comes_back_with_it(opened, tmp_path, clock):
    root = tmp_path / "mount"
    root.mkdir()
    store = SharedStore(root, 1 << 30, BLOCK, "layout", sweep_every_s=3600, clock=clock)
    put(store, name(1))
    root.rename(tmp_path / "away")
    assert not has(store, name(1))
    put(store, *row(2, FAILURES_IN_A_ROW))
    assert not root.exists(), "a missing mount must not be replaced by a folder on another disk"
    assert store.status.state is TierState.READ_ONLY
    (tmp_path / "away").rename(root)
    clock.now += RETRY_S + 1
    assert has(store, name(1))
    put(store, name(7))
    shutil.rmtree(root)
    root.mkdir()
    clock.now += KNOWN_S
    put(store, name(7))
    assert has(store, name(7)), "a store that was emptied is filled again"
    store.close(soon())


def test_only_one_worker_sweeps_until_it_goes_or_dies(opened, tmp_path):
    one, two = opened(), opened()
    put(one, name(1))
    assert one.sweep() is not None
    assert two.sweep() is None
    assert one.sweep() is not None
    (lease,) = tmp_path.glob("*/sweeper")
    age(lease, LEASE_S + 1)
    assert two.sweep() is not None
    assert one.sweep() is None
    two.close(soon())
    assert one.sweep() is not None, "who leaves gives the lease up"
    assert not list(tmp_path.glob("*/sweeper.*"))


def test_what_is_unused_for_too_long_is_deleted_and_what_is_used_stays(opened, tmp_path):
    store = opened(ttl_s=1000)
    put(store, *row(0, 3))
    for entry in row(0, 3):
        age(file_of(tmp_path, entry), 999)
    assert has(store, name(0)), "a use that renews it"
    assert store.pin([name(1)]) == [True]
    for entry in row(0, 2):
        wait_for(lambda entry=entry: time.time() - file_of(tmp_path, entry).stat().st_mtime < 100)
    age(file_of(tmp_path, name(2)), 1001)
    swept = store.sweep()
    assert swept is not None
    assert (swept.num_expired, swept.num_evicted) == (1, 0)
    assert [has(store, entry) for entry in row(0, 3)] == [True, True, False]
    assert counter(store, "expired") == 1


def test_the_longest_unused_go_when_the_store_is_too_large(opened, tmp_path):
    slot = 12288
    store = opened(capacity=10 * slot)
    put(store, *row(0, 15))
    for number in range(15):
        age(file_of(tmp_path, name(number)), 60 * (20 + number))
    store.pin([name(14)])
    wait_for(lambda: time.time() - file_of(tmp_path, name(14)).stat().st_mtime < 100)
    swept = store.sweep()
    assert swept is not None
    assert swept.num_bytes <= 10 * slot
    assert counter(store, "bytes") == swept.num_bytes
    held = [has(store, name(number)) for number in range(15)]
    assert held == [True] * 8 + [False] * 6 + [True]
    assert counter(store, "evicted") == 6
    again = store.sweep()
    assert again is not None
    assert again.num_evicted == 0


def test_a_pin_holds_in_this_workers_sweeps_for_as_long_as_it_lasts(opened, tmp_path):
    store = opened(ttl_s=1000)
    put(store, *row(0, 2))
    age(file_of(tmp_path, name(0)), 5000)
    store.pin(row(0, 1))
    wait_for(lambda: time.time() - file_of(tmp_path, name(0)).stat().st_mtime < 100)
    for entry in row(0, 2):
        age(file_of(tmp_path, entry), 5000)
    store.sweep()
    assert [has(store, entry) for entry in row(0, 2)] == [True, False]


def test_a_block_that_nobody_used_for_too_long_is_a_miss_before_it_is_swept(opened, tmp_path, clock):
    store, other = opened(ttl_s=100), opened(ttl_s=100)
    put(store, *row(0, 4))
    assert other.pin_prefix("system", row(3, 1), ttl_s=1000)
    for number, seconds in enumerate((99, 40, 101, 101)):
        age(file_of(tmp_path, name(number)), seconds)
    assert other.find(row(0, 3), soon()) == 2
    assert [has(other, entry) for entry in row(0, 4)] == [True, True, False, True]
    put(store, name(5))
    clock.now += KNOWN_S
    put(store, name(2))
    assert has(other, name(2)), "stored anew"
    age(file_of(tmp_path, name(1)), 101)
    swept = store.sweep()
    assert (swept.num_expired, counter(store, "expired")) == (1, 1)
    assert not list(tmp_path.glob(f"*/*/{name(1).hex()}.kv"))


def test_a_pinned_prefix_outlives_every_workers_sweeps_until_its_time_is_over(opened, tmp_path, clock):
    one, two = opened(capacity=100 * BLOCK, ttl_s=1000), opened(capacity=100 * BLOCK, ttl_s=1000)
    put(one, *row(0, 2))
    assert not one.pin_prefix("too much", row(10, one.pins.max_names + 1), ttl_s=100)
    age(file_of(tmp_path, name(0)), 900)
    assert one.pin_prefix("system", row(0, 1), ttl_s=100)
    wait_for(lambda: file_of(tmp_path, name(0)).stat().st_mtime > time.time() - 100)  # a thread renews it
    for late in (90, 110):
        clock.now = late
        for path in tmp_path.glob("*/*/*.kv"):
            age(path, 900)
        assert one.sweep() is not None
        one._sweeper.give_up_lease()
        for path in tmp_path.glob("*/*/*.kv"):
            age(path, time.time() - path.stat().st_mtime + 200)  # 200 s pass
        assert two.sweep() is not None
        two._sweeper.give_up_lease()
        assert [bool(list(tmp_path.glob(f"*/*/{entry.hex()}.kv"))) for entry in row(0, 2)] == [late == 90, False]


def test_a_tenant_has_its_share_after_every_workers_sweep(opened, tmp_path):
    slot = opened()._format.slot_bytes
    one, two = opened(capacity=20 * slot, tenant_share=0.25), opened(capacity=20 * slot, tenant_share=0.25)
    put(one, *row(0, 3))
    for number, store in enumerate((one, two)):
        for entry in row(100 * (number + 1), 4):
            assert store.put(entry, content(entry), b"loud".ljust(16))
        assert store.put(name(300 + number), content(name(300 + number)), b"quiet".ljust(16))
        wait_for(lambda store=store: not store._writing)
    minutes = {entry: 60 * index for index, entry in enumerate([*row(0, 3), *row(100, 4), *row(200, 4), *row(300, 2)])}
    for entry, minute in minutes.items():
        age(file_of(tmp_path, entry), 4000 - minute)
    swept = one.sweep()
    assert (swept.num_over_share, swept.num_evicted, swept.num_expired) == (4, 0, 0)
    assert counter(one, "over_share") == 4
    kept = {entry for entry in minutes if list(tmp_path.glob(f"*/*/{entry.hex()}.kv"))}
    assert kept == {*row(0, 3), *row(200, 4), *row(300, 2)}


def test_no_sweep_deletes_what_was_used_just_now(opened, tmp_path):
    store = opened(capacity=BLOCK)
    put(store, *row(0, 4))
    for entry in row(0, 2):
        age(file_of(tmp_path, entry), SPARE_S + 61)
    swept = store.sweep()
    assert swept is not None
    assert swept.num_evicted == 2
    assert [has(store, entry) for entry in row(0, 4)] == [False, False, True, True]


def test_a_sweep_removes_what_interrupted_writes_left_and_nothing_of_strangers(opened, tmp_path):
    store = opened()
    put(store, name(1))
    folder = file_of(tmp_path, name(1)).parent
    torn, fresh, foreign = folder / f"{name(2).hex()}.abc", folder / f"{name(3).hex()}.def", folder.parent / "notes.txt"
    for path in (torn, fresh, foreign):
        path.write_bytes(b"?")
    age(torn, LEASE_S + 1)
    age(foreign, LEASE_S + 1)
    store.sweep()
    assert (torn.exists(), fresh.exists(), foreign.exists()) == (False, True, True)
    assert has(store, name(1))


def test_a_sweeper_that_lost_its_lease_stops(opened, tmp_path, monkeypatch):
    store = opened(ttl_s=1)
    put(store, *row(0, 6))
    for entry in row(0, 6):
        age(file_of(tmp_path, entry), 1000)
    renew, calls = sweeping.Sweeper._renew_lease, []

    def lose_it_in_the_second_walk(sweeper):
        calls.append(1)
        if len(calls) == 9:
            next(tmp_path.glob("*/sweeper")).write_text("another worker")
        return renew(sweeper)

    monkeypatch.setattr(sweeping.Sweeper, "_renew_lease", lose_it_in_the_second_walk)
    assert store.sweep() is None
    assert len(list(tmp_path.glob("*/*/*.kv"))) == 4


def test_sweeps_come_by_themselves(opened, tmp_path):
    store = opened(ttl_s=1000, sweep_every_s=0.01)
    put(store, name(1))
    age(file_of(tmp_path, name(1)), 1001)
    wait_for(lambda: counter(store, "expired") == 1)


def test_pins_are_given_back_once_each(opened):
    store = opened()
    put(store, name(1))
    assert store.pin([name(1), name(2)]) == [True, False]
    store.unpin([name(1)])
    with pytest.raises(KeyError):
        store.unpin([name(1)])


def test_a_root_that_is_missing_or_no_folder_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be used"):
        SharedStore(tmp_path / "missing", 1 << 30, BLOCK, "layout")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot be used"):
        SharedStore(tmp_path / "file", 1 << 30, BLOCK, "layout")
    with pytest.raises(ConfigurationError, match="room"):
        SharedStore(tmp_path, BLOCK - 1, BLOCK, "layout")
    assert not (tmp_path / "missing").exists()


def test_a_block_or_name_of_another_size_is_an_error(opened):
    store = opened()
    with pytest.raises(ValueError, match="bytes"):
        store.put(name(1), np.zeros(BLOCK - 1, np.uint8))
    with pytest.raises(ValueError, match="bytes"):
        store.get(b"short", np.zeros(BLOCK, np.uint8), soon())
