"""Blocks that a step touches until it has come back, whatever becomes of its requests meanwhile. Bookkeeping only.

A step that was planned may run later than the end of a request that takes part in it: it still writes the KV of a
token nobody wants, and still copies a block that lost its owner. Later *steps* cannot be hurt, as steps take effect in
the order of their plans; but a block that is free can be given to a transfer from another worker, which keeps to no
such order. So the step itself owns these blocks, as a quarantine: nobody gets them before its result is here.
What it only reads may change under it, since the tokens of a request that has ended are dropped.
"""

from collections.abc import Iterable

from engine.blocks import BlockAllocator, Owner, OwnerKind


class StepBlocks:
    """What one step copies and holds."""

    def __init__(self, allocator: BlockAllocator, number: int) -> None:
        self.copies: list[tuple[int, int]] = []
        """(source, target), in the order in which they are made."""
        self._allocator = allocator
        self._owner = Owner(OwnerKind.QUARANTINE, f"(step {number})")
        self._held: set[int] = set()

    def hold(self, blocks: Iterable[int]) -> None:
        fresh = [block for block in blocks if block not in self._held]
        self._held.update(fresh)
        self._allocator.share(self._owner, fresh)

    def let_go(self) -> None:
        """The step has come back."""
        self._allocator.release_all(self._owner)
