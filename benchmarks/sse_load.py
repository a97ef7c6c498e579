"""One client for every OpenAI-compatible gateway: so many streams at once, each asking again when it has ended.

It reads as little of the answers as it can (events are counted, not parsed): it shares the cores with what it measures.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import uvloop

REQUEST_TIMEOUT_S = 60.0
_END_OF_CHUNKS = b"0\r\n\r\n"


@dataclass
class Load:
    """What `num_streams` clients saw in `seconds`, counted once the first requests of all of them were through."""

    num_streams: int
    seconds: float = 0.0
    num_requests: int = 0
    num_events: int = 0
    num_failed: int = 0
    first_event_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    """Between two reads that brought something, within a stream."""


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


class _Client(asyncio.Protocol):
    """One connection, kept alive, and one request after the other on it."""

    def __init__(self, load: "_Run", request: bytes) -> None:
        self._run = load
        self._request = request
        self._transport: asyncio.Transport | None = None
        self._sent_at = self._last_at = 0.0
        self._tail = b""
        self._started = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its class
        self._send()

    def _send(self) -> None:
        assert self._transport is not None
        self._started, self._tail = False, b""
        self._sent_at = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now, load = time.perf_counter(), self._run.load
        text = self._tail + data
        events = text.count(b"data: {")
        self._tail = text[-6:] if not text.endswith(_END_OF_CHUNKS) else text[-5:]
        if not self._started:
            if b"HTTP/1.1 200" not in text:
                load.num_failed += 1
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
        if events:
            self._last_at = now
        if self._run.counting:
            load.num_events += events
        if text.endswith(_END_OF_CHUNKS):
            self._run.ended(self)
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._run.over:
            self._run.load.num_failed += 1
            self._run.failed(b"the connection was closed")


class _Run:
    def __init__(self, num_streams: int) -> None:
        self.load = Load(num_streams)
        self.counting = self.over = False
        self._warm: set[_Client] = set()
        self.warm = asyncio.Event()
        self.trouble: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def ended(self, client: _Client) -> None:
        if self.counting:
            self.load.num_requests += 1
        elif not self.warm.is_set():
            self._warm.add(client)
            if len(self._warm) == self.load.num_streams:
                self.warm.set()

    def failed(self, answer: bytes) -> None:
        if not self.trouble.done():
            self.trouble.set_exception(RuntimeError(f"the gateway answered {answer!r}"))


async def _measure(host: str, port: int, requests: Sequence[bytes], num_streams: int, seconds: float) -> Load:
    loop, run = asyncio.get_running_loop(), _Run(num_streams)
    transports = []
    try:
        for number in range(num_streams):
            request = requests[number % len(requests)]
            transport, _ = await loop.create_connection(lambda request=request: _Client(run, request), host, port)
            transports.append(transport)
        warm = asyncio.create_task(run.warm.wait())
        await asyncio.wait({warm, run.trouble}, timeout=REQUEST_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if not warm.done() and not run.trouble.done():
            warm.cancel()
            raise RuntimeError(f"not every stream ended once within {REQUEST_TIMEOUT_S:g} s")
        run.counting = True
        started_at = time.perf_counter()
        await asyncio.wait({run.trouble}, timeout=seconds)
        run.load.seconds = time.perf_counter() - started_at
        if run.trouble.done():
            run.trouble.result()
        return run.load
    finally:
        run.over = True
        for transport in transports:
            transport.abort()


def measure(host: str, port: int, bodies: Sequence[dict[str, object]], num_streams: int, seconds: float) -> Load:
    """Raises RuntimeError when the gateway refuses, hangs up or hangs."""
    requests = [_http(host, port, body) for body in bodies]
    return uvloop.run(_measure(host, port, requests, num_streams, seconds))


def _http(host: str, port: int, body: dict[str, object]) -> bytes:
    data = json.dumps({**body, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data
