"""Workers that are to finish and go: an operator's `baton drain`, and what becomes of streams that take too long.

A worker that drains says so in its heartbeats, so every coordinator knows, whoever told it (another coordinator, a
signal). It gets nothing new. Each coordinator leaves its own streams there for `drain_timeout_s`, then has other
workers of the version go on with them. A stream that nobody else can take stays, and the worker waits for its end:
only a signal cuts it off.
"""

import asyncio
import time
from typing import Any

import msgspec

from baton.errors import InvalidRequestError
from baton.v1 import worker_link_pb2 as wire
from coordinator.dispatch import Dispatcher
from coordinator.metrics import Metrics
from coordinator.workers import Worker, WorkerRegistry

LOOK_S = 0.5


class DrainRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Workers by id, or all of a version."""

    workers: list[str] = []
    version: str = ""


class Drains:
    def __init__(self, registry: WorkerRegistry, dispatcher: Dispatcher, metrics: Metrics, timeout_s: float) -> None:
        self._registry = registry
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._stayed: set[Worker] = set()
        """Counted already, for streams that nobody else can take."""

    def ask(self, asked: DrainRequest) -> dict[str, Any]:
        """Tell them; idempotent. JSON-ready: who drains, and how many workers that can decode are left to the cluster.

        Raises InvalidRequestError if one is not here: then nobody was told.
        """
        workers = self._registry.workers
        if bool(asked.workers) == bool(asked.version):
            raise InvalidRequestError("give workers, or a version", "workers")
        if asked.version:
            ids = sorted(worker.id for worker in workers.values() if worker.version == asked.version)
            versions = sorted({worker.version for worker in workers.values()})
            if not ids:
                raise InvalidRequestError(
                    f"version {asked.version} has no worker here; there are {versions}", "version"
                )
        else:
            ids = list(dict.fromkeys(asked.workers))
            if missing := [id for id in ids if id not in workers]:
                raise InvalidRequestError(f"worker {missing[0]} is not here; there are {sorted(workers)}", "workers")
        for id in ids:
            self._metrics.drains.labels("asked").inc()
            workers[id].send(wire.CoordinatorMessage(drain=wire.Drain()))
        left = [
            worker for worker in workers.values()
            if worker.id not in ids and worker.accepts and (worker.decodes or worker.stands_in)
        ]  # fmt: skip
        return {"draining": {id: f"{workers[id].registration.incarnation:016x}" for id in ids}, "left": len(left)}

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look(time.monotonic())

    def look(self, now_s: float) -> None:
        """Move what has taken too long."""
        draining = {worker for worker in self._registry.workers.values() if worker.draining_since_s is not None}
        self._stayed &= draining
        for worker in draining:
            assert worker.draining_since_s is not None
            if not worker.legs or now_s - worker.draining_since_s < self._timeout_s:
                continue
            moved, stay = self._dispatcher.move_from(worker)
            self._metrics.drains.labels("moved").inc(moved)
            if stay and worker not in self._stayed:
                self._stayed.add(worker)
                self._metrics.drains.labels("stayed").inc(stay)
