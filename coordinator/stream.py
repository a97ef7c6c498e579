"""One stream of tokens: one choice of a request, through every attempt at it.

A pure class. The two workers of an attempt may both report a token (the first one comes straight from prefill and
again from decode), an abandoned attempt may still be talking, and a message may be late, repeated or lost. What is
delivered is each index once, in order, and never two different tokens for one index.
"""

from collections.abc import Callable, Collection
from enum import Enum

from baton.v1 import worker_link_pb2 as wire


class Outcome(Enum):
    """What the owner of a stream has to do after an event."""

    DELIVERED = "delivered"
    """A new token: show it."""
    STOP = "stop"
    """As DELIVERED if the event was a token, and the stream is complete: a stop token, or the worker says so."""
    LENGTH = "length"
    """The same, because max_tokens or the context length is reached."""
    IGNORED = "ignored"
    """A repetition, or something of an attempt that is over."""
    DIVERGED = "diverged"
    """Another token for an index that the client already has: abandon the attempt."""
    GAP = "gap"
    """A token is missing before this one: abandon the attempt."""
    FAILED = "failed"
    """The attempt cannot go on: abandon it."""


DELIVERED, IGNORED = Outcome.DELIVERED, Outcome.IGNORED
"""What most tokens come to. Where each of them passes: to find a member in its enum takes ten times as long."""
ABANDON = frozenset({Outcome.DIVERGED, Outcome.GAP, Outcome.FAILED})
COMPLETE = frozenset({Outcome.STOP, Outcome.LENGTH})


class TokenStream:
    """Tokens delivered so far and the attempt that may add to them.

    `max_tokens`, `min_tokens` and `stop_token_ids` are those of the whole stream, as the workers get them.
    """

    __slots__ = ("_tokens", "ahead", "attempt", "closed", "max_tokens", "min_tokens", "skip", "stop_token_ids")

    def __init__(self, max_tokens: int, min_tokens: int = 0, stop_token_ids: Collection[int] = ()) -> None:
        self.max_tokens = max_tokens
        self.min_tokens = min_tokens
        self.stop_token_ids = frozenset(stop_token_ids)
        self._tokens: list[int] = []
        self.ahead: Callable[[], None] | None = None
        """Of the fast path: extends them by those that it took since it was last asked."""
        self.attempt = 0
        self.skip = 0
        """Numbers that the next attempt leaves out, because a coordinator that had the stream before may use them."""
        self.closed = False

    @property
    def tokens(self) -> list[int]:
        """Delivered."""
        if self.ahead is not None:
            self.ahead()
        return self._tokens

    def extend(self, token_ids: Collection[int]) -> None:
        """By what the fast path took."""
        self._tokens.extend(token_ids)

    def begin_attempt(self) -> int:
        """Number of the new attempt, from 1. Nothing of an earlier one is accepted any more."""
        self.attempt += 1 + self.skip
        self.skip = 0
        return self.attempt

    def close(self) -> None:
        """The stream is over, for whatever reason. Nothing is accepted any more."""
        self.closed = True

    def awaits(self, attempt: int, index: int) -> bool:
        """Whatever token a worker reports there, it will be accepted."""
        return attempt == self.attempt and not self.closed and index == len(self.tokens)

    def accept(self, attempt: int, index: int, token_id: int) -> Outcome:
        """A worker reports `token_id` at position `index` of the stream."""
        if attempt != self.attempt or self.closed:
            return IGNORED
        tokens = self.tokens
        expected = len(tokens)
        if index == expected:
            tokens.append(token_id)
            if token_id in self.stop_token_ids and expected >= self.min_tokens:
                self.closed = True
                return Outcome.STOP
            if expected + 1 >= self.max_tokens:
                self.closed = True
                return Outcome.LENGTH
            return DELIVERED
        if index < expected:
            return IGNORED if tokens[index] == token_id else Outcome.DIVERGED
        return Outcome.GAP

    def ended(self, attempt: int, decode: bool, reason: "wire.EndReason.ValueType", num_tokens: int) -> Outcome:
        """A worker's part of an attempt is over, after `num_tokens` tokens of the stream.

        A prefill worker that fails is no reason to start again: its decode worker notices and prefills by itself.
        """
        if attempt != self.attempt or self.closed:
            return Outcome.IGNORED
        if reason in (wire.END_REASON_STOP, wire.END_REASON_LENGTH) and num_tokens == len(self.tokens):
            self.closed = True
            return Outcome.STOP if reason == wire.END_REASON_STOP else Outcome.LENGTH
        return Outcome.FAILED if decode else Outcome.IGNORED

    def refused(self, attempt: int) -> Outcome:
        """A worker did not admit its part. The other one would wait for it, so the attempt is over."""
        return Outcome.IGNORED if attempt != self.attempt or self.closed else Outcome.FAILED

    def worker_lost(self, attempt: int, decode: bool) -> Outcome:
        """A worker of the attempt is gone. Only the decode worker cannot be done without."""
        if attempt != self.attempt or self.closed or not decode:
            return Outcome.IGNORED
        return Outcome.FAILED
