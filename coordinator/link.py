"""The worker link: one connection a worker, on a port of its own.

1. The worker dials and registers; it is welcomed or refused with the reason.
2. What it says goes to the dispatcher in the turn of the loop that read it. Both sides send heartbeats.
3. The worker is lost when its link breaks, when it is silent for `heartbeat_timeout_s`, when it does not read, or when
   it registers again. Losing it ends its link, and the dispatcher fails its attempts over.
"""

import asyncio
import logging
import math
import secrets
import time
import traceback
from functools import partial

from baton.config import CoordinatorOptions
from baton.cork import Cork
from baton.errors import PeerError
from baton.framed import Framed
from baton.pulse import Pulse
from baton.tls import Tls
from baton.v1 import worker_link_pb2 as wire
from coordinator.dispatch import Dispatcher
from coordinator.limits import Listener, Refusals
from coordinator.workers import Worker, WorkerRegistry

events = logging.getLogger("baton.events")

MAX_CONNECTIONS = 16384
"""Those in a TLS handshake, too."""
MAX_REGISTRATION_BYTES = 1 << 20
MAX_UNREGISTERED = 1024
"""Connections that have not said who they are; more are hung up on."""
SAY_AGAIN_S = 60.0
_HEARTBEAT = wire.CoordinatorMessage(heartbeat=wire.CoordinatorHeartbeat())

Link = Framed[wire.WorkerMessage]


class LinkServer:
    def __init__(
        self, options: CoordinatorOptions, registry: WorkerRegistry, dispatcher: Dispatcher, refusals: Refusals,
        cork: Cork, tls: Tls | None = None,
    ) -> None:  # fmt: skip
        self._options = options
        self._registry = registry
        self._dispatcher = dispatcher
        self._incarnation = secrets.randbits(64)
        self._pulse = Pulse(options.heartbeat_interval_s, options.heartbeat_timeout_s)
        self._cut_off_at_s = -math.inf
        """When a worker was last lost because nobody was heard."""
        self._refusals = refusals
        self._listener = Listener(
            "link", lambda leave: Framed(wire.WorkerMessage, self._opened, leave, MAX_REGISTRATION_BYTES, cork),
            refusals, max_open=MAX_CONNECTIONS, handshake_s=options.heartbeat_timeout_s,
            context=tls.listener("link") if tls is not None else None,
        )  # fmt: skip
        self._links: dict[Link, asyncio.Task[None]] = {}
        self._num_unregistered = 0
        self._stopped = False
        self._said_s = -math.inf
        """When somebody who is no worker was last told of in the log."""

    def start(self) -> int:
        """Listen; returns the port. Raises OSError."""
        return self._listener.open(self._options.link_host, self._options.link_port)

    async def stop(self) -> None:
        """Hang up on every worker. Idempotent."""
        self._stopped = True
        self._listener.close()
        for link in self._links:
            link.close()
        await asyncio.gather(*self._links.values(), return_exceptions=True)

    def _opened(self, link: Link) -> None:
        if self._stopped:
            link.abort()
            return
        if self._num_unregistered >= MAX_UNREGISTERED:
            self._refusals.count("link", "full")
            link.abort()
            self._say_stranger(f"{MAX_UNREGISTERED} others have not registered yet, and it was hung up on at once")
            return
        self._num_unregistered += 1
        task = self._links[link] = asyncio.get_running_loop().create_task(self._serve(link))
        task.add_done_callback(lambda done: self._links.pop(link))

    async def _serve(self, link: Link) -> None:
        try:
            worker = await self._register(link)
        except (ConnectionError, TimeoutError) as error:
            link.abort()
            self._refusals.count("link", "stranger")
            self._say_stranger(str(error) or "no registration arrived in time")
            return
        finally:
            self._num_unregistered -= 1
        if worker is None:
            link.close()
            return
        link.listen(partial(self._hear, worker))
        try:
            await asyncio.wait([link.ended])
        finally:
            worker.lose("its link closed", died=not self._pulse.stood_still)

    async def _register(self, link: Link) -> Worker | None:
        """None: it is none of ours, and was told why. Raises ConnectionError or TimeoutError."""
        async with asyncio.timeout(self._options.heartbeat_timeout_s):
            first = await link.read()
        if first is None:
            return None
        if first.WhichOneof("message") != "registration":
            link.send(_refusal("the first message must be a registration"))
            return None
        try:
            worker = self._registry.register(first.registration, link)
        except PeerError as error:
            events.warning("worker %s refused: %s", first.registration.worker_id, error)
            link.send(_refusal(str(error)))
            return None
        welcome = wire.Welcome(
            coordinator_incarnation=self._incarnation,
            heartbeat_interval_s=self._options.heartbeat_interval_s,
            heartbeat_timeout_s=self._options.heartbeat_timeout_s,
            kv_events=self._dispatcher.knowledge.wants_events,
        )
        worker.send(wire.CoordinatorMessage(welcome=welcome))
        self._registry.on_joined(worker)
        return worker

    def _hear(self, worker: Worker, message: wire.WorkerMessage) -> None:
        if worker.lost.is_set():
            return
        worker.last_seen_s = time.monotonic()
        try:
            self._dispatcher.on_message(worker, message)
        except Exception as error:  # noqa: BLE001 - logged; a bug here must be seen
            # The message of the exception is left out: it might quote a prompt.
            where = "".join(traceback.format_tb(error.__traceback__))
            events.error("link of worker %s broke on %s\n%s", worker.id, type(error).__name__, where)
            worker.lose("what it said could not be handled")

    def _say_stranger(self, reason: str) -> None:
        now = time.monotonic()
        if now - self._said_s >= SAY_AGAIN_S:
            self._said_s = now
            events.warning("who dialled the link is no worker of this version (if it is one, upgrade it): %s", reason)

    async def watch(self) -> None:
        """Send heartbeats, and lose silent workers, until cancelled."""
        while True:
            workers = [worker for worker in self._registry.workers.values() if not worker.lost.is_set()]
            beats = await self._pulse.rest([worker.last_seen_s for worker in workers])
            for worker in list(self._registry.workers.values()):
                if self._pulse.silent(worker.last_seen_s):
                    self._lose_silent(worker)
                elif beats:
                    worker.send(_HEARTBEAT)

    def _lose_silent(self, worker: Worker) -> None:
        """Where nobody is heard it is this process that is cut off: no request made all of them silent."""
        now, timeout_s = time.monotonic(), self._options.heartbeat_timeout_s
        workers = self._registry.workers.values()
        died = any(now - each.last_seen_s < timeout_s / 2 for each in workers) or (
            len(workers) == 1 and now - self._cut_off_at_s > timeout_s
        )
        if not died:
            self._cut_off_at_s = now
        worker.lose(f"silent for {now - worker.last_seen_s:.1f} s", died)


def _refusal(reason: str) -> wire.CoordinatorMessage:
    """Which tells the worker that dialling again cannot help."""
    return wire.CoordinatorMessage(refusal=wire.Refusal(reason=reason))
