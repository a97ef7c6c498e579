import fcntl
import mmap
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest

from baton.errors import ConfigurationError, TransferError
from kvtransfer.memory import HUGE_PAGE_BYTES, PAGE_BYTES, PoolMemory, header_bytes


def test_a_view_sees_the_owners_blocks_and_generations_but_cannot_write():
    owner = PoolMemory.create(600, 100)
    view = PoolMemory.attach(owner.open_readonly(), 600, 100)
    owner.blocks[599] = 7
    owner.generations[599] = 5
    assert (view.blocks[599] == 7).all()
    assert view.generations[599] == 5
    with pytest.raises(ValueError, match="read-only"):
        view.blocks[0, 0] = 1
    with pytest.raises(PermissionError):
        mmap.mmap(view.fd, PAGE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


def test_blocks_lie_behind_the_generations_where_a_huge_page_can_begin():
    num_blocks = HUGE_PAGE_BYTES // 8 + 1
    owner = PoolMemory.create(num_blocks, 64)
    assert header_bytes(num_blocks) == 2 * HUGE_PAGE_BYTES
    assert header_bytes(num_blocks - 1) == HUGE_PAGE_BYTES
    for memory in (owner, PoolMemory.attach(owner.open_readonly(), num_blocks, 64)):
        assert memory.blocks.ctypes.data % HUGE_PAGE_BYTES == 0
        assert memory.blocks.ctypes.data - memory.generations.ctypes.data == 2 * HUGE_PAGE_BYTES
        assert len(memory.buffer) == num_blocks * 64
    np.frombuffer(owner.buffer, np.uint8)[64] = 9
    assert owner.blocks[1, 0] == 9


def huge_bytes(array: np.ndarray) -> int:
    """How much of the mapping around an array is in huge pages, by the kernel's account."""
    for mapping in Path("/proc/self/smaps").read_text().split("VmFlags")[:-1]:
        first, last = (int(end, 16) for end in re.search(r"^([0-9a-f]+)-([0-9a-f]+) ", mapping, re.M).groups())
        if first <= array.ctypes.data < last:
            return int(re.search(r"ShmemPmdMapped: +(\d+) kB", mapping)[1]) << 10
    raise AssertionError("the array is in no mapping")


def can_collapse() -> bool:
    """Whether the kernel makes a huge page when asked to, in ordinary memory."""
    scratch = mmap.mmap(-1, 2 * HUGE_PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -np.frombuffer(scratch, np.uint8).ctypes.data % HUGE_PAGE_BYTES
    scratch[start] = 1
    try:
        scratch.madvise(25, start, HUGE_PAGE_BYTES)  # MADV_COLLAPSE
    except OSError:
        return False
    return True


@pytest.mark.skipif(not can_collapse(), reason="this kernel has no huge pages at hand")
def test_a_pool_and_the_views_of_its_peers_are_in_huge_pages():
    owner = PoolMemory.create(40, 256 << 10)
    assert huge_bytes(owner.blocks) == 12 << 20
    assert not owner.blocks.any()
    owner.blocks[39] = 7
    view = PoolMemory.attach(owner.open_readonly(), 40, 256 << 10)
    assert (view.blocks[39] == 7).all()
    assert huge_bytes(view.blocks) > 0
    writer = PoolMemory.create(3, 256 << 10, num_peer_blocks=100)
    mapped = writer.map_peer(owner.fd, 40)
    writer.touch_peer(mapped)
    blocks = np.frombuffer(writer.buffer, np.uint8).reshape(103, 256 << 10)
    assert huge_bytes(blocks[mapped.first_block]) == 40 * (256 << 10)
    assert (blocks[mapped.first_block + 39] == 7).all()


@pytest.mark.parametrize(("name", "value"), [("_MADV_COLLAPSE", 9999), ("_MAX_COLLAPSE_S", 0.0)])
def test_where_huge_pages_are_refused_or_slow_a_pool_has_small_ones(name, value, monkeypatch, caplog):
    monkeypatch.setattr("kvtransfer.memory." + name, value)
    monkeypatch.setattr("kvtransfer.memory._COLLAPSED_BYTES", HUGE_PAGE_BYTES)
    with caplog.at_level("INFO"):
        memory = PoolMemory.create(40, 256 << 10)
    assert re.search("huge pages for [02] of 12 MiB only", caplog.text)
    assert os.fstat(memory.fd).st_blocks * 512 == 12 << 20, "not every page was taken at the start"
    assert not memory.blocks.any()
    assert huge_bytes(memory.blocks) <= HUGE_PAGE_BYTES


def test_a_pool_has_no_name_that_a_killed_process_could_leave_behind():
    memory = PoolMemory.create(1, 1)
    assert os.readlink(f"/proc/self/fd/{memory.fd}").startswith("/memfd:")


def test_each_pool_has_an_epoch_and_a_token_of_its_own():
    pools = [PoolMemory.create(1, 1) for _ in range(4)]
    assert len({memory.epoch for memory in pools} | {memory.token for memory in pools}) == 8


def test_a_pool_cannot_shrink_under_its_readers():
    memory = PoolMemory.create(4, PAGE_BYTES)
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, PAGE_BYTES)


@pytest.mark.parametrize("shape", [(5, PAGE_BYTES), (3, PAGE_BYTES), (4, PAGE_BYTES + 1)])
def test_memory_of_another_size_than_stated_is_refused(shape):
    memory = PoolMemory.create(4, PAGE_BYTES)
    with pytest.raises(TransferError, match="size"):
        PoolMemory.attach(memory.open_readonly(), *shape)


def test_an_ordinary_file_or_memory_that_may_shrink_is_refused():
    with tempfile.TemporaryFile() as file:
        file.truncate(2 * PAGE_BYTES)
        with pytest.raises(TransferError):
            PoolMemory.attach(os.dup(file.fileno()), 1, PAGE_BYTES)
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 2 * PAGE_BYTES)
    assert not fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    with pytest.raises(TransferError):
        PoolMemory.attach(fd, 1, PAGE_BYTES)


def test_an_array_outlives_the_pool_it_views():
    memory = PoolMemory.create(2, PAGE_BYTES)
    row = memory.blocks[1]
    memory.close()
    memory.close()
    row[:] = 3
    assert (row == 3).all()


@pytest.mark.parametrize("shape", [(0, 1), (1, 0), (1, -1), (1 << 40, 1 << 30)])
def test_an_impossible_pool_is_a_configuration_error(shape):
    with pytest.raises(ConfigurationError):
        PoolMemory.create(*shape)


def test_a_peers_blocks_go_on_behind_the_own_ones_and_both_sides_see_one_memory():
    memory, peer = PoolMemory.create(5, 96, num_peer_blocks=1000), PoolMemory.create(40, 96)
    mapped = memory.map_peer(peer.fd, 40)
    blocks = np.frombuffer(memory.buffer, np.uint8).reshape(1005, 96)
    blocks[mapped.first_block + 39] = 7
    assert (peer.blocks[39] == 7).all()
    assert blocks[:5].ctypes.data == memory.blocks.ctypes.data
    assert blocks[mapped.first_block].ctypes.data % PAGE_BYTES == 0
    peer.generations[3] += np.uint64(1)
    assert mapped.generations[3] == peer.generations[3]
    assert not mapped.generations.flags.writeable


def test_addresses_of_a_peer_that_left_are_used_again_and_no_two_overlap():
    memory, peer = PoolMemory.create(5, 96, num_peer_blocks=650), PoolMemory.create(100, 96)
    mapped = [memory.map_peer(peer.fd, 100) for _ in range(4)]
    assert [each.first_block for each in mapped] == [128, 256, 384, 512]
    with pytest.raises(TransferError, match="addresses"):
        memory.map_peer(peer.fd, 100)
    memory.unmap_peer(mapped[1])
    assert memory.map_peer(peer.fd, 100).first_block == mapped[1].first_block


def test_a_peers_memory_that_is_not_what_it_says_is_not_mapped():
    memory, peer = PoolMemory.create(5, 96, num_peer_blocks=1000), PoolMemory.create(40, 96)
    with pytest.raises(TransferError, match="size"):
        memory.map_peer(peer.fd, 41)


def test_a_touch_of_what_is_mapped_no_more_changes_nothing():
    memory, peer = PoolMemory.create(5, 96, num_peer_blocks=1000), PoolMemory.create(40, 96)
    mapped = memory.map_peer(peer.fd, 40)
    memory.touch_peer(mapped)
    memory.unmap_peer(mapped)
    memory.touch_peer(mapped)
    peer.blocks[:] = 1
    memory.close()
    assert (peer.blocks == 1).all()
