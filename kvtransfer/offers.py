"""The offering side of hand-overs: a ZeroMQ ROUTER that workers who pull connect to.

The life of one hand-over, seen from here:

1. `open` grants a lease to one peer. What that peer asked for before (a parked Want) is answered now.
2. `offer` hands over blocks whose content is final, all of it or that of the leading layers. A thread computes their
   checksums, in order.
3. The peer's Want attaches its connection; from then on each checksummed block is announced to it, in order.
4. `close` ends the row and carries the first token. The peer's heartbeats renew the lease until it releases.
5. The lease ends: `on_released(id, verified)`; or it expires: `on_quarantined(id)`, and `on_resolved(id)` once no
   peer can read the blocks any more. Nothing else is ever called, and nothing twice.

Where blocks of a decode worker are at hand to write into (`direct`), its Want says where, and `on_want` passes that on.
The owner then answers with `written`, in place of 2 to 4, or declines with it and goes on as above.

A Want with names is for a hand-over that nobody assigned: `on_ask` passes it on, the owner answers with `found`, and
opens, offers and closes what it has.

Everything here runs on one event loop; only checksums leave it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import xxhash
import zmq
import zmq.asyncio

from baton.config import HandoverOptions
from baton.errors import ConfigurationError, PeerError
from baton.pulse import Pulse
from baton.tls import Tls
from baton.v1 import handover_pb2 as pb
from kvtransfer.direct import DirectServer, LentPool, Placed
from kvtransfer.handshake import refusal
from kvtransfer.lanes.base import LaneEndpoint, LaneServer
from kvtransfer.layout import BlockLayout
from kvtransfer.leases import LeaseBook, LeaseChange, LeaseEvent
from kvtransfer.memory import PoolMemory
from kvtransfer.outgoing import Connection, Outgoing, Parked, Stranger
from kvtransfer.sealing import ALERT, Seal, is_late
from kvtransfer.wire import (
    HIGH_WATER_MARK,
    MAX_FRAME_BYTES,
    MAX_ID_BYTES,
    MAX_WANT_NAMES,
    Numbering,
    PeerIdentity,
    PeerRef,
    send_now,
    spawn,
)

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
MAX_STRANGERS = 256
"""Connections in a TLS handshake; beyond these the oldest is forgotten."""
HANDSHAKE_MS = 5000
"""Who does not speak ZeroMQ by then is hung up on."""
MAX_PARKED = 4096


class Writing(NamedTuple):
    """A placement that may be written into, and whom to tell about it."""

    connection: Connection
    pool: LentPool


class OfferServer:
    """Offers blocks of `memory`. Every method is called on the event loop's thread, and none of them waits for a peer.

    on_released(id, verified), on_quarantined(id), on_resolved(id): see the module. `verified` says that the peer has
    every block.
    """

    def __init__(
        self,
        me: PeerIdentity,
        layout: BlockLayout,
        memory: PoolMemory,
        lanes: Sequence[LaneServer],
        options: HandoverOptions,
        counters: dict[str, float],
        on_released: Callable[[str, bool], None],
        on_quarantined: Callable[[str], None],
        on_resolved: Callable[[str], None],
        direct: DirectServer | None = None,
        on_want: Callable[[str, Placed | None], None] = lambda handover_id, placed: None,
        on_ask: Callable[[str, PeerIdentity, Sequence[bytes]], None] | None = None,
        tls: Tls | None = None,
    ) -> None:
        """`direct`: maps pools of decode workers. on_want(id, placed): once a Want of an open hand-over, never from
        inside a call of the owner's. `placed`: the owner must call `written` until that has said `stopped`.

        on_ask(id, peer, names): a peer asks for blocks by name. None: nothing is ever found.

        `tls`: nothing is said to a peer without (see `sealing`).
        """
        self._me = me
        self._layout = layout
        self._memory = memory
        self._lanes = lanes
        self._options = options
        self._counters = counters
        self._on_released = on_released
        self._on_quarantined = on_quarantined
        self._on_resolved = on_resolved
        self._direct = direct
        self._on_want_of = on_want
        self._on_ask = on_ask
        self._tls = tls
        self._strangers: dict[bytes, Stranger] = {}
        self._writing: dict[str, Writing] = {}
        self._direct_endpoint: pb.LaneEndpoint | None = None
        # A reader's batch lasts at most pull_timeout_s, and its own clock is checked well within the silence allowed.
        self._book = LeaseBook(options.lease_s, options.pull_timeout_s + options.heartbeat_timeout_s)
        self._outgoing: dict[str, Outgoing] = {}
        self._parked: dict[str, Parked] = {}
        self._connections: dict[bytes, Connection] = {}
        self._endpoints: list[pb.LaneEndpoint] = []
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="kv-checksum")
        self._tasks: list[asyncio.Task[None]] = []
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None

    async def start(self, host: str, port: int = 0) -> str:
        """Serve lanes and control messages; returns the address for peers. Raises ConfigurationError.

        Port 0 takes a free one.
        """
        for lane in self._lanes:
            try:
                endpoint = lane.start(self._memory)
            except ConfigurationError as error:
                log.warning("%s", error)
                continue
            self._endpoints.append(_endpoint(endpoint))
        if not self._endpoints:
            raise ConfigurationError("no lane of --lanes can be served on this host")
        if self._direct is not None:
            try:
                self._direct_endpoint = _endpoint(self._direct.start())
            except ConfigurationError as error:
                log.warning("%s", error)
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a peer that left is an error, not silence
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        self._socket.setsockopt(zmq.IPV6, int(":" in host))
        try:
            self._socket.bind(f"tcp://{_bracketed(host)}:{port or '*'}")
        except zmq.ZMQError as error:
            raise ConfigurationError(f"offers cannot be served on {host}: {error}; change --host") from error
        self._tasks = [spawn(self._receive(self._socket)), spawn(self._watch())]
        bound = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        return f"tcp://{_bracketed(host)}:{bound.rpartition(':')[2]}"

    async def stop(self) -> None:
        """Close every lane, end every hand-over, and return once no thread of this object runs."""
        for handover_id, outgoing in list(self._outgoing.items()):
            self._send_failed(outgoing.connection, handover_id, "the worker stops")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._close_lanes)
        if self._direct is not None:
            await self._direct.close()
        self._apply(self._book.lose(list(self._outgoing)))
        if self._socket is not None and self._context is not None:
            self._socket.close()
            await asyncio.to_thread(self._context.term)
            self._socket = None

    def _close_lanes(self) -> None:
        for lane in self._lanes:
            lane.close()
        self._hasher.shutdown(wait=True, cancel_futures=True)

    # -- what the owner of the blocks says ---------------------------------------------------------------------------

    def open(self, handover_id: str, peer: PeerRef) -> None:
        """Begin a hand-over that only `peer` may want. Raises ValueError for an id used before."""
        change = self._book.open(handover_id, peer.identity, time.monotonic())
        outgoing = self._outgoing[handover_id] = Outgoing()
        parked = self._parked.pop(handover_id, None)
        if change is not None:
            asyncio.get_running_loop().call_soon(self._apply, [change])  # never from inside open()
        elif parked is not None:
            self._want(parked.connection, parked.want, outgoing)

    def expects_placement(self, peer: PeerIdentity) -> bool:
        """Whether the Want of that worker can be expected to name blocks to write into."""
        return self._direct is not None and self._direct.lends(peer)

    def offer(
        self,
        handover_id: str,
        first_block: int,
        block_ids: Sequence[int],
        generations: Sequence[int],
        num_layers: int | None = None,
    ) -> None:
        """These blocks, at positions `first_block` and on, are final. Ignored once the hand-over has ended.

        `num_layers`: only that many leading layers are, more than before; the same blocks must follow, until with None
        all layers are. Raises ValueError when they do not follow the ones before, or are no blocks of the pool.
        """
        if block_ids and not 0 <= min(block_ids) <= max(block_ids) < self._memory.num_blocks:
            raise ValueError(f"hand-over {handover_id} offers a block outside of the pool")
        outgoing, is_whole = self._outgoing.get(handover_id), num_layers is None
        if outgoing is None:
            return
        layers = range(outgoing.num_begun_layers, self._layout.num_layers if num_layers is None else num_layers)
        fits = not layers.start or len(block_ids) == outgoing.num_begun
        if not (fits and len(layers) > 0 and layers.stop <= self._layout.num_layers):
            raise ValueError(f"hand-over {handover_id}: {num_layers} layers offered after {layers.start}")
        if not self._book.offer(handover_id, first_block, len(block_ids) if is_whole else 0):
            return
        outgoing.num_begun, outgoing.num_begun_layers = (0, 0) if is_whole else (len(block_ids), layers.stop)
        self._count("handover_blocks_offered", len(block_ids) if is_whole else 0)
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._hasher, self._checksum, list(block_ids), list(generations), layers)
        future.add_done_callback(lambda done: self._checksummed(handover_id, first_block, num_layers or 0, done))

    def close(
        self,
        handover_id: str,
        num_blocks: int,
        num_tokens: int,
        first_token_id: int,
        first_token_index: int,
        first_logprob: bytes = b"",
    ) -> None:
        """Every block has been offered. Ignored once the hand-over has ended; ValueError on a wrong count."""
        if self._book.close(handover_id, num_blocks):
            outgoing = self._outgoing[handover_id]
            outgoing.closed = pb.OfferClosed(
                handover_id=handover_id,
                num_blocks=num_blocks,
                num_tokens=num_tokens,
                first_token_id=first_token_id,
                first_token_index=first_token_index,
                first_logprob=first_logprob,
            )
            self._flush(handover_id, outgoing)

    def written(self, handover_id: str, num_blocks: int, stopped: bool) -> None:
        """The first `num_blocks` blocks of a placement are final. Ignored where there is none, or `stopped` was said.

        `stopped`: nothing is written there any more, or ever.
        """
        self._tell_written(pb.Written(handover_id=handover_id, num_blocks=num_blocks, stopped=stopped))

    def written_all(
        self,
        handover_id: str,
        num_blocks: int,
        num_tokens: int,
        first_token_id: int,
        first_token_index: int,
        first_logprob: bytes = b"",
    ) -> None:
        """As `written`, of all blocks: the last word, which carries the first token."""
        message = pb.Written(handover_id=handover_id, num_blocks=num_blocks, stopped=True)
        message.closed.handover_id, message.closed.num_blocks = handover_id, num_blocks
        message.closed.num_tokens = num_tokens
        message.closed.first_token_id, message.closed.first_token_index = first_token_id, first_token_index
        message.closed.first_logprob = first_logprob
        self._tell_written(message)

    def _tell_written(self, message: pb.Written) -> None:
        writing = self._writing.get(message.handover_id)
        if writing is None:
            return
        self._send(writing.connection, pb.HandoverMessage(written=message))
        if message.stopped:
            del self._writing[message.handover_id]
            if self._direct is not None:
                self._direct.done(writing.pool)
            if (outgoing := self._outgoing.get(message.handover_id)) is not None:
                self._flush(message.handover_id, outgoing)

    def found(self, handover_id: str, num_blocks: int) -> None:
        """Answer a Want with names: so many leading blocks are likely to be offered. With none that is all there is."""
        parked = self._parked.get(handover_id)
        if parked is not None:
            message = pb.Found(handover_id=handover_id, num_blocks=num_blocks)
            self._send(parked.connection, pb.HandoverMessage(found=message))
            if num_blocks == 0:
                del self._parked[handover_id]

    def is_awaited(self, handover_id: str) -> bool:
        """Whether a peer waits for a hand-over that has not been opened."""
        return handover_id in self._parked

    def fail(self, handover_id: str, reason: str) -> None:
        """Give the hand-over up. Its blocks come back by the callbacks, at once when no peer has asked for them."""
        outgoing = self._outgoing.get(handover_id)
        if outgoing is None:
            return
        outgoing.finished = True
        self._send_failed(outgoing.connection, handover_id, reason)
        change = self._book.abort(handover_id)
        self._apply([change] if change else [])

    # -- checksums and announcements ---------------------------------------------------------------------------------

    def _checksum(self, block_ids: list[int], generations: list[int], layers: range) -> list[pb.OfferedBlock]:
        layer_bytes = self._memory.block_bytes // self._layout.num_layers
        part = slice(layers.start * layer_bytes, layers.stop * layer_bytes)
        return [
            pb.OfferedBlock(
                block_id=block_id,
                generation=generation,
                checksum=xxhash.xxh3_64_intdigest(self._memory.blocks[block_id, part].data),
            )
            for block_id, generation in zip(block_ids, generations, strict=True)
        ]

    def _checksummed(
        self, handover_id: str, first_block: int, num_layers: int, done: "asyncio.Future[list[pb.OfferedBlock]]"
    ) -> None:
        outgoing = self._outgoing.get(handover_id)
        if done.cancelled() or outgoing is None:
            return
        outgoing.add(handover_id, first_block, done.result(), num_layers)
        self._flush(handover_id, outgoing)

    def _flush(self, handover_id: str, outgoing: Outgoing) -> None:
        """Tell the peer what it does not know yet; nothing is offered while its own blocks may be written into."""
        if outgoing.connection is not None and handover_id not in self._writing:
            for message in outgoing.news(handover_id):
                if not self._send(outgoing.connection, message):
                    return

    def _send(self, connection: Connection, message: pb.HandoverMessage) -> bool:
        """Queue a message; a peer that is gone or does not read loses its connection, and False is returned."""
        if self._socket is None or connection.routing_id not in self._connections:
            return False
        frames = [connection.routing_id, connection.numbering.stamp(message)]
        error = send_now(self._socket, frames)
        if error is not None:
            # Not from inside a caller's open(), offer() or close(): dropping ends leases, which calls the owner back.
            reason = f"nothing can be sent to it: {error}"
            asyncio.get_running_loop().call_soon(self._drop, connection, reason, False)
        return error is None

    def _send_failed(self, connection: Connection | None, handover_id: str, reason: str) -> None:
        if connection is not None:
            self._send(connection, pb.HandoverMessage(failed=pb.OfferFailed(handover_id=handover_id, reason=reason)))

    # -- what peers say ----------------------------------------------------------------------------------------------

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            frames = await socket.recv_multipart()
            if len(frames) != 2:
                continue
            connection = self._connections.get(frames[0])
            if connection is None:
                if self._tls is None:
                    self._greet(socket, frames[0], frames[1], Numbering())
                else:
                    self._shake(socket, frames[0], frames[1], self._tls)
                continue
            try:
                self._handle(connection, connection.numbering.accept(frames[1]))
            except PeerError as error:
                self._drop(connection, str(error), True)

    def _shake(self, socket: zmq.asyncio.Socket, routing_id: bytes, frame: bytes, tls: Tls) -> None:
        """With TLS a connection begins with a handshake, and whoever gets through it says Hello."""
        stranger = self._strangers.pop(routing_id, None)
        if stranger is None and is_late(frame):
            send_now(socket, [routing_id, ALERT])
            return
        if stranger is None:
            stranger = Stranger(Seal(tls.server, True), time.monotonic() + self._options.heartbeat_timeout_s)
        elif stranger.seal.done:
            self._greet(socket, routing_id, frame, Numbering(stranger.seal))
            return
        try:
            answer = stranger.seal.shake(frame)
        except PeerError as error:
            tls.refuse("hand-over", str(error))
            answer = stranger.seal.farewell()
        else:
            self._strangers[routing_id] = stranger
            if len(self._strangers) > MAX_STRANGERS:
                del self._strangers[next(iter(self._strangers))]
        if answer:
            send_now(socket, [routing_id, answer])

    def _greet(self, socket: zmq.asyncio.Socket, routing_id: bytes, frame: bytes, numbering: Numbering) -> None:
        """Answer the first message of a connection, which must be an acceptable Hello."""
        try:
            hello = numbering.accept(frame).hello
            reason = refusal(hello, self._me, self._layout, self._endpoints)
            if len(self._connections) >= MAX_CONNECTIONS:
                reason = f"{MAX_CONNECTIONS} workers are connected already"
        except PeerError as error:
            reason = str(error)
        reply = pb.HelloReply(accepted=not reason, reason=reason or "", incarnation=self._me.incarnation)
        if reason is None:
            peer = PeerIdentity(hello.worker_id, hello.incarnation)
            self._forget_older_lives(peer)
            self._connections[routing_id] = Connection(routing_id, peer, numbering, time.monotonic())
            reply.pool_epoch = self._memory.epoch
            reply.lanes.extend(self._endpoints)
            reply.layout.CopyFrom(self._layout.to_proto())
            if self._direct_endpoint is not None:
                reply.direct.CopyFrom(self._direct_endpoint)
            reply.lease_s = self._options.lease_s
            reply.heartbeat_interval_s = self._options.heartbeat_interval_s
            reply.heartbeat_timeout_s = self._options.heartbeat_timeout_s
        else:
            log.warning("refused a worker that wanted to pull: %s", reason)
        answer = numbering.stamp(pb.HandoverMessage(hello_reply=reply))
        send_now(socket, [routing_id, answer])  # should it be gone already, a heartbeat will notice

    def _forget_older_lives(self, peer: PeerIdentity) -> None:
        for known in list(self._connections.values()):
            if known.peer.worker_id == peer.worker_id and known.peer.incarnation != peer.incarnation:
                self._drop(known, "it was restarted", True)

    def _handle(self, connection: Connection, message: pb.HandoverMessage) -> None:
        now = connection.last_heard = time.monotonic()
        match message.WhichOneof("message"):
            case "want":
                self._on_want(connection, message.want, now)
            case "release":
                handover_id = message.release.handover_id
                parked = self._parked.get(handover_id)
                if parked is not None and parked.connection.peer == connection.peer:
                    del self._parked[handover_id]
                    self._decline(connection, parked.want)
                if len(handover_id) > MAX_ID_BYTES:
                    raise PeerError("the peer names an impossible hand-over")
                change = self._book.release(handover_id, connection.peer, message.release.verified)
                self._apply([change] if change else [])
            case "heartbeat":
                self._book.renew(message.heartbeat.renew, connection.peer, now)
            case kind:
                raise PeerError(f"the peer sent '{kind}', which is not for it to send")

    def _on_want(self, connection: Connection, want: pb.Want, now: float) -> None:
        handover_id = want.handover_id
        if len(handover_id) > MAX_ID_BYTES:
            raise PeerError("the peer names an impossible hand-over")
        if len(want.names) > MAX_WANT_NAMES:
            raise PeerError(f"the peer asks for more than {MAX_WANT_NAMES} blocks at once")
        outgoing = self._outgoing.get(handover_id)
        if outgoing is not None:
            self._want(connection, want, outgoing)
        elif self._book.has_ended(handover_id) or len(self._parked) >= MAX_PARKED:
            self._send_failed(connection, handover_id, "the offer has ended")
            self._decline(connection, want)
        elif not want.names:
            # Both workers are assigned at the same time. What has not come here by then is lost with the way to here,
            # and the peer, who sees that this worker lives, would wait for as long as its request may take.
            self._parked[handover_id] = Parked(connection, want, now + self._options.heartbeat_timeout_s)
        elif handover_id not in self._parked:
            self._parked[handover_id] = Parked(connection, want, now + self._options.lease_s)
            if self._on_ask is None:
                self.found(handover_id, 0)
            else:
                self._on_ask(handover_id, connection.peer, list(want.names))

    def _want(self, connection: Connection, want: pb.Want, outgoing: Outgoing) -> None:
        handover_id = want.handover_id
        if not self._book.want(handover_id, connection.peer):
            self._send_failed(connection, handover_id, "the offer has ended, or is for another worker")
            self._decline(connection, want)
            return
        outgoing.connection = connection
        outgoing.first_wanted, outgoing.num_sent = want.first_block, 0
        outgoing.finished = False
        placed = None
        if self._direct is not None and want.HasField("placement") and handover_id not in self._writing:
            placed = self._direct.place(connection.peer, want)
        if placed is not None:
            self._writing[handover_id] = Writing(connection, placed.pool)
        else:
            self._decline(connection, want)
        asyncio.get_running_loop().call_soon(self._on_want_of, handover_id, placed)
        self._flush(handover_id, outgoing)

    def _decline(self, connection: Connection, want: pb.Want) -> None:
        """Nothing will be written into the blocks that it names, unless a Want before it named them too."""
        if want.HasField("placement") and want.handover_id not in self._writing:
            declined = pb.Written(handover_id=want.handover_id, stopped=True)
            self._send(connection, pb.HandoverMessage(written=declined))

    # -- time and endings --------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Heartbeats, leases and parked wants once an interval; silence as soon as it is over."""
        pulse = Pulse(self._options.heartbeat_interval_s, self._options.heartbeat_timeout_s)
        while True:
            beats = await pulse.rest([connection.last_heard for connection in self._connections.values()])
            for connection in list(self._connections.values()):
                if pulse.silent(connection.last_heard):
                    self._drop(connection, "it fell silent", True)
                elif beats:
                    self._send(connection, pb.HandoverMessage(heartbeat=pb.HandoverHeartbeat()))
            if not (beats and pulse.judges):
                continue  # not before what peers sent is read: their heartbeats renew leases
            now = time.monotonic()
            self._apply(self._book.tick(now))
            for routing_id, stranger in list(self._strangers.items()):
                if now >= stranger.expires_at:
                    del self._strangers[routing_id]
            for handover_id, parked in list(self._parked.items()):
                if now >= parked.expires_at:
                    del self._parked[handover_id]
                    self._send_failed(parked.connection, handover_id, "nothing was offered in time")
                    self._decline(parked.connection, parked.want)

    def _drop(self, connection: Connection, reason: str, dead: bool) -> None:
        """Forget a connection and end what was pulled over it; of a dead peer also what it has not asked for yet."""
        if self._connections.pop(connection.routing_id, None) is None:
            return
        lost = {key for key, outgoing in self._outgoing.items() if outgoing.connection is connection}
        if dead and all(other.peer != connection.peer for other in self._connections.values()):
            lost.update(self._book.of_peer(connection.peer))
        for handover_id, parked in list(self._parked.items()):
            if parked.connection is connection:
                del self._parked[handover_id]
        level = logging.WARNING if dead or lost else logging.INFO
        log.log(level, "dropped the connection of worker %s: %s", connection.peer.worker_id, reason)
        if dead or lost:
            self._count("handover_peer_losses", 1)
        if dead and self._socket is not None:  # tell a peer that is alive after all that it must begin anew
            farewell = pb.HandoverMessage(hello_reply=pb.HelloReply(accepted=False, reason=reason))
            send_now(self._socket, [connection.routing_id, connection.numbering.stamp(farewell)])
        self._apply(self._book.lose(lost))

    def _apply(self, changes: Sequence[LeaseChange]) -> None:
        """Tell the owner of the blocks, and the peer where it must stop."""
        for change in changes:
            handover_id = change.handover_id
            if change.event is LeaseEvent.QUARANTINED:
                outgoing = self._outgoing[handover_id]
                self._count("handover_leases_expired", 1)
                log.warning("the lease of hand-over %s expired", handover_id)
                self._on_quarantined(handover_id)
                outgoing.finished = True
                connection = outgoing.connection
                if connection is None or connection.routing_id not in self._connections:
                    self._apply(self._book.lose([handover_id]))  # nobody is there who could read
                else:
                    self._send(connection, pb.HandoverMessage(revoke=pb.Revoke(handover_id=handover_id)))
                continue
            self._outgoing.pop(handover_id, None)
            if change.event is LeaseEvent.RELEASED:
                self._on_released(handover_id, change.verified)
            else:
                self._on_resolved(handover_id)

    def _count(self, name: str, amount: float) -> None:
        self._counters[name] = self._counters.get(name, 0.0) + amount


def _endpoint(endpoint: LaneEndpoint) -> pb.LaneEndpoint:
    return pb.LaneEndpoint(lane=endpoint.lane, address=endpoint.address, token=endpoint.token)


def _bracketed(host: str) -> str:
    """A host as addresses spell it: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host
