"""One trace a request: spans from the gateway to what each worker did, made once it is over.

    text_completion demo          SERVER, with the attributes of OpenTelemetry's conventions for generative AI
      admission                   tokenised, judged, routed
      prefill attempt             of a worker; `baton.cause` says why it was given up
        queue
        prefill
      decode attempt
        queue
        handover                  `baton.handover.wire_s`, `.wait_s`, `.bytes`, `.lane`
        decode

W3C trace context comes in with a call and goes out with the answer and to the workers. While a request runs, tracing
costs it no more than its ids: the spans are made of its timeline. So whether it is kept can be decided at the end: by
the caller's decision, or `--trace-ratio` where there is none; errors, fail-overs and slow requests always are. No span
has text. Conventions: https://opentelemetry.io/docs/specs/semconv/gen-ai/, https://www.w3.org/TR/trace-context/.
"""

import asyncio
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

from coordinator.delivery import Request
from coordinator.timelines import COMPLETED, Part, Span, Timeline

GRACE_S = 1.0
"""From the end of a request to its spans: workers tell what they know a little later."""
MAX_PENDING = 4096
"""Requests that wait for that; those beyond are dropped, and counted."""
ABORTED = "aborted"
Attribute = str | bool | int | float | list[str]

arriving: ContextVar[str] = ContextVar("arriving", default="")
"""The `traceparent` that came with the current call."""


class TraceContext(NamedTuple):
    """Of one request: where its spans belong."""

    trace_id: int
    parent_id: int
    """Of the caller's span; 0: it has none."""
    span_id: int
    """Of the request's own."""
    sampled: bool
    asked: Mapping[str, Attribute]
    """What the client asked for, as attributes of its span."""

    @property
    def traceparent(self) -> str:
        """For whoever comes next."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{self.sampled:02x}"


@dataclass(slots=True)
class SpanData:
    """A span in nobody's format."""

    name: str
    span_id: int
    parent_id: int
    start_ns: int
    """Since 1970."""
    end_ns: int
    service: str
    instance: str
    """Worker; empty: the coordinator."""
    attributes: dict[str, Attribute] = field(default_factory=dict)
    error: str = ""


class Trace(NamedTuple):
    context: TraceContext
    spans: list[SpanData]
    """The request's own first."""


def parse_traceparent(text: str) -> tuple[int, int, bool] | None:
    """(trace id, span id, sampled); None for what the W3C's rules say to ignore."""
    match = re.fullmatch(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", text.strip())
    if match is None or match[1] == "ff" or (match[1] == "00" and match[5]):
        return None
    trace_id, span_id = int(match[2], 16), int(match[3], 16)
    return (trace_id, span_id, bool(int(match[4], 16) & 1)) if trace_id and span_id else None


class Tracer:
    """In the event loop's thread. `export` never blocks; False: it took nothing. `count` says what became of traces."""

    def __init__(
        self, ratio: float, slow_s: float, export: Callable[[Trace], bool], count: Callable[[str], None]
    ) -> None:
        """`ratio` of the requests whose callers have not decided; `slow_s`: longer ones are always kept, 0: none is."""
        self._bound = int(ratio * (1 << 64))
        self._slow_s = slow_s
        self._export = export
        self._count = count
        self._pending: dict[int, tuple[Timeline, TraceContext, str]] = {}
        """By span id: what waits for its workers, and why it is kept."""

    def begin(self, request: Request, timeline: Timeline) -> None:
        sampling = request.choices[0].sampling
        timeline.trace = self._context({
            "gen_ai.operation.name": "chat" if request.form.chat else "text_completion",
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.choice.count": len(request.choices),
        })  # fmt: skip

    def _context(self, asked: Mapping[str, Attribute]) -> TraceContext:
        if (caller := parse_traceparent(arriving.get())) is not None:
            trace_id, parent_id, sampled = caller
            return TraceContext(trace_id, parent_id, _new_id(64), sampled, asked)
        trace_id = _new_id(128)
        # As TraceIdRatioBased has it, so that whoever samples by the same ratio decides the same.
        return TraceContext(trace_id, 0, _new_id(64), trace_id & ((1 << 64) - 1) < self._bound, asked)

    def ended(self, timeline: Timeline) -> None:
        if timeline.trace is None:
            return
        why = self._kept_because(timeline)
        if not why:
            self._count("not_sampled")
        elif len(self._pending) >= MAX_PENDING:
            self._count("dropped")
        else:
            self._pending[timeline.trace.span_id] = timeline, timeline.trace, why
            asyncio.get_running_loop().call_later(GRACE_S, self._finish, timeline.trace.span_id)

    def flush(self) -> None:
        """Wait for nobody's last words any more."""
        for span_id in list(self._pending):
            self._finish(span_id)

    def _kept_because(self, timeline: Timeline) -> str:
        if timeline.outcome not in (COMPLETED, ABORTED):
            return "error"
        if any(part.cause for part in timeline.parts):
            return "failover"
        if self._slow_s and (timeline.ended_s or 0.0) - timeline.started_s > self._slow_s:
            return "slow"
        return "sampled" if timeline.trace is not None and timeline.trace.sampled else ""

    def _finish(self, span_id: int) -> None:
        if (pending := self._pending.pop(span_id, None)) is not None:
            taken = self._export(Trace(pending[1], list(_spans(*pending))))
            self._count("kept" if taken else "dropped")


def _spans(timeline: Timeline, context: TraceContext, why: str) -> Iterator[SpanData]:
    offset_s = timeline.started_unix_s - timeline.started_s
    until_s = timeline.ended_s or timeline.started_s

    def span(of: Span, parent_id: int, service: str, instance: str = "") -> SpanData:
        start_ns, end_ns = (round((at_s + offset_s) * 1e9) for at_s in (of.start_s, max(of.start_s, of.end_s)))
        facts: dict[str, Attribute] = {f"baton.{of.name}.{name}": value for name, value in of.facts.items()}
        return SpanData(of.name, _new_id(64), parent_id, start_ns, end_ns, service, instance, facts)

    name = f"{context.asked['gen_ai.operation.name']} {timeline.model}"
    own = span(Span(name, timeline.started_s, until_s, {}), context.parent_id, "")
    own.service, own.span_id, own.attributes = "baton-coordinator", context.span_id, _about(timeline, context, why)
    own.error = "" if timeline.outcome in (COMPLETED, ABORTED) else timeline.outcome
    yield own
    yield span(timeline.admission(until_s), own.span_id, own.service)
    for part in timeline.parts:
        role = "decode" if part.decode else "prefill"
        whole = Span(f"{role} attempt", part.assigned_s, part.ended_s or until_s, {})
        attempt = span(whole, own.span_id, f"baton-{role}", part.worker)
        attempt.attributes, attempt.error = _about_part(part), part.cause
        yield attempt
        for phase in part.spans(until_s):
            yield span(phase, attempt.span_id, attempt.service, part.worker)


def _about(timeline: Timeline, context: TraceContext, why: str) -> dict[str, Attribute]:
    attributes: dict[str, Attribute] = {
        **context.asked,
        "gen_ai.provider.name": "baton",
        "gen_ai.request.model": timeline.model,
        "gen_ai.response.model": timeline.model,
        "gen_ai.response.id": timeline.id,
        "baton.outcome": timeline.outcome,
        "baton.model.version": timeline.version,
        "baton.attempts": max((part.attempt for part in timeline.parts), default=0),
        "baton.sampled.because": why,
    }
    if timeline.tenant:
        attributes["baton.tenant"] = timeline.tenant
    if (usage := timeline.usage) is not None:
        attributes["gen_ai.usage.input_tokens"] = usage.prompt
        attributes["gen_ai.usage.output_tokens"] = usage.completion
        attributes["gen_ai.usage.cache_read.input_tokens"] = usage.cached_prompt
    if timeline.first_token_s is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = timeline.first_token_s - timeline.started_s
    if timeline.finish_reasons:
        attributes["gen_ai.response.finish_reasons"] = timeline.finish_reasons
    if timeline.outcome not in (COMPLETED, ABORTED):
        attributes["error.type"] = timeline.outcome
    return attributes


def _about_part(part: Part) -> dict[str, Attribute]:
    about: Mapping[str, Attribute] = {
        "baton.worker": part.worker, "baton.attempt": part.attempt, "baton.choice": part.choice,
        "baton.cached_tokens": part.cached_tokens,
    }  # fmt: skip
    return {**about, **({"baton.cause": part.cause, "error.type": part.cause} if part.cause else {})}


def _new_id(bits: int) -> int:
    """Never 0."""
    return random.getrandbits(bits) or 1
