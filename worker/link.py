"""A worker's link to one coordinator: register, answer, heartbeat, and dial again when it breaks.

The coordinator owns every stream of tokens, so work without a link has no reader: when the link breaks, the worker
is told (`on_lost`), keeps what another coordinator may go on with, and registers afresh. Silence counts as a break:
both sides send a heartbeat every `heartbeat_interval_s`, and one that hears nothing for `heartbeat_timeout_s` hangs up.
"""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from baton.errors import ConfigurationError
from baton.framed import Framed, dial, trouble
from baton.pulse import Pulse
from baton.tls import Tls, reason_of
from baton.v1 import worker_link_pb2 as wire
from worker.roles import KvLink, Link

log = logging.getLogger(__name__)
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
        self._registration = registration
        self._handler = handler
        self._heartbeat = heartbeat
        self._tls = tls
        self._connection: Framed[wire.CoordinatorMessage] | None = None
        """From its dialling on."""
        self._told = ""
        self._heard = 0.0
        self._failure: Exception | None = None
        """Of this worker, on what it heard."""
        self.connected = asyncio.Event()
        self.wanted = True
        self.found_s = time.monotonic()
        """Dialled again when it breaks. A link that works is kept whether it is wanted or not."""
        self.coordinator = 0
        """Incarnation of who answered last; 0: nobody yet."""
        self.kv_sequence = 0

    @property
    def unsent_bytes(self) -> int:
        return self._connection.unsent_bytes if self._connection is not None else 0

    def send(self, message: wire.WorkerMessage) -> None:
        """Say something; without a link it is dropped, as its stream has failed over already."""
        connection = self._connection
        if connection is None:
            return
        if message.HasField("heartbeat"):  # which several links may send, each with a number of its own
            heartbeat = wire.WorkerHeartbeat(kv_sequence=self.kv_sequence)
            heartbeat.MergeFrom(message.heartbeat)
            message = wire.WorkerMessage(heartbeat=heartbeat)
        if not connection.send(message):
            connection.abort(ConnectionError("the coordinator does not read"))

    def close(self) -> None:
        """The last message has been sent: the coordinator hangs up when it has read it, and is not dialled again."""
        self.wanted = False
        if self._connection is not None:
            self._connection.finish()

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
            except OSError as error:
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

    async def _explain(self, error: OSError) -> None:
        """Say why there is no link, each reason once an outage. Raises Refused when dialling again cannot help."""
        if self.connected.is_set():
            log.warning("link to the coordinator at %s broke: %s", self._address, error or type(error).__name__)
            return
        reason = "no answer in time" if isinstance(error, TimeoutError) else reason_of(error)
        if not isinstance(error, ConnectionRefusedError | TimeoutError) and (
            problem := await trouble(self._address, self._tls)
        ):
            if problem == self._told and not self.coordinator:  # no chance of a moment, nor files being replaced
                raise Refused(f"no link with the coordinator at {self._address}: {problem}") from error
            reason = problem
        if reason != self._told:
            self._told = reason
            log.info("link to the coordinator at %s: %s", self._address, reason)

    async def _session(self, on_connected: Callable[[], None]) -> None:
        """One connection from dialling to its end, which is an OSError."""
        self.kv_sequence = 0
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                connection = await dial(self._address, wire.CoordinatorMessage, self._tls)
                self._connection = connection
                connection.send(wire.WorkerMessage(registration=self._registration))
                first = await connection.read()
            if first is None:
                raise ConnectionError("the coordinator hung up before its welcome")
            if first.HasField("refusal"):
                raise Refused(f"the coordinator at {self._address} refused this worker: {first.refusal.reason}")
            self.coordinator = first.welcome.coordinator_incarnation
            self.connected.set()
            self._told = ""
            self._handler.on_linked(self)
            if first.welcome.kv_events:
                self._handler.on_kv_wanted(self)
            on_connected()
            log.info("registered with the coordinator at %s", self._address)
            await self._serve(connection, first.welcome)
        finally:
            if self._connection is not None:
                self._connection.abort()
                self._connection = None

    async def _serve(self, connection: Framed[wire.CoordinatorMessage], welcome: wire.Welcome) -> None:
        """Until the link breaks, and then raises why."""
        self._heard = time.monotonic()
        pulse = Pulse(welcome.heartbeat_interval_s, welcome.heartbeat_timeout_s)
        beating = asyncio.create_task(self._beat(pulse))
        connection.listen(self._hear)
        try:
            ends: list[asyncio.Future[Any]] = [beating, connection.ended]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self._failure is not None:
                raise self._failure
            if beating.done():
                beating.result()
            raise connection.ended.result() or ConnectionError("the coordinator hung up")
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)

    def _hear(self, message: wire.CoordinatorMessage) -> None:
        self._heard = time.monotonic()
        try:
            self._dispatch(message)
        except Exception as failure:  # noqa: BLE001 - the session raises it, and this worker ends
            self._failure = failure
            if self._connection is not None:
                self._connection.abort()

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
