"""The ports that workers open for each other: a stranger holds none of them for long."""

import asyncio
import socket
import sys
import time
from pathlib import Path

import pytest

from kvtransfer import offers
from kvtransfer.lanes import tcp

sys.path.insert(0, str(Path(__file__).parent.parent / "kvtransfer"))

from world import OPTIONS, Owner, new_memory, offer_server

SAID = [b"", b"\xff", b"GET / HTTP/1.1\r\n"]  # the last is a peer of ZeroMQ 2, to ZeroMQ


def is_hung_up_on(port: int, said: bytes, timeout_s: float) -> bool:
    with socket.create_connection(("127.0.0.1", port), timeout_s) as stranger:
        stranger.sendall(said)
        deadline = time.monotonic() + timeout_s
        try:
            while stranger.recv(4096):  # ZeroMQ greets whoever comes
                stranger.settimeout(max(0.01, deadline - time.monotonic()))
        except ConnectionError:
            return True
        except TimeoutError:
            return False
        return True


@pytest.mark.parametrize("said", SAID)
def test_a_stranger_at_lane_tcp_holds_no_thread_for_long(monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(tcp, "_FIRST_REQUEST_S", 0.2)
    monkeypatch.setattr(tcp, "_IDLE_PULSE_S", 0.1)
    server = tcp.TcpLaneServer("127.0.0.1")
    memory = new_memory(seed=1)
    endpoint = server.start(memory)
    try:
        assert is_hung_up_on(int(endpoint.address.rpartition(":")[2]), said, 5.0)
        client = tcp.TcpLaneClient.connect(endpoint, new_memory(), time.monotonic() + 5)
        time.sleep(0.5)  # a peer that is known may be silent
        client._request(tcp.Pieces.of([], client._local), lambda: None, time.monotonic() + 5)
        assert len(server._peers) == 1
        client.close()
    finally:
        server.close()


@pytest.mark.parametrize("said", SAID[:2])
def test_a_stranger_at_the_port_of_hand_overs_who_does_not_greet_is_hung_up_on(
    monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(offers, "HANDSHAKE_MS", 200)

    async def scenario() -> None:
        server = offer_server(new_memory(seed=1), Owner(), {}, OPTIONS)
        port = int((await server.start("127.0.0.1")).rpartition(":")[2])
        try:
            assert await asyncio.to_thread(is_hung_up_on, port, said, 5.0)
        finally:
            await server.stop()

    asyncio.run(scenario())
