"""What the pulling side knows of one hand-over: which blocks were offered, pulled and verified, and how it ended."""

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from baton.v1 import handover_pb2 as pb
from kvtransfer.conversion import Conversion, Row
from kvtransfer.lanes.base import BlockRead
from kvtransfer.pulls import Part, PullOutcome, WantedBytes

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
    first_logprob: what came with the first token, as its owner wrote it.
    failure: why it ended early, or None.
    fence: while this is not done, the peer may still write into the blocks from `num_blocks` on. None: nobody does.
    same_bits: False where numbers were cast, so that the blocks do not hold what this worker would compute.
    answer: what the peer did about blocks that were asked for by name.
    wire_s, num_bytes: seconds in which blocks were pulled, and bytes of theirs that are right.
    """

    num_blocks: int
    num_tokens: int | None = None
    first_token_id: int | None = None
    first_token_index: int | None = None
    failure: str | None = None
    same_bits: bool = True
    fence: asyncio.Future[None] | None = None
    answer: Answer | None = None
    first_logprob: bytes = b""
    wire_s: float = field(default=0.0, compare=False)
    num_bytes: int = field(default=0, compare=False)


@dataclass(slots=True)
class OfferedBlock:
    """A block of the peer: the bytes offered so far, from its begin on, and those of them that are here and right."""

    block_id: int
    generation: int
    parts: list[Part]
    num_checked: int = 0
    """Of `parts`."""

    @property
    def bytes_offered(self) -> int:
        return self.parts[-1].end

    @property
    def bytes_checked(self) -> int:
        return self.parts[self.num_checked - 1].end if self.num_checked else 0


class Taking:
    """One hand-over on its way in. Used on the event loop's thread, except for `cancelled`, which pulls look at."""

    def __init__(
        self,
        handover_id: str,
        block_ids: Sequence[int],
        first_block: int,
        num_layers: int,
        block_bytes: int,
        names: Sequence[bytes] = (),
    ) -> None:
        """`block_ids`: the local block of every position; those before `first_block` are here already.

        A block has `num_layers` and `block_bytes`. `names`, of all these blocks: nobody assigned this hand-over, the
        peer is asked what it has of them.
        """
        self.handover_id = handover_id
        self.names = names
        self.num_found: int | None = None
        self.asked_at = 0.0
        self.wire_s = 0.0
        self.num_bytes = 0
        self._offered_at: float | None = None
        self.row = Row(list(block_ids), first_block)
        self.num_verified = first_block
        """Leading blocks of the peer's row that are here, all layers of them."""
        self.failure: str | None = None
        self.cancelled = threading.Event()
        self.changed = asyncio.Event()
        self.pull: Future[PullOutcome] | None = None
        self._conversion: Conversion | None = None
        self._num_layers = num_layers
        self._block_bytes = block_bytes
        self._offered: list[OfferedBlock] = []  # from position _first_wanted on
        self._first_wanted = first_block
        self._batch: list[tuple[OfferedBlock, int]] = []
        self._closed: pb.OfferClosed | None = None

    def convert_with(self, conversion: Conversion) -> None:
        """The peer's row has other blocks than the one here. Comes before any offer."""
        self._conversion = conversion
        self._block_bytes = conversion.peer.block_bytes
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
        num_layers = offer.num_layers or self._num_layers
        if not self._first_wanted <= offer.first_block <= position or self._closed is not None:
            self.end(f"the peer offered block {offer.first_block} where {position} was due")
        elif offer.first_block + len(offer.blocks) > self._num_wanted:
            self.end(f"the peer offers more than the {len(self.row.block_ids)} blocks that are reserved here")
        elif num_layers > self._num_layers:
            self.end(f"the peer offers {num_layers} layers, and there are {self._num_layers}")
        else:
            end = num_layers * (self._block_bytes // self._num_layers)
            if all(self._extend(offer.first_block + index, each, end) for index, each in enumerate(offer.blocks)):
                self.changed.set()
            else:
                self.end(f"the peer offered block {offer.first_block} once more, and not with more layers")

    def _extend(self, position: int, offered: pb.OfferedBlock, end: int) -> bool:
        """The block at a position is final up to byte `end`."""
        part, index = Part(end, offered.checksum), position - self._first_wanted
        if index == len(self._offered):
            self._offered.append(OfferedBlock(offered.block_id, offered.generation, [part]))
            return True
        block = self._offered[index]
        same = (block.block_id, block.generation) == (offered.block_id, offered.generation)
        if not same or block.bytes_offered >= end:
            return False
        block.parts.append(part)
        return True

    def on_closed(self, closed: pb.OfferClosed) -> None:
        end = self._first_wanted + len(self._offered)
        if any(block.bytes_offered < self._block_bytes for block in self._offered):
            self.end("the peer closed what it has not offered in full")
            return
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

    def next_batch(self, max_bytes: int) -> list[WantedBytes]:
        """What is offered and not here, from the first position on; of one block more than `max_bytes` if need be.

        Whole blocks without a gap where they are converted.
        """
        batch: list[WantedBytes] = []
        self._batch = []
        for position in range(self.num_verified, self._first_wanted + len(self._offered)):
            block = self._offered[position - self._first_wanted]
            start, end = block.bytes_checked, block.bytes_offered
            if self._conversion is not None and end < self._block_bytes:
                break
            if start == end:
                continue
            max_bytes -= end - start
            if batch and max_bytes < 0:
                break
            # Where blocks are converted, each pull has its own places to land; see `staging.Converter`.
            local_block = self.row.block_ids[position] if self._conversion is None else 0
            read = BlockRead(block.block_id, block.generation, local_block, start, end - start)
            batch.append(WantedBytes(read, tuple(block.parts[block.num_checked :])))
            self._batch.append((block, len(block.parts)))
        return batch

    def on_pulled(self, num_right: int) -> tuple[int, int]:
        """So many leading entries of the latest batch are here. Returns how many blocks that completes, and bytes."""
        num_bytes, before = 0, self.num_verified
        for block, num_checked in self._batch[:num_right]:
            num_bytes -= block.bytes_checked
            block.num_checked = num_checked
            num_bytes += block.bytes_checked
        end = self._first_wanted + len(self._offered)
        while self.num_verified < end:
            if self._offered[self.num_verified - self._first_wanted].bytes_checked < self._block_bytes:
                break
            self.num_verified += 1
        return self.num_verified - before, num_bytes

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
            num_blocks, closed.num_tokens, closed.first_token_id, closed.first_token_index, same_bits=same_bits,
            first_logprob=closed.first_logprob,
        )  # fmt: skip

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
