"""What the pulling side knows of one hand-over: which blocks were offered, pulled and verified, and how it ended."""

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from baton.v1 import handover_pb2 as pb
from kvtransfer.conversion import Conversion, Row
from kvtransfer.lanes.base import BlockRead
from kvtransfer.pulls import PullOutcome, WantedBlock

if TYPE_CHECKING:
    from concurrent.futures import Future

CANCELLED = "cancelled"


class Answer(NamedTuple):
    """What a peer did about blocks that it was asked for by name."""

    num_found: int | None
    """Blocks that it said to have; None: it did not say."""
    wait_s: float | None
    """From asking until the first was offered, None: nothing was. `pull_s`: from then to the end."""
    pull_s: float | None


@dataclass(frozen=True, slots=True)
class IntakeResult:
    """How a hand-over went for the puller.

    num_blocks: leading blocks that are here and verified, those that were here before included.
    num_tokens, first_token_id, first_token_index: what closed the offer; None unless everything arrived.
    failure: why it ended early, or None.
    fence: while this is not done, the peer may still write into the blocks from `num_blocks` on. None: nobody does.
    same_bits: False where numbers were cast, so that the blocks do not hold what this worker would compute.
    answer: what the peer did about blocks that were asked for by name.
    """

    num_blocks: int
    num_tokens: int | None = None
    first_token_id: int | None = None
    first_token_index: int | None = None
    failure: str | None = None
    same_bits: bool = True
    fence: asyncio.Future[None] | None = None
    answer: Answer | None = None


class Taking:
    """One hand-over on its way in. Used on the event loop's thread, except for `cancelled`, which pulls look at."""

    def __init__(
        self, handover_id: str, block_ids: Sequence[int], first_block: int, names: Sequence[bytes] = ()
    ) -> None:
        """`block_ids`: the local block of every position; those before `first_block` are here already.

        `names`, of all these blocks: nobody assigned this hand-over, the peer is asked what it has of them.
        """
        self.handover_id = handover_id
        self.names = names
        self.num_found: int | None = None
        self.asked_at = 0.0
        self._offered_at: float | None = None
        self.row = Row(list(block_ids), first_block)
        self.num_verified = first_block
        """Leading blocks of the peer's row that are here."""
        self.failure: str | None = None
        self.cancelled = threading.Event()
        self.changed = asyncio.Event()
        self.pull: Future[PullOutcome] | None = None
        self._conversion: Conversion | None = None
        self._offered: list[WantedBlock] = []  # from position _first_wanted on
        self._first_wanted = first_block
        self._closed: pb.OfferClosed | None = None

    def convert_with(self, conversion: Conversion) -> None:
        """The peer's row has other blocks than the one here. Comes before any offer."""
        self._conversion = conversion
        self.num_verified = self._first_wanted = conversion.first_needed(self.row.first_block)

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

    def expect_found(self) -> None:
        """The peer has had its time to say what it has."""
        if self.num_found is None:
            self.end("the peer did not say in time what it has")

    def on_found(self, found: pb.Found) -> None:
        if not self.names or found.num_blocks > len(self.names):
            self.end(f"the peer found {found.num_blocks} of {len(self.names)} blocks")
            return
        self.num_found = found.num_blocks
        if self.num_found == 0:
            self._closed = pb.OfferClosed()
        self.changed.set()

    def on_offer(self, offer: pb.Offer) -> None:
        self._offered_at = self._offered_at or time.monotonic()
        position = self._first_wanted + len(self._offered)
        end = position + len(offer.blocks)
        if offer.first_block != position or self._closed is not None:
            self.end(f"the peer offered block {offer.first_block} where {position} was due")
        elif end > self._num_wanted:
            self.end(f"the peer offers more than the {len(self.row.block_ids)} blocks that are reserved here")
        else:
            # Where blocks are converted, each pull has its own places to land; see `staging.Converter`.
            local = self.row.block_ids[position:end] if self._conversion is None else [0] * len(offer.blocks)
            for block, local_block in zip(offer.blocks, local, strict=True):
                read = BlockRead(block.block_id, block.generation, local_block)
                self._offered.append(WantedBlock(read, block.checksum))
            self.changed.set()

    def on_closed(self, closed: pb.OfferClosed) -> None:
        end = self._first_wanted + len(self._offered)
        # A row that ends before the first block wanted is here in full already; nothing is offered then.
        if closed.num_blocks != end and (self._offered or closed.num_blocks > end):
            self.end(f"the peer closed at {closed.num_blocks} blocks, and block {end} was due")
        else:
            self._closed = closed
            self.changed.set()

    def on_written(self, written: pb.Written) -> None:
        """The peer writes straight into the row, so that nothing is left to do here."""
        if written.num_blocks > len(self.row.block_ids) or self._offered or self._closed is not None:
            self.end(f"the peer says that it has written {written.num_blocks} blocks, which cannot be")
            return
        self.num_verified = max(self.num_verified, written.num_blocks)
        if written.HasField("closed"):
            if written.stopped and written.closed.num_blocks == self.num_verified:
                self._closed = written.closed
            else:
                self.end("the peer closed what it has not written")
        self.changed.set()

    def next_batch(self, max_blocks: int) -> list[WantedBlock]:
        start = self.num_verified - self._first_wanted
        # Nothing is offered where the peer writes by itself.
        return self._offered[start : start + max_blocks]

    def answer(self) -> Answer | None:
        if not self.names:
            return None
        if self._offered_at is None:
            return Answer(self.num_found, None, None)
        return Answer(self.num_found, self._offered_at - self.asked_at, time.monotonic() - self._offered_at)

    def result(self) -> IntakeResult:
        num_blocks, same_bits = self._num_blocks_here(), self._conversion is None or self._conversion.same_bits
        if self.failure is not None or self._closed is None:
            return IntakeResult(num_blocks, failure=self.failure or CANCELLED, same_bits=same_bits)
        closed = self._closed
        return IntakeResult(
            num_blocks, closed.num_tokens, closed.first_token_id, closed.first_token_index, same_bits=same_bits
        )

    @property
    def _num_wanted(self) -> int:
        """Blocks of the peer that the row here has room for."""
        num_blocks = len(self.row.block_ids)
        return num_blocks if self._conversion is None else self._conversion.num_needed(num_blocks)

    def _num_blocks_here(self) -> int:
        if self._conversion is None:
            return self.num_verified
        count = self._conversion.num_touched if self.complete else self._conversion.num_filled
        return max(self.row.first_block, min(len(self.row.block_ids), count(self.num_verified)))
