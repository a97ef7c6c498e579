"""When what happened to each of the last requests: a few numbers a worker's part, none a token, and no text.

    admission   |--|                            arrived, tokenised, routed
    queue          |---|                        prefill-0: assigned, until it took the prompt up
    prefill            |------------|           prefill-0: until its first token
    queue          |-|                          decode-0: until its blocks were reserved
    handover         |=---=--===--==|           decode-0: of this, blocks were on the wire for `wire_s`
    decode                          |--------|  decode-0: from there, or its first token, to the end

The dispatcher says what begins and ends here; what only a worker knows comes at an attempt's end (`AttemptTimes`),
which may be after that of the request. `baton trace` and the spans of `coordinator.tracing` are made of the same.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import Struct

from baton.v1 import worker_link_pb2 as wire
from coordinator.delivery import Request, UsageCounts
from coordinator.version_metrics import SECONDS, Buckets
from coordinator.workers import Leg, Worker

if TYPE_CHECKING:
    from coordinator.tracing import TraceContext

MAX_ENDED = 1024
"""Requests that are remembered after their end; about 2 kB each."""
MAX_PARTS = 64
"""Of one request; what comes later is served and not remembered."""
MAX_TOLD_S = 1e6
COMPLETED = "completed"


class Span(NamedTuple):
    """One bar. Times are `time.monotonic()` of the coordinator."""

    name: str
    start_s: float
    end_s: float
    facts: Mapping[str, str | int | float]


class Part(Struct):
    """A worker's part in one attempt at one choice."""

    worker: str
    decode: bool
    computes: bool
    """The prompt; else it takes it over."""
    choice: int
    attempt: int
    assigned_s: float
    adopted: bool = False
    admitted_s: float | None = None
    cached_tokens: int = 0
    first_token_s: float | None = None
    """That came from there, and that the client did not have."""
    ended_s: float | None = None
    cause: str = ""
    """Why it was abandoned."""
    told: wire.AttemptTimes | None = None

    def spans(self, now_s: float) -> Iterator[Span]:
        """In the order in which they begin."""
        end_s, told = self.ended_s or now_s, self.told
        admitted_s = self.admitted_s
        if told is not None and told.HasField("started_s"):  # nearer to what happened than when it was heard of
            admitted_s = min(self.assigned_s + told.started_s, end_s)
        if not self.adopted:
            yield Span("queue", self.assigned_s, end_s if admitted_s is None else admitted_s, {})
        if admitted_s is None:
            return
        first_s = decode_s = end_s if self.first_token_s is None else self.first_token_s
        if told is not None and told.HasField("take_s"):
            decode_s = taken_s = min(self.assigned_s + (told.taken_s or told.total_s), end_s)
            yield Span("handover", min(self.assigned_s + told.take_s, taken_s), taken_s, {
                "wire_s": told.wire_s, "wait_s": max(0.0, told.taken_s - told.take_s - told.wire_s),
                "bytes": told.handover_bytes, "lane": told.lane,
            })  # fmt: skip
        if self.computes and not self.adopted:
            yield Span("prefill", admitted_s, first_s, {"cached_tokens": self.cached_tokens})
        if self.decode and self.first_token_s is not None:
            yield Span("decode", decode_s, end_s, {})


class Timeline(Struct):
    """Of one request, from arrival on."""

    id: str
    tenant: str
    model: str
    version: str
    started_s: float
    started_unix_s: float
    prompt_tokens: int
    trace: "TraceContext | None" = None
    """None: nobody traces it."""
    parts: list[Part] = []
    first_token_s: float | None = None
    ended_s: float | None = None
    outcome: str = ""
    """Empty while it runs."""
    usage: UsageCounts | None = None
    finish_reasons: list[str] = []

    def admission(self, now_s: float) -> Span:
        """Before any worker had it."""
        end_s = self.parts[0].assigned_s if self.parts else now_s
        return Span("admission", self.started_s, end_s, {})

    def described(self, now_s: float, name_of: Callable[[str], str]) -> dict[str, Any]:
        """For people and programs; `name_of` a worker's id is what they may know."""
        now_s = self.ended_s or now_s
        first_s = self.first_token_s
        spans = [self._row(self.admission(now_s))]
        for part in self.parts:
            about = {
                "worker": name_of(part.worker), "role": "decode" if part.decode else "prefill",
                "choice": part.choice, "attempt": part.attempt,
            }  # fmt: skip
            rows = [self._row(span) | about for span in part.spans(now_s)]
            if part.cause and rows:
                rows[-1]["cause"] = part.cause
            spans += rows
        usage = self.usage
        return {
            "id": self.id,
            "object": "request.trace",
            "model": self.model,
            "version": self.version,
            "outcome": self.outcome or "running",
            "started_unix_s": self.started_unix_s,
            "total_s": now_s - self.started_s,
            "first_token_s": None if first_s is None else first_s - self.started_s,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": None if usage is None else usage.completion,
            "spans": spans,
        }

    def _row(self, span: Span) -> dict[str, Any]:
        times = {"start_s": span.start_s - self.started_s, "end_s": span.end_s - self.started_s}
        return {"name": span.name} | times | dict(span.facts)


def numbered() -> Callable[[str], str]:
    """Names for who may not know those of workers: the same for the same."""
    numbers: dict[str, int] = {}
    return lambda worker: f"worker {numbers.setdefault(worker, len(numbers) + 1)}"


def traceparent_of(request: Request | None) -> str:
    """For whoever comes after this coordinator; empty: nobody traces the request."""
    timeline = request.timeline if request is not None else None
    return timeline.trace.traceparent if timeline is not None and timeline.trace is not None else ""


def _possible(times: wire.AttemptTimes) -> bool:
    """No worker has spent less than nothing, or a number that is none."""
    told = (times.total_s, times.started_s, times.take_s, times.taken_s, times.wire_s)
    return all(0.0 <= seconds < MAX_TOLD_S for seconds in told)


class Timelines:
    """In the event loop's thread. Running requests have theirs with them; of ended ones the last are kept."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running: dict[str, Timeline] = {}
        self._ended: OrderedDict[str, Timeline] = OrderedDict()
        self.queue, self.prefill, self.decode = Buckets(SECONDS), Buckets(SECONDS), Buckets(SECONDS)
        self.handover_bytes: Counter[str] = Counter()
        """By lane."""
        self.handover_wait, self.handover_wire = Buckets(SECONDS), Buckets(SECONDS)
        self.on_begun: Callable[[Request, Timeline], None] = lambda request, timeline: None
        self.on_ended: Callable[[Timeline], None] = lambda timeline: None
        """Set by the tracer."""

    def begin(self, request: Request, model: str) -> None:
        unix_s = time.time() - self._clock() + request.started_s
        timeline = request.timeline = Timeline(
            request.id, request.caller.tenant, model, request.version, request.started_s, unix_s,
            request.prompt_tokens,
        )  # fmt: skip
        if not request.shadow:
            self._running[request.id] = timeline
            self.on_begun(request, timeline)

    def part(self, leg: Leg, computes: bool, adopted: bool = False) -> Part:
        choice = leg.choice
        part = Part(leg.worker.id, leg.decode, computes, choice.number, leg.attempt, self._clock(), adopted)
        timeline = choice.request.timeline
        if timeline is not None and len(timeline.parts) < MAX_PARTS:
            timeline.parts.append(part)
        return part

    def admitted(self, leg: Leg, cached_tokens: int) -> None:
        """The worker took it up; idempotent."""
        part = leg.part
        if part is None or part.admitted_s is not None:
            return
        part.admitted_s, part.cached_tokens = self._clock(), cached_tokens
        if part.computes and not leg.choice.request.shadow:
            self.queue.observe(part.admitted_s - part.assigned_s)

    def first_token(self, leg: Leg, now_s: float) -> None:
        """Once a leg."""
        part = leg.part
        if part is None:
            return
        part.first_token_s = now_s
        if part.computes and part.admitted_s is not None and not leg.choice.request.shadow:
            self.prefill.observe(now_s - part.admitted_s)

    def left(self, leg: Leg, cause: str = "") -> None:
        """Nothing more is expected of the leg's worker; the first cause stays."""
        part = leg.part
        if part is not None and part.ended_s is None:
            part.ended_s, part.cause = self._clock(), cause

    def told(self, worker: Worker, ending: wire.Ending) -> None:
        """What the worker knows of an attempt that ended there, which may be forgotten here."""
        if not ending.HasField("times") or not _possible(ending.times):
            return
        request_id, _, number = ending.id.request_id.rpartition("-")
        timeline = self.get(request_id)
        if timeline is None:
            return
        for part in timeline.parts:
            place = (part.worker, part.attempt, str(part.choice))
            if place == (worker.id, ending.id.attempt, number) and part.told is None and not part.adopted:
                part.told = times = ending.times
                lane = times.lane if times.lane in worker.registration.lanes else "none"
                self.handover_bytes[lane] += times.handover_bytes
                if times.HasField("take_s") and times.taken_s:
                    self.handover_wire.observe(times.wire_s)
                    self.handover_wait.observe(max(0.0, times.taken_s - times.take_s - times.wire_s))
                return

    def ended(self, request: Request, outcome: str) -> None:
        timeline = self._running.pop(request.id, None)
        if timeline is None or timeline is not request.timeline:  # a shadow, or one that was never admitted
            return
        timeline.ended_s, timeline.outcome = self._clock(), outcome
        timeline.first_token_s, timeline.version = request.first_token_s, request.version
        timeline.usage = request.usage()
        timeline.finish_reasons = [choice.finish_reason or "error" for choice in request.choices]
        if outcome == COMPLETED and request.first_token_s is not None:
            self.decode.observe(timeline.ended_s - request.first_token_s)
        self._ended[timeline.id] = timeline
        self._ended.move_to_end(timeline.id)
        if len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)
        self.on_ended(timeline)

    def get(self, id: str) -> Timeline | None:
        """Of a request that runs, or was among the last to end."""
        return self._running.get(id) or self._ended.get(id)
