"""Hand-overs between groups of tensor-parallel ranks of other sizes, made of hand-overs between two ranks each.

    prefill, 2 ranks      | heads 0 1 2 3 | heads 4 5 6 7 |
                              │       │       │       │        one hand-over for each two ranks with heads in common,
    decode, 4 ranks       |  0 1  |  2 3  |  4 5  |  6 7  |    which has an id of its own: `pair_id`

A rank that takes has one row of blocks, and each peer fills its own heads of it (`RankIntake`). A rank that gives has
one row, too, and gets its blocks back when the last of its readers has ended (`RankOffers`). What is below knows two
workers and one lease, as ever.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from baton.errors import PeerError
from kvtransfer.intake import CANCELLED, Intake, IntakeResult
from kvtransfer.layout import BlockLayout, ranks_in_common
from kvtransfer.offers import OfferServer
from kvtransfer.wire import PeerRef

log = logging.getLogger(__name__)


def pair_id(handover_id: str, giver: int, taker: int) -> str:
    """What two ranks, each of its own group, call their part of a hand-over."""
    return f"{handover_id}#{giver}-{taker}"


@dataclass(slots=True)
class _Row:
    """One hand-over that comes in: ids of its parts, and why it ended early."""

    parts: dict[int, str]
    taken: bool = False
    failure: str | None = None


class RankIntake:
    """Takes rows in from all ranks of a peer with heads of this one. Called on the event loop's thread."""

    def __init__(self, intake: Intake, layout: BlockLayout, counters: dict[str, float]) -> None:
        """`layout`: that of this worker's blocks."""
        self._intake = intake
        self._layout = layout
        self._counters = counters
        self._rows: dict[str, _Row] = {}

    def expect(self, handover_id: str, peers: Sequence[PeerRef]) -> None:
        """As `Intake.expect`; ends with `take` or `cancel`. Raises PeerError where `take` would fail for the same."""
        row = self._rows[handover_id] = self._row(handover_id, ranks_in_common(self._layout, len(peers)))
        for rank, part in row.parts.items():
            self._intake.expect(part, peers[rank])

    async def take(
        self, handover_id: str, peers: Sequence[PeerRef], block_ids: Sequence[int], first_block: int, deadline: float
    ) -> IntakeResult:
        """As `Intake.take`. `peers`: all ranks of the peer in their order, also those that are not needed.

        A block counts once the heads of every rank are verified. The first rank that fails ends the hand-over for all,
        with what is whole then. Ranks that close it differently are believed in nothing.
        """
        try:
            needed = ranks_in_common(self._layout, len(peers))
        except PeerError as error:
            return self._failed(handover_id, IntakeResult(first_block, failure=str(error)))
        if handover_id in self._rows and self._rows[handover_id].taken:
            raise ValueError(f"hand-over {handover_id} is being taken already")
        row = self._rows[handover_id] = self._row(handover_id, needed)
        row.taken = True

        async def take_part(rank: int) -> IntakeResult:
            if row.failure is not None:  # before this part began
                return IntakeResult(first_block, failure=CANCELLED)
            result = await self._intake.take(
                row.parts[rank], peers[rank], block_ids, first_block, deadline, needed[rank]
            )
            if result.failure is not None:
                self._end(row, result.failure if len(needed) == 1 else f"rank {rank} of {len(peers)}: {result.failure}")
            return result

        try:
            async with asyncio.TaskGroup() as group:
                takings = [group.create_task(take_part(rank)) for rank in needed]
        finally:
            del self._rows[handover_id]
        results = [taking.result() for taking in takings]
        if len(results) == 1:
            return results[0]
        # Where several ranks fill a row, each converts: nobody writes into it from outside, and there is no fence.
        return self._joined(handover_id, results, first_block, row.failure)

    def cancel(self, handover_id: str) -> None:
        """As `Intake.cancel`."""
        row = self._rows.get(handover_id)
        if row is not None:
            self._end(row, CANCELLED)
            if not row.taken:
                del self._rows[handover_id]

    def _row(self, handover_id: str, ranks: dict[int, range]) -> _Row:
        return _Row({rank: pair_id(handover_id, rank, self._layout.tp_rank) for rank in ranks})

    def _end(self, row: _Row, reason: str) -> None:
        if row.failure is None:
            row.failure = reason
            for part in row.parts.values():
                self._intake.cancel(part)

    def _joined(
        self, handover_id: str, results: list[IntakeResult], first_block: int, failure: str | None
    ) -> IntakeResult:
        same_bits = all(result.same_bits for result in results)
        if any(result.failure is not None for result in results):
            page = self._layout.page_size_tokens
            # A last block that is full of what one rank has to give is whole only if all have given that.
            whole = min(each.num_blocks if each.num_tokens is None else each.num_tokens // page for each in results)
            return IntakeResult(max(first_block, whole), failure=failure, same_bits=same_bits)
        endings = {(each.num_tokens, each.first_token_id, each.first_token_index) for each in results}
        if len(endings) > 1:
            reason = "the ranks closed it with other numbers of tokens, or other first tokens"
            return self._failed(handover_id, IntakeResult(first_block, failure=reason, same_bits=same_bits))
        return replace(results[0], num_blocks=min(each.num_blocks for each in results), same_bits=same_bits)

    def _failed(self, handover_id: str, result: IntakeResult) -> IntakeResult:
        """Where no part has failed, which its intake counts."""
        self._counters["handover_failures"] = self._counters.get("handover_failures", 0.0) + 1
        log.warning("hand-over %s failed: %s", handover_id, result.failure)
        return result


@dataclass(slots=True)
class _Readers:
    """Of one row that is offered: the parts that have not ended, and how the others did."""

    parts: set[str]
    verified: bool = True
    quarantined: bool = False


class RankOffers:
    """Offers one row to all ranks of a peer with heads of this one. Called on the event loop's thread.

    on_released(id, verified), on_quarantined(id), on_resolved(id): as those of an OfferServer, once for the row.
    `verified`: every rank has all its blocks. Blocks are quarantined as soon as one reader's lease has expired, and
    resolved when none can read them any more.
    """

    def __init__(
        self,
        layout: BlockLayout,
        on_released: Callable[[str, bool], None],
        on_quarantined: Callable[[str], None],
        on_resolved: Callable[[str], None],
    ) -> None:
        self._layout = layout
        self._on_released = on_released
        self._on_quarantined = on_quarantined
        self._on_resolved = on_resolved
        self._offers: OfferServer | None = None
        self._rows: dict[str, _Readers] = {}
        self._row_of: dict[str, str] = {}

    def serve_offers(self, offers: OfferServer) -> None:
        """The server that this offers through; its callbacks are `on_part_*`."""
        self._offers = offers

    @property
    def offers(self) -> OfferServer:
        assert self._offers is not None, "serve_offers comes before the first hand-over"
        return self._offers

    def open(self, handover_id: str, peers: Sequence[PeerRef]) -> None:
        """As `OfferServer.open`. `peers`: all ranks of the peer in their order, also those that take nothing from here.

        Raises PeerError when the heads cannot be split over so many.
        """
        ranks = ranks_in_common(self._layout, len(peers))
        parts = {pair_id(handover_id, self._layout.tp_rank, rank): peers[rank] for rank in ranks}
        if handover_id in self._rows:
            raise ValueError(f"hand-over {handover_id} was opened before")
        self._rows[handover_id] = _Readers(set(parts))
        for part, peer in parts.items():
            self._row_of[part] = handover_id
            try:
                self.offers.open(part, peer)
            except ValueError:
                self._forget(handover_id)
                raise

    def offer(
        self,
        handover_id: str,
        first_block: int,
        block_ids: Sequence[int],
        generations: Sequence[int],
        num_layers: int | None = None,
    ) -> None:
        """As `OfferServer.offer`, to every rank. Each has checksums of its own computed: they cost little."""
        for part in self._parts(handover_id):
            self.offers.offer(part, first_block, block_ids, generations, num_layers)

    def close(
        self,
        handover_id: str,
        num_blocks: int,
        num_tokens: int,
        first_token_id: int,
        first_token_index: int,
        first_logprob: bytes = b"",
    ) -> None:
        """As `OfferServer.close`."""
        for part in self._parts(handover_id):
            self.offers.close(part, num_blocks, num_tokens, first_token_id, first_token_index, first_logprob)

    def fail(self, handover_id: str, reason: str) -> None:
        """As `OfferServer.fail`."""
        for part in self._parts(handover_id):
            self.offers.fail(part, reason)

    def on_part_released(self, part: str, verified: bool) -> None:
        handover_id = self._row_of.pop(part, None)
        if handover_id is None:
            return
        row = self._rows[handover_id]
        row.parts.discard(part)
        row.verified &= verified
        if row.parts:
            return
        del self._rows[handover_id]
        if row.quarantined:
            self._on_resolved(handover_id)
        else:
            self._on_released(handover_id, row.verified)

    def on_part_quarantined(self, part: str) -> None:
        handover_id = self._row_of.get(part)
        if handover_id is not None and not self._rows[handover_id].quarantined:
            self._rows[handover_id].quarantined = True
            self._on_quarantined(handover_id)

    def on_part_resolved(self, part: str) -> None:
        self.on_part_released(part, False)

    def _parts(self, handover_id: str) -> list[str]:
        """None once all have ended."""
        row = self._rows.get(handover_id)
        return sorted(row.parts) if row is not None else []

    def _forget(self, handover_id: str) -> None:
        """A hand-over that could not be opened: its owner hears nothing of it any more."""
        for part in self._rows.pop(handover_id).parts:
            if self._row_of.pop(part, None) is not None:
                self.offers.fail(part, "it could not be opened")
