"""Who owns which KV block. Bookkeeping only: no tensor, no I/O.

A block is in exactly one state, the highest that applies:

    FREE  <  CACHED  <  LEASED  <  HELD  <  QUARANTINED
    nobody   has a      kept for   a        a transfer that may still touch it
    wants it name       a reader   request  is unresolved

It can be handed out again in the first two only: a cached block without an owner is evicted, longest unused first.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from baton.errors import BatonError
from engine.requests import BlockCounts

Generations = NDArray[np.uint64]


class BlockAccountingError(BatonError):
    """The books of the pool contradict themselves: a bug, and reason enough to stop the worker."""


class BlockState(IntEnum):
    FREE = 0
    CACHED = 1
    LEASED = 2
    HELD = 3
    QUARANTINED = 4


class OwnerKind(IntEnum):
    """Each kind's value is the state that it puts a block in."""

    LEASE = BlockState.LEASED
    REQUEST = BlockState.HELD
    QUARANTINE = BlockState.QUARANTINED


class Owner(NamedTuple):
    kind: OwnerKind
    id: str


class BlockAllocator:
    """Owners of every block of a pool. Each operation costs time in proportion to the blocks it names.

    `generations`, uint64 `[num_blocks]`, may lie in shared memory: it is written in place, before a block is handed
    out for new content, so that a reader who compares before and after a copy notices that the block was reused.
    """

    def __init__(self, num_blocks: int, generations: Generations | None = None) -> None:
        if generations is None:
            generations = np.zeros(num_blocks, np.uint64)
        if generations.shape != (num_blocks,) or generations.dtype != np.uint64:
            raise BlockAccountingError(f"generations must be uint64 [{num_blocks}]")
        self.num_blocks = num_blocks
        self.generations = generations
        self.on_evict: Callable[[int], None] = lambda block: None
        """Called with a cached block that is about to lose its name; the prefix cache sets it."""
        self._free = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._states = [BlockState.FREE] * num_blocks
        self._tally = [num_blocks, 0, 0, 0, 0]
        self._cached = bytearray(num_blocks)
        self._references = {kind: [0] * num_blocks for kind in OwnerKind}
        self._blocks_of: dict[Owner, dict[int, None]] = {}

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._free) + len(self._evictable)

    def next_evicted(self, count: int) -> list[int]:
        """The cached blocks that would be evicted if `count` blocks were allocated now, first one first."""
        return list(islice(self._evictable, max(0, count - len(self._free))))

    def counts(self) -> BlockCounts:
        free, cached, leased, held, quarantined = self._tally
        return BlockCounts(self.num_blocks, free, cached, held, leased, quarantined)

    def owns_any(self, owner: Owner) -> bool:
        return owner in self._blocks_of

    def owners(self) -> list[Owner]:
        return list(self._blocks_of)

    def blocks_of(self, owner: Owner) -> list[int]:
        return list(self._blocks_of.get(owner, ()))

    def is_cached(self, block: int) -> bool:
        return bool(self._cached[block])

    def is_evictable(self, block: int) -> bool:
        """Cached and without an owner."""
        return self._states[block] is BlockState.CACHED

    def is_private(self, block: int) -> bool:
        """One owner, and nobody can find it by name: that owner may write into it."""
        return not self._cached[block] and sum(counts[block] for counts in self._references.values()) == 1

    def allocate(self, owner: Owner, count: int) -> list[int] | None:
        """`count` blocks for new content, owned by `owner`; None, and nothing changed, when there are not so many."""
        if count > self.num_available:
            return None
        if count == 0:
            return []
        while len(self._free) < count:
            self._evict_one()
        blocks = [self._free.pop() for _ in range(count)]
        self.generations[blocks] += np.uint64(1)
        self._add(owner, blocks)
        return blocks

    def share(self, owner: Owner, blocks: Iterable[int]) -> None:
        """Make `owner` one more owner of blocks that have a content."""
        blocks = list(blocks)
        for block in blocks:
            if self._states[block] is BlockState.FREE:
                raise BlockAccountingError(f"block {block} is free, there is nothing to share")
        self._add(owner, blocks)

    def release(self, owner: Owner, blocks: Sequence[int]) -> None:
        """`owner` gives up some of its blocks. Of those that stay cached, the last is evicted first.

        Blocks of a prompt are passed in their order: a name is of no use without all those before it.
        """
        owned = self._blocks_of.get(owner, {})
        references = self._references[owner.kind]
        for block in reversed(blocks):
            if block not in owned:
                raise BlockAccountingError(f"block {block} released by {owner.kind.name}, which does not own it")
            del owned[block]
            references[block] -= 1
            self._settle(block)
        if not owned:
            self._blocks_of.pop(owner, None)

    def release_all(self, owner: Owner) -> bool:
        """`owner` gives up everything. False when it had nothing."""
        blocks = self.blocks_of(owner)
        self.release(owner, blocks)
        return bool(blocks)

    def transfer(self, source: Owner, target: Owner) -> bool:
        """Everything of `source` becomes `target`'s, with no moment between. False when there was nothing."""
        blocks = self.blocks_of(source)
        self._add(target, blocks)
        self.release(source, blocks)
        return bool(blocks)

    def mark_cached(self, block: int) -> None:
        """The block has a name now: it outlives its owners until it is evicted."""
        if self._states[block] is BlockState.FREE:
            raise BlockAccountingError(f"block {block} is free, it cannot be cached")
        self._cached[block] = True
        self._settle(block)

    def check(self) -> None:
        """Recount everything. Raises BlockAccountingError. Time in proportion to the pool: for idle moments."""
        references = {kind: [0] * self.num_blocks for kind in OwnerKind}
        for owner, blocks in self._blocks_of.items():
            if not blocks:
                raise BlockAccountingError(f"a {owner.kind.name} without blocks is still listed")
            for block in blocks:
                references[owner.kind][block] += 1
        if references != self._references:
            raise BlockAccountingError("reference counts differ from the owners' lists")
        states = [self._state(block) for block in range(self.num_blocks)]
        free = [block for block, state in enumerate(states) if state is BlockState.FREE]
        cached = [block for block, state in enumerate(states) if state is BlockState.CACHED]
        if states != self._states or [states.count(state) for state in BlockState] != self._tally:
            raise BlockAccountingError("states of blocks differ from their owners")
        if sorted(self._free) != free or sorted(self._evictable) != cached:
            raise BlockAccountingError("the free list or the eviction order lost or doubled a block")

    def _add(self, owner: Owner, blocks: list[int]) -> None:
        if not blocks:
            return
        owned = self._blocks_of.setdefault(owner, {})
        references = self._references[owner.kind]
        for block in blocks:
            if block in owned:
                raise BlockAccountingError(f"block {block} given twice to the same {owner.kind.name}")
            owned[block] = None
            references[block] += 1
            self._settle(block)

    def _evict_one(self) -> None:
        block = next(iter(self._evictable))
        self.on_evict(block)
        self._cached[block] = False
        self._settle(block)

    def _state(self, block: int) -> BlockState:
        if self._references[OwnerKind.QUARANTINE][block]:
            return BlockState.QUARANTINED
        if self._references[OwnerKind.REQUEST][block]:
            return BlockState.HELD
        if self._references[OwnerKind.LEASE][block]:
            return BlockState.LEASED
        return BlockState.CACHED if self._cached[block] else BlockState.FREE

    def _settle(self, block: int) -> None:
        """Bring state, tally, free list and eviction order up to date after a change to one block."""
        before, after = self._states[block], self._state(block)
        if before is after:
            return
        self._states[block] = after
        self._tally[before] -= 1
        self._tally[after] += 1
        if before is BlockState.CACHED:
            del self._evictable[block]
        if after is BlockState.CACHED:
            self._evictable[block] = None
        elif after is BlockState.FREE:
            self._free.append(block)
