"""What became of the requests of workers that went. Bookkeeping, no I/O: nothing is done here while nobody is lost."""

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from coordinator.delivery import Request
from coordinator.dispatch import Dispatcher
from coordinator.workers import Worker, WorkerRegistry

MAX_LOSSES = 50


@dataclass(slots=True)
class Loss:
    """One worker that is gone, and the requests that it was computing for then."""

    worker: str
    roles: tuple[str, ...]
    pid: int
    at_unix_s: float
    died: bool
    """Not because it was told to go, or only dialled again."""
    reason: str
    requests: int
    ended: Counter[str] = field(default_factory=Counter)
    """By outcome; the rest goes on."""


class Losses:
    def __init__(self, registry: WorkerRegistry, dispatcher: Dispatcher) -> None:
        """Hears of losses and ends before those who are told of them already."""
        self._losses: deque[Loss] = deque(maxlen=MAX_LOSSES)
        self._interrupted: dict[Request, list[Loss]] = {}
        """Requests that go on."""
        self._on_lost, registry.on_lost = registry.on_lost, self._lost
        self._on_end, dispatcher.on_end = dispatcher.on_end, self._ended

    def _lost(self, worker: Worker) -> None:
        # A prefill worker whose first token is delivered has done its part.
        requests = {
            leg.choice.request for leg in worker.legs.values()
            if not (leg.choice.request.ended or leg.choice.request.shadow)
            and (leg.decode or len(leg.choice.stream.tokens) == leg.first_index)
        }  # fmt: skip
        loss = Loss(
            worker.id, worker.role_names, worker.registration.pid, time.time(), worker.died, worker.lost_because,
            len(requests),
        )  # fmt: skip
        self._losses.append(loss)
        for request in requests:
            self._interrupted.setdefault(request, []).append(loss)
        self._on_lost(worker)

    def _ended(self, request: Request, outcome: str) -> None:
        for loss in self._interrupted.pop(request, ()):
            loss.ended[outcome] += 1
        self._on_end(request, outcome)

    def latest(self) -> list[dict[str, Any]]:
        """Newest first, JSON-ready."""
        return [
            {
                "worker": loss.worker, "roles": loss.roles, "pid": loss.pid, "at": loss.at_unix_s, "died": loss.died,
                "reason": loss.reason, "requests": loss.requests, "ended": dict(loss.ended),
                "running": loss.requests - loss.ended.total(),
            }
            for loss in reversed(self._losses)
        ]  # fmt: skip
