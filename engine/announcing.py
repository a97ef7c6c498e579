"""What readers of a GIVE request are told of its blocks, and when. Bookkeeping only."""

from dataclasses import replace

from engine.blocks import BlockAllocator
from engine.requests import Computed
from engine.sequence import Phase, Sequence
from engine.steps import Step


class Announcer:
    def __init__(self, allocator: BlockAllocator, page_size: int) -> None:
        self._allocator = allocator
        self._page_size = page_size

    def finishing(self, step: Step) -> list[Computed]:
        """What a step in flight makes final for GIVE requests, in their own blocks."""
        computed = []
        for sequence, planned in zip(step.sequences, step.planned, strict=True):
            if sequence.gives and sequence.phase is not Phase.ENDED and sequence.request.placement is None:
                end = planned.start + len(planned.token_ids)
                if (each := self._final(sequence, end, planned.sample is not None)).block_ids:
                    computed.append(each)
        return computed

    def computed(self, sequence: Sequence, last: bool) -> list[Computed]:
        """Which further blocks are final, the partial one only at the end; readers are told now."""
        computed = self._final(sequence, sequence.num_computed, last)
        if not (computed.block_ids or last):
            return []
        self.told(sequence, computed, whole=True)
        return [replace(computed, last=last)]

    @staticmethod
    def told(sequence: Sequence, computed: Computed, whole: bool) -> None:
        """Readers know that some layers are final, or `whole` blocks."""
        sequence.is_exposed = True
        sequence.num_announced_blocks += len(computed.block_ids) if whole else 0

    def _final(self, sequence: Sequence, num_tokens: int, with_partial: bool) -> Computed:
        """Those not announced yet of the blocks that the first `num_tokens` positions fill."""
        first = sequence.num_announced_blocks
        final = len(sequence.block_ids) if with_partial else num_tokens // self._page_size
        blocks = sequence.block_ids[first:final]
        is_placed = sequence.request.placement is not None
        generations = () if is_placed else tuple(self._allocator.generations[blocks].tolist())
        covered = num_tokens if with_partial else final * self._page_size
        return Computed(sequence.id, first, tuple(blocks), generations, covered, last=False)
