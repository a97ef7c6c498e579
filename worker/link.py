"""A worker's stream to one coordinator: register, answer, heartbeat, and dial again when it breaks.

The coordinator owns every stream of tokens, so work without a link has no reader: when the link breaks, the worker
is told (`on_lost`), keeps what another coordinator may go on with, and registers afresh. Silence counts as a break:
both sides send a heartbeat every `heartbeat_interval_s`, and one that hears nothing for `heartbeat_timeout_s` hangs up.
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable

import grpc

from baton.errors import ConfigurationError
from baton.v1 import worker_link_pb2 as wire
from baton.v1.worker_link_pb2_grpc import WorkerLinkStub

log = logging.getLogger(__name__)
MAX_OUTGOING = 8192
MAX_MESSAGE_BYTES = 64 << 20
WELCOME_TIMEOUT_S = 10.0


class LinkHandler(ABC):
    """What a worker does with what its coordinator says. Called on the asyncio thread; must not block."""

    @abstractmethod
    def on_assignment(self, assignment: wire.Assignment) -> None: ...

    @abstractmethod
    def on_abort(self, id: wire.AttemptId) -> None: ...

    @abstractmethod
    def on_pin(self, pin: wire.Pin) -> None: ...

    @abstractmethod
    def on_unpin(self, id: str) -> None: ...

    @abstractmethod
    def on_drain(self) -> None: ...

    @abstractmethod
    def on_adopt(self, adopt: wire.Adopt) -> None: ...

    @abstractmethod
    def on_cached_tokens(self, cached: wire.CachedTokens) -> None: ...

    @abstractmethod
    def on_linked(self, coordinator: int) -> None:
        """The coordinator of this incarnation has welcomed this worker."""

    @abstractmethod
    def on_lost(self, coordinator: int) -> None: ...


class Refused(ConfigurationError):
    """The coordinator will not have this worker; dialling again cannot help."""


class CoordinatorLink:
    def __init__(
        self,
        address: str,
        registration: wire.Registration,
        handler: LinkHandler,
        heartbeat: Callable[[], wire.WorkerHeartbeat],
    ) -> None:
        self._address = address
        self._registration = registration
        self._handler = handler
        self._heartbeat = heartbeat
        self._outgoing: asyncio.Queue[wire.WorkerMessage] | None = None
        self._overflow = asyncio.Event()
        self._coordinator = 0
        self.connected = asyncio.Event()

    def send(self, message: wire.WorkerMessage) -> None:
        """Queue a message; without a link it is dropped, as its stream has failed over already."""
        if self._outgoing is None:
            return
        try:
            self._outgoing.put_nowait(message)
        except asyncio.QueueFull:
            self._overflow.set()

    async def run(self, connect_timeout_s: float) -> None:
        """Keep a link up until cancelled. Raises ConfigurationError when none could be had for `connect_timeout_s`
        at the start, or the coordinator refused this worker."""
        loop = asyncio.get_running_loop()
        give_up_at: float | None = loop.time() + connect_timeout_s
        backoff_s = 0.05
        while True:
            try:
                await self._session()
            except (grpc.aio.AioRpcError, TimeoutError, ConnectionError) as error:
                self._explain(error)
            if self.connected.is_set():
                self.connected.clear()
                give_up_at, backoff_s = None, 0.05
                self._handler.on_lost(self._coordinator)
            elif give_up_at is not None and loop.time() > give_up_at:
                raise ConfigurationError(
                    f"no coordinator answered at {self._address} for {connect_timeout_s:g} s; "
                    "check --coordinator and that `baton coordinator` runs there"
                )
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, 1.0)

    @staticmethod
    def _explain(error: Exception) -> None:
        if isinstance(error, grpc.aio.AioRpcError):
            if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
                raise Refused(f"the coordinator refused this worker: {error.details()}") from error
            log.info("link to the coordinator: %s", error.code().name)
        else:
            log.warning("link to the coordinator broke: %s", error or type(error).__name__)

    async def _session(self) -> None:
        """One connection from dialling to its end."""
        self._outgoing = asyncio.Queue(MAX_OUTGOING)
        self._overflow.clear()
        options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        try:
            async with grpc.aio.insecure_channel(self._address, options=options) as channel:
                self._outgoing.put_nowait(wire.WorkerMessage(registration=self._registration))
                call = WorkerLinkStub(channel).Connect(self._messages(self._outgoing))
                async with asyncio.timeout(WELCOME_TIMEOUT_S):  # wait_for() may lose a cancellation
                    welcome = await call.read()
                if not isinstance(welcome, wire.CoordinatorMessage):  # the end of the stream
                    raise ConnectionError("the coordinator hung up before its welcome")
                self._coordinator = welcome.welcome.coordinator_incarnation
                self.connected.set()
                self._handler.on_linked(self._coordinator)
                log.info("registered with the coordinator at %s", self._address)
                await self._serve(call, welcome.welcome)
        finally:
            self._outgoing = None

    @staticmethod
    async def _messages(queue: "asyncio.Queue[wire.WorkerMessage]") -> AsyncIterator[wire.WorkerMessage]:
        while True:
            yield await queue.get()

    async def _serve(self, call: "grpc.aio.StreamStreamCall[wire.WorkerMessage, wire.CoordinatorMessage]",
                     welcome: wire.Welcome) -> None:  # fmt: skip
        beat = asyncio.create_task(self._beat(welcome.heartbeat_interval_s))
        overflow = asyncio.create_task(self._overflow.wait())
        try:
            while True:
                read = asyncio.ensure_future(call.read())
                done, _ = await asyncio.wait(
                    {read, overflow}, timeout=welcome.heartbeat_timeout_s, return_when=asyncio.FIRST_COMPLETED
                )
                if read not in done:
                    read.cancel()
                    raise ConnectionError("outgoing queue full" if overflow in done else "coordinator silent")
                message = read.result()
                if not isinstance(message, wire.CoordinatorMessage):  # the end of the stream
                    raise ConnectionError("the coordinator closed the stream")
                self._dispatch(message)
        finally:
            beat.cancel()
            overflow.cancel()
            call.cancel()

    def _dispatch(self, message: wire.CoordinatorMessage) -> None:
        match message.WhichOneof("message"):
            case "assignment":
                self._handler.on_assignment(message.assignment)
            case "abort":
                self._handler.on_abort(message.abort.id)
            case "pin":
                self._handler.on_pin(message.pin)
            case "unpin":
                self._handler.on_unpin(message.unpin.id)
            case "adopt":
                self._handler.on_adopt(message.adopt)
            case "cached_tokens":
                self._handler.on_cached_tokens(message.cached_tokens)
            case "drain":
                self._handler.on_drain()
            case _:
                pass  # a heartbeat has done its work by arriving

    async def _beat(self, interval_s: float) -> None:
        while True:
            self.send(wire.WorkerMessage(heartbeat=self._heartbeat()))
            await asyncio.sleep(interval_s)
