"""Clients that come back: to the coordinator that has their request, or to another one after its death.

1. A client whose connection broke names its request and says how far it got. If the request is here, because the
   client asked that it be kept (`X-Baton-Resume-S`) or its old connection only looks alive, it simply goes on reading.
2. Workers that lost their coordinator report its attempts here (`Orphan`), each with the ticket that came with it. They
   wait, and go on computing, for the time that the worker says; nothing of them is kept here but that message.
3. When the client comes, the request is built again from the tickets of its choices and the dispatcher adopts their
   attempts. The worker sends all tokens again, so text, stop strings and usage come out as they did the first time.
   A choice that nobody has any more starts its next attempt from its prompt, with the same sampling and seed; what the
   client says it has is compared with that, and on a difference its stream ends with an error.
4. Its coordinator may not be dead: it hangs, or the client cannot reach it. So a request that is not known here is
   claimed from the workers, which take it from whoever has it. One that hung begins further attempts when it goes on,
   for a client that is gone: their numbers are none that are used here.
5. Whoever reads last has the request. A request whose client is gone for too long is aborted.

A client may be faster than the workers that find their coordinator dead: an unknown id is waited for.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from baton.config import CoordinatorOptions
from baton.errors import PeerError
from baton.token_ids import unpack
from baton.v1 import worker_link_pb2 as wire
from coordinator.delivery import Choice, Position, Request
from coordinator.dispatch import Adoption, Dispatcher
from coordinator.failures import FailureKind, RequestFailed, cut_off, shutting_down
from coordinator.metrics import Metrics
from coordinator.requests import Intake
from coordinator.tenants.caller import calling
from coordinator.tickets import Ticket, TicketError, num_choices, read, same_request
from coordinator.workers import Worker

log = logging.getLogger("baton.requests")
MAX_ORPHANED = 4096
"""Requests of other coordinators that may wait here for their clients."""
MAX_SKIP = 1_000_000
"""Of attempts' numbers; see `TokenStream.skip`. So many that two coordinators hardly choose the same."""
LOOK_AGAIN_S, ANSWER_S = 0.1, 1.0
LINK_AGAIN_S = 1.0
"""What a worker needs to find another coordinator, once it knows that it lost one."""


@dataclass(slots=True)
class _Orphan:
    worker: Worker
    ticket: Ticket
    message: wire.Orphan
    timer: asyncio.TimerHandle

    @property
    def id(self) -> wire.AttemptId:
        return self.message.assignment.id


@dataclass(slots=True)
class _Left:
    request: Request
    timer: asyncio.TimerHandle


class Resumption:
    def __init__(self, options: CoordinatorOptions, intake: Intake, dispatcher: Dispatcher, metrics: Metrics) -> None:
        self._options = options
        self._intake = intake
        self._registry = intake.registry
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._wait_s = options.heartbeat_timeout_s + LINK_AGAIN_S
        self._orphans: dict[str, dict[int, _Orphan]] = {}
        """By request id and number of the choice."""
        self._left: dict[str, _Left] = {}
        """Requests, running or ended, whose client hung up and may come back."""
        self._waiters: dict[str, set[asyncio.Future[None]]] = {}
        """By request id."""
        self._num_waiting = 0
        dispatcher.on_orphan = self._on_orphan

    def close(self) -> None:
        """Nobody comes back any more."""
        orphans = [orphan for found in self._orphans.values() for orphan in found.values()]
        for timer in [*(left.timer for left in self._left.values()), *(orphan.timer for orphan in orphans)]:
            timer.cancel()

    def check_free(self, id: str) -> None:
        """Raise RequestFailed for an id that a request has already."""
        if id in self._dispatcher.requests or id in self._left or id in self._orphans:
            raise RequestFailed(FailureKind.ID_IN_USE, "a request with this id is here already; choose another id")

    def left(self, request: Request, reader: int) -> None:
        """A client is gone, or has all of its answer: keep the request for it, or abort it. Idempotent."""
        if reader != request.reader:
            return  # it came back meanwhile
        if request.differs:
            self._metrics.resumed.labels("differs").inc()
        keep_s = min(request.resume_s, self._options.max_resume_s)
        if keep_s <= 0 or request.failure is not None or request.differs:
            self._over(request)
            return
        if len(self._left) >= self._options.max_requests:
            self._give_up(next(iter(self._left)))
        timer = asyncio.get_running_loop().call_later(keep_s, self._give_up, request.id)
        self._left[request.id] = _Left(request, timer)

    def _give_up(self, id: str) -> None:
        left = self._left.pop(id)
        left.timer.cancel()
        if not left.request.ended:
            self._metrics.resumed.labels("given_up").inc()
        self._over(left.request)

    def _over(self, request: Request) -> None:
        """Nobody comes back for it."""
        self._dispatcher.abort(request)
        request.forget()

    def _foreign(self, id: str) -> bool:
        """Somebody has this request here, and it is not the caller."""
        if (request := self._here(id)) is not None:
            tenant = request.caller.tenant
        elif found := self._orphans.get(id):
            tenant = _any(found).ticket.tenant
        else:
            return False
        return not calling.get().owns(tenant)

    def abort(self, id: str) -> None:
        """The client does not want the rest. Idempotent: an unknown or ended id is not an error, nor is another's."""
        if self._foreign(id):
            return
        if id in self._left:
            self._give_up(id)
        elif id in self._orphans:
            self._forget(id)
        elif (request := self._dispatcher.requests.get(id)) is not None:
            self._dispatcher.abort(request)

    async def resume(self, id: str, positions: Sequence[Position] = ()) -> Request:
        """The request, for a client to go on with from `positions`, by choice.

        Raises RequestFailed where nobody has it any more.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._search_s()
        claimed: set[Worker] = set()
        while True:
            await self._intake.turns.begin()
            if self._foreign(id):
                raise _unknown()
            if (request := self._here(id)) is not None:
                if self.better_elsewhere(request):
                    raise cut_off()
                if left := self._left.pop(id, None):
                    left.timer.cancel()
                self._metrics.resumed.labels("here").inc()
                return request
            if self._dispatcher.draining:
                raise shutting_down()
            claimed = self._claim(id, claimed)
            late = loop.time() >= deadline
            if (found := self._orphans.get(id)) and (late or len(found) == num_choices(_any(found).ticket)):
                return self._adopt(id, found, positions)
            if late and not self._registry.workers:
                raise cut_off()  # nobody could be asked
            if late:
                self._metrics.resumed.labels("unknown").inc()
                raise _unknown()
            await self._news(id, deadline)

    def _search_s(self) -> float:
        """How long an unknown request is looked for: workers that have been here for long answer a claim at once."""
        workers, now = self._registry.workers.values(), time.monotonic()
        settled = bool(workers) and all(now - worker.joined_s > self._wait_s for worker in workers)
        return min(ANSWER_S, self._wait_s) if settled else self._wait_s

    def better_elsewhere(self, request: Request) -> bool:
        """This coordinator has lost all workers, and may be the one that is cut off: they keep for another what its
        client can have there."""
        since_s = self._registry.empty_since_s
        lonely = since_s is not None and time.monotonic() - since_s > LINK_AGAIN_S
        return lonely and request.resume_s > 0 and not request.ended

    def _here(self, id: str) -> Request | None:
        """The request, if it goes on here or its end is kept; not what another coordinator has claimed."""
        left = self._left.get(id)
        if left is None:
            return self._dispatcher.requests.get(id)
        if left.request.failure is None or left.request.failure.kind is not FailureKind.SUPERSEDED:
            return left.request
        left.timer.cancel()
        del self._left[id]
        return None

    def _claim(self, id: str, asked: set[Worker]) -> set[Worker]:
        """Ask the workers that have not been asked for what they have of a request; all that have been."""
        workers = set(self._registry.workers.values())
        for worker in workers - asked:
            worker.send(wire.CoordinatorMessage(claim=wire.Claim(request_id=id, tenant=calling.get().opaque)))
        return workers

    async def _news(self, id: str, deadline: float) -> None:
        """Wait until an orphan of this request was reported, a worker may have joined, or the time is over."""
        if self._num_waiting >= self._options.max_requests:
            raise RequestFailed(FailureKind.OVERLOADED, "too many clients wait for their requests; try again later")
        waiter = asyncio.get_running_loop().create_future()
        waiters = self._waiters.setdefault(id, set())
        waiters.add(waiter)
        self._num_waiting += 1
        try:
            async with asyncio.timeout_at(min(deadline, asyncio.get_running_loop().time() + LOOK_AGAIN_S)):
                await waiter
        except TimeoutError:
            pass
        finally:
            self._num_waiting -= 1
            waiters.remove(waiter)
            if not waiters:
                del self._waiters[id]

    # What workers report

    def _on_orphan(self, worker: Worker, message: wire.Orphan) -> None:
        try:
            ticket = read(message.assignment.ticket)
            self._check(ticket, message.assignment)
        except TicketError as error:
            log.warning("worker %s reports an attempt that cannot be adopted: %s", worker.id, error)
            self._metrics.orphans.labels("rejected").inc()
            _abort(worker, message.assignment.id)
            return
        id = ticket.request_id
        if self._here(id) is not None:
            # Somebody goes on with this choice already, from what was known before; or with this very attempt, which
            # was reported once when its link broke and again because it was claimed.
            if worker.leg(message.assignment.id) is None:
                self._metrics.orphans.labels("late").inc()
                _abort(worker, message.assignment.id)
            return
        if id not in self._orphans and len(self._orphans) >= MAX_ORPHANED:
            self._forget(next(iter(self._orphans)))
        found = self._orphans.setdefault(id, {})
        kept_s = min(message.kept_s, self._options.request_timeout_s)
        timer = asyncio.get_running_loop().call_later(kept_s, self._expire, id, ticket.choice)
        orphan, other = _Orphan(worker, ticket, message, timer), found.get(ticket.choice)
        if other is not None:
            orphan, beaten = (orphan, other) if _beats(orphan, other) else (other, orphan)
            beaten.timer.cancel()
            if beaten.worker.id != orphan.worker.id or beaten.id != orphan.id:
                _abort(beaten.worker, beaten.id)
        found[ticket.choice] = orphan
        self._metrics.orphans.labels("reported").inc()
        for waiter in self._waiters.get(id, ()):
            if not waiter.done():
                waiter.set_result(None)

    def _check(self, ticket: Ticket, assignment: wire.Assignment) -> None:
        num_prompt, vocab_size = assignment.num_prompt_tokens, self._intake.tokenizer.facts.vocab_size
        if ticket.model != self._intake.model_name:
            raise TicketError("it is of another model")
        if assignment.id.request_id != f"{ticket.request_id}-{ticket.choice}" or not assignment.id.attempt:
            raise TicketError("it is of another attempt")
        try:
            tokens = unpack(assignment.token_ids)
        except PeerError as error:
            raise TicketError(str(error)) from None
        if not 1 <= num_prompt <= len(tokens) or max(tokens) >= vocab_size:
            raise TicketError("its prompt is none of this model")
        if any(other.ticket.request_id == ticket.request_id and not same_request(other.ticket, ticket)
               for other in self._orphans.get(ticket.request_id, {}).values()):  # fmt: skip
            raise TicketError("it contradicts another one of its request")

    def _expire(self, id: str, choice: int) -> None:
        found = self._orphans[id]
        del found[choice]
        if not found:
            del self._orphans[id]
            self._metrics.orphans.labels("expired").inc()

    def _forget(self, id: str) -> None:
        for orphan in self._orphans.pop(id).values():
            orphan.timer.cancel()
            _abort(orphan.worker, orphan.id)

    # A client has come

    def _adopt(self, id: str, found: dict[int, _Orphan], positions: Sequence[Position]) -> Request:
        """Raises RequestFailed if there is no room; the orphans then wait on."""
        # The newest attempt's worker has the version that the request is at; one cut off may have an older one's.
        newest = max(found.values(), key=lambda orphan: orphan.id.attempt)
        request = self._rebuild(newest, list(found.values()))
        adoptions: dict[Choice, Adoption] = {}
        given_up: list[_Orphan] = []
        for choice in request.choices:
            choice.stream.attempt, choice.stream.skip = 1, secrets.randbelow(MAX_SKIP)
            orphan = found.get(choice.number)
            if orphan is None:
                continue
            assignment, attempt = orphan.message.assignment, orphan.id.attempt
            choice.stream.attempt = attempt
            cached_tokens = orphan.message.cached_tokens if attempt == 1 else orphan.ticket.cached_tokens
            choice.cached_tokens = min(cached_tokens, choice.num_prompt_tokens)
            # Logprobs of tokens from other workers went with the coordinator; a client that has them needs none.
            had = positions[choice.number].num_tokens if choice.number < len(positions) else 0
            lacks_logprobs = choice.sampling.HasField("logprobs") and had < orphan.message.without_logprobs
            other_version = orphan.worker.version != request.version
            if other_version or lacks_logprobs or assignment.sampling != choice.sampling:
                given_up.append(orphan)
            else:
                adoptions[choice] = Adoption(orphan.worker, attempt, orphan.message.num_tokens)
        with calling.get().admitting(request, sum(adoption.num_tokens for adoption in adoptions.values())):
            self._dispatcher.adopt(request, adoptions)
        for orphan in found.values():
            orphan.timer.cancel()
        for orphan in given_up:
            _abort(orphan.worker, orphan.id)
        self._orphans.pop(id, None)
        self._metrics.resumed.labels("adopted").inc()
        log.info("request %s goes on here: %d of %d choices adopted", id, len(adoptions), len(request.choices))
        return request

    def _rebuild(self, one: _Orphan, all: list[_Orphan]) -> Request:
        """As it was, before its first token. `one` has the ticket that it is built from."""
        ticket, assignment = one.ticket, one.message.assignment
        request = Request(ticket.request_id, ticket.cache_salt, ticket.form, ticket.resume_s)
        request.version = one.worker.version
        request.created_unix_s = ticket.created_unix_s
        remaining_s = max(orphan.message.remaining_s for orphan in all)
        request.started_s = time.monotonic() - max(0.0, self._options.request_timeout_s - remaining_s)
        request.first_token_s = request.started_s  # measured where it arrived
        own = ticket.choice // ticket.form.choices_per_prompt
        for index, prompt in enumerate(ticket.prompts):
            sampling = wire.EngineSampling()
            sampling.CopyFrom(assignment.sampling)
            sampling.seed, sampling.max_tokens = prompt.seed, prompt.max_tokens
            token_ids = (
                unpack(assignment.token_ids)[: assignment.num_prompt_tokens] if index == own else prompt.token_ids
            )
            self._intake.add_choices(request, index, token_ids, sampling)
        return request


def _unknown() -> RequestFailed:
    message = "no request with this id is kept here: it never was, or it waited too long; send it again"
    return RequestFailed(FailureKind.UNKNOWN_REQUEST, message)


def _any(found: dict[int, _Orphan]) -> _Orphan:
    return next(iter(found.values()))


def _beats(one: _Orphan, other: _Orphan) -> bool:
    """Whether `one`, which came later, is the one to go on with: the newer attempt, or the one that is still there."""
    if one.id.attempt != other.id.attempt:
        return one.id.attempt > other.id.attempt
    return other.worker.lost.is_set() or one.message.num_tokens >= other.message.num_tokens


def _abort(worker: Worker, id: wire.AttemptId) -> None:
    worker.send(wire.CoordinatorMessage(abort=wire.AbortAttempt(id=id)))
