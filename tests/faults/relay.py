"""Between every two processes: TCP relays that see each message pass, and can hold it back for ever.

A relay cuts the bytes into frames (messages of the worker link, ZMTP of hand-overs) and passes them on as they came.
Its tap hears of each message before and after, in the same turn of the loop, so that what a test does then is done
before the message arrives, or right after. `Cuts` says who is cut off: nothing passes any more, in neither direction,
and no connection ends; what was held back goes on when the cut is healed, as on a network that retransmits.

Workers tell each other addresses. Each is replaced by the one of a relay in front of it, which is as long.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable

from baton.framed import GREETING, LENGTH_BYTES

GREETING_BYTES, LONG, COMMAND = (10, 1, 53), 2, 4  # of ZMTP 3
HOST = "127.0.0.1"
Frames = Callable[[asyncio.StreamReader, bool], AsyncIterator[bytes]]


async def link_frames(reader: asyncio.StreamReader, from_client: bool) -> AsyncIterator[bytes]:
    yield await reader.readexactly(len(GREETING))
    while True:
        length = await reader.readexactly(LENGTH_BYTES)
        yield length + await reader.readexactly(int.from_bytes(length, "little"))


async def zmtp_frames(reader: asyncio.StreamReader, from_client: bool) -> AsyncIterator[bytes]:
    for size in GREETING_BYTES:  # each end waits for a part of the other's before it sends the next of its own
        yield await reader.readexactly(size)
    while True:
        flags = await reader.readexactly(1)
        length = await reader.readexactly(8 if flags[0] & LONG else 1)
        yield flags + length + await reader.readexactly(int.from_bytes(length, "big"))


async def any_bytes(reader: asyncio.StreamReader, from_client: bool) -> AsyncIterator[bytes]:
    while data := await reader.read(1 << 18):
        yield data


class ZmtpMessages:
    """Messages of one frame each, out of one direction of a connection."""

    def __init__(self) -> None:
        self._greetings_left = len(GREETING_BYTES)

    def of(self, frame: bytes) -> list[bytes]:
        """The message in this frame, if it has any."""
        if self._greetings_left:
            self._greetings_left -= 1
            return []
        return [] if frame[0] & COMMAND else [frame[9:] if frame[0] & LONG else frame[2:]]


class Cuts:
    """Who is cut off from what: pairs of a network's name and a process's."""

    def __init__(self) -> None:
        self._cut: set[tuple[str, str]] = set()
        self._changed = asyncio.Event()
        self.held = 0
        """Frames that had to wait; proof that a cut cut something."""

    def cut(self, network: str, process: str) -> None:
        self._cut.add((network, process))

    def is_cut(self, network: str, process: str) -> bool:
        return (network, process) in self._cut

    def heal(self) -> None:
        self._cut.clear()
        self._changed.set()
        self._changed = asyncio.Event()

    async def passable(self, network: str, parties: set[str]) -> bool:
        """Wait until nothing is cut between these; whether anything was."""
        waited = False
        while any((network, party) in self._cut for party in parties):
            self.held += not waited
            waited = True
            await self._changed.wait()
        return waited


class Connection:
    """One connection through a relay. `parties`: the processes at its ends, as far as they are known."""

    target: tuple[str, int] | None = None
    """Where it goes, if not where the others of its relay go."""
    dialling = False
    """Nothing has been said yet; who dials in vain, because of a cut, has to dial again."""

    def __init__(self, parties: set[str]) -> None:
        self.parties = parties
        self.severed = False

    async def before(self, frame: bytes, from_client: bool) -> bytes:
        """A frame is about to be passed on; what is passed on."""
        return frame

    def after(self, from_client: bool) -> None:
        """It has been."""


class Relay:
    """A port in front of an address, which may change."""

    def __init__(self, network: str, cuts: Cuts, frames: Frames, connected: Callable[[], Connection]) -> None:
        self.target: tuple[str, int] | None = None
        self.port = 0
        self._network, self._cuts, self._frames, self._connected = network, cuts, frames, connected
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], Connection] = {}

    async def start(self, host: str = HOST, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._serve, host, port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        self.sever()

    def sever(self, party: str = "") -> None:
        """End every connection, or those of one process; what has not been passed on is lost, as when it dies with it
        unsent."""
        for task, connection in self._connections.items():
            if not party or party in connection.parties:
                connection.severed = True  # what is just passing is not passed on either
                task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connection = self._connections[task] = self._connected()
        writers = [writer]
        try:
            target = connection.target or self.target
            if await self._cuts.passable(self._network, connection.parties) or target is None:
                return
            their_reader, their_writer = await asyncio.open_connection(*target)
            writers.append(their_writer)
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(connection, reader, their_writer, True))
                pumps.create_task(self._pump(connection, their_reader, writer, False))
        except* (OSError, asyncio.IncompleteReadError, _Ended):
            pass
        except* asyncio.CancelledError:
            pass
        finally:
            del self._connections[task]
            for each in writers:
                each.transport.abort() if task.cancelling() else each.close()

    async def _pump(
        self, connection: Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, from_client: bool
    ) -> None:
        try:
            async for frame in self._frames(reader, from_client):
                passed = await connection.before(frame, from_client)
                waited = await self._cuts.passable(self._network, connection.parties)
                if connection.severed or (waited and connection.dialling) or writer.is_closing():
                    raise _Ended
                writer.write(passed)
                await writer.drain()
                connection.after(from_client)
        except (OSError, asyncio.IncompleteReadError):
            pass
        await self._cuts.passable(self._network, connection.parties)  # that it ended is not told either
        raise _Ended


class _Ended(Exception):
    """One direction has ended, and with it the other one."""


class Addresses:
    """Relays for addresses that workers tell each other: the same relay for the same address."""

    def __init__(self) -> None:
        self._relays: dict[str, Relay] = {}
        self._starting = asyncio.Lock()

    async def replaced(self, data: bytes, pattern: bytes, relay_for: Callable[[], Relay], key: str) -> bytes:
        """`data` with the port of the first address that matches `pattern` (group 1: host, 2: port) a relay's."""
        match = re.search(pattern, data)
        if match is None:
            return data
        async with self._starting:
            relay = self._relays.get(key)
            if relay is None:
                relay = self._relays[key] = relay_for()
                await relay.start()
        relay.target = (match[1].decode(), int(match[2]))
        port = str(relay.port).encode()
        assert len(port) == len(match[2]), "an address is replaced by one that is as long"
        return data[: match.start(2)] + port + data[match.end(2) :]

    def of(self, key: str) -> Relay | None:
        return self._relays.get(key)

    async def stop(self) -> None:
        for relay in self._relays.values():
            await relay.stop()
