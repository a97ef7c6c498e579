"""The worker link: one bidirectional gRPC stream a worker, on a port of its own.

1. The worker dials and registers; it is welcomed or refused with the reason.
2. One task reads what it says into the dispatcher, one writes its outbox. Both sides send heartbeats.
3. The worker is lost when its link breaks, when it is silent for `heartbeat_timeout_s`, when it does not read, or when
   it registers again. Losing it ends this call, and the dispatcher fails its attempts over.
"""

import asyncio
import contextlib
import logging
import math
import secrets
import time
import traceback
from collections import deque
from typing import Any, NoReturn

import grpc

from baton.config import CoordinatorOptions
from baton.errors import PeerError
from baton.pulse import Pulse
from baton.tls import Tls
from baton.v1 import worker_link_pb2 as wire
from baton.v1 import worker_link_pb2_grpc as rpc
from coordinator.dispatch import Dispatcher
from coordinator.workers import Worker, WorkerRegistry

events = logging.getLogger("baton.events")

_Context = grpc.aio.ServicerContext[wire.WorkerMessage, wire.CoordinatorMessage]
_BUNDLE_BYTES = 64 << 10
_HEARTBEAT = wire.CoordinatorMessage(heartbeat=wire.CoordinatorHeartbeat())


class LinkServicer(rpc.WorkerLinkServicer):
    def __init__(
        self, options: CoordinatorOptions, registry: WorkerRegistry, dispatcher: Dispatcher, tls: Tls | None = None
    ) -> None:
        self._options = options
        self._registry = registry
        self._dispatcher = dispatcher
        self._incarnation = secrets.randbits(64)
        self._pulse = Pulse(options.heartbeat_interval_s, options.heartbeat_timeout_s)
        self._cut_off_at_s = -math.inf
        """When a worker was last lost because nobody was heard."""
        self._tls = tls
        self._unknown: deque[float] = deque()
        """When each connection was accepted that nothing was heard on yet."""

    async def Connect(self, request_iterator: Any, context: _Context) -> None:  # type: ignore[override]
        with contextlib.suppress(IndexError):
            self._unknown.popleft()  # whichever: only how many stay is of interest
        worker = await self._register(context)
        tasks = [
            asyncio.create_task(self._read(worker, context)),
            asyncio.create_task(self._write(worker, context)),
            asyncio.create_task(worker.lost.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            worker.lose("its link closed", died=not self._pulse.stood_still)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _register(self, context: _Context) -> Worker:
        try:
            async with asyncio.timeout(self._options.heartbeat_timeout_s):
                first = await context.read()
        except TimeoutError:
            await _refuse(context, "no registration arrived in time", grpc.StatusCode.DEADLINE_EXCEEDED)
        if not isinstance(first, wire.WorkerMessage) or first.WhichOneof("message") != "registration":
            await _refuse(context, "the first message must be a registration")
        try:
            worker = self._registry.register(first.registration)
        except PeerError as error:
            events.warning("worker %s refused: %s", first.registration.worker_id, error)
            await _refuse(context, str(error))
        welcome = wire.Welcome(
            coordinator_incarnation=self._incarnation,
            heartbeat_interval_s=self._options.heartbeat_interval_s,
            heartbeat_timeout_s=self._options.heartbeat_timeout_s,
            kv_events=self._dispatcher.knowledge.wants_events,
            bundles=True,
        )
        worker.send(wire.CoordinatorMessage(welcome=welcome))
        self._registry.on_joined(worker)
        return worker

    async def _read(self, worker: Worker, context: _Context) -> None:
        try:
            while not worker.lost.is_set():
                message = await context.read()
                if not isinstance(message, wire.WorkerMessage):
                    return
                worker.last_seen_s = time.monotonic()
                for each in message.bundle or (message,):
                    if not worker.lost.is_set():
                        self._dispatcher.on_message(worker, each)
        except (grpc.RpcError, grpc.aio.UsageError):
            return
        except Exception as error:
            # A bug here must be seen. The message of the exception is left out: it might quote a prompt.
            where = "".join(traceback.format_tb(error.__traceback__))
            events.error("link of worker %s broke on %s\n%s", worker.id, type(error).__name__, where)
            raise

    async def _write(self, worker: Worker, context: _Context) -> None:
        """What was said at once goes as one to a worker that reads that."""
        while True:
            said = [await worker.outbox.get()]
            size = said[0].ByteSize()
            while worker.registration.bundles and not worker.outbox.empty() and size < _BUNDLE_BYTES:
                said.append(worker.outbox.get_nowait())
                size += said[-1].ByteSize()
            await context.write(said[0] if len(said) == 1 else wire.CoordinatorMessage(bundle=said))

    def on_connection(self) -> None:
        """With TLS, for each connection that is accepted, on a thread of gRPC's. How its handshake ends is not told,
        so that one which no call comes on within `heartbeat_timeout_s` counts as refused."""
        self._unknown.append(time.monotonic())

    def _judge_unknown(self, now: float) -> None:
        while self._unknown and now - self._unknown[0] > self._options.heartbeat_timeout_s:
            self._unknown.popleft()
            if self._tls is not None:
                self._tls.refuse("link", "no TLS, or no certificate of the authority of --tls-ca")

    async def watch(self) -> None:
        """Send heartbeats, and lose silent workers, until cancelled."""
        while True:
            workers = [worker for worker in self._registry.workers.values() if not worker.lost.is_set()]
            beats = await self._pulse.rest([worker.last_seen_s for worker in workers])
            self._judge_unknown(time.monotonic())
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


async def _refuse(
    context: _Context, reason: str, code: grpc.StatusCode = grpc.StatusCode.FAILED_PRECONDITION
) -> NoReturn:
    """FAILED_PRECONDITION tells the worker that dialling again cannot help."""
    await context.abort(code, reason)
    raise AssertionError("abort always raises")
