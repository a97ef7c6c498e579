"""The blocks of one pool that live on in tiers: saved when they get their name, loaded when that is sooner than
computing them.

    pool ──save: copied while the generation stands──▶ host memory, disk, shared store
    pool ◀──load: checked, then copied up the tiers────┘

Saving is a reader like any other (a seqlock's): a block that is handed out again meanwhile is dropped, not torn.
Loading writes into blocks that a request has reserved for it.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from baton.name_changes import Changed, Held
from kvtransfer.memory import PoolMemory
from kvtransfer.tiers.base import OwnTier, Tier, TierState
from kvtransfer.tiers.tenants import NOBODY

log = logging.getLogger(__name__)

LOAD_THREADS, ASK_THREADS = 4, 4
MAX_UNSAVED = 8192
"""Blocks that wait to be saved; what comes on top is not kept."""
ASSUMED_BYTES_PER_S = 1e9
"""Of every tier, until its first load was measured."""
_WEIGHT = 0.2
_ON = {TierState.ON: 1.0, TierState.READ_ONLY: 0.5, TierState.OFF: 0.0}


class Unsaved(NamedTuple):
    """A block of the pool that is to be kept: its content is what the name says while it has this generation."""

    name: bytes
    block_id: int
    generation: int
    tenant: bytes = NOBODY


class BlockStore:
    """Tiers behind one pool, fastest first.

    `worth_loading` may be called on any thread, the others on the event loop's.
    """

    def __init__(self, memory: PoolMemory, tiers: Sequence[Tier]) -> None:
        self._memory = memory
        self._tiers = tuple(tiers)
        self._own = [tier for tier in tiers if isinstance(tier, OwnTier)]
        self._counters = {"kv_blocks_loaded": 0.0, "kv_loads_missed": 0.0, "kv_saves_dropped": 0.0}
        self._counters |= {"kv_pins": 0.0, "kv_pins_refused": 0.0}
        self._block_s = {tier.name: memory.block_bytes / ASSUMED_BYTES_PER_S for tier in tiers}
        self._unsaved: deque[Unsaved] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._asked = [tier for tier in tiers if type(tier).find is not Tier.find]
        self._askers = ThreadPoolExecutor(ASK_THREADS, thread_name_prefix="kv-ask")
        self._loaders = ThreadPoolExecutor(LOAD_THREADS, thread_name_prefix="kv-load")
        self._saver = threading.Thread(target=self._save_all, name="kv-save", daemon=True)
        self._saver.start()

    def worth_loading(self, names: Sequence[bytes], compute_s: float | None) -> int:
        """How many of these leading blocks come sooner than they are computed, each in `compute_s` (None: unknown).

        As many as save the most time altogether: behind fast blocks slow ones may not pay any more.
        """
        held = [tier.holds(names) for tier in self._tiers]
        saved_s, best_s, best = 0.0, 0.0, 0
        for index in range(len(names)):
            holder = next((tier for tier, row in zip(self._tiers, held, strict=True) if row[index]), None)
            if holder is None:
                break
            saved_s += (compute_s if compute_s is not None else math.inf) - self._block_s[holder.name]
            if saved_s >= best_s:
                best_s, best = saved_s, index + 1
        return best

    @property
    def must_ask(self) -> bool:
        """Whether a tier knows of blocks only after `look_up`."""
        return bool(self._asked)

    async def look_up(self, names: Sequence[bytes], deadline: float) -> None:
        """Have the tiers that others write into, too, find out which of these leading blocks they hold."""
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(self._askers, tier.find, names, deadline) for tier in self._asked))

    def save(self, blocks: Sequence[Unsaved]) -> None:
        """Keep these, soon. Never waits: what there is no room for is dropped."""
        with self._wake:
            room = MAX_UNSAVED - len(self._unsaved)
            # The end of a prompt first: what comes later is kept for longer, and a block needs all those before it.
            self._unsaved.extend(reversed(blocks[:room]))
            self._counters["kv_saves_dropped"] += max(0, len(blocks) - room)
            self._wake.notify()

    async def load(
        self,
        names: Sequence[bytes],
        block_ids: Sequence[int],
        deadline: float,
        cancelled: threading.Event,
        tenant: bytes = NOBODY,
    ) -> int:
        """Write blocks into the pool; returns how many leading ones are right. Nothing writes any more by then.

        In faster tiers they are `tenant`'s from then on. `deadline` in `time.monotonic()` seconds; once `cancelled` is
        set, no further block is begun.
        """
        loading = _Loading(list(zip(names, block_ids, strict=True)), deadline, cancelled, tenant)
        loop = asyncio.get_running_loop()
        width = min(LOAD_THREADS, len(loading.blocks))
        work = [loop.run_in_executor(self._loaders, self._load_some, loading, first, width) for first in range(width)]
        outcomes = await asyncio.gather(*work, return_exceptions=True)
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if errors:
            raise errors[0]
        self._count("kv_blocks_loaded", loading.num_right)
        self._count("kv_loads_missed", len(names) - loading.num_right)
        return loading.num_right

    @property
    def max_pinned(self) -> int:
        """Blocks that pins may keep together: those of the tier that has the most room for them."""
        return max(tier.pins.max_names for tier in self._tiers)

    def pin(self, key: str, names: Sequence[bytes], ttl_s: float) -> bool:
        """Keep these blocks, stored already or still to come, for `ttl_s` in every tier that has room for them.

        False, counted, when none has. Never waits.
        """
        is_kept = [tier.pin_prefix(key, names, ttl_s) for tier in self._tiers]
        self._count("kv_pins" if any(is_kept) else "kv_pins_refused", 1)
        return any(is_kept)

    def unpin(self, key: str) -> None:
        """Let them go the way of all others. Nothing happens for an unknown key."""
        for tier in self._tiers:
            tier.unpin_prefix(key)

    def unpin_all(self, prefix: str = "") -> None:
        """The same for every key that begins so."""
        for key in {key for tier in self._tiers for key in tier.pins.keys if key.startswith(prefix)}:
            self.unpin(key)

    def watch(self, on_first: Callable[[], None]) -> dict[str, Held]:
        """What each tier holds that is this worker's alone, by its name; `take_changes` tells what changes after that.

        `on_first` is called in some thread, and must not wait, when there comes to be something to take.
        """
        return {tier.name: tier.watch(on_first) for tier in self._own}

    def take_changes(self) -> dict[str, Changed]:
        """Of the tiers with any, since this was last called; only while they are watched."""
        taken = ((tier.name, tier.take_changes()) for tier in self._own)
        return {name: changed for name, changed in taken if changed is not None}

    def unwatch(self) -> None:
        for tier in self._own:
            tier.unwatch()

    def close(self, deadline: float) -> None:
        """Save what waits as far as the deadline allows, and close the tiers. No load is running."""
        self.unwatch()
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._saver.join(max(0.0, deadline - time.monotonic()))
        for threads in (self._askers, self._loaders):
            threads.shutdown(wait=True, cancel_futures=True)
        for tier in self._tiers:
            tier.close(deadline)

    @property
    def counters(self) -> dict[str, float]:
        """Its own and those of the tiers; of each `kv_<tier>_on` (1 on, 0.5 read-only, 0 off), `_pinned` and
        `_capacity_bytes`."""
        result = dict(self._counters)
        for tier in self._tiers:
            result |= tier.counters
            result[f"kv_{tier.name}_on"] = _ON[tier.status.state]
            result[f"kv_{tier.name}_pinned"] = len(tier.pins)
            result[f"kv_{tier.name}_capacity_bytes"] = tier.capacity_bytes
        return result

    # -- Saving ------------------------------------------------------------------------------------------------------

    def _save_all(self) -> None:
        copy = np.empty(self._memory.block_bytes, np.uint8)
        while True:
            with self._wake:
                while not self._unsaved and not self._stopping:
                    self._wake.wait()
                if not self._unsaved:
                    return
                block = self._unsaved.popleft()
            try:
                self._save_one(block, copy)
            except Exception:  # of one block: without its thread a tier would look alive and keep nothing any more
                log.exception("a KV block could not be saved")
                self._count("kv_saves_dropped", 1)

    def _save_one(self, block: Unsaved, copy: npt.NDArray[np.uint8]) -> None:
        missing = [tier for tier in self._tiers if not tier.holds([block.name])[0]]
        if not missing:
            return
        generations = self._memory.generations
        np.copyto(copy, self._memory.blocks[block.block_id])
        if generations[block.block_id] != block.generation:
            self._count("kv_saves_dropped", 1)
            return
        for tier in missing:
            tier.put(block.name, copy, block.tenant)

    # -- Loading -----------------------------------------------------------------------------------------------------

    def _load_some(self, loading: "_Loading", first: int, step: int) -> None:
        for index in range(first, len(loading.blocks), step):
            if index >= loading.num_right or loading.cancelled.is_set():
                loading.missed(index)
                return
            name, block_id = loading.blocks[index]
            if not self._load_one(name, block_id, loading, step):
                loading.missed(index)
                return

    def _load_one(self, name: bytes, block_id: int, loading: "_Loading", num_threads: int) -> bool:
        into = self._memory.blocks[block_id]
        for position, tier in enumerate(self._tiers):
            start = time.monotonic()
            if tier.get(name, into, loading.deadline):
                seconds = (time.monotonic() - start) / num_threads
                self._block_s[tier.name] += _WEIGHT * (seconds - self._block_s[tier.name])
                for faster in self._tiers[:position]:
                    faster.put(name, into, loading.tenant)
                return True
        return False

    def _count(self, name: str, amount: float) -> None:
        with self._wake:
            self._counters[name] += amount


class _Loading:
    """One load, shared by its threads."""

    def __init__(
        self, blocks: list[tuple[bytes, int]], deadline: float, cancelled: threading.Event, tenant: bytes
    ) -> None:
        self.blocks = blocks
        self.tenant = tenant
        self.deadline = deadline
        self.cancelled = cancelled
        self.num_right = len(blocks)
        """Blocks before the first that is missing: what lies behind it is of no use."""
        self._lock = threading.Lock()

    def missed(self, index: int) -> None:
        with self._lock:
            self.num_right = min(self.num_right, index)
