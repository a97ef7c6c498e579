"""What a worker keeps of a coordinator that it lost, so that another one can go on with it.

1. The link breaks. Attempts of the decode role go on as orphans. A prefill goes on to its end by itself: its hand-over
   needs no coordinator, and the decode worker releases it.
2. Every other coordinator that this worker has, or gets, a link to is told of each orphan, and of the attempts that
   ended so short a while ago that their last tokens may have reached no client.
3. It adopts those whose client comes back, and gets all their tokens. The others are aborted when they have waited
   for `keep_s`. A coordinator that comes back itself has given up on them: they are aborted at once.
4. A coordinator may hang, or be cut off from its clients alone, while its link looks alive. Where the client comes to
   another one, that one claims the request: its attempts become orphans on the spot, and their coordinator is told.
"""

import asyncio
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass

from baton.v1 import worker_link_pb2 as wire
from worker.roles import Attempt, Link, step_logprob

MAX_KEPT = 1024
"""Beyond it the attempt that was kept first goes."""
REPLAY_TOKENS = 512
"""In one message."""


Send = Callable[[wire.WorkerMessage], None]


@dataclass(slots=True)
class _Kept:
    attempt: Attempt
    ending: wire.Ending | None
    """None while the attempt goes on."""
    timer: asyncio.TimerHandle
    claimed: bool = False
    """Another coordinator than the one that assigned it has come for it."""


class Orphans:
    """Attempts of the decode role, by key, that wait for a coordinator. Runs on the asyncio thread."""

    def __init__(
        self,
        abort: Callable[[Attempt], None],
        counters: MutableMapping[str, float],
        keep_s: float = 0.0,
    ) -> None:
        """`abort` ends an attempt that goes on. With `keep_s` 0 nothing is kept."""
        self.keep_s = keep_s
        self._links: dict[int, Send] = {}
        """To the coordinators that have welcomed this worker, by their incarnation."""
        self._abort = abort
        self._counters = counters
        self._kept: dict[str, _Kept] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def linked(self, coordinator: int, send: Send) -> None:
        """A coordinator has welcomed this worker."""
        self._links[coordinator] = send
        for kept in list(self._kept.values()):
            if kept.attempt.coordinator != coordinator:
                send(_report(kept))
            elif not kept.claimed:
                self._drop(kept)

    def claim(self, request_id: str, link: Link, attempts: Iterable[Attempt], tenant: str = "") -> None:
        """A client of `tenant` has come to `link`'s coordinator with a request that another one may have. `attempts`:
        all here."""
        for attempt in attempts:
            theirs = attempt.link is not link and not attempt.orphaned
            if theirs and self.keep_s and _is_of(attempt, request_id, tenant):
                ending = wire.Ending(id=attempt.id, reason=wire.END_REASON_TAKEN, num_tokens=attempt.num_tokens)
                attempt.link.send(wire.WorkerMessage(ending=ending))
                attempt.orphaned = True
                self._counters["orphans"] += 1
                self._keep(attempt, None)
        for kept in self._kept.values():
            if _is_of(kept.attempt, request_id, tenant) and (
                kept.claimed or kept.attempt.coordinator != link.coordinator
            ):
                kept.claimed, kept.attempt.link = True, link
                link.send(_report(kept))

    def lost(self, coordinator: int, attempts: Iterable[Attempt]) -> None:
        """A coordinator is gone; `attempts`, which it assigned, go on."""
        self._links.pop(coordinator, None)
        for attempt in attempts:
            decodes = attempt.assignment.role == wire.ROLE_DECODE
            if decodes and not self.keep_s:
                self._abort(attempt)
                continue
            attempt.orphaned = True
            if decodes:
                self._counters["orphans"] += 1
                self._keep(attempt, None)
        for kept in list(self._kept.values()):
            if kept.attempt.coordinator == coordinator:
                for send in self._links.values():
                    send(_report(kept))

    def ended(self, attempt: Attempt, ending: wire.Ending) -> None:
        """An attempt is over; one that a coordinator aborted may be complete by a stop string that it saw."""
        reasons = {wire.END_REASON_STOP, wire.END_REASON_LENGTH}
        if not attempt.orphaned:
            reasons.add(wire.END_REASON_ABORTED)
        self._forget(attempt.key)
        if attempt.assignment.role == wire.ROLE_DECODE and ending.reason in reasons and self.keep_s > 0:
            self._keep(attempt, ending)

    def adopt(self, id: wire.AttemptId, key: str, handle: int, coordinator: int) -> None:
        """Answer a coordinator that goes on with an attempt: everything so far, or that it is not here."""
        send, kept = self._links[coordinator], self._forget(key)
        if kept is None:
            admission = wire.Admission(id=id, accepted=False, reason="this attempt waits for nobody here")
            send(wire.WorkerMessage(admission=admission))
            return
        attempt = kept.attempt
        attempt.handle, attempt.coordinator, attempt.orphaned = handle, coordinator, False
        self._counters["orphans_adopted"] += 1
        admission = wire.Admission(id=id, accepted=True, cached_tokens=attempt.cached_tokens or 0)
        send(wire.WorkerMessage(admission=admission))
        for first in range(0, len(attempt.tokens), REPLAY_TOKENS):
            send(wire.WorkerMessage(tokens=_replay(attempt, first)))
        if kept.ending is not None:
            send(wire.WorkerMessage(ending=kept.ending))
            self._keep(attempt, kept.ending)  # the next coordinator may die as the first one did

    def _keep(self, attempt: Attempt, ending: wire.Ending | None) -> None:
        self._forget(attempt.key)
        if len(self._kept) >= MAX_KEPT:
            self._expire(next(iter(self._kept)))
        timer = asyncio.get_running_loop().call_later(self.keep_s, self._expire, attempt.key)
        self._kept[attempt.key] = _Kept(attempt, ending, timer)

    def _forget(self, key: str) -> _Kept | None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            kept.timer.cancel()
        return kept

    def _expire(self, key: str) -> None:
        self._drop(self._kept[key])

    def _drop(self, kept: _Kept) -> None:
        self._forget(kept.attempt.key)
        if kept.ending is None:
            self._counters["orphans_aborted"] += 1
            self._abort(kept.attempt)


def _is_of(attempt: Attempt, request_id: str, tenant: str) -> bool:
    """Whether it decodes a choice of this request of this tenant."""
    assignment = attempt.assignment
    of, _, choice = attempt.id.request_id.rpartition("-")
    return assignment.role == wire.ROLE_DECODE and of == request_id and choice.isdigit() and assignment.tenant == tenant


def _report(kept: _Kept) -> wire.WorkerMessage:
    attempt, now = kept.attempt, asyncio.get_running_loop().time()
    message = wire.WorkerMessage()
    orphan = message.orphan
    orphan.assignment.CopyFrom(attempt.assignment)
    for field in ("prefill", "decode", "holders", "handle"):
        orphan.assignment.ClearField(field)
    orphan.num_tokens = len(attempt.tokens)
    orphan.cached_tokens = attempt.cached_tokens or 0
    orphan.without_logprobs = len(attempt.tokens) - len(attempt.logprobs)
    orphan.remaining_s = max(0.0, attempt.deadline.when() - now) if attempt.deadline is not None else 0.0
    orphan.kept_s = max(0.0, kept.timer.when() - now)
    return message


def _replay(attempt: Attempt, first: int) -> wire.StepTokens:
    """Tokens of the stream from index `first` on. Those that came with the assignment have no logprobs."""
    token_ids = attempt.tokens[first : first + REPLAY_TOKENS]
    message = wire.StepTokens(
        handles=[attempt.handle] * len(token_ids), indices=range(first, first + len(token_ids)), token_ids=token_ids
    )
    given = len(attempt.tokens) - len(attempt.logprobs)
    for entry in range(max(0, given - first), len(token_ids) if attempt.logprobs else 0):
        logprobs = attempt.logprobs[first + entry - given]
        message.logprobs.append(step_logprob(logprobs, entry))
    return message
