"""Where the time of one request goes: TTFT and the first inter-token gap, cut into parts that add up to them.

All times are nanoseconds of CLOCK_MONOTONIC. Parts: the front door (until the prefill worker has the request), queue,
compute (engine steps), wire (blocks copied or checked after the prompt's last step), and wait (threads, event loops,
messages), which is named hop by hop.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from benchmarks.watched import Call

FRONT_DOOR, QUEUE, COMPUTE, WIRE, WAIT = "front door", "queue", "compute", "wire", "wait"
UNNAMED = "unnamed"


class Part(NamedTuple):
    """Of what kind some time is, and what exactly happened."""

    kind: str
    what: str


class Span(NamedTuple):
    part: Part
    start: int
    end: int


Parts = Counter[Part]
"""Nanoseconds by part, in the order in which they were first met."""


def split(start: int, end: int, spans: Sequence[Span]) -> Parts:
    """Cut `start` to `end` among the spans: each moment belongs to the first in the list that covers it.

    So the parts add up to the whole. What no span covers is UNNAMED.
    """
    edges = sorted({start, end, *(min(max(edge, start), end) for span in spans for edge in (span.start, span.end))})
    parts: Parts = Counter()
    for left, right in pairwise(edges):
        cover = next((span.part for span in spans if span.start <= left and right <= span.end), Part(UNNAMED, ""))
        parts[cover] += right - left
    return parts


def of_kind(parts: Parts, kind: str) -> int:
    return sum(nanoseconds for part, nanoseconds in parts.items() if part.kind == kind)


@dataclass(frozen=True)
class Seen:
    """One request, alone in the system: when the client sent it and had each token, and what each process did."""

    sent: int
    tokens: list[int]
    prefill: list[Call]
    decode: list[Call]
    coordinator: list[Call]


@dataclass(frozen=True)
class HandOver:
    """What one request's time went into.

    ttft, first_gap: as the client saw them. relay: from the end of the prompt's last step to the client's second token;
    its beginning runs beside the first token's way to the client. step: the median of the later gaps.
    """

    ttft: Parts
    first_gap: Parts
    relay: Parts
    step: float
    until_decode: int
    """From the end of the prompt's last step to the beginning of decode's first one."""

    @property
    def beyond_wire(self) -> float:
        """Of the first gap, what neither the wire nor an ordinary gap takes."""
        return self.first_gap.total() - of_kind(self.first_gap, WIRE) - self.step

    @property
    def until_decode_beyond_wire(self) -> int:
        """What the hand-over takes without the wire, whether or not the client could see it."""
        return self.until_decode - of_kind(self.relay, WIRE)


class NoHandOver(Exception):
    """The request was not handed over, or a seam was passed that nobody watches."""


def understand(seen: Seen) -> HandOver:
    """Raises NoHandOver."""
    steps = _computing(seen.prefill)
    if not steps:
        raise NoHandOver("no prefill step was seen")
    computed = steps[-1].end
    received = _first(seen.decode, "Engine.receive", computed)
    decode_step = next((step for step in _computing(seen.decode) if received and step.start >= received.start), None)
    if received is None or decode_step is None:
        raise NoHandOver("decode received nothing after the prompt's last step")
    moves = [call for call in (*seen.prefill, *seen.decode) if call.seam in _MOVES and call.end > computed]
    first_token, second_token = seen.tokens[:2]
    gaps = [after - before for before, after in pairwise(seen.tokens[1:])]
    way = [
        *(Span(Part(WIRE, _MOVES[call.seam]), max(call.start, computed), call.end) for call in moves),
        Span(Part(COMPUTE, "decode step"), decode_step.start, decode_step.end),
        *_hops(computed, _way_of_blocks(seen, computed, received, decode_step)),
    ]
    return HandOver(
        ttft=split(seen.sent, first_token, _until_first_token(seen, steps)),
        first_gap=split(first_token, second_token, way),
        relay=split(computed, second_token, way),
        step=statistics.median(gaps),
        until_decode=decode_step.start - computed,
    )


_MOVES = {"OfferServer._checksum": "checksums", "pull_and_verify": "copies and checks"}


class _Point(NamedTuple):
    """Something that had to happen, and when; None: it did not, as nothing was left to move."""

    what: str
    at: int | None


def _until_first_token(seen: Seen, steps: Sequence[Call]) -> list[Span]:
    assigned = _first(seen.prefill, "WorkerShell.on_assignment", seen.sent)
    if assigned is None:
        raise NoHandOver("the prefill worker got no assignment")
    first, last = steps[0].start, steps[-1].end
    told = _first(seen.coordinator, "Dispatcher._on_tokens", last)
    return [
        *(Span(Part(COMPUTE, "prefill steps"), step.start, step.end) for step in steps),
        Span(Part(FRONT_DOOR, "client -> prefill worker"), seen.sent, assigned.start),
        Span(Part(QUEUE, "assigned -> first step"), assigned.start, first),
        Span(Part(WAIT, "between steps"), first, last),
        *_hops(last, [
            _Point("step -> prefill's loop", _start(_first(seen.prefill, "WorkerShell._on_output", last))),
            _Point("prefill's loop -> coordinator", _start(told)),
            _Point("coordinator -> client", seen.tokens[0]),
        ]),
    ]  # fmt: skip


def _way_of_blocks(seen: Seen, computed: int, received: Call, decode_step: Call) -> list[_Point]:
    """What has to happen one after the other between the prompt's last step and the client's second token."""
    until = received.start
    checks = [call for call in seen.prefill if call.seam == "OfferServer._checksum" and computed <= call.start < until]
    pulls = [call for call in seen.decode if call.seam == "pull_and_verify" and computed <= call.end < until]
    told = [call for call in seen.prefill if call.seam == "OfferServer._send" and computed <= call.start < until]
    news = next((call for kind in ("offer", "written") for call in told if call.detail == kind), None)
    heard = _first(seen.decode, "Intake._on_message", news.start, news.detail) if news else None
    submitted = [call for call in seen.decode if call.seam == "StepLoop.submit" and computed <= call.start < until]
    out = _first(seen.decode, "WorkerShell._on_output", decode_step.end)
    delivered = _first(seen.coordinator, "Dispatcher._on_tokens", out.start) if out else None
    return [
        _Point("step -> prefill's loop", _start(_first(seen.prefill, "WorkerShell._on_output", computed))),
        _Point("prefill's loop -> checksum thread", checks[0].start if checks else None),
        _Point("between checksums", checks[-1].end if checks else None),
        _Point("-> announced", _start(news)),
        _Point("announced -> decode's loop", _start(heard)),
        _Point("decode's loop -> pull thread", pulls[0].start if pulls else None),
        _Point("between pulls", pulls[-1].end if pulls else None),
        _Point("-> engine told", submitted[-1].start if submitted else None),
        _Point("told -> engine hears", received.start),
        _Point("hears -> decode step", decode_step.start),
        _Point("decode step", decode_step.end),
        _Point("step -> decode's loop", _start(out)),
        _Point("decode's loop -> coordinator", _start(delivered)),
        _Point("coordinator -> client", seen.tokens[1]),
    ]


def _hops(start: int, points: Iterable[_Point]) -> list[Span]:
    """From each point that was reached to the next one. One that came earlier than the point before took no time."""
    spans = []
    for point in points:
        if point.at is not None:
            end = max(start, point.at)
            spans.append(Span(Part(WAIT, point.what), start, end))
            start = end
    return spans


def _computing(calls: Sequence[Call]) -> list[Call]:
    """The steps that computed something; others only report what else happened."""
    runs = [call.start for call in calls if call.seam == "ModelRunner.run"]
    return [call for call in calls if call.seam == "Engine.step" and any(call.start <= run <= call.end for run in runs)]


def _first(calls: Sequence[Call], seam: str, since: int, detail: str = "") -> Call | None:
    matches = (call for call in calls if call.seam == seam and call.start >= since)
    return next((call for call in matches if detail in ("", call.detail)), None)


def _start(call: Call | None) -> int | None:
    return call.start if call is not None else None
