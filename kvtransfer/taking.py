"""What the pulling side knows of one hand-over: which blocks were offered, pulled and verified, and how it ended."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from baton.v1 import handover_pb2 as pb
from kvtransfer.lanes.base import BlockRead
from kvtransfer.pulls import PullOutcome, WantedBlock

if TYPE_CHECKING:
    from concurrent.futures import Future

CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class IntakeResult:
    """How a hand-over went for the puller.

    num_blocks: leading blocks that are here and verified, those that were here before included.
    num_tokens, first_token_id, first_token_index: what closed the offer; None unless everything arrived.
    failure: why it ended early, or None.
    """

    num_blocks: int
    num_tokens: int | None = None
    first_token_id: int | None = None
    first_token_index: int | None = None
    failure: str | None = None


class Taking:
    """One hand-over on its way in. Used on the event loop's thread, except for `cancelled`, which pulls look at."""

    def __init__(self, handover_id: str, block_ids: Sequence[int], first_block: int) -> None:
        """`block_ids`: the local block of every position; those before `first_block` are here already."""
        self.handover_id = handover_id
        self.num_verified = first_block
        self.failure: str | None = None
        self.cancelled = threading.Event()
        self.changed = asyncio.Event()
        self.pull: Future[PullOutcome] | None = None
        self._block_ids = list(block_ids)
        self._offered: list[WantedBlock] = []  # from position _first_block on
        self._first_block = first_block
        self._closed: pb.OfferClosed | None = None

    @property
    def complete(self) -> bool:
        return self._closed is not None and self.num_verified >= self._closed.num_blocks

    def end(self, reason: str) -> None:
        """Stop early; the first reason stays. A pull that runs ends soon, one that waits for its turn never begins."""
        if self.failure is None and not self.complete:
            self.failure = reason
        self.cancelled.set()
        if self.pull is not None:
            self.pull.cancel()
        self.changed.set()

    def on_offer(self, offer: pb.Offer) -> None:
        position = self._first_block + len(self._offered)
        end = position + len(offer.blocks)
        if offer.first_block != position or self._closed is not None:
            self.end(f"the peer offered block {offer.first_block} where {position} was due")
        elif end > len(self._block_ids):
            self.end(f"the peer offers more than the {len(self._block_ids)} blocks that are reserved here")
        else:
            for block, local_block in zip(offer.blocks, self._block_ids[position:end], strict=True):
                read = BlockRead(block.block_id, block.generation, local_block)
                self._offered.append(WantedBlock(read, block.checksum))
            self.changed.set()

    def on_closed(self, closed: pb.OfferClosed) -> None:
        end = self._first_block + len(self._offered)
        # A row that ends before first_block is here in full already; nothing is offered then.
        if closed.num_blocks != end and (self._offered or closed.num_blocks > end):
            self.end(f"the peer closed at {closed.num_blocks} blocks, and block {end} was due")
        else:
            self._closed = closed
            self.changed.set()

    def next_batch(self, max_blocks: int) -> list[WantedBlock]:
        start = self.num_verified - self._first_block
        return self._offered[start : start + max_blocks]

    def result(self) -> IntakeResult:
        if self.failure is not None or self._closed is None:
            return IntakeResult(self.num_verified, failure=self.failure or CANCELLED)
        closed = self._closed
        return IntakeResult(self.num_verified, closed.num_tokens, closed.first_token_id, closed.first_token_index)
