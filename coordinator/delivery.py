"""A request and its choices on the way to the client: what has arrived, what has not been taken yet, how it ended.

Workers' tokens come in on the link, are detokenised at once (so a stop string ends the work even when the client
reads slowly) and wait here, merged into one delta a choice, until the front end takes them. What waits is bounded by
max_tokens. The front end is woken once for all tokens that a step brought.
"""

import asyncio
import time
from dataclasses import dataclass, field

from baton.v1 import worker_link_pb2 as wire
from coordinator.detokenizer import TextStream
from coordinator.failures import RequestFailed
from coordinator.stream import TokenStream

STOP, LENGTH, ABORTED = "stop", "length", "abort"
_MISSING_LOGPROB = -9999.0  # as OpenAI writes a logprob too small to matter; JSON has no infinity


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]
    """(token id, logprob), likeliest first."""
    text_offset: int
    """Characters of the choice's text before this token."""


@dataclass(slots=True)
class Delta:
    """What one choice gained since the last delta."""

    choice: int
    prompt_index: int
    first_index: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None


class Choice:
    """One stream of a request: its prompt, its tokens and text so far."""

    __slots__ = (
        "_delta",
        "avoid",
        "begun_by",
        "cached_tokens",
        "failures",
        "finish_reason",
        "homeless_since_s",
        "last_token_s",
        "number",
        "prompt",
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
        prompt: list[int],
        sampling: wire.EngineSampling,
        text: TextStream,
        show_stop_token: bool,
    ) -> None:
        self.request = request
        self.number = len(request.choices)
        self.prompt_index = prompt_index
        self.prompt = prompt
        self.sampling = sampling
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
        self._delta: Delta | None = None
        request.choices.append(self)

    def add(self, token_id: int, logprob: wire.StepLogprob | None, is_stop_token: bool) -> bool:
        """Append a delivered token. True if a stop string is complete now."""
        delta = self._pending(len(self.stream.tokens) - 1)
        delta.token_ids.append(token_id)
        if self.sampling.HasField("logprobs"):
            delta.logprobs.append(_token_logprob(token_id, logprob, self.text.length))
        if not is_stop_token or self.show_stop_token:
            delta.text += self.text.push(token_id)
        return self.text.stopped

    def end(self, reason: str) -> None:
        """The choice is complete; idempotent."""
        if self.finish_reason is not None:
            return
        self.finish_reason = reason
        self.stream.close()
        delta = self._pending(len(self.stream.tokens))
        if not self.text.stopped:
            delta.text += self.text.finish()
        delta.finish_reason = reason

    def _pending(self, index: int) -> Delta:
        """The delta that waits to be taken; a new one begins at `index`."""
        if self._delta is None:
            self._delta = Delta(self.number, self.prompt_index, index)
            self.request.touch(self)
        return self._delta

    def take(self) -> Delta:
        delta, self._delta = self._delta, None
        assert delta is not None
        return delta


def _token_logprob(token_id: int, entry: wire.StepLogprob | None, text_offset: int) -> TokenLogprob:
    if entry is None:
        return TokenLogprob(token_id, _MISSING_LOGPROB, (), text_offset)
    pairs = zip(entry.alternative_ids, entry.alternative_logprobs, strict=False)
    alternatives = tuple((id, _finite(logprob)) for id, logprob in pairs)
    return TokenLogprob(token_id, _finite(entry.logprob), alternatives, text_offset)


def _finite(logprob: float) -> float:
    return logprob if logprob > _MISSING_LOGPROB else _MISSING_LOGPROB


@dataclass(frozen=True, slots=True)
class UsageCounts:
    """Tokens the client sent and got."""

    prompt: int
    completion: int
    cached_prompt: int


class Request:
    """All choices of one client's call. The dispatcher ends it; the front end reads it."""

    def __init__(self, id: str, cache_salt: str = "") -> None:
        self.id = id
        self.cache_salt = cache_salt
        self.created_unix_s = int(time.time())
        self.started_s = time.monotonic()
        self.first_token_s: float | None = None
        self.choices: list[Choice] = []
        self.prompt_tokens = 0
        self.failure: RequestFailed | None = None
        self.ended = False
        self.deadline: asyncio.TimerHandle | None = None
        self._dirty: list[Choice] = []
        self._waiter: asyncio.Future[None] | None = None

    @property
    def drained(self) -> bool:
        """It ended and everything has been taken."""
        return self.ended and not self._dirty

    def touch(self, choice: Choice) -> None:
        """`choice` has a delta waiting."""
        self._dirty.append(choice)
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def deltas(self) -> list[Delta]:
        """Waits for what is new, at most one delta a choice; [] when the request is complete.

        Raises RequestFailed, after everything that was delivered has been taken. The wait ends at the request's
        deadline at the latest, because the dispatcher then ends the request.
        """
        while not self._dirty:
            if self.failure is not None:
                raise self.failure
            if self.ended:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        dirty, self._dirty = self._dirty, []
        return [choice.take() for choice in dirty]

    def usage(self) -> UsageCounts:
        cached: dict[int, int] = {}
        for choice in self.choices:
            cached[choice.prompt_index] = max(cached.get(choice.prompt_index, 0), choice.cached_tokens)
        completion = sum(len(choice.stream.tokens) for choice in self.choices)
        return UsageCounts(self.prompt_tokens, completion, sum(cached.values()))
