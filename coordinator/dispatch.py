"""Life of a request inside the coordinator, from admitted to ended.

1. `start` admits a request's choices and begins attempt 1 of each.
2. `_begin_attempt` asks the routing policy for workers and tells both at the same time. Each worker's part is a leg.
3. Tokens come in packed by step (`_on_tokens`); the choice's stream decides what is new, the choice turns it into text.
4. A choice is complete by a token (stop token, max_tokens), by its text (stop string), or because the worker says so.
5. A leg that cannot go on (worker lost, refused, error, another token than the client has) abandons the attempt:
   the next one starts elsewhere from prompt + delivered tokens with the same sampling. Those that living workers fail
   are bounded by `max_attempts`, paced by `coordinator.retries` and charged to the guilty one's breaker. After deaths a
   stream goes on until its deadline, alone on a worker if it is a suspect (`coordinator.suspects`, `.quarantine`).
6. `end` is the one function that ends a request: complete, failed, expired or aborted. It is idempotent.
"""

import asyncio
import itertools
import logging
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from baton.config import CoordinatorOptions, parse_classes
from baton.token_ids import TOKEN_BYTES
from baton.v1 import worker_link_pb2 as wire
from coordinator.admission import Admission
from coordinator.assignments import assign
from coordinator.breakers import Breakers
from coordinator.delivery import ABORTED, LENGTH, STOP, Choice, Request
from coordinator.failures import (
    FailureKind,
    RequestFailed,
    handed_on,
    internal,
    moved,
    poison,
    shutting_down,
    unavailable,
)
from coordinator.knowledge import Prompt, open_knowledge
from coordinator.metrics import Metrics
from coordinator.placing import Placer
from coordinator.quarantine import Quarantine
from coordinator.retries import RetryBudget
from coordinator.routing import Route, Router
from coordinator.stream import ABANDON, COMPLETE, DELIVERED, IGNORED, Outcome
from coordinator.suspects import Suspects
from coordinator.timelines import Timelines
from coordinator.versions import Versions
from coordinator.worker_table import Candidates
from coordinator.workers import Leg, Worker, WorkerRegistry, work_together

events = logging.getLogger("baton.events")
log = logging.getLogger("baton.requests")
RETURN_POLL_S = 0.1


class Adoption(NamedTuple):
    """An attempt that another coordinator began and that goes on, or has ended, at a worker of this one."""

    worker: Worker
    attempt: int
    num_tokens: int


class Dispatcher:
    def __init__(self, options: CoordinatorOptions, registry: WorkerRegistry, metrics: Metrics) -> None:
        self._options = options
        self._registry = registry
        self.policy = options.routing
        self._metrics = metrics
        self.knowledge = open_knowledge(options.kv_routing, registry.table, options.kv_index_blocks)
        self._suspects = Suspects()
        self._retries = RetryBudget()
        self._delayed: dict[Choice, asyncio.TimerHandle] = {}
        """Choices whose next attempt waits, for the retry budget or for a worker."""
        self._pump_due = False
        self.quarantine = Quarantine(self._suspects)
        self.breakers = Breakers(metrics.breaker)
        self.versions = Versions(registry, metrics)
        router = Router(registry.table, options.routing, options.local_prefill_tokens)
        self._route = Placer(router, self.knowledge, registry, self._suspects, self.breakers, metrics).route
        self.admission = Admission(parse_classes(options.service_classes), metrics, metrics.itl_total)
        self.timelines = Timelines()
        self._handles = itertools.count(1)
        self._legs: dict[Choice, list[Leg]] = {}
        """Of the current attempt at each choice."""
        self._untold: list[tuple[Choice, int, Route]] = []
        """Attempts that their workers are told of when this turn of the event loop is over."""
        self.requests: dict[str, Request] = {}
        self.num_streams = 0
        self.leaving = False
        """Told to go: clients are, as well, but requests are served until it drains."""
        self.draining = False
        self.model = ""
        """Name of the one served, for tickets."""
        self.on_orphan: Callable[[Worker, wire.Orphan], None] = lambda worker, orphan: None
        """Set by the resumption."""
        self.on_end: Callable[[Request, str], None] = lambda request, outcome: None
        """Set by the shadows."""
        self.idle = asyncio.Event()
        self.idle.set()
        registry.on_lost = self._on_lost

    def check_capacity(self, num_streams: int) -> None:
        """Raise RequestFailed if so many more streams cannot be taken now."""
        if self.draining:
            raise shutting_down()
        if not self.versions.serves:
            raise unavailable("no worker that can decode is connected; try again later")
        if self.num_streams + num_streams > self._options.max_requests:
            raise RequestFailed(FailureKind.OVERLOADED, "too many requests are running; try again later")

    def num_live(self) -> int:
        """Of the streams here, those that have not ended: of several choices of a request, some may have."""
        live = (request.choices for request in self.requests.values() if not request.shadow)
        return sum(choice.finish_reason is None for choices in live for choice in choices)

    def num_taken_up(self) -> int:
        """Of the streams here, those whose prompt a worker computes, or has computed."""
        return sum(
            any(leg.admitted and leg.part is not None and leg.part.computes for leg in legs)
            for choice, legs in self._legs.items()
            if not choice.request.shadow
        )

    def choose_version(self, key: str) -> str:
        """Of a new request, whose id or user `key` is. Raises RequestFailed if none takes requests."""
        version = self.versions.choose(key)
        if version is None:
            raise unavailable("no worker that can decode is connected; try again later")
        return version

    def start(self, request: Request) -> None:
        """Admit and route every choice. Raises RequestFailed if there is no room; later failures are the request's."""
        route = self._admit(request)
        for choice in request.choices:
            if not request.ended:
                self._begin_attempt(choice, route)
            route = None

    def adopt(self, request: Request, orphans: Mapping[Choice, Adoption]) -> None:
        """Go on with what another coordinator began; a choice without an orphan starts its next attempt.

        Raises RequestFailed if there is no room.
        """
        request.adopted = True
        self._admit(request)
        for choice in request.choices:
            if request.ended:
                return
            orphan = orphans.get(choice)
            if orphan is None or orphan.worker.lost.is_set():
                self._begin_attempt(choice)
                continue
            choice.stream.attempt = orphan.attempt
            choice.begun_by = orphan.worker.registration
            leg = Leg(choice, orphan.attempt, orphan.worker, True, next(self._handles))
            leg.admitted = True  # what it found in its cache was said with the orphan
            leg.part = self.timelines.part(leg, computes=True, adopted=True)
            self._legs[choice] = [leg]
            orphan.worker.open(leg, choice.num_prompt_tokens + orphan.num_tokens, 0)
            orphan.worker.send(wire.CoordinatorMessage(adopt=wire.Adopt(id=leg.id, handle=leg.handle)))

    def _admit(self, request: Request) -> Route | None:
        """The route, where one was chosen, of the first attempt at the first choice."""
        route: Route | None = None
        if not request.shadow:
            self.check_capacity(len(request.choices))
        if request.id in self.requests:
            raise RequestFailed(FailureKind.ID_IN_USE, "a request with this id is here already; choose another id")
        request.version = request.version or self.choose_version(request.id)
        if not (request.shadow or request.adopted):
            route = self._route(request.choices[0], self._registry.candidates(request.version))
            self.admission.admit(request, route, self.num_streams, len(self._registry.workers))
        self.requests[request.id] = request
        self.timelines.begin(request, self.model)
        self.idle.clear()
        if not request.shadow:
            self.num_streams += len(request.choices)
            self._retries.admitted(len(request.choices))
            self._suspects.begin(request)
        loop = asyncio.get_running_loop()
        request.deadline = loop.call_later(self._patience_s(request), self._expire, request)
        return route

    def legs(self, choice: Choice) -> Sequence[Leg]:
        """Of its current attempt, who prefills first; none while it waits for the next one."""
        return self._legs.get(choice, ())

    def abort(self, request: Request) -> None:
        """The client does not want the rest. Effective in every state, idempotent."""
        request.unwanted = True
        if not request.ended:
            for choice in request.choices:
                choice.end(ABORTED)
        self.end(request, "aborted")

    def end(self, request: Request, outcome: str, failure: RequestFailed | None = None) -> None:
        """The one end of a request. `outcome` labels the metric; a failure is raised to the front end's reader."""
        if request.ended:
            return
        request.ended = True
        request.failure = failure
        if request.deadline is not None:
            request.deadline.cancel()
            request.deadline = None  # it knows the context that the request came in, which knows the request
        for choice in request.choices:
            choice.settle()
            choice.stream.close()
            self._drop_legs(choice)
        self._suspects.forget(request)
        self.quarantine.forget(request)
        self.admission.ended(request)
        self._pump_soon()
        if self.requests.pop(request.id, None) is not None and not request.shadow:
            self.num_streams -= len(request.choices)
        if not self.requests:
            self.idle.set()
        self._metrics.request_ended(outcome, request, time.monotonic())
        self.timelines.ended(request, outcome)
        request.wake()
        request.caller.ended(request, outcome)
        self.on_end(request, outcome)

    def let_go(self) -> None:
        """End every request here, but not in its workers: they keep it for the coordinator that its client finds."""
        self._legs.clear()
        for request in list(self.requests.values()):
            self.end(request, "handed_on", handed_on())

    def _expire(self, request: Request) -> None:
        if (left_s := self._patience_s(request)) > 0:  # the first token came in time
            request.deadline = asyncio.get_running_loop().call_later(left_s, self._expire, request)
            return
        took_s = time.monotonic() - request.started_s
        what = "the request took" if request.first_token_s is not None else "the first token took"
        message = f"{what} longer than the {took_s:.3g} s that it could"
        self.end(request, "timeout", RequestFailed(FailureKind.TIMEOUT, message))

    def _remaining_s(self, request: Request) -> float:
        limit_s = min(self._options.request_timeout_s, request.urgency.deadline_s or math.inf)
        return request.started_s + limit_s - time.monotonic()

    def _patience_s(self, request: Request) -> float:
        """Until the client does not want it any more, if nothing more comes."""
        left_s, max_ttft_s = self._remaining_s(request), request.urgency.max_ttft_s
        if request.first_token_s is not None or max_ttft_s is None:
            return left_s
        return min(left_s, request.started_s + max_ttft_s - time.monotonic())

    # Attempts

    def _begin_attempt(self, choice: Choice, route: Route | None = None) -> None:
        """`route`: of any worker of its version, if that has been decided."""
        version = choice.request.version
        if self._suspects.isolated(choice.request) and version in self._registry.ready_versions():
            self._metrics.quarantine.labels("waited").inc()
            self.quarantine.park(choice)
            self._pump_soon()
            return
        candidates, closed = self._registry.candidates(version), self.quarantine.closed
        if not closed:
            self._attempt(choice, candidates, route)
            return
        open = self._registry.table.without(candidates, closed)
        if self._route(choice, open) is None and self._route(choice, candidates) is not None:
            self._metrics.quarantine.labels("stranded_others").inc()
            self.quarantine.strand(choice)
        else:
            self._attempt(choice, open)

    def _attempt(self, choice: Choice, candidates: Candidates, route: Route | None = None) -> None:
        """Start the next attempt on some of these workers. If none can take it, wait for one, or end the request."""
        route = route or self._route(choice, candidates)
        if route is None and self._may_wait_for_worker(choice):
            self._delayed[choice] = asyncio.get_running_loop().call_later(RETURN_POLL_S, self._retry, choice)
            return
        choice.homeless_since_s = None
        if route is None and self._move(choice.request):
            return
        if route is None:
            self.end(choice.request, "failed", unavailable("no worker that can decode this is left; try again later"))
            return
        decoder = self._registry.workers[route.decode].registration
        if choice.begun_by is not None and not work_together(decoder, choice.begun_by):
            self.end(choice.request, "failed", unavailable("the model was replaced meanwhile; send the request again"))
            return
        choice.begun_by = choice.begun_by or decoder
        attempt = choice.stream.begin_attempt()
        self._metrics.attempt_started(route.choice.value, again=attempt > 1)
        for worker_id in filter(None, (route.prefill, route.decode)):
            self.breakers.chosen(worker_id)
            if worker_id in choice.avoid:
                self._metrics.avoided_used.inc()
        self._assign(choice, attempt, route)

    def _may_wait_for_worker(self, choice: Choice) -> bool:
        """The last worker that could go on with a stream died: others, or itself, may be back soon.

        A stream that never began waits as well where nobody is left of those that were there when it was admitted.
        """
        fits_nobody = not choice.stream.attempt and choice.request.version in self._registry.ready_versions()
        if fits_nobody or choice.request.shadow:
            return False
        now = time.monotonic()
        if choice.homeless_since_s is None:
            self._metrics.waits_for_worker.inc()
            choice.homeless_since_s = now
        return now - choice.homeless_since_s < self._options.worker_return_s

    def _move(self, request: Request) -> bool:
        """Begin anew at another version, as nothing was delivered and no worker of the request's own is there."""
        if request.moved or request.adopted or request.shadow or any(each.stream.tokens for each in request.choices):
            return False
        if request.version in self._registry.ready_versions() or self._suspects.isolated(request):
            return False  # too long for those that are there; or those that were there may have died of it
        version = self.versions.choose(request.id, besides=[request.version])
        if version is None:
            return False
        log.warning(
            "%s begins anew at version %s: %s is gone", request.id, version, request.version,
            extra={"fields": {"request_id": request.id, "model_version": version}},
        )  # fmt: skip
        self._metrics.version_moves.inc()
        request.version, request.moved = version, True
        self.quarantine.forget(request)
        for choice in request.choices:
            self._drop_legs(choice)
            choice.begun_by = choice.homeless_since_s = None
        for choice in request.choices:
            if not request.ended:
                self._begin_attempt(choice)
        return True

    def move_from(self, worker: Worker) -> tuple[int, int]:
        """Have others of its version go on with a draining worker's streams. How many do, and how many nobody takes."""
        moved = stay = 0
        for leg in list(worker.legs.values()):
            choice = leg.choice
            handed_over = not leg.decode and len(choice.stream.tokens) > leg.first_index
            if choice.request.ended or handed_over or worker.legs.get(leg.handle) is not leg:
                continue
            if choice.request.shadow:
                self.abort(choice.request)
            elif self._route(choice, self._registry.candidates(choice.request.version)) is None:
                stay += 1
            else:
                moved += 1
                self._metrics.attempts_failed.labels("moved").inc()
                self._drop_legs(choice, "moved")
                self._begin_attempt(choice)
        return moved, stay

    def _pump_soon(self, news: bool = False) -> None:
        """Let the quarantine take its turn once whoever calls has finished what it is doing."""
        if (news or self.quarantine.busy) and not self._pump_due:
            self._pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_due = False
        turn = self.quarantine.turn(time.monotonic(), self._registry.workers, self.breakers.trouble())
        for choice in {leg.choice: None for leg in turn.move}:
            if choice.request.ended:
                continue
            self._metrics.quarantine.labels("moved_others").inc()
            self._metrics.attempts_failed.labels("moved").inc()
            self._drop_legs(choice, "moved")
            self._begin_attempt(choice)
        for choice, worker in turn.start:
            if not choice.request.ended:
                self._metrics.quarantine.labels("ran_alone").inc()
                self._attempt(choice, self._registry.table.among([worker.row]))
        for choice in turn.resume:
            if not choice.request.ended:
                self._begin_attempt(choice)

    def _assign(self, choice: Choice, attempt: int, route: Route) -> None:
        """To the workers of the route, which the next decision counts as theirs; they are told in the next turn, one
        request after the other: `coordinator.turns` says what that saves."""
        num_tokens = choice.num_prompt_tokens + len(choice.stream.tokens)
        for id in filter(None, (route.prefill, route.decode)):
            worker = self._registry.workers[id]
            leg = Leg(choice, attempt, worker, id == route.decode, next(self._handles))
            leg.first_index, leg.paired = len(choice.stream.tokens), route.prefill is not None
            self._legs.setdefault(choice, []).append(leg)
            computes = not (leg.decode and leg.paired)
            leg.part = self.timelines.part(leg, computes)
            leg.expected_tokens = route.cached_tokens if computes else None
            worker.open(leg, num_tokens, num_tokens - route.cached_tokens if computes else 0)
        if not self._untold:
            asyncio.get_running_loop().call_soon(self._tell)
        self._untold.append((choice, attempt, route))

    def _tell(self) -> None:
        """Nothing of attempts that are over already."""
        untold, self._untold = self._untold, []
        for choice, attempt, route in untold:
            legs = self._legs.get(choice, ())
            # A prefill worker that was lost meanwhile is named to nobody: decode computes the prompt.
            legs = [leg for leg in legs if leg.attempt == attempt and not leg.worker.lost.is_set()]
            try:
                if legs:
                    deadline_s = max(0.001, self._remaining_s(choice.request))
                    assign(choice, legs, route.work, self._registry, deadline_s, self.model)
            except Exception as error:  # noqa: BLE001 - logged, without its message: it might quote a prompt
                where = "".join(traceback.format_tb(error.__traceback__))
                log.error("%s failed on %s\n%s", choice.stream_id, type(error).__name__, where)
                self.end(choice.request, "failed", internal())

    def _computed(self, leg: Leg, packed: bytes) -> None:
        """The leg's worker has these tokens in its KV cache."""
        leg.remembered = True
        request = leg.choice.request
        self.knowledge.computed(leg.worker, Prompt(packed, request.cache_salt, request.version))

    def _abandon(self, leg: Leg, cause: str, own_fault: bool = True) -> None:
        """The attempt cannot go on: the next one starts elsewhere. `own_fault`: a living worker failed it."""
        choice = leg.choice
        attempt = choice.stream.attempt
        self._metrics.attempts_failed.labels(cause).inc()
        log.warning(
            "attempt %d of %s abandoned: %s (worker %s)", attempt, choice.stream_id, cause, leg.worker.id,
            extra={"fields": _about(leg) | {"cause": cause}},
        )  # fmt: skip
        choice.avoid.add(leg.worker.id)
        self.timelines.left(leg, cause)
        self._drop_legs(choice, f"{cause} elsewhere")
        if choice.request.shadow:
            if own_fault:
                self.breakers.failure(leg.worker.id)
            self.end(choice.request, "failed")
            return
        if not own_fault:
            self._begin_attempt(choice)
            return
        if cause != "expired":
            self.breakers.failure(leg.worker.id)
        choice.failures += 1
        if choice.failures >= self._options.max_attempts:
            message = f"workers failed {choice.failures} attempts at this request; try again later"
            self.end(choice.request, "failed", unavailable(message))
        elif delay_s := self._retries.take():
            self._metrics.retries_delayed.inc()
            self._delayed[choice] = asyncio.get_running_loop().call_later(delay_s, self._retry, choice)
        else:
            self._begin_attempt(choice)

    def _retry(self, choice: Choice) -> None:
        del self._delayed[choice]
        self._begin_attempt(choice)

    def _drop_legs(self, choice: Choice, cause: str = "") -> None:
        """Abort the current attempt in every worker that has a part in it, or the wait for the next one.

        `cause`: why the attempt is given up, if it is.
        """
        if choice in self._delayed:
            self._delayed.pop(choice).cancel()
        # Who decodes is told first: it would take the end of its prefill for a loss, and compute the prompt itself.
        for leg in reversed(self._legs.pop(choice, [])):
            self.timelines.left(leg, cause)
            if leg.handle in leg.worker.legs:
                leg.worker.abort(leg)

    def _complete(self, choice: Choice, reason: str, by: Leg, workers_know: bool) -> None:
        """A choice has all its tokens. `workers_know`: the leg's worker ends by the same rule, without being told.

        A prefill leg then only waits for its lease to be released; aborting it would cut a transfer short. But if the
        first token was the last one, decode still waits for blocks that nobody needs.
        """
        for leg in self._legs.get(choice, ()):
            if leg is by or (by.decode and by.paired):
                self.breakers.success(leg.worker.id)
        if workers_know:
            for leg in self._legs.get(choice, ()):
                if leg is by or (by.decode and not leg.decode):
                    leg.worker.close(leg)
        self._drop_legs(choice)
        if by.decode:
            self._computed(by, choice.packed()[:-TOKEN_BYTES])
        self._ended(choice, reason)

    def cut(self, choice: Choice, reason: str) -> None:
        """Nobody may see more of a choice than there is: its workers need not go on. Idempotent."""
        if choice.finish_reason is None and not choice.request.ended:
            self._drop_legs(choice)
            self._ended(choice, reason)

    def _ended(self, choice: Choice, reason: str) -> None:
        choice.end(reason)
        request = choice.request
        if all(other.finish_reason is not None for other in request.choices):
            self.end(request, "completed")

    # What workers say

    def on_message(self, worker: Worker, message: wire.WorkerMessage) -> None:
        """Any message of a registered worker but its registration."""
        self.admission.hear(time.monotonic())
        kind = message.WhichOneof("message")
        if kind == "tokens":
            self._on_tokens(worker, message.tokens)
        elif kind == "heartbeat":
            worker.beat(message.heartbeat)
            self.knowledge.on_beat(worker)
            self._registry.on_change()
            self._pump_soon(worker.heartbeat.reservation != 0)
        elif kind == "admission":
            self._on_admission(worker, message.admission)
        elif kind == "progress":
            leg = worker.leg(message.progress.id)
            if leg is not None:
                computed = message.progress.computed_tokens
                worker.waits(leg, max(0, leg.choice.num_prompt_tokens + len(leg.choice.stream.tokens) - computed))
                if message.progress.prefill_failed and leg.paired:
                    self._blame_peers(leg)
                    self._alone_now(leg.choice)
        elif kind == "ending":
            self._on_ending(worker, message.ending)
        elif kind == "kv_events":
            self.knowledge.on_events(worker, message.kv_events)
        elif kind == "orphan":
            self.on_orphan(worker, message.orphan)
        else:
            worker.lose(f"it sent an unexpected message ({kind or 'empty'})")

    def _on_tokens(self, worker: Worker, step: wire.StepTokens) -> None:
        """The hot path: every token of every stream passes here."""
        if not len(step.handles) == len(step.indices) == len(step.token_ids):
            worker.lose("its StepTokens arrays differ in length")
            return
        now = time.monotonic()
        logprobs = {entry.entry: entry for entry in step.logprobs} if step.logprobs else None
        legs, fast_paths = worker.legs, worker.fast_paths
        taken = fast_paths.take(step.handles, step.indices, step.token_ids, now)
        for entry in [at for at, done in enumerate(taken) if not done]:
            handle, index, token_id = step.handles[entry], step.indices[entry], step.token_ids[entry]
            if (leg := legs.get(handle)) is None:
                continue
            choice = leg.choice
            if (leg.waiting_tokens or not leg.remembered) and choice.stream.awaits(leg.attempt, index):
                self._begins(leg, now)
            if (path := choice.fast_path) is not None:
                if path.enter(leg) and fast_paths.take([handle], [index], [token_id], now)[0]:
                    continue
                path.leave()
            outcome = choice.stream.accept(leg.attempt, index, token_id)
            if outcome is IGNORED:
                continue
            # The usual outcome is not looked up in a set: an enum's hash costs more than all of `accept`.
            ends = outcome is not DELIVERED
            if ends and outcome in ABANDON:
                if outcome is Outcome.DIVERGED and index == leg.first_index:
                    # The other token is of the attempt's other worker, if there is one. Either may be wrong.
                    self._blame_peers(leg)
                self._abandon(leg, outcome.value)
                continue
            self._metrics.token(choice, now)
            stopped = choice.add(token_id, logprobs.get(entry) if logprobs else None, ends and outcome is Outcome.STOP)
            if ends:
                self._complete(choice, STOP if stopped else _REASONS[outcome], leg, workers_know=True)
            elif stopped:
                self._complete(choice, STOP, leg, workers_know=False)

    def _begins(self, leg: Leg, now: float) -> None:
        """Its worker says the next token: it has computed all that is before it."""
        if leg.waiting_tokens:
            leg.worker.waits(leg, 0)
        if not leg.remembered:
            self._computed(leg, leg.choice.packed_prompt)
            self.timelines.first_token(leg, now)
            self.admission.first_token(leg.choice, now)

    def _on_admission(self, worker: Worker, admission: wire.Admission) -> None:
        if admission.draining:
            worker.drains()
        leg = worker.leg(admission.id)
        if leg is None:
            return
        choice = leg.choice
        if admission.accepted:
            # Only the first word counts: a request that was preempted finds its own blocks when it comes back.
            if leg.attempt == 1 and not leg.admitted:
                choice.cached_tokens = max(choice.cached_tokens, min(admission.cached_tokens, choice.num_prompt_tokens))
                for other in self._legs.get(choice, ()):
                    if other.decode and other is not leg and choice.cached_tokens:
                        cached = wire.CachedTokens(id=other.id, num_tokens=choice.cached_tokens)
                        other.worker.send(wire.CoordinatorMessage(cached_tokens=cached))
            if leg.expected_tokens is not None and not leg.admitted:
                num_tokens = choice.num_prompt_tokens + len(choice.stream.tokens)
                worker.waits(leg, max(0, num_tokens - admission.cached_tokens))
                self._metrics.cached(num_tokens, leg.expected_tokens, admission.cached_tokens)
            leg.admitted = True
            self.timelines.admitted(leg, admission.cached_tokens)
            return
        if choice.stream.refused(leg.attempt) is Outcome.FAILED:
            log.info(
                "worker %s refused %s: %s", worker.id, choice.stream_id, admission.reason, extra={"fields": _about(leg)}
            )
            worker.close(leg)
            # An admitted one waited for its adoption, and somebody else had it first.
            own_fault = not (admission.draining or admission.reserved or leg.admitted)
            self._abandon(leg, "refused", own_fault=own_fault)

    def _on_ending(self, worker: Worker, ending: wire.Ending) -> None:
        self.timelines.told(worker, ending)
        leg = worker.leg(ending.id)
        if leg is None:
            return
        worker.close(leg)
        if ending.reason == wire.END_REASON_TAKEN:
            self._taken(leg.choice)
            return
        outcome = leg.choice.stream.ended(leg.attempt, leg.decode, ending.reason, ending.num_tokens)
        if outcome in COMPLETE:
            self._complete(leg.choice, _REASONS[outcome], leg, workers_know=True)
        elif outcome is Outcome.FAILED:
            reason = wire.EndReason.Name(ending.reason) if ending.reason in wire.EndReason.values() else "unknown"
            log.warning(
                "worker %s ended %s with %s: %s", worker.id, leg.choice.stream_id, reason, ending.detail,
                extra={"fields": _about(leg) | {"reason": reason}},
            )  # fmt: skip
            cause = "expired" if ending.reason == wire.END_REASON_DEADLINE else "ended"
            self._abandon(leg, cause, own_fault=not worker.heartbeat.draining)
        elif not leg.decode and ending.reason != wire.END_REASON_HANDED_OVER:
            self._alone_now(leg.choice)
            if ending.reason == wire.END_REASON_ERROR:
                self.breakers.failure(worker.id)

    def _taken(self, choice: Choice) -> None:
        """Its client went to another coordinator, which goes on with it: what it has in workers stays there."""
        for leg in self._legs.pop(choice, ()):
            leg.worker.close(leg)
        self.end(choice.request, "moved", moved())

    def _on_lost(self, worker: Worker) -> None:
        self.knowledge.forget(worker)
        legs = list(worker.legs.values())
        convicted = self._charge_death(worker, legs) if worker.died else []
        for leg in legs:
            worker.close(leg)
        for request in convicted:
            events.error("request %s is poison: it killed worker %s alone, after others", request.id, worker.id)
            self._metrics.quarantine.labels("convicted").inc()
            self.end(request, "poisoned", poison())
        for leg in legs:
            if leg.choice.stream.worker_lost(leg.attempt, leg.decode) is Outcome.FAILED:
                self._abandon(leg, "worker_lost", own_fault=False)
            elif not leg.decode:
                self._alone_now(leg.choice)
        self._pump_soon()

    def _charge_death(self, worker: Worker, legs: list[Leg]) -> list[Request]:
        """Everybody who was there is a suspect. Those that are guilty beyond doubt."""
        self.breakers.failure(worker.id)
        legs = legs + [leg for leg in worker.aftermath() if not leg.choice.request.ended]
        legs = [leg for leg in legs if not leg.choice.request.shadow]
        self._metrics.suspects.inc(len({leg.choice.request for leg in legs}))
        return self._suspects.died(legs, self.quarantine.alone(worker))

    def _alone_now(self, choice: Choice) -> None:
        """What the prefill worker has not done, decode does."""
        for leg in self._legs.get(choice, ()):
            leg.paired = False

    def _blame_peers(self, leg: Leg) -> None:
        """A worker's death is charged when it is lost, not here."""
        for other in self._legs.get(leg.choice, ()):
            if other is not leg and not other.worker.lost.is_set():
                self.breakers.failure(other.worker.id)


def _about(leg: Leg) -> dict[str, str | int]:
    """For logs."""
    choice = leg.choice
    return {"request_id": choice.request.id, "choice": choice.number, "attempt": leg.attempt, "worker": leg.worker.id}


_REASONS = {Outcome.STOP: STOP, Outcome.LENGTH: LENGTH}
