"""Shadow traffic: copies of clients' requests that run at a version which serves nobody, to be compared with it.

1. When a client's request has been started, each version with a shadow share gets a copy of it or does not.
   The copy has the same tokens, sampling and seeds, no ticket and no reader.
2. It is nobody's concern: it has no part in admission, retries or suspicion, its first failure ends it, and its workers
   serve no client (`coordinator.rollout` sees to that). At most `max_shadows` streams of copies run. What is beyond
   them, and all of them once clients take LOAD_SHARE of the streams that may run or have to wait, is dropped and
   counted.
3. When both have ended their tokens are compared. A copy whose original failed or was aborted is aborted.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from coordinator.delivery import Choice, Request
from coordinator.dispatch import Dispatcher
from coordinator.failures import RequestFailed
from coordinator.metrics import Metrics
from coordinator.requests import new_request_id
from coordinator.rollout import Rollout

LOAD_SHARE = 0.5


@dataclass(slots=True)
class _Pair:
    client: Request
    copy: Request
    client_tokens: list[list[int]] | None = None
    """By choice, once it is complete."""


class Shadows:
    def __init__(
        self,
        dispatcher: Dispatcher,
        metrics: Metrics,
        max_shadows: int,
        max_requests: int,
        add_choices: Callable[[Request, Request], None],
    ) -> None:
        """`add_choices` gives the second request the choices of the first."""
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._max_shadows = max_shadows
        self._max_clients = max_requests * LOAD_SHARE
        self._add_choices = add_choices
        self._pairs: dict[Request, _Pair] = {}
        """By copy."""
        self._copies: dict[Request, list[_Pair]] = {}
        """By the client's request."""
        self._closed = False
        dispatcher.on_end = self._on_end

    def started(self, client: Request) -> None:
        """A client's request was started. Its copies are started in a later turn of the loop."""
        rollout = self._dispatcher.versions.rollout
        if self._closed or not rollout.shadow:
            return
        if self._overloaded:
            self._drop_all("dropped_load")
        for version in rollout.shadow:
            if version != client.version and rollout.wants_shadow(client.id, version):
                asyncio.get_running_loop().call_soon(self._start, client, version)

    def rolled_out(self, rollout: Rollout) -> None:
        """What may run has changed."""
        self._abort([pair for pair in self._pairs.values() if not rollout.shadow.get(pair.copy.version)], "useless")

    def close(self) -> None:
        """Stop all of them for good."""
        self._closed = True
        self._drop_all("useless")

    def _start(self, client: Request, version: str) -> None:
        if self._closed or client.ended:
            self._count("useless")
        elif self._overloaded:
            self._count("dropped_load")
        elif self._num_streams + len(client.choices) > self._max_shadows:
            self._count("dropped_limit")
        else:
            copy = Request(new_request_id("shadow"), client.cache_salt, client.form)
            copy.version, copy.shadow = version, True
            self._add_choices(client, copy)
            pair = self._pairs[copy] = _Pair(client, copy)
            self._copies.setdefault(client, []).append(pair)
            self._count("started")
            try:
                self._dispatcher.start(copy)
            except RequestFailed:
                self._dispatcher.end(copy, "failed")

    def _on_end(self, request: Request, outcome: str) -> None:
        if (pair := self._pairs.get(request)) is not None:
            if outcome == "completed" and pair.client_tokens is None and not pair.client.ended:
                return  # the client's goes on
            self._forget(pair)
            if outcome == "completed" and pair.client_tokens is not None:
                self._compare(pair)
            return
        pairs = list(self._copies.get(request, ()))
        for pair in pairs:
            if outcome != "completed":
                self._abort([pair], "useless")
                continue
            pair.client_tokens = [choice.stream.tokens for choice in request.choices]
            if pair.copy.ended:
                self._forget(pair)
                self._compare(pair)

    def _compare(self, pair: _Pair) -> None:
        assert pair.client_tokens is not None
        figures = self._metrics.versions.of(pair.copy.version, shadow=True)
        for tokens, choice in zip(pair.client_tokens, pair.copy.choices, strict=True):
            first = first_difference(tokens, choice)
            figures.answers["equal" if first is None else "different"] += 1
            if first is not None:
                figures.first_difference.observe(first)

    @property
    def _overloaded(self) -> bool:
        return self._dispatcher.num_streams > self._max_clients or self._dispatcher.admission.pressed

    @property
    def _num_streams(self) -> int:
        return sum(len(copy.choices) for copy in self._pairs)

    def _drop_all(self, event: str) -> None:
        self._abort(list(self._pairs.values()), event)

    def _abort(self, pairs: list[_Pair], event: str) -> None:
        for pair in pairs:
            self._forget(pair)
            self._count(event)
            self._dispatcher.abort(pair.copy)

    def _forget(self, pair: _Pair) -> None:
        del self._pairs[pair.copy]
        pairs = self._copies[pair.client]
        pairs.remove(pair)
        if not pairs:
            del self._copies[pair.client]

    def _count(self, event: str) -> None:
        self._metrics.shadows.labels(event).inc()


def first_difference(tokens: list[int], choice: Choice) -> int | None:
    """Tokens before the first that the other answer does not have; None for equal answers."""
    own = choice.stream.tokens
    if own == tokens:
        return None
    pairs = enumerate(zip(own, tokens, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(own), len(tokens)))
