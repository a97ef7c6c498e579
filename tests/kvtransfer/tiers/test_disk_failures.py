"""A failing disk costs the blocks it holds, never the worker: the tier says what it no longer does, and recovers."""

import errno
import shutil
import threading
import time

import numpy as np
import pytest

from kvtransfer.tiers import disk
from kvtransfer.tiers.base import TierState
from kvtransfer.tiers.breaker import RETRY_S
from tests.kvtransfer.tiers.disk_world import (
    BLOCK_BYTES,
    SLOTS,
    block_of,
    count,
    load,
    loaded,
    name_of,
    open_tier,
    segment_files,
    settle,
    soon,
    store,
)
from tests.kvtransfer.tiers.faulty_files import FaultyFiles


class World:
    """A tier on a faulty disk, with a clock that the test moves."""

    def __init__(self, folder, **options) -> None:
        self.now = 1000.0
        self.tier = open_tier(folder, open_files=FaultyFiles, clock=lambda: self.now, **options)
        self.disk: FaultyFiles = self.tier._files

    def state(self) -> TierState:
        return self.tier.status.state

    def put(self, number: int) -> bool:
        return self.tier.put(name_of(number), block_of(name_of(number)))


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.disk.fail.clear()
    for event in world.disk._held.values():
        event.set()
    world.tier.close(soon())


def test_a_full_disk_keeps_the_tier_at_the_size_that_it_has(world):
    store(world.tier, range(2 * SLOTS))
    world.disk.fail["fallocate"] = errno.ENOSPC
    store(world.tier, range(100, 120))
    assert world.disk.num_calls["fallocate"] == 3, "tried once more, then not for a while"
    assert loaded(world.tier, range(116, 120)) == [116, 117, 118, 119]
    assert len(segment_files(world.disk.folder)) == 2, "what could not be allocated is gone"
    assert count(world.tier, "io_errors") == 1
    assert world.state() is TierState.ON
    del world.disk.fail["fallocate"]
    world.now += RETRY_S
    store(world.tier, range(200, 220))
    assert len(segment_files(world.disk.folder)) == 6


def test_a_disk_that_is_full_from_the_start_makes_the_tier_read_only_until_there_is_room(world):
    world.disk.fail["fallocate"] = errno.ENOSPC
    store(world.tier, [1])
    assert world.state() is TierState.READ_ONLY
    assert "No space" in world.tier.status.reason
    assert not world.put(2)
    assert count(world.tier, "refused") == 2
    del world.disk.fail["fallocate"]
    world.now += RETRY_S
    assert world.state() is TierState.ON
    store(world.tier, [3])
    assert load(world.tier, 3)


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.ENODEV])
def test_a_disk_that_lets_nothing_be_written_makes_the_tier_read_only_at_once(world, code):
    store(world.tier, range(3))
    world.disk.fail["pwritev"] = code
    store(world.tier, [3])
    assert world.state() is TierState.READ_ONLY
    assert not world.put(4)
    assert loaded(world.tier, range(5)) == [0, 1, 2]
    del world.disk.fail["pwritev"]
    world.now += RETRY_S
    store(world.tier, [4])
    assert loaded(world.tier, range(5)) == [0, 1, 2, 4]
    assert world.state() is TierState.ON


def test_single_bad_places_cost_single_blocks_and_many_in_a_row_all_writing(world):
    world.disk.fail["pwritev"] = errno.EIO
    store(world.tier, [0, 1])
    del world.disk.fail["pwritev"]
    store(world.tier, [2])
    assert world.state() is TierState.ON
    assert (count(world.tier, "io_errors"), count(world.tier, "refused")) == (2, 2)
    world.disk.fail["pwritev"] = errno.EIO
    store(world.tier, [3, 4])
    assert world.state() is TierState.ON
    store(world.tier, [5])
    assert world.state() is TierState.READ_ONLY
    assert loaded(world.tier, range(6)) == [2]


def test_reads_that_fail_are_misses_and_switch_the_tier_off_until_it_is_tried_again(world):
    store(world.tier, range(10))
    world.disk.fail["preadv"] = errno.EIO
    assert loaded(world.tier, range(3)) == []
    assert world.state() is TierState.OFF
    assert "Input/output error" in world.tier.status.reason
    assert world.tier.holds([name_of(5)]) == [False]
    assert not load(world.tier, 5)
    assert not world.put(50)
    assert world.disk.num_calls["preadv"] == 3
    world.now += RETRY_S
    assert not load(world.tier, 3)
    assert world.state() is TierState.OFF, "one more failure is enough"
    del world.disk.fail["preadv"]
    world.now += RETRY_S
    assert loaded(world.tier, range(10)) == [4, 5, 6, 7, 8, 9]
    assert world.state() is TierState.ON


def test_single_bad_places_cost_single_blocks_when_read(world):
    store(world.tier, range(10))
    for pair in ([0, 1], [3, 4]):
        world.disk.fail["preadv"] = errno.EIO
        assert loaded(world.tier, pair) == []
        del world.disk.fail["preadv"]
        assert load(world.tier, 2)
    assert world.state() is TierState.ON
    assert loaded(world.tier, range(10)) == [2, 5, 6, 7, 8, 9]


def test_half_a_write_is_no_block(world, monkeypatch):
    write = FaultyFiles.pwritev
    monkeypatch.setattr(FaultyFiles, "pwritev", lambda self, fd, buffers, at: write(self, fd, [buffers[0][:5000]], at))
    store(world.tier, [0])
    assert count(world.tier, "io_errors") == 1
    monkeypatch.undo()
    assert not load(world.tier, 0)


def test_half_a_read_is_a_miss(world, monkeypatch):
    store(world.tier, [0])
    read = FaultyFiles.preadv
    monkeypatch.setattr(FaultyFiles, "preadv", lambda self, fd, buffers, at: read(self, fd, [buffers[0][:5000]], at))
    assert not load(world.tier, 0)
    assert count(world.tier, "checksum_failures") == 1


def test_a_slow_disk_makes_put_refuse_and_never_wait(tmp_path):
    world = World(tmp_path, write_buffer_bytes=0)
    release = world.disk.hold("pwritev")
    start = time.monotonic()
    taken = [world.put(number) for number in range(10)]
    assert time.monotonic() - start < 2
    assert taken == [True] * 2 + [False] * 8, "one buffer more than there are writers"
    assert count(world.tier, "refused") == 8
    release.set()
    settle(world.tier)
    assert loaded(world.tier, range(10)) == [0, 1]
    world.tier.close(soon())


def test_a_read_that_hangs_ends_at_its_deadline_and_never_touches_its_callers_memory_again(world, monkeypatch):
    monkeypatch.setattr(disk, "STALL_S", 0.05)
    store(world.tier, [0, 1])
    release = world.disk.hold("preadv")
    into = np.full((2, BLOCK_BYTES), 7, np.uint8)
    start = time.monotonic()
    assert world.tier.get_many([name_of(0), name_of(1)], list(into), start + 0.1) == [False, False]
    assert 0.1 <= time.monotonic() - start < 2
    assert count(world.tier, "timeouts") == 2
    assert world.state() is TierState.ON
    for _ in range(2):
        assert not world.tier.get(name_of(0), into[0], time.monotonic() + 0.1)
    assert world.state() is TierState.OFF
    assert "deadline" in world.tier.status.reason
    start = time.monotonic()
    assert not world.tier.get(name_of(0), into[0], soon())
    assert time.monotonic() - start < 2, "nobody waits for a disk that hangs"
    release.set()
    world.now += RETRY_S
    assert loaded(world.tier, [0, 1]) == [0, 1]
    assert (into == 7).all()


def test_deadlines_that_callers_set_too_near_say_nothing_about_the_disk(world):
    store(world.tier, [0])
    release = world.disk.hold("preadv")
    into = np.zeros(BLOCK_BYTES, np.uint8)
    for _ in range(5):
        assert not world.tier.get(name_of(0), into, time.monotonic() + 0.01)
    assert not world.tier.get(name_of(0), into, time.monotonic() - 1)
    release.set()
    assert world.state() is TierState.ON
    assert load(world.tier, 0)


def test_no_slot_is_written_over_while_it_is_read(tmp_path):
    world = World(tmp_path, num_segments=1)
    store(world.tier, range(SLOTS))
    release = world.disk.hold("preadv")
    reader = threading.Thread(target=load, args=(world.tier, 0))
    reader.start()
    world.disk.wait_until_held("preadv")
    store(world.tier, [50])
    assert count(world.tier, "refused") == 1, "its reader is still at it"
    release.set()
    reader.join(10)
    assert count(world.tier, "loaded") == 1
    store(world.tier, [51])
    assert load(world.tier, 51)
    world.tier.close(soon())


def test_a_deleted_folder_switches_the_tier_off_and_frees_its_room(world):
    store(world.tier, range(3))
    shutil.rmtree(world.disk.folder)
    store(world.tier, range(3, 6))
    assert world.state() is TierState.OFF
    assert "deleted" in world.tier.status.reason
    assert count(world.tier, "bytes") == 0
    assert not world.disk._names, "an open file would keep its room"
    assert not world.put(9)
    assert loaded(world.tier, range(10)) == []


def test_a_deleted_file_costs_its_blocks_alone(world):
    store(world.tier, range(6 * SLOTS))
    segment_files(world.disk.folder)[2].unlink()
    store(world.tier, [100])
    assert loaded(world.tier, range(6 * SLOTS)) == [n for n in range(6 * SLOTS) if n // SLOTS != 2]
    assert load(world.tier, 100)


def test_what_hangs_at_the_end_is_left_alone(tmp_path):
    world = World(tmp_path)
    store(world.tier, [0])
    release = world.disk.hold("pwritev")
    world.put(1)
    world.disk.wait_until_held("pwritev")
    world.put(2)
    start = time.monotonic()
    world.tier.close(start + 0.1)
    assert time.monotonic() - start < 2
    assert world.disk._names, "a file that is written stays open"
    release.set()
    settle(world.tier)
    assert world.disk.num_calls["pwritev"] == 2, "what was not begun by the deadline is dropped"


def test_files_that_cannot_be_read_at_the_start_are_passed_over(tmp_path):
    tier = open_tier(tmp_path)
    store(tier, range(2 * SLOTS))
    tier.close(soon())

    class BadFirstFile(FaultyFiles):
        def preadv(self, fd, buffers, offset):
            if self._names[fd].endswith("0.kv"):
                raise OSError(errno.EIO, "bad sector")
            return super().preadv(fd, buffers, offset)

    again = open_tier(tmp_path, open_files=BadFirstFile)
    assert loaded(again, range(2 * SLOTS)) == list(range(SLOTS, 2 * SLOTS))
    assert count(again, "io_errors") == 1
    store(again, range(100, 200))
    assert len(segment_files(tmp_path)) == 6, "what cannot be read counts for the capacity as well"
    again.close(soon())
