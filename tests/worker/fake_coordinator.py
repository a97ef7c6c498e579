"""Coordinators for tests of a worker's link: they say what a script says, and note what they hear."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeAlias

from baton.framed import Framed
from baton.v1 import worker_link_pb2 as wire

WELCOME = wire.CoordinatorMessage(welcome=wire.Welcome(heartbeat_interval_s=0.05, heartbeat_timeout_s=0.6))
BEAT = wire.CoordinatorMessage(heartbeat=wire.CoordinatorHeartbeat())
Script: TypeAlias = Callable[[], AsyncIterator[wire.CoordinatorMessage]]


async def beating(*messages: wire.CoordinatorMessage) -> AsyncIterator[wire.CoordinatorMessage]:
    yield WELCOME
    for message in messages:
        yield message
    while True:
        yield BEAT
        await asyncio.sleep(0.05)


def refusing(reason: str) -> Script:
    async def refuse() -> AsyncIterator[wire.CoordinatorMessage]:
        yield wire.CoordinatorMessage(refusal=wire.Refusal(reason=reason))

    return refuse


class FakeCoordinator:
    """Answers each connection with the next script, the last one again and again; hangs up after it."""

    address = ""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts) or [beating]
        self.heard: asyncio.Queue[str | None] = asyncio.Queue()
        self.kv_sequences: list[int] = []
        self.connections = 0
        self.links: list[Framed[wire.WorkerMessage]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def up(self) -> AsyncIterator["FakeCoordinator"]:
        """Listening; the next time at the same port."""
        loop = asyncio.get_running_loop()
        host, _, port = (self.address or "127.0.0.1:0").rpartition(":")
        server = await loop.create_server(lambda: Framed(wire.WorkerMessage, self._opened), host, int(port))
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def hears(self, kind: str) -> None:
        while await self.heard.get() != kind:
            pass

    def _opened(self, link: Framed[wire.WorkerMessage]) -> None:
        self.connections += 1
        link.listen(self.on_message)
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        task = asyncio.create_task(self._say(link, script))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        link.ended.add_done_callback(lambda ended: task.cancel())
        self.links.append(link)

    async def _say(self, link: Framed[wire.WorkerMessage], script: Script) -> None:
        try:
            async for message in script():
                link.send(message)
        finally:
            link.close()

    def on_message(self, message: wire.WorkerMessage) -> None:
        if message.HasField("heartbeat"):
            self.kv_sequences.append(message.heartbeat.kv_sequence)
        self.heard.put_nowait(message.WhichOneof("message"))
