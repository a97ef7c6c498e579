"""A request and its choices on the way to the client: what has arrived, what has not been taken yet, how it ended.

Workers' tokens come in on the link, are detokenised at once (so a stop string ends the work even when the client
reads slowly) and wait here until the front end takes them, as one delta a choice. All of them are kept until the
request is forgotten, so that a client whose connection broke can go on from any place; what that takes is bounded by
max_tokens. The front end is woken once for all tokens that a step brought.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import xxhash

from baton.token_ids import pack, unpack
from baton.v1 import worker_link_pb2 as wire
from coordinator.detokenizer import TextStream
from coordinator.failures import FailureKind, RequestFailed, moved
from coordinator.stream import TokenStream
from coordinator.tenants.caller import ANYBODY, Caller
from coordinator.version_metrics import Figures

if TYPE_CHECKING:
    from coordinator.fast_path import FastPath
    from coordinator.timelines import Timeline

STOP, LENGTH, ABORTED, CONTENT_FILTER = "stop", "length", "abort", "content_filter"
_MISSING_LOGPROB = -9999.0  # as OpenAI writes a logprob too small to matter; JSON has no infinity


class TokenLogprob(msgspec.Struct, frozen=True):
    token_id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]
    """(token id, logprob), likeliest first."""
    text_offset: int
    """Characters of the choice's text before this token."""


class Position(NamedTuple):
    """What a client has of one choice."""

    num_tokens: int = 0
    ended: bool = False
    """Its finish reason, too."""
    digest: str = ""
    """xxh32 of the tokens (`baton.token_ids`): says which they are, when they are computed once more."""


class AnswerForm(msgspec.Struct, frozen=True):
    """What a client asked of its answer beyond the tokens."""

    chat: bool = False
    include_usage: bool = False
    keep_special_tokens: bool = False
    stop: tuple[str, ...] = ()
    choices_per_prompt: int = 1
    continuous_usage: bool = False
    """In every event what was used so far, not only in the last one."""


_PLAIN = AnswerForm()


class Urgency(msgspec.Struct, frozen=True):
    """How soon a client needs its answer: see `coordinator.admission`."""

    service_class: str = ""
    """Empty: the one of requests that name none."""
    max_ttft_s: float | None = None
    """Without a first token by then the client wants nothing."""
    deadline_s: float | None = None
    """Nor without the whole answer by then."""


class Delta(msgspec.Struct):
    """What one choice gained since the last delta."""

    choice: int
    prompt_index: int
    first_index: int
    token_ids: list[int] = []
    text: str = ""
    logprobs: list[TokenLogprob] = []
    finish_reason: str | None = None
    digest: str = ""
    """See `Position`."""


class Choice:
    """One stream of a request: its prompt, its tokens and text so far."""

    __slots__ = (
        "_claimed",
        "_dirty",
        "_gives_logprobs",
        "_logprobs",
        "_muted",
        "_num_unwritten",
        "_taken",
        "avoid",
        "begun_by",
        "cached_tokens",
        "digest",
        "failures",
        "fast_path",
        "finish_reason",
        "homeless_since_s",
        "last_token_s",
        "num_prompt_tokens",
        "number",
        "packed_prompt",
        "pieces",
        "prompt_index",
        "request",
        "sampling",
        "show_stop_token",
        "stream",
        "stream_id",
        "text",
    )  # fmt: skip

    def __init__(
        self,
        request: "Request",
        prompt_index: int,
        prompt: Sequence[int],
        sampling: wire.EngineSampling,
        text: TextStream,
        show_stop_token: bool,
    ) -> None:
        self.request = request
        self.number = len(request.choices)
        self.prompt_index = prompt_index
        self.num_prompt_tokens = len(prompt)
        self.packed_prompt = pack(prompt)
        """As a list it would take ten times the memory, and as many of the processor's caches."""
        self.sampling = sampling
        self._gives_logprobs = sampling.HasField("logprobs")
        self.stream = TokenStream(sampling.max_tokens, sampling.min_tokens, sampling.stop_token_ids)
        self.stream_id = f"{request.id}-{self.number}"
        self.text = text
        self.show_stop_token = show_stop_token
        self.avoid: set[str] = set()
        self.failures = 0
        """Attempts that living workers failed."""
        self.cached_tokens = 0
        self.begun_by: wire.Registration | None = None
        """The worker that began the stream; another model must not continue it."""
        self.homeless_since_s: float | None = None
        """No worker has been there since that could go on with it."""
        self.last_token_s: float | None = None
        self.finish_reason: str | None = None
        self.pieces: list[str] = []
        """Of the text: what each token lets show, and then what the end does. A function of the tokens alone."""
        self._num_unwritten = 0
        """Of these, so many at the beginning were the fast path's, or came before: only who goes back needs them."""
        self._logprobs: list[TokenLogprob] = []
        self._taken = 0
        """Tokens that the client has."""
        self.digest = xxhash.xxh32()
        """Of these."""
        self._claimed: Position | None = None
        """What a client that came back says it has; until it is known to be right it gets nothing."""
        self._dirty = False
        self._muted = False
        """The client knows how it ended."""
        self.fast_path: FastPath | None = None
        """Of its reader's connection, if it goes there."""
        request.choices.append(self)

    @property
    def prompt(self) -> list[int]:
        return unpack(self.packed_prompt)

    def packed(self) -> bytes:
        """The prompt and what was delivered (`baton.token_ids`)."""
        tokens = self.stream.tokens
        return self.packed_prompt + pack(tokens) if tokens else self.packed_prompt

    def add(self, token_id: int, logprob: wire.StepLogprob | None, is_stop_token: bool) -> bool:
        """Append a delivered token. True if a stop string is complete now."""
        if self._gives_logprobs:
            self._logprobs.append(_token_logprob(token_id, logprob, self.text.length))
        self.pieces.append(self.text.push(token_id) if not is_stop_token or self.show_stop_token else "")
        if len(self.pieces) > self._taken:  # else a client is here that had more before its coordinator died
            self._touch()
        return self.text.stopped

    @property
    def plain(self) -> bool:
        """Its tokens need nothing but their texts."""
        return not self._gives_logprobs and not self.text.has_stops and self.text.byte_level

    @property
    def all_taken(self) -> bool:
        """Its reader has all that there is, and it is known to be right."""
        return not self._dirty and self._claimed is None and self._taken == len(self.stream.tokens)

    def took(self, token_ids: Sequence[int], last_token_s: float) -> None:
        """The fast path gave its reader these, and the last of them then."""
        self.stream.extend(token_ids)
        self.pieces += [""] * len(token_ids)
        self._num_unwritten = len(self.pieces)
        self.digest.update(pack(token_ids))
        self._taken += len(token_ids)
        self.last_token_s = last_token_s
        if self.request.figures is not None:
            self.request.figures.fast_path_tokens += len(token_ids)

    def settle(self) -> None:
        """Before anything but the next token: the fast path takes no more of them."""
        if self.fast_path is not None:
            self.fast_path.leave()

    def end(self, reason: str) -> None:
        """The choice is complete; idempotent."""
        if self.finish_reason is not None:
            return
        self.settle()
        self.finish_reason = reason
        self.stream.close()
        if not self.text.stopped:
            self.pieces.append(self.text.finish())
        self._touch()

    def _touch(self) -> None:
        if not self._dirty and (self._claimed is not None or not self._muted):
            self._dirty = True
            self.request.touch(self)

    def take(self) -> Delta | None:
        """What came since the last time; None if the client knows that already.

        Raises RequestFailed where the client has other tokens than these, which were computed once more.
        """
        self._dirty = False
        first, tokens = self._taken, self.stream.tokens
        if self._claimed is not None:
            self._check(self._claimed)
            self._claimed = None
        if self._muted:
            return None
        new, self._taken = tokens[first:], max(first, len(tokens))
        self.digest.update(pack(new))
        pieces = self.pieces
        # Most have one token; slices are made of three objects.
        text = pieces[first] if len(pieces) == first + 1 else "".join(pieces[first:])
        logprobs = self._logprobs[first:] if self._gives_logprobs else []
        digest = self.digest.hexdigest()
        return Delta(self.number, self.prompt_index, first, new, text, logprobs, self.finish_reason, digest)

    def _check(self, claimed: Position) -> None:
        tokens = self.stream.tokens[: claimed.num_tokens]
        self.digest.update(pack(tokens))
        ended = self.finish_reason is not None and len(self.stream.tokens) == claimed.num_tokens
        check_claim(claimed, len(tokens), self.digest.hexdigest(), ended)

    def rewind(self, position: Position) -> None:
        """The client goes on from there."""
        self.settle()
        self.fast_path = None
        if unwritten := self.stream.tokens[: self._num_unwritten]:
            self.pieces[: self._num_unwritten], self._num_unwritten = self.text.again(unwritten), 0
        self._dirty, self._muted, self._taken = False, position.ended, position.num_tokens
        self.digest, self._claimed = xxhash.xxh32(), position if position.num_tokens else None
        if len(self.pieces) > self._taken or self.finish_reason is not None:
            self._touch()


def check_claim(claimed: Position, num_tokens: int, digest: str, ended: bool) -> None:
    """Raise RequestFailed unless these, up to there, are what a client that came back says it has."""
    if num_tokens < claimed.num_tokens or digest != claimed.digest or (claimed.ended and not ended):
        raise RequestFailed(
            FailureKind.DIFFERS, "this request was computed again, and came out otherwise; send it again"
        )


def _token_logprob(token_id: int, entry: wire.StepLogprob | None, text_offset: int) -> TokenLogprob:
    if entry is None:
        return TokenLogprob(token_id, _MISSING_LOGPROB, (), text_offset)
    pairs = zip(entry.alternative_ids, entry.alternative_logprobs, strict=False)
    alternatives = tuple((id, _finite(logprob)) for id, logprob in pairs)
    return TokenLogprob(token_id, _finite(entry.logprob), alternatives, text_offset)


def _finite(logprob: float) -> float:
    return logprob if logprob > _MISSING_LOGPROB else _MISSING_LOGPROB


class UsageCounts(msgspec.Struct, frozen=True):
    """Tokens the client sent and got."""

    prompt: int
    completion: int
    cached_prompt: int


class Request:
    """All choices of one client's call. The dispatcher ends it; the front end reads it."""

    __slots__ = (
        "_dirty",
        "_usage",
        "_waiter",
        "adopted",
        "asked_again",
        "cache_salt",
        "caller",
        "choices",
        "created_unix_s",
        "deadline",
        "differs",
        "ended",
        "failure",
        "figures",
        "first_token_s",
        "form",
        "id",
        "moved",
        "on_news",
        "prompt_tokens",
        "reader",
        "resume_s",
        "shadow",
        "started_s",
        "timeline",
        "unfiltered",
        "unwanted",
        "urgency",
        "user",
        "version",
    )  # fmt: skip

    def __init__(self, id: str, cache_salt: str = "", form: AnswerForm = _PLAIN, resume_s: float = 0.0) -> None:
        self.id = id
        self.cache_salt = cache_salt
        self.form = form
        self.resume_s = resume_s
        """How long it is kept for a client that hung up."""
        self.user = ""
        """Whom the client names: requests of one belong together."""
        self.caller: Caller = ANYBODY
        """Whose it is."""
        self.version = ""
        """Of the model, chosen when it is admitted: all attempts at all choices are its."""
        self.moved = False
        """To a second version, as nothing was delivered yet and the first one was gone."""
        self.adopted = False
        """Another coordinator began it, and may have delivered more than is known here."""
        self.urgency = Urgency()
        self.asked_again = False
        """Its client has some of the answer; nobody knew the request any more."""
        self.shadow = False
        """A copy that nobody reads: see `coordinator.shadows`."""
        self.figures: Figures | None = None
        """Where its times are counted."""
        self.timeline: Timeline | None = None
        """What became of it when; from its admission on."""
        self.created_unix_s = int(time.time())
        self.started_s = time.monotonic()
        self.first_token_s: float | None = None
        self.choices: list[Choice] = []
        self.prompt_tokens = 0
        self.failure: RequestFailed | None = None
        self.ended = False
        self.deadline: asyncio.TimerHandle | None = None
        self.reader = 0
        """Number of the client that has it now: of two, the one that came later."""
        self.differs = False
        """From what its client has."""
        self.unwanted = False
        """Aborted, be it when its workers had finished."""
        self.unfiltered = 0
        """Choices whose text has not passed its filters to the end."""
        self.on_news: Callable[[], None] | None = None
        """Called whenever there may be something to take: of the latest reader, if it is a stream of events."""
        self._dirty: list[Choice] = []
        self._usage: UsageCounts | None = None
        """Once it has ended."""
        self._waiter: asyncio.Future[None] | None = None

    @property
    def drained(self) -> bool:
        """It ended and everything has been taken."""
        return self.ended and not self._dirty and (not self.unfiltered or self.failure is not None)

    def touch(self, choice: Choice) -> None:
        """`choice` has a delta waiting."""
        self._dirty.append(choice)
        self.wake()

    def wake(self) -> None:
        if (on_news := self.on_news) is not None:
            on_news()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def attach(self, positions: Sequence[Position] = ()) -> int:
        """The number of a new reader that goes on from `positions`, by choice; one before it is done."""
        self.reader += 1
        self._dirty = []
        for choice in self.choices:
            choice.rewind(positions[choice.number] if choice.number < len(positions) else Position())
        self.wake()
        return self.reader

    def listen(self, reader: int, on_news: Callable[[], None]) -> None:
        """Have it called from now on. Raises RequestFailed for a reader that is not the latest."""
        self._check_latest(reader)
        self.on_news = on_news

    def _check_latest(self, reader: int) -> None:
        if reader != self.reader:
            raise moved()

    async def deltas(self, reader: int = 0) -> list[Delta]:
        """Waits for what is new, at most one delta a choice; [] when the request is complete.

        Raises RequestFailed, after everything that was delivered has been taken, for a reader that is not the latest,
        and where what its client has turns out to be other tokens. The wait ends at the request's deadline at the
        latest, because the dispatcher then ends the request.
        """
        while True:
            if found := self.take(reader):
                return found
            if self.failure is not None:
                raise self.failure
            if self.ended and not self.unfiltered:
                return []
            waiter = self._waiter = asyncio.get_running_loop().create_future()
            try:
                await waiter
            finally:
                if self._waiter is waiter:  # else it is that of a reader that came meanwhile
                    self._waiter = None

    def take(self, reader: int) -> list[Delta]:
        """What is new now, at most one delta a choice.

        Raises RequestFailed for a reader that is not the latest, and where what its client has turns out to be other
        tokens.
        """
        self._check_latest(reader)
        dirty, self._dirty = self._dirty, []
        try:
            return [delta for choice in dirty if (delta := choice.take()) is not None]
        except RequestFailed:
            self.differs = True
            raise

    async def news(self, reader: int, timeout_s: float | None) -> list[Delta] | None:
        """As `deltas`; None when there was nothing for so long."""
        if timeout_s is None:
            return await self.deltas(reader)
        try:
            async with asyncio.timeout(timeout_s):
                return await self.deltas(reader)
        except TimeoutError:
            return None

    def forget(self) -> None:
        """Nobody reads it, or goes on with it, any more.

        It and its choices know each other: apart, both go at once, and the collector of garbage has nothing to find.
        """
        self.usage()
        self.choices, self._dirty = [], []

    def usage(self) -> UsageCounts:
        if self._usage is not None:
            return self._usage
        cached: dict[int, int] = {}
        for choice in self.choices:
            cached[choice.prompt_index] = max(cached.get(choice.prompt_index, 0), choice.cached_tokens)
        counts = UsageCounts(self.prompt_tokens, self.output_tokens, sum(cached.values()))
        if self.ended:
            self._usage = counts
        return counts

    def facts(self) -> dict[str, str | int | float | None]:
        """For logs: what can be said of it without a word of its text."""
        usage, first_s = self.usage(), self.first_token_s
        trace = self.timeline.trace if self.timeline is not None else None
        return {
            "trace_id": None if trace is None else f"{trace.trace_id:032x}",
            "request_id": self.id, "tenant": self.caller.tenant, "model_version": self.version,
            "first_token_s": None if first_s is None else round(first_s - self.started_s, 6),
            "prompt_tokens": usage.prompt, "cached_tokens": usage.cached_prompt, "completion_tokens": usage.completion,
        }  # fmt: skip

    @property
    def output_tokens(self) -> int:
        return sum(len(choice.stream.tokens) for choice in self.choices)
