"""The pulling side's connection to one peer: a ZeroMQ DEALER for messages and a lane for bytes.

It never reconnects by itself: numbering and leases belong to one connection, so whoever still needs the peer after a
loss makes a new link, and begins with a new handshake.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from baton.config import HandoverOptions
from baton.errors import PeerError, TransferError
from baton.pulse import Pulse
from baton.tls import Tls
from baton.v1 import handover_pb2 as pb
from kvtransfer.direct import Lending
from kvtransfer.handshake import check_reply, hello, offered_layout
from kvtransfer.lanes.base import LaneClient, LaneEndpoint, OtherHostError
from kvtransfer.lanes.choosing import open_best
from kvtransfer.lanes.registry import Lane
from kvtransfer.layout import BlockLayout
from kvtransfer.memory import PoolMemory
from kvtransfer.sealing import Seal
from kvtransfer.staging import Converter, Converters
from kvtransfer.wire import (
    HIGH_WATER_MARK,
    MAX_FRAME_BYTES,
    Numbering,
    PeerIdentity,
    PeerRef,
    send_now,
    spawn,
)

log = logging.getLogger(__name__)

PULL_THREADS = 2
"""Pulls from one peer at the same time. A link has its own threads, so that a stalled peer holds up nobody else."""
_GONE = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


class PeerLink:
    """on_message(message): everything but handshake and heartbeats. on_lost(link): once, `lost` then says why.

    active_ids(): the hand-overs whose leases the heartbeat renews.
    """

    def __init__(
        self,
        me: PeerIdentity,
        peer: PeerRef,
        options: HandoverOptions,
        on_message: Callable[["PeerLink", pb.HandoverMessage], None],
        on_lost: Callable[["PeerLink"], None],
        active_ids: Callable[["PeerLink"], list[str]],
        tls: Tls | None = None,
    ) -> None:
        self.peer = peer
        self.lost: str | None = None
        self.retired = False
        """Takes no further hand-overs; set by the owner."""
        self.fell_back = False
        """A better lane than the one in use should have reached the peer and did not."""
        self.converter: Converter | None = None
        """What to pull with where the peer's blocks are not laid out as those here."""
        self.lending: Lending | None = None
        """The peer has this worker's pool and can write into blocks that a Want names."""
        self._me = me
        self._options = options
        self._on_message = on_message
        self._on_lost = on_lost
        self._active_ids = active_ids
        self._seal = None if tls is None else Seal(tls.client, False)
        self._numbering = Numbering(self._seal)
        self._hello = pb.HandoverMessage()
        self._last_heard = 0.0
        self._greeting: asyncio.Future[pb.HelloReply] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task[None]] = []
        self._socket: zmq.asyncio.Socket | None = None
        self._monitor_socket: zmq.asyncio.Socket | None = None
        self._lane: LaneClient | None = None
        self.threads = ThreadPoolExecutor(PULL_THREADS, thread_name_prefix="kv-pull")

    @property
    def lane(self) -> LaneClient:
        if self._lane is None:
            raise PeerError(f"no lane to worker {self.peer.worker_id} is open")
        return self._lane

    async def connect(
        self,
        context: zmq.asyncio.Context,
        layout: BlockLayout,
        memory: PoolMemory,
        lanes: Sequence[Lane],
        converters: Converters,
    ) -> None:
        """Handshake, then open the best lane that really reaches the peer, all within heartbeat_timeout_s each.

        Raises PeerError; the link is then of no use and must be closed.
        """
        try:
            self._dial(context)
        except zmq.ZMQError as error:
            raise PeerError(f"'{self.peer.address}' cannot be dialled: {error}") from error
        self._hello = hello(self._me, self.peer, layout, [lane.name for lane in lanes])
        if self._seal is None:
            self.send(self._hello)
        else:
            self._send_frame(self._seal.shake())
        try:
            async with asyncio.timeout(self._options.heartbeat_timeout_s):
                reply = await asyncio.shield(self._greeting)
        except TimeoutError as error:
            raise PeerError("the peer did not answer the handshake") from error
        self._last_heard = time.monotonic()
        self._tasks.append(spawn(self._beat(reply)))
        loop, theirs = asyncio.get_running_loop(), offered_layout(reply, layout)
        self.converter = await loop.run_in_executor(self.threads, converters.for_peer, theirs)
        if self.converter is not None:
            log.info("blocks of worker %s are converted: %s", self.peer.worker_id, self.converter.conversion)
        landing = self.converter.staging.memory if self.converter else memory
        self._lane = await self._open_lane(reply, landing, lanes)
        if reply.HasField("direct") and self.converter is None and self._options.direct_wait_s > 0:
            await self._lend(reply.direct, memory)
        if self.lost:
            raise PeerError(self.lost)

    async def _lend(self, direct: pb.LaneEndpoint, memory: PoolMemory) -> None:
        endpoint = LaneEndpoint(direct.lane, direct.address, direct.token)
        deadline = time.monotonic() + self._options.heartbeat_timeout_s
        loop = asyncio.get_running_loop()
        try:
            self.lending = await loop.run_in_executor(
                self.threads, Lending.connect, endpoint, memory, self._me, deadline
            )
            log.info("worker %s writes into blocks that are reserved here", self.peer.worker_id)
        except TransferError as error:
            self.fell_back |= not isinstance(error, OtherHostError)
            log.warning("worker %s cannot write into blocks here, they are pulled: %s", self.peer.worker_id, error)

    def _dial(self, context: zmq.asyncio.Context) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 200)  # long enough for the last Release
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.IPV6, 1)
        self._monitor_socket = self._socket.get_monitor_socket(_GONE)
        self._tasks = [spawn(self._monitor(self._monitor_socket)), spawn(self._receive(self._socket))]
        self._socket.connect(self.peer.address)

    async def _open_lane(self, reply: pb.HelloReply, memory: PoolMemory, lanes: Sequence[Lane]) -> LaneClient:
        endpoints = {theirs.lane: LaneEndpoint(theirs.lane, theirs.address, theirs.token) for theirs in reply.lanes}
        loop, timeout_s = asyncio.get_running_loop(), self._options.heartbeat_timeout_s
        try:
            choice = await loop.run_in_executor(self.threads, open_best, lanes, endpoints, memory, timeout_s)
        except TransferError as error:
            raise PeerError(f"no lane reaches the peer: {error}") from error
        self.fell_back = choice.is_fallback
        level = logging.WARNING if choice.is_fallback else logging.INFO
        log.log(level, "blocks of worker %s come by %s", self.peer.worker_id, choice)
        return choice.client

    def send(self, message: pb.HandoverMessage) -> None:
        """Queue a message; a peer that cannot take it is lost. Nothing is sent to a lost peer."""
        if self._socket is None or self.lost is not None:
            return
        self._send_frame(self._numbering.stamp(message))

    def _send_frame(self, frame: bytes) -> None:
        if self._socket is not None and (error := send_now(self._socket, [frame])) is not None:
            self._lose(f"nothing can be sent to the peer: {error}")

    async def close(self) -> None:
        """Let go of the peer. No pull of this link may be running."""
        if self.lost is None:
            self.lost = "the link was closed"
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._greeting.cancel()
        if self._socket is not None:
            self._socket.disable_monitor()
            self._socket.close()
            self._socket = None
        if self._monitor_socket is not None:
            self._monitor_socket.close(linger=0)
        if self._lane is not None:
            self._lane.close()
        if self.lending is not None:
            self.lending.recall()
        self.threads.shutdown(wait=False)

    def _lose(self, reason: str) -> None:
        if self.lost is not None:
            return
        self.lost = reason
        if not self._greeting.done():
            self._greeting.set_exception(PeerError(reason))
        log.warning("lost worker %s as a source of blocks: %s", self.peer.worker_id, reason)
        self._on_lost(self)

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while self.lost is None:
            frame = await socket.recv()
            try:
                if self._seal is None or self._seal.done:
                    self._handle(self._numbering.accept(frame))
                else:
                    self._shake(self._seal, frame)
            except PeerError as error:
                self._lose(str(error))

    def _shake(self, seal: Seal, frame: bytes) -> None:
        try:
            answer = seal.shake(frame)
        except PeerError:
            self._send_frame(seal.farewell())
            raise
        if answer:
            self._send_frame(answer)
        if seal.done:
            self.send(self._hello)

    def _handle(self, message: pb.HandoverMessage) -> None:
        self._last_heard = time.monotonic()
        match message.WhichOneof("message"):
            case "hello_reply":
                self._on_reply(message.hello_reply)
            case "heartbeat":
                pass
            case "offer" | "closed" | "failed" | "revoke" | "written" | "found" if self._greeting.done():
                self._on_message(self, message)
            case kind:
                raise PeerError(f"the peer sent '{kind}', which is not for it to send now")

    def _on_reply(self, reply: pb.HelloReply) -> None:
        check_reply(reply, self.peer)
        if self._greeting.done():
            raise PeerError("the peer greeted twice")
        self._greeting.set_result(reply)

    async def _beat(self, reply: pb.HelloReply) -> None:
        """Renew leases, and notice silence. The peer's times count: it is its memory that is on loan."""
        pulse = Pulse(reply.heartbeat_interval_s, reply.heartbeat_timeout_s)
        while self.lost is None:
            if await pulse.rest([self._last_heard]):
                self.send(pb.HandoverMessage(heartbeat=pb.HandoverHeartbeat(renew=self._active_ids(self))))
            if pulse.silent(self._last_heard):
                self._lose("it fell silent")

    async def _monitor(self, monitor: zmq.asyncio.Socket) -> None:
        """A process that dies closes its connection: this tells at once, where silence takes its time."""
        frames = await monitor.recv_multipart()
        event = parse_monitor_message(frames)["event"]
        self._lose("it closed the connection" if event == zmq.EVENT_DISCONNECTED else "nobody listens there")
