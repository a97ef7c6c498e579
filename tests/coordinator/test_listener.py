"""Who comes while a port is closed: the kernel took the connection, so somebody has to answer on it."""

import asyncio
import socket
from collections.abc import Callable

import pytest

from coordinator.limits import Listener, Refusals


class Echo(asyncio.Protocol):
    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave = leave

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()


def test_who_was_accepted_when_the_port_closed_is_answered() -> None:
    async def scenario() -> None:
        refusals = Refusals()
        listener = Listener("http", Echo, refusals, max_open=8, handshake_s=5, context=None)
        port = listener.open("127.0.0.1", 0)
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            client.sendall(b"hello")
            async with asyncio.timeout(10):
                while not refusals.open["http"]:
                    await asyncio.sleep(0)
            listener.close()
            assert await asyncio.to_thread(client.recv, 64) == b"hello"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 10)

    asyncio.run(scenario())
