"""Whoever knows a tier at one moment and hears of its changes knows what it holds, whatever threads do to it."""

import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kvtransfer.memory import PoolMemory
from kvtransfer.tiers.base import OwnTier
from kvtransfer.tiers.host import HostTier
from kvtransfer.tiers.shared import SharedStore
from kvtransfer.tiers.store import BlockStore, Unsaved
from tests.kvtransfer.tiers.disk_world import (
    BLOCK_BYTES,
    block_of,
    load,
    name_of,
    open_tier,
    segment_files,
    settle,
    soon,
    store,
)
from tests.told import Told

NAMES = 60


def held(tier: OwnTier) -> set[bytes]:
    names = [name_of(number) for number in range(NAMES)]
    return {name for name, is_held in zip(names, tier.holds(names), strict=True) if is_held}


def nobody() -> None:
    pass


def work(tier: OwnTier, seed: int) -> None:
    rng, into = random.Random(seed), np.zeros(BLOCK_BYTES, np.uint8)
    for round_number in range(300):
        number = rng.randrange(NAMES)
        time.sleep(0.0001)  # lets the others in
        match rng.randrange(5):
            case 0 | 1 | 2:
                tier.put(name_of(number), block_of(name_of(number)), rng.choice([b"", b"a", b"b"]))
            case 3:
                tier.get(name_of(number), into, soon())
            case _ if round_number % 2:
                tier.pin_prefix(str(seed), [name_of(number), name_of(number + 1)], 0.01)
            case _:
                tier.unpin_prefix(str(seed))


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_a_moment_and_all_changes_since_are_what_a_tier_holds(kind: str, tmp_path: Path) -> None:
    """20 of 60 blocks fit, tenants have shares, and blocks expire while four threads are at work."""
    options = {"ttl_s": 0.05, "tenant_share": 0.4}
    tier: OwnTier = (
        HostTier(20 * BLOCK_BYTES, BLOCK_BYTES, **options) if kind == "host" else open_tier(tmp_path, 5, **options)
    )
    woken = threading.Event()
    threads = [threading.Thread(target=work, args=(tier, seed)) for seed in range(4)]
    for thread in threads:
        thread.start()
    told, num_told = Told(tier.watch(woken.set)), 0
    while any(thread.is_alive() for thread in threads):
        woken.wait(0.01)
        woken.clear()
        changed = tier.take_changes()
        told.hear(changed)
        num_told += len(changed.names) if changed else 0
        if num_told % 5 == 0:
            again = tier.watch(woken.set)
            told.hear(again.before)
            assert told.names == set(again.names), "somebody who comes later is told the same"
    if kind == "disk":
        settle(tier)
    told.hear(tier.take_changes())
    now = held(tier)
    told.hear(tier.take_changes())  # looking lets go of what is too old
    assert told.names == now
    assert num_told > 20
    tier.close(soon())


def test_a_disk_that_is_warm_after_a_restart_tells_of_what_it_has(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    store(tier, range(10))
    assert tier.take_changes() is None, "nobody watched"
    tier.close(soon())
    tier = open_tier(tmp_path)
    told = Told(tier.watch(nobody))
    assert told.names == {name_of(number) for number in range(10)}
    store(tier, range(10, 13))
    (file, *_) = segment_files(tmp_path)
    file.write_bytes(bytes(file.stat().st_size))
    assert not load(tier, 0), "its bytes are gone"
    told.hear(tier.take_changes())
    assert told.names == {name_of(number) for number in range(1, 13)} == held(tier)
    tier.unwatch()
    store(tier, [20])
    assert tier.take_changes() is None
    tier.close(soon())


def test_a_store_tells_of_its_own_tiers_and_not_of_what_all_workers_share(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    memory = PoolMemory.create(4, BLOCK_BYTES)
    host, disk = HostTier(8 * BLOCK_BYTES, BLOCK_BYTES), open_tier(tmp_path / "disk")
    shared = SharedStore(tmp_path / "shared", 1 << 24, BLOCK_BYTES, "tiny float32")
    blocks = BlockStore(memory, [host, disk, shared])
    woken = threading.Event()
    assert {name: each.names for name, each in blocks.watch(woken.set).items()} == {"host": [], "disk": []}
    memory.blocks[0] = block_of(name_of(0))
    blocks.save([Unsaved(name_of(0), 0, int(memory.generations[0]))])
    assert woken.wait(10)
    changes: dict[str, dict[bytes, bool]] = {}
    deadline = time.monotonic() + 10
    while len(changes) < 2:
        assert time.monotonic() < deadline
        changes |= {name: each.names for name, each in blocks.take_changes().items()}
        time.sleep(0.001)
    assert changes == {"host": {name_of(0): True}, "disk": {name_of(0): True}}
    blocks.close(soon())
    memory.close()
