"""`benchmarks.sse_load`: what it counts of answers that its time cuts."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.sse_load import measure

EVENTS = 8
EVENT = b'data: {"choices":[]}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@contextmanager
def gateway(counting: threading.Event, *lengths: int) -> Iterator[int]:
    """Its port. It answers so many events to each request of a connection, all but the first once `counting` is set,
    and ends those answers that have all of them."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number, num_events in enumerate(lengths):
            await reader.readuntil(b"}")
            if number:
                await asyncio.to_thread(counting.wait, 10)
            data = EVENT * num_events
            writer.write(HEAD + b"%x\r\n%b\r\n" % (len(data), data) + (b"0\r\n\r\n" if num_events == EVENTS else b""))
        await reader.read()
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port.append(server.sockets[0].getsockname()[1])
        is_up.set()
        await asyncio.to_thread(is_over.wait)
        server.close()

    port: list[int] = []
    is_up, is_over = threading.Event(), threading.Event()
    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        assert is_up.wait(10)
        yield port[0]
    finally:
        is_over.set()
        thread.join(10)


def test_an_answer_that_is_cut_counts_as_far_as_it_came() -> None:
    counting = threading.Event()

    def cpu_s() -> float:
        """Asked for when the time begins."""
        counting.set()
        return 0.0

    with gateway(counting, EVENTS, EVENTS, EVENTS // 4) as port:
        load = measure("127.0.0.1", port, [{"n": 1}], 3, 0.5, cpu_s)
    assert load.num_requests == 3, "the first answer of each stream is before the time"
    assert load.events_each == EVENTS
    assert load.num_answers == pytest.approx(3 * 1.25)
