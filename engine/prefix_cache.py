"""Which block holds which content, by chained name (`baton.block_names`). Bookkeeping only.

The allocator owns the blocks and the order of eviction; this knows the names.
"""

from collections.abc import Sequence
from typing import NamedTuple

from baton.block_names import block_name
from baton.name_changes import Held, NameChanges
from engine.blocks import BlockAccountingError, BlockAllocator


class NameChain:
    """Names of the full blocks of one growing token sequence, each computed once."""

    def __init__(self, root: bytes, page_size: int, max_tokens: int) -> None:
        """Tokens from `max_tokens` on stay unnamed: their KV depends on more than the tokens before them."""
        self.names: list[bytes] = []
        self._root = root
        self._page_size = page_size
        self._max_blocks = max(0, max_tokens) // page_size

    def extend(self, token_ids: Sequence[int]) -> list[bytes]:
        """All names, after naming those blocks that `token_ids`, the whole sequence, has filled since."""
        size = self._page_size
        for index in range(len(self.names), min(len(token_ids) // size, self._max_blocks)):
            parent = self.names[-1] if self.names else self._root
            self.names.append(block_name(parent, token_ids[index * size : (index + 1) * size]))
        return self.names


class CachedBlock(NamedTuple):
    name: bytes
    block: int
    tenant: bytes


class PrefixCache:
    """Names of blocks whose content is final. The first block of a name keeps it."""

    def __init__(self, allocator: BlockAllocator) -> None:
        self._allocator = allocator
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._tenant_of: dict[int, bytes] = {}
        """Of blocks that have one."""
        self._said: set[int] = set()
        self.num_evicted_unsaid = 0
        """Blocks that were evicted and that `newly_at_risk` had not said."""
        self.changes = NameChanges()
        allocator.on_evict = self._forget

    def __len__(self) -> int:
        return len(self._block_of)

    def lookup(self, names: Sequence[bytes]) -> list[int]:
        """Blocks of the longest run of leading names that are all here. Nothing is changed: `share` them to keep."""
        blocks: list[int] = []
        for name in names:
            block = self._block_of.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def insert(self, name: bytes, block: int, tenant: bytes = b"") -> bool:
        """Name a block that is full and computed. False: another block has that name already and keeps it."""
        if name in self._block_of:
            return False
        if block in self._name_of:
            raise BlockAccountingError(f"block {block} already has another name")
        self._block_of[name] = block
        self._name_of[block] = name
        if tenant:
            self._tenant_of[block] = tenant
        self._allocator.mark_cached(block)
        self.changes.note(name, True)
        return True

    def held(self) -> Held:
        """All names, in one copy: some milliseconds for a million of them."""
        return Held(list(self._block_of), self.changes.take())

    def newly_at_risk(self, count: int) -> list[CachedBlock]:
        """Blocks that would be evicted if `count` were allocated now, each once until it is used again.

        The first one to go comes last.
        """
        at_risk = self._allocator.next_evicted(count)
        self._said -= {block for block in self._said.difference(at_risk) if not self._allocator.is_evictable(block)}
        fresh = set(at_risk) - self._said
        self._said |= fresh
        last_first = [block for block in reversed(at_risk) if block in fresh] if fresh else []
        return [CachedBlock(self._name_of[block], block, self._tenant_of.get(block, b"")) for block in last_first]

    def check(self) -> None:
        """Raises BlockAccountingError when names and the allocator's flags differ."""
        flagged = {block for block in range(self._allocator.num_blocks) if self._allocator.is_cached(block)}
        if {block: name for name, block in self._block_of.items()} != self._name_of or flagged != set(self._name_of):
            raise BlockAccountingError("names and cached blocks do not match one to one")

    def _forget(self, block: int) -> None:
        name = self._name_of.pop(block)
        del self._block_of[name]
        self.changes.note(name, False)
        self._tenant_of.pop(block, None)
        self.num_evicted_unsaid += block not in self._said
        self._said.discard(block)
