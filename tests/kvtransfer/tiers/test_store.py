"""The blocks of a pool in tiers: saved whole or not at all, loaded right or missed."""

import asyncio
import threading
import time
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pytest

from baton.metrics import TIER_COUNTERS
from kvtransfer.memory import PoolMemory
from kvtransfer.tiers.base import COUNTED, Block, Tier, TierState, TierStatus
from kvtransfer.tiers.pins import PrefixPins
from kvtransfer.tiers.store import MAX_UNSAVED, BlockStore, Unsaved
from kvtransfer.tiers.tenants import NOBODY

BLOCKS, SIZE = 64, 4096


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def content(number: int) -> npt.NDArray[np.uint8]:
    return np.full(SIZE, number % 251, np.uint8)


class DictTier(Tier):
    """Keeps everything; `gate` holds up whoever gets, `before_put` runs before each put."""

    block_bytes = SIZE
    capacity_bytes = 100 * SIZE

    def __init__(self, name: str, delay_s: float = 0.0, max_pinned: int = 8) -> None:
        self.name = name
        self.pins = PrefixPins(max_pinned)
        self.blocks: dict[bytes, bytes] = {}
        self.tenants: set[bytes] = set()
        self.delay_s = delay_s
        self.gate = threading.Event()
        self.gate.set()
        self.getting = threading.Semaphore(0)
        self.closed = False

    def holds(self, names: Sequence[bytes]) -> list[bool]:
        return [name in self.blocks for name in names]

    def put(self, name: bytes, block: Block, tenant: bytes = NOBODY) -> bool:
        self.tenants.add(tenant)
        self.blocks[name] = bytes(self.block_view(name, block))
        return True

    def get(self, name: bytes, into: npt.NDArray[np.uint8], deadline: float) -> bool:
        self.getting.release()
        if not self.gate.wait(max(0.0, deadline - time.monotonic())) or name not in self.blocks:
            return False
        time.sleep(self.delay_s)
        into[:] = np.frombuffer(self.blocks[name], np.uint8)
        return True

    def pin(self, names: Sequence[bytes]) -> list[bool]:
        return self.holds(names)

    def unpin(self, names: Iterable[bytes]) -> None:
        pass

    def pin_prefix(self, key: str, names: Sequence[bytes], ttl_s: float) -> bool:
        return self.pins.pin(key, names, ttl_s) is not None

    def unpin_prefix(self, key: str) -> None:
        self.pins.unpin(key)

    @property
    def counters(self) -> dict[str, float]:
        return {f"kv_{self.name}_bytes": float(len(self.blocks) * SIZE)}

    @property
    def status(self) -> TierStatus:
        return TierStatus(TierState.ON)

    def close(self, deadline: float) -> None:
        self.closed = True


class World:
    def __init__(self, *tiers: DictTier) -> None:
        self.memory = PoolMemory.create(BLOCKS, SIZE)
        self.tiers = tiers
        self.store = BlockStore(self.memory, tiers)
        self.cancelled = threading.Event()

    def fill(self, count: int) -> list[Unsaved]:
        """Blocks 0, 1, … hold contents 0, 1, …"""
        for number in range(count):
            self.memory.blocks[number] = content(number)
        return [Unsaved(name(number), number, int(self.memory.generations[number]), b"t") for number in range(count)]

    def saved(self, count: int) -> None:
        deadline = time.monotonic() + 10
        while any(len(tier.blocks) < count for tier in self.tiers):
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def load(self, numbers: Sequence[int], first_block: int, timeout_s: float = 10.0) -> int:
        blocks = range(first_block, first_block + len(numbers))
        deadline = time.monotonic() + timeout_s
        return asyncio.run(self.store.load([name(each) for each in numbers], blocks, deadline, self.cancelled, b"t"))

    def close(self) -> None:
        self.store.close(time.monotonic() + 5)
        assert all(tier.closed for tier in self.tiers)
        self.memory.close()


def test_what_was_saved_comes_back() -> None:
    world = World(DictTier("fast"), DictTier("slow"))
    world.store.save(world.fill(20))
    world.saved(20)
    assert world.store.worth_loading([name(number) for number in range(25)], None) == 20
    assert all(tier.tenants == {b"t"} for tier in world.tiers)
    assert world.load(range(20), 30) == 20
    for number in range(20):
        assert (world.memory.blocks[30 + number] == content(number)).all()
    assert world.store.counters["kv_blocks_loaded"] == 20
    world.close()


def test_a_block_that_is_handed_out_again_while_it_is_copied_is_not_kept() -> None:
    world = World(DictTier("fast"))
    blocks = world.fill(2)
    world.memory.generations[0] += np.uint64(1)
    world.store.save(blocks)
    world.saved(1)
    assert list(world.tiers[0].blocks) == [name(1)]
    assert world.store.counters["kv_saves_dropped"] == 1
    world.close()


def test_a_load_stops_at_the_first_block_that_is_missing_and_counts() -> None:
    world = World(DictTier("fast"))
    for number in (0, 1, 2, 4, 5, 6, 7):
        world.tiers[0].blocks[name(number)] = content(number).tobytes()
    assert world.store.worth_loading([name(number) for number in range(8)], None) == 3
    assert world.load(range(8), 20) == 3
    for number in range(3):
        assert (world.memory.blocks[20 + number] == content(number)).all()
    assert world.store.counters["kv_loads_missed"] == 5
    world.close()


def test_blocks_of_a_slow_tier_are_kept_by_the_fast_one_from_then_on() -> None:
    fast, slow = DictTier("fast"), DictTier("slow")
    world = World(fast, slow)
    for number in range(4):
        slow.blocks[name(number)] = content(number).tobytes()
    assert world.load(range(4), 10) == 4
    assert fast.blocks == slow.blocks
    assert fast.tenants == {b"t"}, "whoever loaded them"
    world.close()


def test_nothing_is_loaded_that_is_computed_sooner() -> None:
    slow = DictTier("slow", delay_s=0.02)
    world = World(slow)
    for number in range(8):
        slow.blocks[name(number)] = content(number).tobytes()
    names = [name(number) for number in range(8)]
    assert world.store.worth_loading(names, 0.001) == 8, "not measured yet"
    for _ in range(4):
        world.load(range(8), 10)
    assert world.store.worth_loading(names, 0.0001) == 0
    assert world.store.worth_loading(names, 0.1) == 8
    world.close()


def test_slow_blocks_behind_fast_ones_are_left_alone_when_they_do_not_pay() -> None:
    fast, slow = DictTier("fast"), DictTier("slow", delay_s=0.02)
    world = World(fast, slow)
    for number in range(8):
        slow.blocks[name(number)] = content(number).tobytes()
    for _ in range(3):
        world.load(range(8), 10)
        fast.blocks.clear()
    for number in range(5):
        fast.blocks[name(number)] = content(number).tobytes()
    assert world.store.worth_loading([name(number) for number in range(8)], 0.001) == 5
    world.close()


def test_a_cancelled_load_begins_nothing_more_and_ends_only_when_nothing_writes() -> None:
    tier = DictTier("slow")
    world = World(tier)
    for number in range(32):
        tier.blocks[name(number)] = content(number).tobytes()
    tier.gate.clear()

    async def cancel() -> int:
        deadline = time.monotonic() + 10
        load = asyncio.ensure_future(
            world.store.load([name(each) for each in range(32)], range(32), deadline, world.cancelled)
        )
        while not tier.getting.acquire(blocking=False):
            await asyncio.sleep(0.001)
        world.cancelled.set()
        await asyncio.sleep(0.01)
        assert not load.done(), "its threads are at work"
        tier.gate.set()
        return await load

    assert asyncio.run(cancel()) < 32
    world.close()


def test_a_load_that_takes_too_long_is_a_miss() -> None:
    tier = DictTier("slow")
    world = World(tier)
    tier.blocks[name(0)] = content(0).tobytes()
    tier.gate.clear()
    assert world.load([0], 0, timeout_s=0.05) == 0
    world.close()


def test_saves_that_pile_up_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DictTier("fast")
    entered, go_on = threading.Event(), threading.Event()
    put = tier.put

    def slow_put(name: bytes, block: Block, tenant: bytes) -> bool:
        entered.set()
        assert go_on.wait(10)
        return put(name, block, tenant)

    monkeypatch.setattr(tier, "put", slow_put)
    world = World(tier)
    (block,) = world.fill(1)
    world.store.save([block])
    assert entered.wait(10)
    world.store.save([block] * (MAX_UNSAVED + 7))
    assert world.store.counters["kv_saves_dropped"] == 7
    go_on.set()
    world.close()


def test_a_block_that_makes_a_tier_fail_does_not_end_the_saving_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DictTier("fast")
    put = tier.put

    def fails_once(name: bytes, block: Block, tenant: bytes) -> bool:
        monkeypatch.setattr(tier, "put", put)
        raise KeyError(name)

    monkeypatch.setattr(tier, "put", fails_once)
    world = World(tier)
    world.store.save(world.fill(3))
    world.saved(2)
    assert world.store.counters["kv_saves_dropped"] == 1
    world.close()


def test_a_fault_in_a_tier_is_not_taken_for_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DictTier("fast")

    def broken(name: bytes, into: npt.NDArray[np.uint8], deadline: float) -> bool:
        raise KeyError(name)

    monkeypatch.setattr(tier, "get", broken)
    world = World(tier)
    with pytest.raises(KeyError):
        world.load([1], 0)
    world.close()


def test_a_prefix_is_pinned_in_every_tier_that_has_room_for_it() -> None:
    small, large = DictTier("host", max_pinned=2), DictTier("disk", max_pinned=6)
    world = World(small, large)
    assert world.store.max_pinned == 6
    names = [name(number) for number in range(4)]
    assert world.store.pin("both", names[:2], 60.0)
    assert world.store.pin("large", names, 60.0)
    assert (set(small.pins), set(large.pins)) == (set(names[:2]), set(names))
    assert not world.store.pin("neither", [name(number) for number in range(10, 13)], 60.0)
    counters = world.store.counters
    assert (counters["kv_pins"], counters["kv_pins_refused"]) == (2, 1)
    assert (counters["kv_host_pinned"], counters["kv_disk_pinned"]) == (2, 4)
    world.store.unpin("large")
    world.store.unpin("unknown")
    assert set(large.pins) == set(names[:2])
    world.store.unpin_all()
    assert not small.pins.keys
    assert not large.pins.keys
    world.close()


def test_what_tiers_count_is_what_is_exported() -> None:
    assert set(COUNTED) == {*TIER_COUNTERS, "bytes"}
    world = World(DictTier("host"))
    assert world.store.counters["kv_host_on"] == 1.0
    world.close()
