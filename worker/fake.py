"""A worker without an engine: it says what a real one would, and computes nothing.

It makes the front door measurable alone, and a cluster of thousands possible on a laptop. Its tokens are a function of
the prompt and the index, so any attempt at any fake worker gives the same stream; its times are set. Prompts take
`num_tokens / prefill_tokens_per_s`, one after the other; all running requests get their next token every `step_s`, in
one message, as from a real batch. No block is moved: a decode worker waits as long as the prefill of its attempt takes
where nothing is before it. It keeps nothing of a coordinator that is gone.
"""

import asyncio
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import xxhash

from baton.errors import PeerError
from baton.token_ids import count, unpack
from baton.v1 import worker_link_pb2 as wire
from worker.link import LinkHandler
from worker.reservation import Reservation
from worker.roles import KvLink, Link

PAGE_SIZE = 16
_STRIDE = 7919
"""Between the tokens of a stream, in the vocabulary; prime, so that it comes to all of them."""


@dataclass(frozen=True)
class Pace:
    """`prefill_tokens_per_s` 0: prompts take no time."""

    step_s: float
    prefill_tokens_per_s: float

    def prefill_s(self, num_tokens: int) -> float:
        return num_tokens / self.prefill_tokens_per_s if self.prefill_tokens_per_s else 0.0


@dataclass(slots=True)
class _Stream:
    link: Link
    assignment: wire.Assignment
    seed: int
    next_index: int
    computed_at: float
    """When its prompt is through, by the clock of the loop."""
    ends_at: float
    """Its deadline."""
    admitted: bool = False


@dataclass
class _Outgoing:
    """What one link is told after a step."""

    tokens: wire.StepTokens = field(default_factory=wire.StepTokens)
    others: list[wire.WorkerMessage] = field(default_factory=list)


def _key(id: wire.AttemptId) -> str:
    return f"{id.request_id}/{id.attempt}"


def token_at(prompt: Sequence[int], index: int, vocabulary: Sequence[int]) -> int:
    """What every fake worker says at `index` of the answer to `prompt`."""
    return _token(_seed(prompt), index, vocabulary)


def _seed(prompt: Sequence[int]) -> int:
    return xxhash.xxh3_64_intdigest(array("I", prompt).tobytes())


def _token(seed: int, index: int, vocabulary: Sequence[int]) -> int:
    return vocabulary[(seed + index * _STRIDE) % len(vocabulary)]


class FakeWorker(LinkHandler):
    """`vocabulary`: the tokens that it says. `total_blocks`: what it counts its requests' tokens against."""

    def __init__(self, pace: Pace, vocabulary: Sequence[int], total_blocks: int) -> None:
        self._pace = pace
        self._vocabulary = vocabulary
        self._total_blocks = total_blocks
        self._streams: dict[str, _Stream] = {}
        self._prefill_until = 0.0
        self._has_work = asyncio.Event()
        self._reservation = Reservation()
        self._draining = False
        self.drained = asyncio.Event()
        """It was told to drain, and nothing runs any more."""
        self.say_to_all: Callable[[wire.WorkerMessage], None] = lambda message: None
        """Set by whoever has its links."""

    async def run(self) -> None:
        """Steps, until cancelled."""
        loop, step_s = asyncio.get_running_loop(), self._pace.step_s
        next_at = loop.time()
        while True:
            if not self._streams:
                self._has_work.clear()
                await self._has_work.wait()
                next_at = loop.time()
            self.step(loop.time())
            # One that comes late is not made up for beyond one step, as a batch never is.
            next_at = max(next_at + step_s, loop.time())
            await asyncio.sleep(next_at - loop.time())

    def step(self, now: float) -> None:
        """The next token of every stream whose prompt is computed by `now`, in one message a link."""
        told: dict[Link, _Outgoing] = {}
        for stream in list(self._streams.values()):
            out = told.setdefault(stream.link, _Outgoing())
            if not stream.admitted:
                stream.admitted = True
                stream.link.send(wire.WorkerMessage(admission=wire.Admission(id=stream.assignment.id, accepted=True)))
            if now >= stream.ends_at:
                self._end(stream, wire.END_REASON_DEADLINE, out.others.append)
            elif now >= stream.computed_at:
                self._advance(stream, out)
        for link, out in told.items():
            if out.tokens.handles:
                link.send(wire.WorkerMessage(tokens=out.tokens))
            for message in out.others:
                link.send(message)

    def _advance(self, stream: _Stream, out: _Outgoing) -> None:
        """Its next token, and its end when that was the last."""
        index, assignment = stream.next_index, stream.assignment
        token_id, sampling = _token(stream.seed, index, self._vocabulary), assignment.sampling
        stream.next_index += 1
        if sampling.HasField("logprobs"):
            out.tokens.logprobs.add(entry=len(out.tokens.handles), logprob=-1.0)
        out.tokens.handles.append(assignment.handle)
        out.tokens.indices.append(index)
        out.tokens.token_ids.append(token_id)
        if token_id in sampling.stop_token_ids and index >= sampling.min_tokens:
            self._end(stream, wire.END_REASON_STOP, out.others.append)
        elif stream.next_index >= sampling.max_tokens:
            self._end(stream, wire.END_REASON_LENGTH, out.others.append)
        elif assignment.role == wire.ROLE_PREFILL:
            self._end(stream, wire.END_REASON_HANDED_OVER, out.others.append)

    def _end(
        self, stream: _Stream, reason: "wire.EndReason.ValueType", say: Callable[[wire.WorkerMessage], None]
    ) -> None:
        id = stream.assignment.id
        del self._streams[_key(id)]
        say(wire.WorkerMessage(ending=wire.Ending(id=id, reason=reason, num_tokens=stream.next_index)))
        self._look_around()

    def _look_around(self) -> None:
        """Something is gone, or came to be wanted: who has reserved this worker may have it to itself now."""
        reservation = self._reservation
        if self._draining and not self._streams:
            self.drained.set()
        alone = all(reservation.admits(stream.link) for stream in self._streams.values())
        if reservation.token and not reservation.cleared and alone:
            reservation.clear(reservation.token)
            self._beat()

    def heartbeat(self) -> wire.WorkerHeartbeat:
        now = asyncio.get_running_loop().time()
        held = min(self._total_blocks, sum(map(_num_blocks, self._streams.values())))
        waiting = [each for each in self._streams.values() if each.computed_at > now]
        return wire.WorkerHeartbeat(
            blocks=wire.BlockCounts(total=self._total_blocks, free=self._total_blocks - held, held=held),
            running_requests=len(self._streams) - len(waiting),
            waiting_requests=len(waiting),
            waiting_prefill_tokens=sum(count(each.assignment.token_ids) for each in waiting),
            draining=self._draining,
            reservation=self._reservation.token,
            reservation_cleared=self._reservation.cleared,
            reservation_wanted=self._reservation.wanted,
            prefill_tokens_per_s=self._pace.prefill_tokens_per_s,
            step_s=self._pace.step_s,
        )

    def _beat(self) -> None:
        self.say_to_all(wire.WorkerMessage(heartbeat=self.heartbeat()))

    # What coordinators say

    def on_assignment(self, link: Link, assignment: wire.Assignment) -> None:
        key, reserved = _key(assignment.id), not self._reservation.admits(link)
        if self._draining or reserved or key in self._streams:
            reason = (
                "this worker is draining" if self._draining
                else "another coordinator has this worker to itself" if reserved
                else "this attempt is here already"
            )  # fmt: skip
            self._refuse(link, assignment, reason, reserved)
            return
        try:
            tokens = unpack(assignment.token_ids)
        except PeerError as error:
            self._refuse(link, assignment, str(error))
            return
        now = asyncio.get_running_loop().time()
        computed_at = now + self._pace.prefill_s(len(tokens))
        if not assignment.HasField("prefill"):  # computed here, behind the prompts before it
            computed_at += max(0.0, self._prefill_until - now)
            self._prefill_until = computed_at
        prompt = tokens[: assignment.num_prompt_tokens]
        first = len(tokens) - len(prompt)
        ends_at = now + (assignment.deadline_s or float("inf"))
        self._streams[key] = _Stream(link, assignment, _seed(prompt), first, computed_at, ends_at)
        self._has_work.set()

    def _refuse(self, link: Link, assignment: wire.Assignment, reason: str, reserved: bool = False) -> None:
        refusal = wire.Admission(
            id=assignment.id, accepted=False, reason=reason, draining=self._draining, reserved=reserved
        )
        link.send(wire.WorkerMessage(admission=refusal))

    def on_abort(self, link: Link, id: wire.AttemptId) -> None:
        stream = self._streams.get(_key(id))
        if stream is not None and stream.link is link:
            self._end(stream, wire.END_REASON_ABORTED, link.send)

    def on_lost(self, link: Link) -> None:
        self._reservation.lost(link)
        for stream in [each for each in self._streams.values() if each.link is link]:
            self._end(stream, wire.END_REASON_ABORTED, lambda message: None)

    def on_drain(self) -> None:
        self._draining = True
        self._beat()
        self._look_around()

    def on_reserve(self, link: Link, token: int) -> None:
        self._reservation.reserve(link, token)
        self._beat()
        self._look_around()

    def on_unreserve(self, link: Link, token: int) -> None:
        self._reservation.unreserve(link, token)
        self._beat()

    def on_adopt(self, link: Link, adopt: wire.Adopt) -> None:
        """It reports no orphans, so this is of somebody's imagination."""
        refusal = wire.Admission(id=adopt.id, accepted=False, reason="fake workers keep nothing")
        link.send(wire.WorkerMessage(admission=refusal))

    def on_linked(self, link: Link) -> None:
        """It has nothing to tell."""

    def on_kv_wanted(self, link: KvLink) -> None:
        """It has no caches, and no snapshot says the same."""

    def on_pin(self, link: Link, pin: wire.Pin) -> None:
        """It has no tiers."""

    def on_unpin(self, link: Link, id: str) -> None:
        """It has no tiers."""

    def on_claim(self, link: Link, claim: wire.Claim) -> None:
        """What another coordinator gave it stays that one's: it reports no orphans."""

    def on_cached_tokens(self, cached: wire.CachedTokens) -> None:
        """For orphans only."""


def _num_blocks(stream: _Stream) -> int:
    return (stream.assignment.num_prompt_tokens + stream.next_index) // PAGE_SIZE + 1
