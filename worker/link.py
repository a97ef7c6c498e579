"""A worker's stream to one coordinator: register, answer, heartbeat, and dial again when it breaks.

The coordinator owns every stream of tokens, so work without a link has no reader: when the link breaks, the worker
is told (`on_lost`), keeps what another coordinator may go on with, and registers afresh. Silence counts as a break:
both sides send a heartbeat every `heartbeat_interval_s`, and one that hears nothing for `heartbeat_timeout_s` hangs up.
"""

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from typing import cast

import grpc

from baton.errors import ConfigurationError
from baton.grpc_tls import channel, trouble
from baton.pulse import Pulse
from baton.tls import Tls
from baton.v1 import worker_link_pb2 as wire
from baton.v1.worker_link_pb2_grpc import WorkerLinkStub
from worker.roles import KvLink, Link

log = logging.getLogger(__name__)
MAX_OUTGOING = 8192
MAX_MESSAGE_BYTES = 64 << 20
BUNDLE_BYTES = 64 << 10
WELCOME_TIMEOUT_S = 10.0
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.05, 1.0


class LinkHandler(ABC):
    """What a worker does with what its coordinators say. Called on the asyncio thread; must not block.

    `link`: the one it was heard on. Answers go there, and it stands for the coordinator as long as it is not lost.
    """

    @abstractmethod
    def on_assignment(self, link: Link, assignment: wire.Assignment) -> None: ...

    @abstractmethod
    def on_abort(self, link: Link, id: wire.AttemptId) -> None: ...

    @abstractmethod
    def on_pin(self, link: Link, pin: wire.Pin) -> None: ...

    @abstractmethod
    def on_unpin(self, link: Link, id: str) -> None: ...

    @abstractmethod
    def on_reserve(self, link: Link, token: int) -> None: ...

    @abstractmethod
    def on_unreserve(self, link: Link, token: int) -> None: ...

    @abstractmethod
    def on_drain(self) -> None: ...

    @abstractmethod
    def on_adopt(self, link: Link, adopt: wire.Adopt) -> None: ...

    @abstractmethod
    def on_claim(self, link: Link, claim: wire.Claim) -> None: ...

    @abstractmethod
    def on_cached_tokens(self, cached: wire.CachedTokens) -> None: ...

    @abstractmethod
    def on_linked(self, link: Link) -> None:
        """Its coordinator has welcomed this worker."""

    @abstractmethod
    def on_kv_wanted(self, link: KvLink) -> None:
        """Its coordinator wants to know what the caches hold, from now on: at its welcome, or once more."""

    @abstractmethod
    def on_lost(self, link: Link) -> None: ...


class Refused(ConfigurationError):
    """The coordinator will not have this worker; dialling again cannot help."""


class CoordinatorLink:
    def __init__(
        self,
        address: str,
        registration: wire.Registration,
        handler: LinkHandler,
        heartbeat: Callable[[], wire.WorkerHeartbeat],
        tls: Tls | None = None,
    ) -> None:
        self._address = address
        self._registration = wire.Registration(bundles=True)
        self._registration.MergeFrom(registration)
        self._handler = handler
        self._heartbeat = heartbeat
        self._tls = tls
        self._outgoing: asyncio.Queue[wire.WorkerMessage | None] | None = None
        self._overflow = asyncio.Event()
        self._told = ""
        self._heard = 0.0
        self._bundles = False
        self.connected = asyncio.Event()
        self.wanted = True
        """Dialled again when it breaks. A link that works is kept whether it is wanted or not."""
        self.coordinator = 0
        """Incarnation of who answered last; 0: nobody yet."""
        self.kv_sequence = 0

    @property
    def backlog(self) -> int:
        """Messages that wait to be written."""
        return self._outgoing.qsize() if self._outgoing is not None else 0

    def send(self, message: wire.WorkerMessage) -> None:
        """Queue a message; without a link it is dropped, as its stream has failed over already."""
        if self._outgoing is None:
            return
        if message.HasField("heartbeat"):  # which several links may send, each with a number of its own
            heartbeat = wire.WorkerHeartbeat(kv_sequence=self.kv_sequence)
            heartbeat.MergeFrom(message.heartbeat)
            message = wire.WorkerMessage(heartbeat=heartbeat)
        try:
            self._outgoing.put_nowait(message)
        except asyncio.QueueFull:
            self._overflow.set()

    def close(self) -> None:
        """The last message has been sent: the coordinator hangs up when it has read it, and is not dialled again."""
        self.wanted = False
        if self._outgoing is not None:
            with contextlib.suppress(asyncio.QueueFull):
                self._outgoing.put_nowait(None)

    async def run(
        self, on_connected: Callable[[], None], is_reached_otherwise: Callable[[int], bool] = lambda coordinator: False
    ) -> None:
        """Keep a link up until cancelled, or broken and not `wanted`. Raises Refused when the coordinator says so.

        `is_reached_otherwise`: that coordinator has another link, by another address. It keeps one link a worker, the
        newest: two that both dialled again would break each other for ever.
        """
        backoff_s = FIRST_BACKOFF_S
        while True:
            held = self.coordinator != 0 and is_reached_otherwise(self.coordinator)
            try:
                if not held:
                    await self._session(on_connected)
            except (grpc.aio.AioRpcError, TimeoutError, ConnectionError) as error:
                if cast("asyncio.Task[None]", asyncio.current_task()).cancelling():
                    raise asyncio.CancelledError from error  # gRPC takes it for itself while it opens a call
                if self.wanted:
                    await self._explain(error)
            if self.connected.is_set():
                self.connected.clear()
                backoff_s = FIRST_BACKOFF_S
                self._handler.on_lost(self)
            if not self.wanted:
                log.info("the link to the coordinator at %s is gone, and not wanted any more", self._address)
                return
            await asyncio.sleep(MAX_BACKOFF_S if held else backoff_s)
            if not self.wanted:
                return
            backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)

    async def _explain(self, error: Exception) -> None:
        """Say why there is no link, each reason once an outage. Raises Refused when dialling again cannot help."""
        if not isinstance(error, grpc.aio.AioRpcError):
            log.warning("link to the coordinator at %s broke: %s", self._address, error or type(error).__name__)
            return
        if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
            raise Refused(f"the coordinator at {self._address} refused this worker: {error.details()}") from error
        reason = error.code().name
        if error.code() == grpc.StatusCode.UNAVAILABLE and (problem := await trouble(self._address, self._tls)):
            if problem == self._told and not self.coordinator:  # no chance of a moment, nor files being replaced
                raise Refused(f"no link with the coordinator at {self._address}: {problem}") from error
            reason = problem
        if reason != self._told:
            self._told = reason
            log.info("link to the coordinator at %s: %s", self._address, reason)

    async def _session(self, on_connected: Callable[[], None]) -> None:
        """One connection from dialling to its end."""
        self._outgoing = asyncio.Queue(MAX_OUTGOING)
        self._overflow.clear()
        self.kv_sequence = 0
        self._bundles = False
        options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        try:
            async with channel(self._address, self._tls, options) as opened:
                self._outgoing.put_nowait(wire.WorkerMessage(registration=self._registration))
                call = WorkerLinkStub(opened).Connect(self._messages(self._outgoing))
                async with asyncio.timeout(WELCOME_TIMEOUT_S):  # wait_for() may lose a cancellation
                    welcome = await call.read()
                if not isinstance(welcome, wire.CoordinatorMessage):  # the end of the stream
                    raise ConnectionError("the coordinator hung up before its welcome")
                self.coordinator = welcome.welcome.coordinator_incarnation
                self._bundles = welcome.welcome.bundles
                self.connected.set()
                self._told = ""
                self._handler.on_linked(self)
                if welcome.welcome.kv_events:
                    self._handler.on_kv_wanted(self)
                on_connected()
                log.info("registered with the coordinator at %s", self._address)
                await self._serve(call, welcome.welcome)
        finally:
            self._outgoing = None

    async def _messages(self, queue: "asyncio.Queue[wire.WorkerMessage | None]") -> AsyncIterator[wire.WorkerMessage]:
        """What was said at once, as after a step, goes as one: a message on the way costs more than what is in it."""
        ended = False
        while not ended and (message := await queue.get()) is not None:
            said, size = [message], message.ByteSize()
            while self._bundles and not (ended or queue.empty()) and size < BUNDLE_BYTES:
                following = queue.get_nowait()
                if following is None:
                    ended = True
                else:
                    said.append(following)
                    size += following.ByteSize()
            yield message if len(said) == 1 else wire.WorkerMessage(bundle=said)

    async def _serve(self, call: "grpc.aio.StreamStreamCall[wire.WorkerMessage, wire.CoordinatorMessage]",
                     welcome: wire.Welcome) -> None:  # fmt: skip
        """Until the link breaks, and then raises why."""
        self._heard = time.monotonic()
        pulse = Pulse(welcome.heartbeat_interval_s, welcome.heartbeat_timeout_s)
        tasks = [asyncio.create_task(work) for work in (self._read(call), self._beat(pulse), self._overflown())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            done.pop().result()
        finally:
            for task in tasks:
                task.cancel()
            call.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, call: "grpc.aio.StreamStreamCall[wire.WorkerMessage, wire.CoordinatorMessage]") -> None:
        while isinstance(message := await call.read(), wire.CoordinatorMessage):
            self._heard = time.monotonic()
            for each in message.bundle or (message,):
                self._dispatch(each)
        raise ConnectionError("the coordinator closed the stream")

    async def _overflown(self) -> None:
        await self._overflow.wait()
        raise ConnectionError("outgoing queue full")

    def _dispatch(self, message: wire.CoordinatorMessage) -> None:
        match message.WhichOneof("message"):
            case "assignment":
                self._handler.on_assignment(self, message.assignment)
            case "abort":
                self._handler.on_abort(self, message.abort.id)
            case "pin":
                self._handler.on_pin(self, message.pin)
            case "unpin":
                self._handler.on_unpin(self, message.unpin.id)
            case "adopt":
                self._handler.on_adopt(self, message.adopt)
            case "claim":
                self._handler.on_claim(self, message.claim)
            case "cached_tokens":
                self._handler.on_cached_tokens(message.cached_tokens)
            case "reserve":
                self._handler.on_reserve(self, message.reserve.token)
            case "unreserve":
                self._handler.on_unreserve(self, message.unreserve.token)
            case "send_kv_snapshot":
                self._handler.on_kv_wanted(self)
            case "drain":
                self._handler.on_drain()
            case _:
                pass  # a heartbeat has done its work by arriving

    async def _beat(self, pulse: Pulse) -> None:
        while True:
            beats = await pulse.rest([self._heard])
            if pulse.silent(self._heard):
                raise ConnectionError("coordinator silent")
            if beats:
                self.send(wire.WorkerMessage(heartbeat=self._heartbeat()))
