"""One client for every OpenAI-compatible gateway: so many streams at once, each asking again when it has ended.

It reads as little of the answers as it can (events are counted, not parsed): it shares the cores with what it measures.
"""

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import uvloop

REQUEST_TIMEOUT_S = 60.0
NUMBER = "00000000"
"""In the text of a body: another number each time, so that no two requests are equal."""
_END_OF_CHUNKS = b"0\r\n\r\n"


@dataclass
class Load:
    """What `num_streams` clients saw in `seconds`, counted once the first requests of all of them were through."""

    num_streams: int
    seconds: float = 0.0
    cpu_s: float = 0.0
    """Of the gateway in that time."""
    num_requests: int = 0
    """Answers that ended in that time."""
    num_events: int = 0
    events_of_these: int = 0
    """Of the answers that ended, those before that time included."""
    first_event_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    """Between two reads that brought something, within a stream."""

    @property
    def events_each(self) -> float:
        """Of a whole answer."""
        return self.events_of_these / self.num_requests

    @property
    def num_answers(self) -> float:
        """That came in that time, the parts of those that are cut at its ends included."""
        return self.num_events / self.events_each


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


class _Client(asyncio.Protocol):
    """One connection, kept alive, and one request after the other on it."""

    def __init__(self, run: "_Run", requests: Iterator[bytes]) -> None:
        self._run = run
        self._requests = requests
        self._transport: asyncio.Transport | None = None
        self._sent_at = self._last_at = 0.0
        self._tail = b""
        self._started = False
        self._num_events = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its class
        self._send()

    def _send(self) -> None:
        assert self._transport is not None
        request = next(self._requests)
        self._started, self._tail, self._num_events = False, b"", 0
        self._sent_at = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        now, load = time.perf_counter(), self._run.load
        text = self._tail + data
        events = text.count(b"data: {")
        self._tail = text[-6:]  # shorter than what is counted, longer than what ends an answer
        if not self._started:
            if len(text) >= 12 and not text.startswith(b"HTTP/1.1 200"):
                self._run.failed(text[:300])
                return
            if not events:
                self._tail = text  # headers alone
                return
            self._started = True
            if self._run.counting:
                load.first_event_s.append(now - self._sent_at)
        elif events and self._run.counting:
            load.gaps_s.append(now - self._last_at)
        self._num_events += events
        if events:
            self._last_at = now
            if b'data: {"error"' in text:
                self._run.failed(text[:300])
        if self._run.counting:
            load.num_events += events
        if text.endswith(_END_OF_CHUNKS):
            self._run.ended(self, self._num_events)
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._run.over:
            self._run.failed(b"nothing more: the connection was closed")


class _Run:
    def __init__(self, num_streams: int) -> None:
        self.load = Load(num_streams)
        self.counting = self.over = False
        self.warm, self.stopped = asyncio.Event(), asyncio.Event()
        self._warm: set[_Client] = set()
        self._trouble: RuntimeError | None = None

    def ended(self, client: _Client, num_events: int) -> None:
        if self.counting:
            self.load.num_requests += 1
            self.load.events_of_these += num_events
        elif not self.warm.is_set():
            self._warm.add(client)
            if len(self._warm) == self.load.num_streams:
                self.warm.set()

    def failed(self, answer: bytes) -> None:
        self._trouble = self._trouble or RuntimeError(f"the gateway answered {answer!r}")
        self.warm.set()
        self.stopped.set()

    def check(self) -> None:
        if self._trouble is not None:
            raise self._trouble


async def _connect(run: _Run, host: str, port: int, requests: Iterator[bytes]) -> list[asyncio.BaseTransport]:
    loop = asyncio.get_running_loop()
    connecting = (
        loop.create_connection(lambda: _Client(run, requests), host, port) for _ in range(run.load.num_streams)
    )
    return [(await each)[0] for each in connecting]


async def _measure(
    host: str, port: int, requests: Iterator[bytes], num_streams: int, seconds: float, cpu_s: Callable[[], float]
) -> Load:
    run = _Run(num_streams)
    transports = await _connect(run, host, port, requests)
    try:
        try:
            await asyncio.wait_for(run.warm.wait(), REQUEST_TIMEOUT_S)
        except TimeoutError:
            raise RuntimeError(f"not every stream ended once within {REQUEST_TIMEOUT_S:g} s") from None
        run.counting = True
        started_at, cpu_at = time.perf_counter(), cpu_s()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(run.stopped.wait(), seconds)
        run.load.seconds, run.load.cpu_s = time.perf_counter() - started_at, cpu_s() - cpu_at
        run.check()
        return run.load
    finally:
        run.over = True
        for transport in transports:
            cast(asyncio.Transport, transport).abort()


def measure(
    host: str, port: int, bodies: Sequence[dict[str, Any]], num_streams: int, seconds: float,
    cpu_s: Callable[[], float] = lambda: 0.0,
) -> Load:  # fmt: skip
    """`bodies` are asked in turn. `cpu_s`: what the gateway has used so far.

    Raises RuntimeError when it refuses, hangs up or hangs.
    """
    return uvloop.run(_measure(host, port, _requests(host, port, bodies), num_streams, seconds, cpu_s))


def _requests(host: str, port: int, bodies: Sequence[dict[str, Any]]) -> Iterator[bytes]:
    requests = [request_of(host, port, body) for body in bodies]
    for count in itertools.count():
        yield requests[count % len(requests)].replace(NUMBER.encode(), b"%0*d" % (len(NUMBER), count), 1)


def request_of(host: str, port: int, body: dict[str, Any]) -> bytes:
    """As it goes over a connection."""
    data = json.dumps({**body, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data
