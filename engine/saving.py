"""Which blocks the store is to keep: each as it gets its name, or those about to be evicted. Bookkeeping only."""

from collections.abc import Iterable

from engine.block_tables import BlockTables
from engine.limits import SchedulerLimits
from engine.requests import Named
from engine.sequence import Sequence


class Saver:
    """What it returns is for the store; without a store that is nothing."""

    def __init__(self, tables: BlockTables, limits: SchedulerLimits, has_store: bool, at_eviction: bool) -> None:
        self._tables = tables
        self._has_store = has_store
        self._save_ahead = _most_taken(limits, tables.allocator.num_blocks) if has_store and at_eviction else 0
        """Blocks next to be evicted that are to be saved by then; 0: each is saved when it gets its name."""

    @property
    def num_too_late(self) -> int:
        """Blocks that were evicted before it was said that they should be saved."""
        return self._tables.cache.num_evicted_unsaid if self._save_ahead else 0

    def publish(self, sequence: Sequence) -> list[Named]:
        """Let others find what it has computed."""
        published = self._tables.publish(sequence)
        return [] if self._save_ahead else self.named(published, sequence.request.tenant)

    def at_risk(self) -> list[Named]:
        """Blocks that the steps to come may evict."""
        if not self._save_ahead:
            return []
        newly = self._tables.cache.newly_at_risk(self._save_ahead)
        return [each for name, block, tenant in newly for each in self.named([(name, block)], tenant)]

    def named(self, named: Iterable[tuple[bytes, int]], tenant: bytes) -> list[Named]:
        if not self._has_store:
            return []
        generations = self._tables.allocator.generations
        return [Named(name, block, int(generations[block]), tenant) for name, block in named]


def _most_taken(limits: SchedulerLimits, num_blocks: int) -> int:
    """Blocks that a step may take at once: for the longest prompt, a batch and a token of everybody; at most half."""
    num_tokens = limits.max_model_tokens + limits.max_batch_tokens
    return min(num_tokens // limits.page_size + limits.max_running, num_blocks // 2)
