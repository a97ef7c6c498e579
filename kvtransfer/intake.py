"""The pulling side of hand-overs.

The life of one hand-over, seen from here:

1. `take` connects to the peer unless it is connected: handshake, then the best lane that really works.
2. Want tells the peer from which block on this side needs the row.
3. Offers arrive while the peer still computes; what has been offered is pulled in bounded batches, each block checked
   by the xxh3 of the bytes that arrived. From a peer with another layout they land beside the pool and are converted
   (`staging`). Heartbeats renew the lease.
4. Closed and everything verified: Release(verified) goes out at once, and the result carries the first token.
5. Anything else (loss of the peer, stale or corrupt block, deadline, Revoke, cancellation) ends it with what was
   verified until then. In every case `take` returns only when no thread can write the local blocks any more.

A peer that this worker has lent its pool to writes into the blocks by itself, in place of 3. It cannot be made to stop:
where it may still write when `take` returns, the result has a fence (see `kvtransfer.direct`).
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import zmq.asyncio

from baton.config import HandoverOptions
from baton.errors import PeerError
from baton.rates import Rate
from baton.tls import Tls
from baton.v1 import handover_pb2 as pb
from kvtransfer.direct import Lending
from kvtransfer.lanes.registry import Lane
from kvtransfer.layout import BlockLayout
from kvtransfer.link import PeerLink
from kvtransfer.memory import PoolMemory
from kvtransfer.pulls import MAX_BATCH_BYTES, WantedBytes, pull_and_verify
from kvtransfer.staging import Converters
from kvtransfer.taking import CANCELLED, IntakeResult, Taking
from kvtransfer.wire import PeerIdentity, PeerRef, spawn

log = logging.getLogger(__name__)

_STOPS = "the worker stops"

__all__ = ["CANCELLED", "Intake", "IntakeResult"]


class Intake:
    """Pulls blocks into `memory`. Every method is called on the event loop's thread."""

    def __init__(
        self,
        me: PeerIdentity,
        layout: BlockLayout,
        memory: PoolMemory,
        lanes: Sequence[Lane],
        options: HandoverOptions,
        counters: dict[str, float],
        other_dtypes: bool = False,
        tls: Tls | None = None,
    ) -> None:
        """`lanes`: best first, see `lanes.registry.parse_lanes`.

        `other_dtypes`: also take blocks of another dtype, cast to the one here. Never for workers whose answers are to
        be exact: such KV is not what they would compute, and `IntakeResult.same_bits` tells.

        `tls`: no peer without is talked to.
        """
        self._me = me
        self._layout = layout
        self._memory = memory
        self._lanes = lanes
        self._tls = tls
        self._options = options
        self._counters = counters
        self._converters = Converters(layout, memory, other_dtypes)
        self._context = zmq.asyncio.Context()
        self._links: dict[PeerRef, asyncio.Task[PeerLink]] = {}
        self._takings: dict[str, Taking] = {}
        self._expected: dict[str, PeerRef] = {}
        self._working: set[asyncio.Task[IntakeResult]] = set()
        self._users: dict[PeerLink, set[str]] = {}  # connected links and the hand-overs that use them
        self._closing: set[asyncio.Task[None]] = set()
        self._lane_names: dict[str, str] = {}
        self._lent: set[Lending] = set()
        self._pulled = Rate()
        self._stopped = False

    def bytes_per_s(self) -> float:
        """Of verified bytes, while blocks are pulled, as measured lately; 0: not yet."""
        return self._pulled.per_s

    def lanes_in_use(self) -> dict[str, str]:
        """Worker id of each peer -> name of the lane that its blocks come by."""
        return dict(self._lane_names)

    async def take(
        self,
        handover_id: str,
        peer: PeerRef,
        block_ids: Sequence[int],
        first_block: int,
        deadline: float,
        heads: range | None = None,
        names: Sequence[bytes] = (),
        answer_s: float = 0.0,
    ) -> IntakeResult:
        """Pull the row of blocks of a hand-over; `deadline` in `time.monotonic()` seconds.

        `block_ids` are the local blocks by position; those before `first_block` are here already. `heads`: those of
        this worker's that the peer has, no more and no less; None: all. Never raises for peer trouble. Should the
        calling task be cancelled, this waits, shielded, until nothing writes any more.

        With `names`, of all the blocks, the hand-over is one that nobody assigned: the peer is asked for those leading
        ones that it has, which may be none, and must say within `answer_s` seconds how many it has found.
        """
        if handover_id in self._takings:
            raise ValueError(f"hand-over {handover_id} is being taken already")
        if self._stopped:
            return IntakeResult(first_block, failure=_STOPS)
        self._expected.pop(handover_id, None)
        num_layers, block_bytes = self._layout.num_layers, self._memory.block_bytes
        taking = self._takings[handover_id] = Taking(
            handover_id, block_ids, first_block, num_layers, block_bytes, names
        )
        work = asyncio.get_running_loop().create_task(self._take(taking, peer, deadline, heads or self._layout.heads))
        if names:
            asyncio.get_running_loop().call_later(answer_s, taking.expect_found)
        self._working.add(work)
        work.add_done_callback(self._working.discard)
        interrupted: asyncio.CancelledError | None = None
        while not work.done():
            try:
                await asyncio.wait([work])
            except asyncio.CancelledError as error:
                interrupted = error
                taking.end(CANCELLED)
        if interrupted is not None:
            raise interrupted
        return work.result()

    def expect(self, handover_id: str, peer: PeerRef) -> None:
        """`take` will follow, once there is room: connect meanwhile, and keep the lease alive.

        Without this, what waits here for longer than a lease would have been computed over there for nothing. Ends
        with `take` or `cancel`.
        """
        self._expected[handover_id] = peer
        self._dial(peer)

    def dial(self, peer: PeerRef) -> None:
        """Connect, if there is no connection yet: `take` may follow."""
        self._dial(peer)

    def cancel(self, handover_id: str) -> bool:
        """`take` returns soon with failure CANCELLED. An unknown id is no error.

        True: it was being taken, and nothing writes into its blocks any more, as of now.
        """
        peer, taking = self._expected.pop(handover_id, None), self._takings.get(handover_id)
        if peer is not None:
            self._decline(handover_id, peer)
        if taking is None:
            return False
        taking.end(CANCELLED)
        return taking.pull is None and not self._is_fenced(handover_id)

    async def stop(self) -> None:
        """End every hand-over and close every connection."""
        self._stopped = True
        for taking in list(self._takings.values()):
            taking.end(_STOPS)
        await asyncio.gather(*self._working, *self._links.values(), return_exceptions=True)
        for link in list(self._users):
            self._retire(link)
        await asyncio.gather(*self._closing)
        for lending in list(self._lent):
            lending.abandon()
        self._converters.close()
        await asyncio.to_thread(self._context.term)

    # -- one hand-over -----------------------------------------------------------------------------------------------

    async def _take(self, taking: Taking, peer: PeerRef, deadline: float, heads: range) -> IntakeResult:
        timer = asyncio.get_running_loop().call_later(
            deadline - time.monotonic(), taking.end, "the hand-over did not end before its deadline"
        )
        fence = None
        try:
            link = await self._connected(taking, peer)
            if link is not None:
                fence = await self._relay(taking, link, heads)
            elif not taking.names:
                self._decline(taking.handover_id, peer)
        finally:
            timer.cancel()
            del self._takings[taking.handover_id]
        result = replace(taking.result(), answer=taking.answer(), wire_s=taking.wire_s, num_bytes=taking.num_bytes)
        if fence is not None and not fence.done():
            result = replace(result, fence=fence)
        if result.failure is not None and result.failure != CANCELLED and not taking.names:
            self._count("handover_failures", 1)
            log.warning("hand-over %s from %s failed: %s", taking.handover_id, peer.worker_id, result.failure)
        return result

    async def _connected(self, taking: Taking, peer: PeerRef) -> PeerLink | None:
        """The link to the peer, shared by all its hand-overs; None when `taking` ended first."""
        while taking.failure is None:
            attempt = self._dial(peer)
            ended = asyncio.get_running_loop().create_task(_ended(taking))
            await asyncio.wait([attempt, ended], return_when=asyncio.FIRST_COMPLETED)
            ended.cancel()
            if not attempt.done():
                return None
            if (error := attempt.exception()) is not None:
                taking.end(str(error))
            elif (link := attempt.result()) in self._users:
                return link
        return None

    async def _relay(self, taking: Taking, link: PeerLink, heads: range) -> "asyncio.Future[None] | None":
        """Returns the fence around what the peer was allowed to write, if it was."""
        fence = None
        handover_id = taking.handover_id
        self._users[link].add(handover_id)
        try:
            if link.converter is not None:
                taking.convert_with(link.converter.conversion)
            theirs = self._layout.heads if link.converter is None else link.converter.conversion.heads
            if theirs != heads:
                taking.end(f"tp_rank does not fit: {_named(heads)} were to come from a peer that has {_named(theirs)}")
                return None
            if taking.failure is not None:  # while it was connected: nobody may write there any more
                return None
            want = pb.Want(handover_id=handover_id, first_block=taking.num_verified, names=taking.names)
            taking.asked_at = time.monotonic()
            if link.lending is not None and not taking.names and not self._is_fenced(handover_id):
                fence = link.lending.fence(handover_id)
                self._place(want, link.lending, taking.row.block_ids)
            link.send(pb.HandoverMessage(want=want))
            if link.lost is not None:
                taking.end(link.lost)
            while taking.failure is None and not taking.complete:
                batch = taking.next_batch(MAX_BATCH_BYTES)
                if batch:
                    await self._pull(taking, link, batch)
                else:
                    taking.changed.clear()
                    await taking.changed.wait()  # ended by the deadline's timer at the latest
        finally:
            release = pb.Release(handover_id=handover_id, verified=taking.failure is None)
            link.send(pb.HandoverMessage(release=release))
            users = self._users.get(link)
            if users is not None:
                users.discard(handover_id)
                if link.retired:
                    self._retire(link)
        return fence

    def _place(self, want: pb.Want, lending: Lending, block_ids: Sequence[int]) -> None:
        want.placement.lending = lending.number
        want.placement.block_ids.extend(block_ids)
        want.placement.generations.extend(self._memory.generations[block_ids].tolist())

    def _decline(self, handover_id: str, peer: PeerRef) -> None:
        """Have the peer give back what it computed, or not begin: else its blocks would wait for the end of the lease.

        Over a connection that is there or coming; without one there is only the lease."""

        def release(attempt: "asyncio.Task[PeerLink]") -> None:
            if not attempt.cancelled() and attempt.exception() is None and (link := attempt.result()) in self._users:
                link.send(pb.HandoverMessage(release=pb.Release(handover_id=handover_id)))

        if (attempt := self._links.get(peer)) is not None:
            attempt.add_done_callback(release)

    def _is_fenced(self, handover_id: str) -> bool:
        return any(lending.is_fenced(handover_id) for lending in self._lent)

    async def _pull(self, taking: Taking, link: PeerLink, batch: list[WantedBytes]) -> None:
        deadline = time.monotonic() + self._options.pull_timeout_s
        converter = link.converter
        if converter is None:
            pull = link.threads.submit(pull_and_verify, link.lane, self._memory, batch, deadline, taking.cancelled)
        else:
            first = taking.num_verified
            pull = link.threads.submit(converter.pull, link.lane, batch, first, taking.row, deadline, taking.cancelled)
        taking.pull = pull
        try:
            outcome = await asyncio.wrap_future(pull)
        except asyncio.CancelledError:  # by taking.end(), before a thread took it up
            return
        finally:
            taking.pull = None
        num_blocks, num_bytes = taking.on_pulled(outcome.num_verified)
        taking.wire_s += outcome.seconds
        taking.num_bytes += num_bytes
        self._count("handover_blocks_received", num_blocks)
        self._count("handover_bytes_received", num_bytes)
        if converter is not None:
            self._count("handover_blocks_converted", num_blocks)
        self._count("handover_seconds", outcome.seconds)
        if outcome.failure is None:
            self._pulled.add(num_bytes, outcome.seconds)
        self._count("handover_blocks_retried", outcome.num_retried)
        self._count("handover_checksum_failures", outcome.num_mismatched)
        if outcome.failure is not None and taking.failure is None:
            taking.end(outcome.failure)
            # A lane that failed may be broken for good: later hand-overs shake hands and probe anew.
            self._retire(link)

    # -- links -------------------------------------------------------------------------------------------------------

    def _dial(self, peer: PeerRef) -> "asyncio.Task[PeerLink]":
        """The connection to a peer, or the attempt at one that is under way; a new one where there is none."""
        attempt = self._links.get(peer)
        if attempt is None:
            attempt = self._links[peer] = asyncio.get_running_loop().create_task(self._connect(peer))
            attempt.add_done_callback(lambda done: done.exception())  # seen, also when nobody waits any more
        return attempt

    async def _connect(self, peer: PeerRef) -> PeerLink:
        link = PeerLink(self._me, peer, self._options, self._on_message, self._on_lost, self._active_ids, self._tls)
        try:
            await link.connect(self._context, self._layout, self._memory, self._lanes, self._converters)
        except PeerError:
            self._links.pop(peer, None)  # whoever comes next tries anew
            self._count("handover_peer_losses", 1)
            await link.close()
            raise
        self._users[link] = set()
        if link.lending is not None:
            self._lent.add(link.lending)
            link.lending.watch(partial(self._on_lending_ended, link))
        self._count("handover_lane_fallbacks", link.fell_back)
        before, now = self._lane_names.get(peer.worker_id), link.lane.name
        if before not in (None, now):
            log.warning("blocks of worker %s came by lane %s before, and by %s now", peer.worker_id, before, now)
        self._lane_names[peer.worker_id] = now
        return link

    def _on_message(self, link: PeerLink, message: pb.HandoverMessage) -> None:
        body = getattr(message, message.WhichOneof("message") or "")
        if isinstance(body, pb.Written) and body.stopped and link.lending is not None:
            link.lending.stopped(body.handover_id)  # whoever takes it, or does not any more
        taking = self._takings.get(body.handover_id)
        if taking is None or body.handover_id not in self._users.get(link, ()):
            return  # late: it ended here
        match body:
            case pb.Offer() if self._is_fenced(body.handover_id):
                taking.end("the peer offers blocks although it may write by itself")
            case pb.Offer():
                taking.on_offer(body)
            case pb.Written():
                before = taking.num_verified
                taking.on_written(body)
                self._count("handover_blocks_direct", taking.num_verified - before)
            case pb.Found():
                taking.on_found(body)
            case pb.OfferClosed():
                taking.on_closed(body)
            case pb.OfferFailed():
                taking.end(f"the peer gave up: {body.reason}")
            case pb.Revoke():
                taking.end("the lease ended")

    def _on_lending_ended(self, link: PeerLink, lending: Lending, fenced: list[str]) -> None:
        self._lent.discard(lending)
        if link.lending is lending:
            link.lending = None
        for handover_id in fenced:
            if handover_id in self._users.get(link, ()):
                self._takings[handover_id].end("the peer does not write any more")

    def _on_lost(self, link: PeerLink) -> None:
        users = self._users.get(link)
        if users is None:
            return  # still connecting: _connect() counts it
        self._count("handover_peer_losses", 1)
        for handover_id in users:
            self._takings[handover_id].end(link.lost or "the peer is lost")
        self._retire(link)

    def _retire(self, link: PeerLink) -> None:
        """Give a link no further hand-overs, and close it once nobody uses it."""
        if not link.retired:
            link.retired = True
            self._links.pop(link.peer, None)
        if self._users.get(link, True):
            return
        del self._users[link]
        closing = spawn(link.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    def _active_ids(self, link: PeerLink) -> list[str]:
        expected = (handover_id for handover_id, peer in self._expected.items() if peer == link.peer)
        return sorted({*self._users.get(link, ()), *expected})

    def _count(self, name: str, amount: float) -> None:
        self._counters[name] = self._counters.get(name, 0.0) + amount


async def _ended(taking: Taking) -> None:
    while taking.failure is None:
        taking.changed.clear()
        await taking.changed.wait()


def _named(heads: range) -> str:
    return f"heads {heads.start} to {heads.stop - 1}"
