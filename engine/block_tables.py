"""Blocks of sequences: from the prefix cache, fresh, copied on write, published, leased, quarantined. Bookkeeping only.

One rule stands above all: a sequence writes only into blocks that nobody else can read. Hits of the prefix cache are
whole blocks before the first position it computes, with one exception: when its last token is cached too, that token
is computed again for its logits, in a copy of the shared block.
"""

from collections.abc import Callable
from collections.abc import Sequence as Many

from engine.blocks import BlockAllocator, Owner, OwnerKind
from engine.in_flight import StepBlocks
from engine.prefix_cache import NameChain, PrefixCache
from engine.requests import Placement
from engine.sequence import Sequence


def fence_id(request_id: str) -> str:
    """What the blocks are resolved by that a request parted with; it goes on, and may come to have others."""
    return f"{request_id} (fenced)"


class BlockTables:
    """Gives blocks to sequences and takes them back. `shareable_tokens` maps the length of a prompt to the number of
    leading tokens whose KV depends on nothing but the tokens up to them."""

    def __init__(self, allocator: BlockAllocator, page_size: int, shareable_tokens: Callable[[int], int]) -> None:
        self.allocator = allocator
        self.cache = PrefixCache(allocator)
        self.page_size = page_size
        self._shareable_tokens = shareable_tokens

    def num_blocks_for(self, num_positions: int) -> int:
        return -(-num_positions // self.page_size)

    def names(self, cache_root: bytes, num_prompt_tokens: int) -> NameChain:
        return NameChain(cache_root, self.page_size, self._shareable_tokens(num_prompt_tokens))

    def num_cached_tokens(self, token_ids: Many[int], cache_root: bytes, num_prompt_tokens: int) -> int:
        names = self.names(cache_root, num_prompt_tokens).extend(token_ids)
        return len(self.cache.lookup(names)) * self.page_size

    def admit(self, sequence: Sequence, step: StepBlocks) -> bool:
        """Blocks for every token that the sequence has, cached ones first. False, and nothing changed: not enough.

        Everything at once: a prompt that has begun never waits for blocks while it keeps others from having them.
        One with a placement takes no block of this pool; what the cache has is copied to where it lacks.
        """
        if sequence.request.placement is not None:
            self._place(sequence, sequence.request.placement, step)
            return True
        hits = self.cache.lookup(sequence.names.extend(sequence.token_ids))
        total = self.num_blocks_for(sequence.num_positions_at_start)
        copy_last = not sequence.awaits_kv and len(hits) * self.page_size == len(sequence.token_ids)
        if copy_last and not self._fits(hits, total + 1):
            # Source and copy do not fit side by side: compute the whole last block again.
            hits.pop()
            copy_last = False
        if not self._fits(hits, total):
            return False
        self.allocator.share(sequence.owner, hits)
        fresh = self.allocator.allocate(sequence.owner, total - len(hits) + copy_last)
        assert fresh is not None, "counted just above"
        sequence.settle(len(hits) * self.page_size - copy_last)
        if copy_last:
            self._copy(sequence, hits.pop(), fresh[0], step)
        sequence.num_final_blocks = len(hits)
        sequence.block_ids = hits + fresh
        return True

    def shortfall(self, sequence: Sequence) -> int:
        """Blocks that have to come back before `admit` can succeed; 0 or less: none."""
        if sequence.request.placement is not None:
            return 0
        hits = self.cache.lookup(sequence.names.extend(sequence.token_ids))
        return self._num_lacking(hits, self.num_blocks_for(sequence.num_positions_at_start))

    def make_writable(self, sequence: Sequence, step: StepBlocks) -> bool:
        """See that the block of the next position exists and is the sequence's alone. False: no block left."""
        index = sequence.num_launched // self.page_size
        if sequence.num_final_blocks <= index < len(sequence.block_ids):
            return True
        fresh = self.allocator.allocate(sequence.owner, 1)
        if fresh is None:
            return False
        if index == len(sequence.block_ids):
            sequence.block_ids.append(fresh[0])
            return True
        self._copy(sequence, sequence.block_ids[index], fresh[0], step)
        sequence.block_ids[index] = fresh[0]
        sequence.num_final_blocks = index
        return True

    def make_room(self, sequence: Sequence, num_positions: int, max_blocks: int) -> int:
        """Blocks for a writable position and those after it, at most `max_blocks` new ones. Returns how many fit.

        All are the sequence's alone: what others may read ends before the writable block.
        """
        needed = self.num_blocks_for(sequence.num_launched + num_positions) - len(sequence.block_ids)
        fresh = self.allocator.allocate(sequence.owner, max(0, min(needed, max_blocks)))
        assert fresh is not None, "as many were available"
        sequence.block_ids += fresh
        return min(num_positions, len(sequence.block_ids) * self.page_size - sequence.num_launched)

    def publish(self, sequence: Sequence) -> list[tuple[bytes, int]]:
        """Let others find the blocks that are full and computed by now. Returns names and blocks that are new."""
        num_full = sequence.num_computed // self.page_size
        if num_full <= sequence.num_final_blocks:
            return []
        names = sequence.names.extend(sequence.token_ids)
        filled = range(sequence.num_final_blocks, min(num_full, len(names)))
        sequence.num_final_blocks = num_full
        pairs = [(names[index], sequence.block_ids[index]) for index in filled]
        return [(name, block) for name, block in pairs if self.cache.insert(name, block, sequence.request.tenant)]

    def final_blocks(self, sequence: Sequence) -> list[tuple[bytes, int]]:
        """Names and blocks of what others may read of it."""
        names = sequence.names.extend(sequence.token_ids)
        return list(zip(names, sequence.block_ids[: sequence.num_final_blocks], strict=False))

    def names_behind_cached(self, sequence: Sequence) -> list[bytes]:
        """Names of the full blocks of what it has that the pool does not hold."""
        names = sequence.names.extend(sequence.token_ids)
        return names[len(self.cache.lookup(names)) :]

    def hold_for_step(self, sequence: Sequence) -> None:
        """A step in flight still writes into some blocks: whoever they go to, they are nobody's to fill before then."""
        if sequence.in_flight and sequence.last_step is not None:
            assert sequence.request.placement is None, "a runner that launches works on a device, where none is placed"
            first = sequence.num_computed // self.page_size
            sequence.last_step.hold(sequence.block_ids[first : self.num_blocks_for(sequence.num_launched)])

    def release(self, sequence: Sequence) -> None:
        self.allocator.release_all(sequence.owner)
        sequence.block_ids = []
        sequence.num_final_blocks = 0
        sequence.settle(0)

    def lease(self, sequence: Sequence) -> None:
        """The blocks stay for a reader, under the id of the request."""
        self.allocator.transfer(sequence.owner, Owner(OwnerKind.LEASE, sequence.id))

    def quarantine(self, sequence: Sequence, quarantine_id: str) -> None:
        """Keep what somebody outside may still write into. A peer that computes there reads the final ones before."""
        self.allocator.transfer(sequence.owner, Owner(OwnerKind.QUARANTINE, quarantine_id))
        self.release(sequence)

    def lease_cached(self, lease_id: str, names: Many[bytes]) -> list[int]:
        """The cached ones of these leading blocks stay for a reader."""
        hits = self.cache.lookup(names)
        self.allocator.share(Owner(OwnerKind.LEASE, lease_id), hits)
        return hits

    def release_lease(self, request_id: str) -> bool:
        return self.allocator.release_all(Owner(OwnerKind.LEASE, request_id))

    def quarantine_lease(self, request_id: str) -> bool:
        return self.allocator.transfer(Owner(OwnerKind.LEASE, request_id), Owner(OwnerKind.QUARANTINE, request_id))

    def resolve(self, request_id: str) -> bool:
        return self.allocator.release_all(Owner(OwnerKind.QUARANTINE, request_id))

    def check(self) -> None:
        self.allocator.check()
        self.cache.check()

    def _fits(self, hits: list[int], total: int) -> bool:
        return self._num_lacking(hits, total) <= 0

    def _num_lacking(self, hits: list[int], total: int) -> int:
        """Beside the hits and what is available; an unowned hit cannot be evicted to make room for itself."""
        unowned_hits = sum(self.allocator.is_evictable(block) for block in hits)
        return total - len(hits) - (self.allocator.num_available - unowned_hits)

    def _place(self, sequence: Sequence, placement: Placement, step: StepBlocks) -> None:
        first = placement.num_cached_blocks
        hits = self.cache.lookup(sequence.names.extend(sequence.token_ids))
        sequence.block_ids = list(placement.block_ids)
        step.copies.extend(zip(hits[first:], sequence.block_ids[first:], strict=False))
        step.hold(hits[first:])
        # The last token is computed in any case, for its logits; its block is one of those that may be written.
        sequence.settle(min(max(first, len(hits)) * self.page_size, len(sequence.token_ids) - 1))
        sequence.num_final_blocks = first
        sequence.names = NameChain(b"", self.page_size, max_tokens=0)  # nobody finds another pool's blocks here

    def _copy(self, sequence: Sequence, source: int, target: int, step: StepBlocks) -> None:
        """The step keeps the source: the same plan, or a later one, could hand it out before the copy is made."""
        step.copies.append((source, target))
        step.hold([source])
        self.allocator.release(sequence.owner, [source])
