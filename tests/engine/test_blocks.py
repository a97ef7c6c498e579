"""Every block has owners or none, and the books always show it."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.blocks import BlockAccountingError, BlockAllocator, Owner, OwnerKind
from engine.prefix_cache import PrefixCache
from engine.requests import BlockCounts

ALICE, BOB = Owner(OwnerKind.REQUEST, "alice"), Owner(OwnerKind.REQUEST, "bob")
LEASE, QUARANTINE = Owner(OwnerKind.LEASE, "alice"), Owner(OwnerKind.QUARANTINE, "alice")


def test_a_block_goes_through_all_states_and_the_pool_is_whole_again() -> None:
    allocator = BlockAllocator(4)
    # 1. A request takes three blocks.
    first, second, third = allocator.allocate(ALICE, 3) or []
    assert allocator.counts() == BlockCounts(total=4, free=1, cached=0, held=3, leased=0, quarantined=0)
    # 2. One of them gets a name, another request shares it.
    allocator.mark_cached(first)
    allocator.share(BOB, [first])
    assert allocator.counts().held == 3
    # 3. The first request hands over: the shared block is still held, the others are leased.
    assert allocator.transfer(ALICE, LEASE)
    assert allocator.counts() == BlockCounts(total=4, free=1, cached=0, held=1, leased=2, quarantined=0)
    # 4. The lease expires while its reader is silent: quarantine goes before every other state.
    assert allocator.transfer(LEASE, QUARANTINE)
    assert allocator.counts() == BlockCounts(total=4, free=1, cached=0, held=0, leased=0, quarantined=3)
    # 5. The reader is gone: what has a name stays, what has not is free.
    assert allocator.release_all(QUARANTINE)
    allocator.release_all(BOB)
    assert allocator.counts() == BlockCounts(total=4, free=3, cached=1, held=0, leased=0, quarantined=0)
    # 6. Under pressure the cached block is evicted too: the pool is whole.
    assert sorted(allocator.allocate(BOB, 4) or []) == sorted({first, second, third} | set(range(4)))
    allocator.release_all(BOB)
    assert allocator.counts().free == 4
    allocator.check()


def test_a_reader_sees_another_generation_once_a_block_is_handed_out_again() -> None:
    shared_memory = np.full(3, 7, np.uint64)
    allocator = BlockAllocator(3, shared_memory)
    blocks = allocator.allocate(ALICE, 3) or []
    assert shared_memory.tolist() == [8, 8, 8]
    allocator.release_all(ALICE)
    assert shared_memory.tolist() == [8, 8, 8], "the content is still what it was"
    again = allocator.allocate(BOB, 1) or []
    assert shared_memory[again[0]] == 9
    assert sorted(shared_memory[[block for block in blocks if block != again[0]]].tolist()) == [8, 8]


def test_sharing_a_cached_block_keeps_its_generation() -> None:
    allocator = BlockAllocator(1)
    blocks = allocator.allocate(ALICE, 1) or []
    allocator.mark_cached(blocks[0])
    allocator.release_all(ALICE)
    allocator.share(BOB, blocks)
    assert allocator.generations.tolist() == [1]


def test_too_large_an_allocation_changes_nothing() -> None:
    allocator = BlockAllocator(3)
    evicted: list[int] = []
    allocator.on_evict = evicted.append
    blocks = allocator.allocate(ALICE, 1) or []
    allocator.mark_cached(blocks[0])
    allocator.release_all(ALICE)
    allocator.allocate(BOB, 1)
    before = allocator.counts()
    assert allocator.allocate(ALICE, 3) is None
    assert (allocator.counts(), evicted, allocator.blocks_of(ALICE)) == (before, [], [])


def test_the_longest_unused_block_is_evicted_first_and_within_a_prompt_the_last() -> None:
    allocator = BlockAllocator(4)
    evicted: list[int] = []
    allocator.on_evict = evicted.append
    old, new = allocator.allocate(ALICE, 2) or [], allocator.allocate(BOB, 2) or []
    for block in (*old, *new):
        allocator.mark_cached(block)
    allocator.release_all(ALICE)
    allocator.release_all(BOB)
    allocator.share(ALICE, old)
    allocator.release_all(ALICE)
    allocator.allocate(LEASE, 4)
    assert evicted == [new[1], new[0], old[1], old[0]]


def test_only_a_block_that_nobody_else_can_find_is_private() -> None:
    allocator = BlockAllocator(2)
    alone, shared = allocator.allocate(ALICE, 2) or []
    allocator.share(LEASE, [shared])
    assert allocator.is_private(alone)
    assert not allocator.is_private(shared)
    allocator.mark_cached(alone)
    assert not allocator.is_private(alone)


def test_releasing_what_is_not_owned_is_an_error_and_an_unknown_owner_has_nothing() -> None:
    allocator = BlockAllocator(2)
    blocks = allocator.allocate(ALICE, 1) or []
    with pytest.raises(BlockAccountingError):
        allocator.release(BOB, blocks)
    with pytest.raises(BlockAccountingError):
        allocator.share(ALICE, blocks)
    with pytest.raises(BlockAccountingError):
        allocator.share(BOB, [block for block in range(2) if block not in blocks])
    assert not allocator.release_all(BOB)
    assert not allocator.transfer(BOB, LEASE)
    allocator.check()


@pytest.mark.parametrize("damage", ["_free", "_evictable", "_tally", "_references", "_states", "_blocks_of"])
def test_check_notices_damaged_books(damage: str) -> None:
    allocator = BlockAllocator(4)
    blocks = allocator.allocate(ALICE, 2) or []
    allocator.mark_cached(blocks[0])
    allocator.release(ALICE, blocks[:1])
    allocator.check()
    {
        "_free": lambda: allocator._free.pop(),
        "_evictable": lambda: allocator._evictable.clear(),
        "_tally": lambda: allocator._tally.__setitem__(0, 3),
        "_references": lambda: allocator._references[OwnerKind.LEASE].__setitem__(3, 1),
        "_states": lambda: allocator._states.reverse(),
        "_blocks_of": lambda: allocator._blocks_of.clear(),
    }[damage]()
    with pytest.raises(BlockAccountingError):
        allocator.check()


def test_generations_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(BlockAccountingError):
        BlockAllocator(4, np.zeros(3, np.uint64))


NUM_BLOCKS = 6
owners = st.builds(Owner, st.sampled_from(OwnerKind), st.sampled_from(["a", "b"]))


class BlocksMachine(RuleBasedStateMachine):
    """Allocator and prefix cache against a model that keeps a set of owners per block."""

    @initialize()
    def start(self) -> None:
        self.allocator = BlockAllocator(NUM_BLOCKS)
        self.cache = PrefixCache(self.allocator)
        self.owners: dict[int, set[Owner]] = {block: set() for block in range(NUM_BLOCKS)}
        self.names: dict[int, bytes] = {}
        self.generations = [0] * NUM_BLOCKS
        self.unused: list[int] = []
        """Cached blocks without owner, longest unused first."""

    def drop(self, owner: Owner, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.owners[block].discard(owner)
            if not self.owners[block] and block in self.names:
                self.unused.append(block)

    @rule(owner=owners, count=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, owner: Owner, count: int) -> None:
        free = [block for block in self.owners if not self.owners[block] and block not in self.names]
        blocks = self.allocator.allocate(owner, count)
        if count > len(free) + len(self.unused):
            assert blocks is None
            return
        assert blocks is not None
        expected_evictions = self.unused[: max(0, count - len(free))]
        assert set(blocks) <= set(free) | set(expected_evictions)
        for block in expected_evictions:
            assert block in blocks
            del self.names[block]
            self.unused.remove(block)
        assert len(set(blocks)) == count
        for block in blocks:
            self.owners[block] = {owner}
            self.generations[block] += 1

    @rule(data=st.data(), owner=owners)
    def share(self, data: st.DataObject, owner: Owner) -> None:
        used = [b for b in self.owners if (self.owners[b] or b in self.names) and owner not in self.owners[b]]
        blocks = data.draw(st.lists(st.sampled_from(used), unique=True)) if used else []
        self.allocator.share(owner, blocks)
        for block in blocks:
            self.owners[block].add(owner)
            if block in self.unused:
                self.unused.remove(block)

    @rule(data=st.data(), owner=owners)
    def release_some(self, data: st.DataObject, owner: Owner) -> None:
        owned = [block for block in self.owners if owner in self.owners[block]]
        blocks = data.draw(st.lists(st.sampled_from(owned), unique=True)) if owned else []
        self.allocator.release(owner, blocks)
        self.drop(owner, blocks)

    @rule(owner=owners)
    def release_all(self, owner: Owner) -> None:
        blocks = self.allocator.blocks_of(owner)
        assert set(blocks) == {block for block in self.owners if owner in self.owners[block]}
        assert self.allocator.release_all(owner) == bool(blocks)
        self.drop(owner, blocks)

    @rule(source=owners, target_kind=st.sampled_from(OwnerKind))
    def transfer(self, source: Owner, target_kind: OwnerKind) -> None:
        target = Owner(target_kind, "new")
        blocks = self.allocator.blocks_of(source)
        if any(target in self.owners[block] for block in blocks):
            return
        assert self.allocator.transfer(source, target) == bool(blocks)
        for block in blocks:
            self.owners[block].add(target)
            self.owners[block].remove(source)

    @rule(data=st.data(), name=st.sampled_from([b"x", b"y", b"z"]))
    def name(self, data: st.DataObject, name: bytes) -> None:
        nameless = [block for block in self.owners if self.owners[block] and block not in self.names]
        if not nameless:
            return
        block = data.draw(st.sampled_from(nameless))
        is_first = name not in self.names.values()
        assert self.cache.insert(name, block) == is_first
        if is_first:
            self.names[block] = name

    @invariant()
    def books_match_the_model(self) -> None:
        if not hasattr(self, "owners"):
            return
        self.allocator.check()
        self.cache.check()
        kinds = {block: max((owner.kind for owner in self.owners[block]), default=None) for block in self.owners}
        nobodys = [block for block in self.owners if kinds[block] is None]
        assert self.allocator.counts() == BlockCounts(
            total=NUM_BLOCKS,
            free=sum(block not in self.names for block in nobodys),
            cached=sum(block in self.names for block in nobodys),
            held=sum(kind is OwnerKind.REQUEST for kind in kinds.values()),
            leased=sum(kind is OwnerKind.LEASE for kind in kinds.values()),
            quarantined=sum(kind is OwnerKind.QUARANTINE for kind in kinds.values()),
        )
        assert self.allocator.generations.tolist() == self.generations
        for block, name in self.names.items():
            assert self.cache.lookup([name]) == [block]

    def teardown(self) -> None:
        if hasattr(self, "owners"):
            for owner in self.allocator.owners():
                self.allocator.release_all(owner)
            counts = self.allocator.counts()
            assert counts.free + counts.cached == NUM_BLOCKS


BlocksMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None, derandomize=True)
TestBlocksMachine = BlocksMachine.TestCase
