"""Runs isolated requests one to a worker, so that a worker's death says who caused it. Bookkeeping, no I/O.

A lane is a worker that takes nothing else. One that has nothing to do becomes a lane at once. If none has, the least
busy one is reserved: it gets nothing new, and what still runs there after PATIENCE_S is moved to others. At most one is
reserved at a time, and none where half of the workers are lanes already. A lane opens when its request has ended, has
left, or is acquitted. Where lanes leave no worker for the others, these wait; then a lane opens after MAX_CLOSED_S in
any case.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.delivery import Choice, Request
from coordinator.suspects import Suspects, progressed
from coordinator.workers import Leg, Worker

PATIENCE_S = 1.0
MAX_CLOSED_S = 10.0


@dataclass(slots=True)
class Lane:
    worker: Worker
    since_s: float
    request: Request | None = None
    """None: reserved, what still runs there has to go first."""


@dataclass(slots=True)
class Turn:
    """What the dispatcher has to do now."""

    move: list[Leg] = field(default_factory=list)
    """Attempts in the way of an isolated request; they go on elsewhere."""
    start: list[tuple[Choice, Worker]] = field(default_factory=list)
    """Isolated, each with the worker that it has for itself."""
    resume: list[Choice] = field(default_factory=list)
    """Others that found every worker closed, and need not wait any more; all if no worker of their version is left."""


class Quarantine:
    def __init__(self, suspects: Suspects) -> None:
        self._suspects = suspects
        self._lanes: dict[str, Lane] = {}
        self._waiting: list[Choice] = []
        self._stranded: list[Choice] = []

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._stranded or self._lanes)

    @property
    def closed(self) -> Collection[str]:
        """Ids of workers that take no ordinary request."""
        return self._lanes.keys()

    def park(self, choice: Choice) -> None:
        """An isolated one that waits for a worker of its own."""
        self._waiting.append(choice)

    def strand(self, choice: Choice) -> None:
        """Another one that waits for a lane to open."""
        self._stranded.append(choice)

    def forget(self, request: Request) -> None:
        """The request has ended; its lane is free in the next turn."""
        self._waiting = [choice for choice in self._waiting if choice.request is not request]
        self._stranded = [choice for choice in self._stranded if choice.request is not request]

    def alone(self, worker: Worker) -> bool:
        """Nothing but one isolated request is, or may be, on this worker, another coordinator's work included."""
        lane = self._lanes.get(worker.id)
        if lane is None or lane.worker is not worker or lane.request is None:
            return False
        if any(leg.choice.request is not lane.request for leg in (*worker.legs.values(), *worker.aftermath())):
            return False
        beat = worker.heartbeat
        return 0 < len(worker.legs) >= beat.running_requests + beat.waiting_requests

    def status(self) -> dict[str, object]:
        """JSON-ready."""
        lanes = {id: None if lane.request is None else lane.request.id for id, lane in self._lanes.items()}
        return {"suspects": len(self._suspects), "waiting": len(self._waiting), "lanes": lanes}

    def turn(self, now_s: float, workers: Mapping[str, Worker], trouble: Mapping[str, int]) -> Turn:
        """Once something may have changed: a heartbeat, a loss, an end, a request that was parked."""
        turn = Turn()
        self._open_lanes(now_s, workers)
        able = [worker for worker in workers.values() if worker.accepts and (worker.decodes or worker.stands_in)]
        for choice in list(self._waiting):
            lane = self._lane_for(choice, able, trouble, now_s)
            if lane is not None:
                self._waiting.remove(choice)
                turn.start.append((choice, lane.worker))
        self._reserve(able, now_s, turn)
        there = {worker.version for worker in able}
        open = {worker.version for worker in able if worker.id not in self._lanes}
        turn.resume = [each for each in self._stranded if _version(each) in open or _version(each) not in there]
        turn.resume += [each for each in self._waiting if _version(each) not in there]
        resumed = set(turn.resume)
        self._stranded = [each for each in self._stranded if each not in resumed]
        self._waiting = [each for each in self._waiting if each not in resumed]
        return turn

    def _open_lanes(self, now_s: float, workers: Mapping[str, Worker]) -> None:
        for id, lane in list(self._lanes.items()):
            if workers.get(id) is not lane.worker or not (lane.request or (self._waiting and lane.worker.accepts)):
                del self._lanes[id]
            elif lane.request is not None:
                own = [leg for leg in lane.worker.legs.values() if leg.choice.request is lane.request]
                acquitted = any(progressed(leg) for leg in own) and self._suspects.acquit(lane.request)
                overdue = self._stranded and now_s - lane.since_s > MAX_CLOSED_S
                if not own or acquitted or overdue:
                    del self._lanes[id]

    def _lane_for(
        self, choice: Choice, able: Iterable[Worker], trouble: Mapping[str, int], now_s: float
    ) -> Lane | None:
        """The lane of the choice's request, or a new one on a worker that has nothing to do."""
        for lane in self._lanes.values():
            if lane.request is choice.request:
                return lane
        total = len(choice.prompt) + choice.stream.max_tokens
        own = (worker for worker in able if worker.version == _version(choice))
        free = [worker for worker in own if total <= worker.context_tokens and self._free(worker, now_s)]
        if not free:
            return None
        worker = min(free, key=lambda one: (one.id in choice.avoid, trouble.get(one.id, 0), not one.decodes))
        lane = self._lanes[worker.id] = Lane(worker, now_s, choice.request)
        return lane

    def _free(self, worker: Worker, now_s: float) -> bool:
        """It has nothing to do; or was reserved long ago, and what is there now can only be another coordinator's."""
        lane = self._lanes.get(worker.id)
        if lane is None or lane.request is not None:
            return lane is None and worker.empty
        return worker.empty or (not worker.legs and now_s - lane.since_s > MAX_CLOSED_S)

    def _reserve(self, able: Sequence[Worker], now_s: float, turn: Turn) -> None:
        """Have a worker emptied for those that still wait."""
        reserved = next((lane for lane in self._lanes.values() if lane.request is None), None)
        if not self._waiting:
            if reserved is not None:
                del self._lanes[reserved.worker.id]
            return
        if reserved is None:
            if self._lanes and len(self._lanes) * 2 >= len(able):
                return
            choice = self._waiting[0]
            total = len(choice.prompt) + choice.stream.max_tokens
            fit = [
                worker for worker in able
                if worker.decodes and total <= worker.context_tokens and worker.id not in self._lanes
                and worker.version == _version(choice)
            ]  # fmt: skip
            if fit:
                worker = min(fit, key=lambda one: (one.id in choice.avoid, len(one.legs)))
                self._lanes[worker.id] = Lane(worker, now_s)
        elif now_s - reserved.since_s > PATIENCE_S:
            turn.move += reserved.worker.legs.values()


def _version(choice: Choice) -> str:
    return choice.request.version
