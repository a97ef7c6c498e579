"""Messages over one connection: whole and in order however the bytes come, and the end of it for what is none."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from baton import framed
from baton.framed import GREETING, MAX_UNREAD, Framed, dial
from baton.tls import COORDINATOR_NAME, Tls, inside
from baton.v1 import worker_link_pb2 as wire
from tests.authority import Authority

pytestmark = pytest.mark.timeout(60)
Server = Framed[wire.WorkerMessage]
Client = Framed[wire.CoordinatorMessage]


def message(number: int, size: int = 0) -> wire.WorkerMessage:
    return wire.WorkerMessage(ending=wire.Ending(num_tokens=number, detail="x" * size))


def packed(said: wire.WorkerMessage) -> bytes:
    data = said.SerializeToString()
    return len(data).to_bytes(4, "little") + data


@asynccontextmanager
async def listening(tls: Tls | None = None) -> AsyncIterator[tuple[str, "asyncio.Queue[Server]"]]:
    opened: asyncio.Queue[Server] = asyncio.Queue()
    server = await asyncio.get_running_loop().create_server(
        lambda: Framed(wire.WorkerMessage, opened.put_nowait), "127.0.0.1", 0,
        ssl=tls.listener("link") if tls is not None else None,
    )  # fmt: skip
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", opened
    finally:
        server.close()


def between(story: Callable[[Client, Server], Awaitable[None]], tls: Tls | None = None) -> None:
    async def run() -> None:
        async with listening(tls) as (address, opened):
            client = await dial(address, wire.CoordinatorMessage, tls)
            server = await opened.get()
            try:
                await story(client, server)
            finally:
                client.abort()
                server.abort()

    asyncio.run(run())


async def numbers(link: Server, count: int) -> list[int]:
    found = []
    for _ in range(count):
        said = await link.read()
        assert said is not None
        found.append(said.ending.num_tokens)
    return found


@pytest.mark.parametrize("step", [1, 7, 100, 1 << 20])
def test_messages_are_whole_and_in_order_however_their_bytes_come(step: int) -> None:
    rng = random.Random(step)
    said = [message(number, rng.choice([0, 3, 200, 5000])) for number in range(30)]
    data = GREETING + b"".join(map(packed, said))

    async def run() -> None:
        link = Server(wire.WorkerMessage)
        heard: list[wire.WorkerMessage] = []
        link.listen(heard.append)
        at = 0
        while at < len(data):
            size = rng.randint(1, step)
            link.data_received(data[at : at + size])
            at += size
        assert heard == said
        assert not link.ended.done()

    asyncio.run(run())


@pytest.mark.parametrize("secure", [False, True])
def test_both_sides_speak_until_one_has_finished(secure: bool, tmp_path: Path) -> None:
    async def story(client: Client, server: Server) -> None:
        for number in range(200):
            assert client.send(message(number, 1000))
        assert await numbers(server, 50) == list(range(50))
        rest: list[int] = []
        server.listen(lambda said: rest.append(said.ending.num_tokens))
        assert server.send(wire.CoordinatorMessage(drain=wire.Drain()))
        assert (await client.read()).HasField("drain")  # type: ignore[union-attr]
        client.finish()
        assert client.send(message(0)), "nobody hears it"
        assert await server.ended is None
        assert rest == list(range(50, 200))
        server.close()
        assert await client.read() is None
        assert client.send(message(1)), "nobody hears it"

    tls = inside(Authority(tmp_path, "ours").sign("all").options(), COORDINATOR_NAME) if secure else None
    between(story, tls)


def test_a_peer_that_says_more_than_is_read_has_to_wait() -> None:
    async def story(client: Client, server: Server) -> None:
        for number in range(10 * MAX_UNREAD):
            client.send(message(number, 50_000))
        while client.unsent_bytes == 0 or len(server._unread) <= MAX_UNREAD:
            await asyncio.sleep(0.01)
        for _ in range(20):
            await asyncio.sleep(0.01)
        assert len(server._unread) < 3 * MAX_UNREAD, "what one read brought, and no more"
        assert await numbers(server, 10 * MAX_UNREAD) == list(range(10 * MAX_UNREAD))

    between(story)


def test_what_nobody_reads_is_refused_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framed, "MAX_UNSENT_BYTES", 1 << 20)

    async def story(client: Client, server: Server) -> None:
        server._transport.pause_reading()  # type: ignore[union-attr]
        count = 0
        while client.send(message(0, 100_000)):
            count += 1
            assert count < 1000
            await asyncio.sleep(0)
        assert client.unsent_bytes <= (1 << 20) + 200_000

    between(story)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"PRI * HTTP/2.0\r\n", "something else"),
        (b"baton-link/2\n", "something else"),
        (b"\x16", "something else"),
        (GREETING + b"\xff\xff\xff\xff", "more than"),
        (GREETING + b"\x02\x00\x00\x00\xff\xff", "no message"),
    ],
)
def test_what_is_no_link_ends_it_and_is_named(data: bytes, says: str) -> None:
    async def run() -> None:
        async with listening() as (address, opened):
            reader, writer = await asyncio.open_connection(*address.split(":"))
            writer.write(data)
            link = await opened.get()
            with pytest.raises(ConnectionError, match=says):
                await link.read()
            assert await reader.read() in (b"", GREETING)
            writer.close()

    asyncio.run(run())


def test_whatever_bytes_come_it_hears_messages_or_ends() -> None:
    async def run() -> None:
        for seed in range(300):
            rng = random.Random(seed)
            data = bytearray(GREETING + b"".join(packed(message(number, 20)) for number in range(5)))
            for _ in range(rng.randint(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            link = Server(wire.WorkerMessage)
            heard: list[wire.WorkerMessage] = []
            link.listen(heard.append)
            link.data_received(bytes(data))
            assert link.ended.done() or len(heard) <= 5

    asyncio.run(run())


def test_a_connection_that_breaks_says_so_after_what_came_before() -> None:
    async def story(client: Client, server: Server) -> None:
        client.send(message(1))
        assert await numbers(server, 1) == [1]
        client.send(message(2))
        while not server._unread:
            await asyncio.sleep(0.001)
        server.connection_lost(OSError(104, "Connection reset by peer"))
        assert await numbers(server, 1) == [2]
        with pytest.raises(ConnectionError, match="reset by peer"):
            await server.read()

    between(story)
