"""Disk tiers for tests: small, with blocks whose right bytes anybody can tell from their names."""

import functools
import time
from pathlib import Path

import numpy as np

from kvtransfer.tiers.disk import DiskTier
from kvtransfer.tiers.opening import charge
from kvtransfer.tiers.records import RecordFormat
from kvtransfer.tiers.tenants import NOBODY

BLOCK_BYTES = 1536
"""A multiple of 512 and not of 4096."""
SLOT_BYTES = RecordFormat(bytes(16), BLOCK_BYTES).slot_bytes
SLOTS = 4
"""Of a segment."""


def capacity_of(num_segments: int, slots: int = SLOTS, slot_bytes: int = SLOT_BYTES) -> int:
    return (64 << 10) + num_segments * charge(slots * slot_bytes)


def open_tier(folder: Path, num_segments: int = 6, block_bytes: int = BLOCK_BYTES, **options) -> DiskTier:
    slot_bytes = RecordFormat(bytes(16), block_bytes).slot_bytes
    options.setdefault("capacity_bytes", capacity_of(num_segments, slot_bytes=slot_bytes))
    options.setdefault("layout_fingerprint", "tiny float32")
    options.setdefault("num_writers", 1)
    options.setdefault("num_readers", 2)
    return DiskTier(folder, block_bytes=block_bytes, segment_bytes=SLOTS * slot_bytes, **options)


@functools.lru_cache(1024)
def block_of(name: bytes, block_bytes: int = BLOCK_BYTES) -> np.ndarray:
    return np.random.default_rng(list(name)).integers(0, 256, block_bytes, np.uint8)


def name_of(number: int) -> bytes:
    return number.to_bytes(16, "little")


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


def settle(tier: DiskTier) -> None:
    """Until everything taken is written or given up."""
    deadline = soon()
    while tier._pending:
        assert time.monotonic() < deadline, "the tier does not get done"
        time.sleep(0.0005)


def store(tier: DiskTier, numbers, tenant: bytes = NOBODY) -> None:
    """Put and wait, one by one, so that the order on disk is the order here."""
    for number in numbers:
        tier.put(name_of(number), block_of(name_of(number), tier.block_bytes), tenant)
        settle(tier)


def load(tier: DiskTier, number: int) -> bool:
    """Whether the tier has the block; fails when it gives wrong bytes."""
    into = np.zeros(tier.block_bytes, np.uint8)
    is_loaded = tier.get(name_of(number), into, soon())
    assert not is_loaded or (into == block_of(name_of(number), tier.block_bytes)).all(), "WRONG BYTES"
    return is_loaded


def loaded(tier: DiskTier, numbers) -> list[int]:
    return [number for number in numbers if load(tier, number)]


def count(tier: DiskTier, what: str) -> float:
    return tier.counters[f"kv_disk_{what}"]


def allocated_bytes(folder: Path) -> int:
    """What everything below the folder takes on the disk."""
    return sum(path.lstat().st_blocks * 512 for path in (folder, *folder.rglob("*")))


def segment_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("segment-*.kv"))
