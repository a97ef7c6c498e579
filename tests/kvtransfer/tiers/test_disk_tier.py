"""What the disk tier promises while its disk works: right bytes, kept within its capacity, found again."""

import os
import random
import threading
import time

import numpy as np
import pytest

from baton.errors import ConfigurationError
from kvtransfer.tiers import files as files_module
from kvtransfer.tiers.base import TierState
from tests.kvtransfer.tiers.disk_world import (
    BLOCK_BYTES,
    SLOT_BYTES,
    SLOTS,
    allocated_bytes,
    block_of,
    capacity_of,
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


@pytest.fixture
def opened(tmp_path):
    """Opens tiers in one folder, and closes them."""
    tiers = []

    def open_one(**options):
        tiers.append(open_tier(options.pop("folder", tmp_path), **options))
        return tiers[-1]

    yield open_one
    for tier in tiers:
        if tier.status.reason != "closed":
            tier.close(soon())


def reopen(opened, tier, **options):
    tier.close(soon())
    return opened(**options)


@pytest.mark.parametrize("block_bytes", [512, BLOCK_BYTES, 4096, 65536 + 512, 1 << 20])
def test_blocks_of_any_size_come_back_and_again_after_a_restart(opened, block_bytes):
    tier = opened(block_bytes=block_bytes)
    store(tier, range(10))
    assert tier.holds([name_of(3), name_of(11)]) == [True, False]
    assert loaded(tier, range(12)) == list(range(10))
    tier = reopen(opened, tier, block_bytes=block_bytes)
    assert loaded(tier, range(12)) == list(range(10))
    assert (count(tier, "loaded"), count(tier, "misses"), count(tier, "checksum_failures")) == (10, 2, 0)


def test_many_blocks_are_loaded_at_once_each_to_its_place(opened):
    tier = opened(num_writers=3)
    store(tier, range(10))
    names = [name_of(number) for number in (7, 99, 0, 7, 5)]
    into = np.zeros((5, BLOCK_BYTES), np.uint8)
    assert tier.get_many(names, list(into), soon()) == [True, False, True, True, True]
    for row in (0, 2, 3, 4):
        assert (into[row] == block_of(names[row])).all()
    assert not into[1].any()


def test_what_was_taken_is_a_copy(opened):
    tier, block = opened(), block_of(name_of(1)).copy()
    assert tier.put(name_of(1), memoryview(block))
    block[:] = 0
    settle(tier)
    assert load(tier, 1)


def test_a_block_that_is_held_is_not_written_again(opened):
    tier = opened()
    store(tier, [1, 1, 1])
    assert (count(tier, "stored"), count(tier, "duplicates")) == (1, 2)


@pytest.mark.parametrize(("name", "size"), [(b"short", BLOCK_BYTES), (bytes(16), BLOCK_BYTES - 1)])
def test_names_and_blocks_of_a_wrong_size_are_refused_loudly(opened, name, size):
    tier = opened()
    with pytest.raises(ValueError, match="bytes"):
        tier.put(name, np.zeros(size, np.uint8))
    with pytest.raises(ValueError, match="bytes"):
        tier.get(name, np.zeros(size, np.uint8), soon())


# Capacity and eviction


def test_the_capacity_holds_in_allocated_bytes_and_the_newest_blocks_stay(opened, tmp_path):
    tier = opened(num_segments=3)
    for number in range(100):
        store(tier, [number])
        assert allocated_bytes(tmp_path) <= capacity_of(3)
        assert count(tier, "bytes") <= capacity_of(3)
    held = loaded(tier, range(100))
    assert 2 * SLOTS < len(held) <= 3 * SLOTS
    assert held[-SLOTS:] == [96, 97, 98, 99]
    assert count(tier, "evicted") == 100 - len(held)


def test_blocks_in_use_outlive_those_that_nobody_asks_for(opened):
    tier = opened(num_segments=4)
    store(tier, range(8))
    for number in range(8, 200):
        assert load(tier, 2)
        assert load(tier, 5)
        store(tier, [number])
    assert loaded(tier, range(8)) == [2, 5]


def test_pinned_blocks_are_not_evicted_and_unpinned_ones_are(opened):
    tier = opened(num_segments=3)
    store(tier, range(4))
    assert tier.pin([name_of(0), name_of(77), name_of(0)]) == [True, False, True]
    store(tier, range(100, 150))
    assert load(tier, 0)
    tier.unpin([name_of(0)])
    store(tier, range(150, 200))
    assert tier.holds([name_of(0)]) == [True]
    tier.unpin([name_of(0)])
    with pytest.raises(KeyError):
        tier.unpin([name_of(0)])
    store(tier, range(200, 250))
    assert tier.holds([name_of(0)]) == [False]


def test_a_pinned_prefix_outlives_a_flood_until_its_time_is_over(opened):
    now = [0.0]
    tier = opened(num_segments=6, clock=lambda: now[0])
    assert tier.pins.max_names == 6
    assert tier.pin_prefix("system", [name_of(number) for number in range(3)], ttl_s=100)
    assert tier.pin_prefix("short", [name_of(number) for number in range(3, 5)], ttl_s=50)
    assert not tier.pin_prefix("too much", [name_of(number) for number in range(50, 52)], ttl_s=100)
    store(tier, range(60))
    assert loaded(tier, range(8)) == list(range(5))
    now[0] = 60
    store(tier, range(60, 150))
    assert loaded(tier, range(8)) == list(range(3))
    tier.unpin_prefix("system")
    store(tier, range(150, 240))
    assert loaded(tier, range(8)) == []


def test_a_tenant_has_its_share_of_the_disk_also_after_a_restart(opened):
    tenant = bytes(range(16))
    tier = opened(num_segments=6, tenant_share=0.25)
    store(tier, range(8))
    store(tier, range(100, 150), tenant)
    assert loaded(tier, range(100, 150)) == list(range(144, 150))
    assert load(tier, 144)
    store(tier, [150], tenant)
    assert loaded(tier, range(144, 151)) == [144, *range(146, 151)], "its own that was unused for longest"
    assert loaded(tier, range(8)) == list(range(8)), "of nobody"
    assert (count(tier, "over_share"), count(tier, "evicted")) == (45, 0)
    tier = reopen(opened, tier, num_segments=6, tenant_share=0.25)
    assert len(loaded(tier, range(100, 151))) == 6, "as many as it may have"
    store(tier, [151], tenant)
    assert len(loaded(tier, range(100, 152))) == 6
    assert loaded(tier, range(8)) == list(range(8))


def test_blocks_that_nobody_used_for_too_long_are_misses_and_their_room_is_used_again(opened):
    now = [1e9]
    options = {"num_segments": 2, "ttl_s": 100.0, "wall_clock": lambda: now[0]}
    tier = opened(**options)
    store(tier, range(8))
    assert tier.pin_prefix("system", [name_of(0)], ttl_s=1e6)
    assert tier.pin([name_of(1)]) == [True]
    now[0] += 60
    assert load(tier, 2)
    now[0] += 60
    assert loaded(tier, range(8)) == [0, 1, 2]
    assert (count(tier, "expired"), count(tier, "evicted")) == (5, 0)
    store(tier, range(10, 15))
    assert loaded(tier, range(8)) == [0, 1, 2]
    assert loaded(tier, range(10, 15)) == list(range(10, 15)), "in the room of those that expired"
    assert count(tier, "evicted") == count(tier, "refused") == 0
    tier.unpin([name_of(1)])
    now[0] += 90
    tier = reopen(opened, tier, **options)
    assert tier.holds([name_of(number) for number in range(20)]).count(True) == 5, "stored 90 s ago; the others before"
    now[0] += 10
    assert loaded(tier, range(20)) == []


def test_a_segment_full_of_pinned_blocks_is_passed_over(opened):
    tier = opened(num_segments=5)
    assert tier.pin_prefix("system", [name_of(number) for number in range(SLOTS)], ttl_s=100)
    store(tier, range(200))
    assert loaded(tier, range(SLOTS + 1)) == list(range(SLOTS))
    assert count(tier, "refused") == 0


def test_blocks_are_refused_while_everything_is_pinned(opened):
    tier = opened(num_segments=2)
    store(tier, range(8))
    assert all(tier.pin([name_of(number) for number in range(8)]))
    store(tier, [8, 9])
    assert count(tier, "refused") == 2
    assert loaded(tier, range(10)) == list(range(8))
    tier.unpin([name_of(0)] + [name_of(number) for number in range(1, 8)])
    store(tier, [8])
    assert load(tier, 8)


def test_a_smaller_capacity_holds_from_the_next_start_on(opened, tmp_path):
    tier = opened(num_segments=6)
    store(tier, range(24))
    tier = reopen(opened, tier, num_segments=2)
    assert allocated_bytes(tmp_path) <= capacity_of(2)
    assert loaded(tier, range(24)) == list(range(16, 24))
    assert len(segment_files(tmp_path)) == 2


def test_a_capacity_without_room_for_a_segment_says_how_much_is_needed(opened):
    with pytest.raises(ConfigurationError, match=f"at least {capacity_of(1)}"):
        opened(capacity_bytes=capacity_of(1) - 1)
    opened(capacity_bytes=capacity_of(1))


# Whose files they are


def test_blocks_of_another_layout_are_never_given_out(opened, tmp_path):
    tier = opened(layout_fingerprint="model A")
    store(tier, range(8))
    tier.close(soon())
    (theirs,) = segment_files(tmp_path)[:1]
    other = opened(layout_fingerprint="model B")
    assert not any(other.holds([name_of(number) for number in range(8)]))
    other.close(soon())
    (ours,) = (path for path in tmp_path.iterdir() if path != theirs.parent)
    os.rename(theirs, ours / "segment-00000007.kv")
    other = opened(layout_fingerprint="model B")
    assert loaded(other, range(8)) == []
    store(other, range(50, 58))
    assert loaded(other, range(50, 58)) == list(range(50, 58)), "the slots of the foreign file are free"


def test_a_second_worker_gets_a_folder_of_its_own(opened, tmp_path):
    first, second = opened(), opened()
    store(first, [1])
    store(second, [2])
    assert loaded(first, [1, 2]) == [1]
    assert loaded(second, [1, 2]) == [2]
    assert len(list(tmp_path.iterdir())) == 2


def test_the_folder_says_in_full_whose_it_is_and_a_false_one_is_refused(opened, tmp_path):
    opened(layout_fingerprint="llama / bf16 / page 16").close(soon())
    (label,) = tmp_path.rglob("layout.txt")
    assert label.read_text() == "llama / bf16 / page 16"
    label.write_text("something else")
    with pytest.raises(ConfigurationError, match="another layout"):
        opened(layout_fingerprint="llama / bf16 / page 16")


def test_a_folder_that_is_none_is_a_configuration_error(opened, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="file"):
        opened(folder=tmp_path / "file")


def test_strange_files_are_passed_over(opened, tmp_path):
    tier = opened()
    store(tier, range(4))
    tier.close(soon())
    (segment,) = segment_files(tmp_path)
    home = segment.parent
    rng = np.random.default_rng(0)
    (home / "notes.txt").write_text("hello")
    (home / "segment-1.kv").write_bytes(rng.bytes(SLOT_BYTES))
    (home / "segment-00000002.kv").write_bytes(b"")
    (home / "segment-00000003.kv").write_bytes(rng.bytes(3 * SLOT_BYTES + 17))
    (home / "segment-00000004.kv").mkdir()
    (home / "segment-00000005.kv").symlink_to(segment)
    os.mkfifo(home / "segment-00000006.kv")
    tier = opened()
    assert loaded(tier, range(8)) == [0, 1, 2, 3]
    store(tier, range(10, 30))
    assert loaded(tier, range(26, 30)) == [26, 27, 28, 29]
    assert (home / "notes.txt").read_text() == "hello"
    assert (home / "segment-1.kv").stat().st_size == SLOT_BYTES


def test_a_truncated_file_loses_what_was_cut_off_and_nothing_else(opened, tmp_path):
    tier = opened()
    store(tier, range(4))
    tier.close(soon())
    os.truncate(segment_files(tmp_path)[0], 2 * SLOT_BYTES + 4096)
    assert loaded(opened(), range(4)) == [0, 1]


def test_of_two_copies_of_a_block_the_later_one_counts(opened, tmp_path):
    tier = opened()
    store(tier, [10, 11, 12, 1])
    tier.close(soon())
    (segment,) = segment_files(tmp_path)
    damage(segment, 3 * SLOT_BYTES)
    tier = opened()
    assert not load(tier, 1)
    store(tier, [1])
    assert load(tier, 1)
    assert load(reopen(opened, tier), 1)


# Damage


def damage(segment, offset: int) -> None:
    with open(segment, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


PAGE = 4096
"""Where the record page of slot 0 starts: the block has fewer bytes."""
CHECKED = {
    "first byte of the block": 0,
    "middle of the block": 700,
    "last byte of the block": BLOCK_BYTES - 1,
    "magic": PAGE,
    "version": PAGE + 8,
    "reserved": PAGE + 12,
    "name": PAGE + 16,
    "layout": PAGE + 47,
    "length": PAGE + 48,
    "sequence": PAGE + 56,
    "checksum of the block": PAGE + 64,
    "rest of the page": PAGE + 3000,
    "checksum of the page": PAGE + 4095,
}


@pytest.mark.parametrize("region", CHECKED)
@pytest.mark.parametrize("is_running", [True, False], ids=["running", "restarted"])
def test_a_flipped_bit_anywhere_is_a_miss(opened, tmp_path, region, is_running):
    tier = opened()
    store(tier, [0, 1])
    assert load(tier, 0)
    if not is_running:
        tier.close(soon())
    damage(segment_files(tmp_path)[0], CHECKED[region])
    if not is_running:
        tier = opened()
    was_claimed = tier.holds([name_of(0)]) == [True]
    assert was_claimed or not is_running
    assert loaded(tier, [0, 1]) == [1]
    assert count(tier, "checksum_failures") == was_claimed
    assert tier.holds([name_of(0)]) == [False]
    store(tier, [0])
    assert load(tier, 0)


def test_padding_is_no_part_of_a_block(opened, tmp_path):
    tier = opened()
    store(tier, [0])
    damage(segment_files(tmp_path)[0], BLOCK_BYTES + 5)
    assert load(tier, 0)


def test_a_block_in_the_place_of_another_is_a_miss(opened, tmp_path):
    tier = opened()
    store(tier, [0, 1])
    with open(segment_files(tmp_path)[0], "r+b") as file:
        slots = file.read(2 * SLOT_BYTES)
        file.seek(0)
        file.write(slots[SLOT_BYTES:] + slots[:SLOT_BYTES])
    assert loaded(tier, [0, 1]) == []
    assert count(tier, "checksum_failures") == 2
    assert loaded(reopen(opened, tier), [0, 1]) == [0, 1], "each page still names the block before it"


# Filesystems of all kinds


def test_without_o_direct_the_page_cache_is_used(opened, monkeypatch, caplog):
    real_open = os.open

    def refuse_direct(path, flags, *rest, **options):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real_open(path, flags, *rest, **options)

    monkeypatch.setattr(files_module.os, "open", refuse_direct)
    tier = opened()
    store(tier, range(40))
    assert len(loaded(tier, range(40))) > 20
    assert [record.message for record in caplog.records if "no O_DIRECT" in record.message][1:] == []
    assert "no O_DIRECT" in caplog.text


def test_o_direct_that_is_refused_only_when_used_is_given_up_too(opened, monkeypatch):
    def refuse_direct(real):
        def operation(fd, *rest):
            if files_module.fcntl.fcntl(fd, files_module.fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(22, "Invalid argument")
            return real(fd, *rest)

        return operation

    monkeypatch.setattr(files_module.os, "pwritev", refuse_direct(os.pwritev))
    monkeypatch.setattr(files_module.os, "preadv", refuse_direct(os.preadv))
    tier = opened()
    store(tier, range(10))
    assert loaded(tier, range(10)) == list(range(10))
    assert loaded(reopen(opened, tier), range(10)) == list(range(10))


def test_a_cache_on_a_read_only_filesystem_is_read(opened, monkeypatch):
    tier = opened()
    store(tier, range(4))
    tier.close(soon())
    real_open = os.open

    def refuse_writing(path, flags, *rest, **options):
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise OSError(30, "Read-only file system")
        return real_open(path, flags, *rest, **options)

    monkeypatch.setattr(files_module.os, "open", refuse_writing)
    tier = opened()
    assert tier.status.state is TierState.READ_ONLY
    assert loaded(tier, range(5)) == [0, 1, 2, 3]
    assert not tier.put(name_of(9), block_of(name_of(9)))
    assert count(tier, "refused") == 1


# Threads


@pytest.mark.parametrize("seed", range(3))
def test_threads_that_store_load_and_pin_at_once_never_get_a_wrong_byte(opened, tmp_path, seed):
    """Far more names than room, so that slots are written over while others are read."""
    tier = opened(num_segments=4, num_writers=3, num_readers=3)
    failures: list[BaseException] = []
    deadline = soon(60)

    def work(worker: int) -> None:
        draw = random.Random(seed * 100 + worker)
        try:
            while count(tier, "loaded") < 300 or count(tier, "evicted") < 200:
                assert time.monotonic() < deadline, tier.counters
                number = draw.randrange(60)
                match draw.randrange(4):
                    case 0:
                        load(tier, number)
                    case 1:
                        names = [name_of(draw.randrange(60)) for _ in range(4)]
                        held = [name for name, is_held in zip(names, tier.pin(names), strict=True) if is_held]
                        load(tier, number)
                        tier.unpin(held)
                    case _:
                        tier.put(name_of(number), block_of(name_of(number)))
        except BaseException as failure:  # noqa: BLE001 - shown by the assertion below
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert not failures
    settle(tier)
    assert count(tier, "checksum_failures") == count(tier, "io_errors") == 0
    assert allocated_bytes(tmp_path) <= capacity_of(4)
    assert all(segment.num_pins == 0 for segment in tier._book.segments)
    held = loaded(tier, range(60))
    found_again = loaded(reopen(opened, tier, num_segments=4), range(60))
    assert set(held) <= set(found_again), "more come back: evicted ones whose slots were not written since"
