"""Runs isolated requests one to a worker, so that a worker's death says who caused it. Bookkeeping, no I/O.

A cell is a worker that takes nothing else. To become one it is reserved (`worker.reservation`), which keeps other
coordinators away as well: a worker that has nothing to do, and if there is none the least busy one. It gets nothing
new, and what still runs there after PATIENCE_S is moved to others; each coordinator moves its own. At most one busy
worker is reserved at a time, and none where half of the workers are closed already. The isolated request runs there
once the worker says that nothing else is there. A cell opens when its request has ended, has left, or is acquitted.
Where closed workers leave none for the others, these wait; then a cell opens after MAX_CLOSED_S in any case, also for
others of other coordinators. A request for which a reserved worker was not emptied for so long runs in company.
"""

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from baton.v1 import worker_link_pb2 as wire
from coordinator.delivery import Choice, Request
from coordinator.suspects import Suspects, progressed
from coordinator.workers import Leg, Worker

PATIENCE_S = 1.0
MAX_CLOSED_S = 10.0


@dataclass(slots=True)
class Cell:
    worker: Worker
    since_s: float
    token: int
    """Of its reservation."""
    request: Request | None = None
    """None: reserved, what still runs there has to go first."""

    @property
    def cleared(self) -> bool:
        """Nothing of other coordinators is there, or can be."""
        beat = self.worker.heartbeat
        return beat.reservation == self.token and beat.reservation_cleared


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
        self._cells: dict[str, Cell] = {}
        self._elsewhere: dict[str, float] = {}
        """Workers that other coordinators have reserved, and since when."""
        self._waiting: list[Choice] = []
        self._stranded: list[Choice] = []

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._stranded or self._cells or self._elsewhere)

    @property
    def closed(self) -> Collection[str]:
        """Ids of workers that take no ordinary request."""
        return self._cells.keys() | self._elsewhere.keys()

    def park(self, choice: Choice) -> None:
        """An isolated one that waits for a worker of its own."""
        self._waiting.append(choice)

    def strand(self, choice: Choice) -> None:
        """Another one that waits for a cell to open."""
        self._stranded.append(choice)

    def forget(self, request: Request) -> None:
        """The request has ended; its cell is free in the next turn."""
        self._waiting = [choice for choice in self._waiting if choice.request is not request]
        self._stranded = [choice for choice in self._stranded if choice.request is not request]

    def alone(self, worker: Worker) -> bool:
        """Nothing but one isolated request is, or may be, on this worker, also of other coordinators."""
        cell = self._cells.get(worker.id)
        if cell is None or cell.worker is not worker or cell.request is None:
            return False
        if any(leg.choice.request is not cell.request for leg in (*worker.legs.values(), *worker.aftermath())):
            return False
        return bool(worker.legs) and cell.cleared

    def status(self) -> dict[str, Any]:
        """JSON-ready."""
        cells = {id: None if cell.request is None else cell.request.id for id, cell in self._cells.items()}
        return {"suspects": len(self._suspects), "waiting": len(self._waiting), "cells": cells}

    def turn(self, now_s: float, workers: Mapping[str, Worker], trouble: Mapping[str, int]) -> Turn:
        """Once something may have changed: a heartbeat, a loss, an end, a request that was parked."""
        turn = Turn()
        self._open_cells(now_s, workers)
        self._look_elsewhere(now_s, workers, turn)
        able = [worker for worker in workers.values() if worker.accepts and (worker.decodes or worker.stands_in)]
        for choice in list(self._waiting):
            cell = self._cell_for(choice, now_s, trouble)
            if cell is not None:
                self._waiting.remove(choice)
                turn.start.append((choice, cell.worker))
        self._reserve(able, now_s, trouble, turn)
        there = {worker.version for worker in able}
        open = {worker.version for worker in able if worker.id not in self.closed}
        turn.resume = [each for each in self._stranded if _version(each) in open or _version(each) not in there]
        turn.resume += [each for each in self._waiting if _version(each) not in there]
        resumed = set(turn.resume)
        self._stranded = [each for each in self._stranded if each not in resumed]
        self._waiting = [each for each in self._waiting if each not in resumed]
        stuck = {_version(each) for each in (*self._stranded, *self._waiting)} - open
        for worker in (workers[id] for id in self._elsewhere):
            if worker.version in stuck and not worker.heartbeat.reservation_wanted:
                _unreserve(worker, worker.heartbeat.reservation)  # its holder hears that it is wanted
        return turn

    def _open_cells(self, now_s: float, workers: Mapping[str, Worker]) -> None:
        for id, cell in list(self._cells.items()):
            beat = cell.worker.heartbeat
            overdue = (self._stranded or beat.reservation_wanted) and now_s - cell.since_s > MAX_CLOSED_S
            if workers.get(id) is not cell.worker:
                done = True
            elif cell.request is None:
                denied = beat.reservation not in (0, cell.token)
                wanted = any(_fits(choice, cell.worker) for choice in self._waiting)
                done = denied or not wanted or not cell.worker.accepts
            else:
                own = [leg for leg in cell.worker.legs.values() if leg.choice.request is cell.request]
                done = not own or bool(overdue)
                done = done or (any(progressed(leg) for leg in own) and self._suspects.acquit(cell.request))
            if done:
                del self._cells[id]
                _unreserve(cell.worker, cell.token)  # also if it was not to be had: such a token is ignored
                if beat.reservation == cell.token:
                    beat.reservation = 0

    def _look_elsewhere(self, now_s: float, workers: Mapping[str, Worker], turn: Turn) -> None:
        """Leave those workers alone that another coordinator has to itself."""
        tokens = {id: cell.token for id, cell in self._cells.items()}
        held = [id for id, one in workers.items() if one.heartbeat.reservation not in (0, tokens.get(id, 0))]
        self._elsewhere = {id: self._elsewhere.get(id, now_s) for id in held if id not in self._cells}
        for id, since_s in self._elsewhere.items():
            if now_s - since_s > PATIENCE_S:
                turn.move += workers[id].legs.values()

    def _cell_for(self, choice: Choice, now_s: float, trouble: Mapping[str, int]) -> Cell | None:
        """The cell of the choice's request, or a reserved one on which nothing else is."""
        for cell in self._cells.values():
            if cell.request is choice.request:
                return cell
        ready = [cell for cell in self._cells.values() if _fits(choice, cell.worker) and self._ready(cell, now_s)]
        if not ready:
            return None
        best = min(ready, key=lambda cell: _rank(choice, cell.worker, trouble))
        best.request, best.since_s = choice.request, now_s
        return best

    def _ready(self, cell: Cell, now_s: float) -> bool:
        """It has nothing to do; or was reserved long ago, and what is there now can only be another coordinator's."""
        if cell.request is not None:
            return False
        return (cell.worker.empty and cell.cleared) or (not cell.worker.legs and now_s - cell.since_s > MAX_CLOSED_S)

    def _reserve(self, able: Sequence[Worker], now_s: float, trouble: Mapping[str, int], turn: Turn) -> None:
        """Have workers emptied for those that still wait."""
        reserved = [cell for cell in self._cells.values() if cell.request is None]
        idle_cells = [cell for cell in reserved if cell.worker.empty]
        for choice in {choice.request: choice for choice in self._waiting}.values():
            if cell := next((each for each in idle_cells if _fits(choice, each.worker)), None):
                idle_cells.remove(cell)  # about to be its own
                continue
            fit = [worker for worker in able if _fits(choice, worker) and worker.id not in self.closed]
            idle = [worker for worker in fit if worker.empty]
            if idle:
                worker = min(idle, key=lambda one: _rank(choice, one, trouble))
            else:
                fit = [worker for worker in fit if worker.decodes]
                if not fit or reserved or (self.closed and len(self.closed) * 2 >= len(able)):
                    continue
                worker = min(fit, key=lambda one: (one.id in choice.avoid, len(one.legs)))
            cell = self._cells[worker.id] = Cell(worker, now_s, secrets.randbits(63) + 1)
            reserved.append(cell)
            worker.send(wire.CoordinatorMessage(reserve=wire.Reserve(token=cell.token)))
        for cell in reserved:
            if now_s - cell.since_s > PATIENCE_S:
                turn.move += cell.worker.legs.values()


def _version(choice: Choice) -> str:
    return choice.request.version


def _fits(choice: Choice, worker: Worker) -> bool:
    num_tokens = choice.num_prompt_tokens + choice.stream.max_tokens
    return worker.version == _version(choice) and num_tokens <= worker.context_tokens


def _rank(choice: Choice, worker: Worker, trouble: Mapping[str, int]) -> tuple[bool, int, bool]:
    return (worker.id in choice.avoid, trouble.get(worker.id, 0), not worker.decodes)


def _unreserve(worker: Worker, token: int) -> None:
    worker.send(wire.CoordinatorMessage(unreserve=wire.Unreserve(token=token)))
