"""A coordinator is told to go (SIGTERM) while it has streams that take longer than it may: others go on with them."""

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from tests.system.cluster import Cluster, alive
from tests.system.test_coordinator_death import OPTIONS, PROMPTS, Apart, Streams
from tests.system.test_coordinators import coordinators

DRAIN_S = 0.3
WORDS = ("--dtype", "float32", "--kv-memory", "64MiB", "--drain-timeout-s", str(DRAIN_S))


class Front:
    """One address for several coordinators: a connection goes to the first that takes it."""

    def __init__(self, urls: list[str]) -> None:
        self._ports = [int(url.rpartition(":")[2]) for url in urls]
        self._loop = asyncio.new_event_loop()
        self._open: set[asyncio.Task[None]] = set()
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._run(ready)))
        self._thread.start()
        assert ready.wait(10)

    async def _run(self, ready: threading.Event) -> None:
        self._done = asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        await self._done.wait()
        server.close()
        for task in self._open:
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for port in self._ports:
            with contextlib.suppress(OSError):
                up_reader, up_writer = await asyncio.open_connection("127.0.0.1", port)
                ways = [
                    asyncio.create_task(self._pass(reader, up_writer)),
                    asyncio.create_task(self._pass(up_reader, writer)),
                ]
                self._open.update(ways)
                await asyncio.wait(ways)
                return
        writer.close()

    @staticmethod
    async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
        writer.close()

    def __enter__(self) -> "Front":
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(10)


@pytest.fixture(scope="module")
def expected() -> Iterator[list[str]]:
    with Cluster("--mixed", "1", "--dtype", "float32", "--kv-memory", "64MiB") as cluster:
        body = {"model": "demo", **OPTIONS}
        yield [str(cluster.post("/v1/completions", body | {"prompt": each})["choices"][0]["text"]) for each in PROMPTS]


def test_of_two_coordinators_the_other_goes_on_with_the_streams_of_the_one_that_goes(expected: list[str]) -> None:
    with Cluster("--coordinators", "2", "--no-restart", *WORDS) as cluster, Front(cluster.urls) as front:
        one, two = (cluster.at(url) for url in cluster.urls)
        theirs = Streams(two, PROMPTS)
        streams = Streams(cluster.at(front.url), PROMPTS, len(expected[-1]) // 4)
        assert streams.reached.wait(60)
        pid = coordinators(cluster)[0]
        assert one.status()["streams"] > 0, "there is something to hand on"
        started = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        cluster.wait_for(lambda: not alive(pid), "it is gone", DRAIN_S + 5)
        assert time.monotonic() - started < DRAIN_S + 3
        assert streams.texts() == expected
        assert theirs.texts() == expected
        assert "handing on" in cluster.log()
        assert two.metric("baton_requests_resumed_total", how="adopted") > 0
        assert two.metric("baton_attempts_failed_total") == 0, "nothing was computed again"
        two.wait_for(two.is_whole, "every block is free or cached")


def test_the_next_coordinator_at_the_same_ports_goes_on_with_them(expected: list[str]) -> None:
    with Apart("prefill", "decode", coordinator=("--drain-timeout-s", str(DRAIN_S))) as cluster:
        streams = Streams(cluster, PROMPTS, len(expected[-1]) // 4)
        assert streams.reached.wait(60)
        cluster.coordinator.terminate()
        assert cluster.coordinator.wait(DRAIN_S + 5) == 0
        cluster.start_coordinator()
        assert streams.texts() == expected
        assert cluster.metric("baton_requests_resumed_total", how="adopted") > 0
        cluster.wait_for(cluster.is_whole, "every block is free or cached")


def test_with_all_workers_gone_too_clients_are_told_at_once() -> None:
    """`baton serve` ends: there is nobody to hand anything on to."""
    with Cluster("--mixed", "1", *WORDS) as cluster:
        streams = Streams(cluster, PROMPTS[:1] * 2, 1)
        assert streams.reached.wait(60)
        started = time.monotonic()
        assert cluster.stop(signal.SIGINT) == 0
        with pytest.raises(AssertionError, match="shut down before the end"):
            streams.texts()
        assert time.monotonic() - started < DRAIN_S + 6
