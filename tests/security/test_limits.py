"""No client can take the doors from the others: on real sockets, with what is turned away counted."""

import asyncio
import contextlib
import json
import resource
import socket
import ssl
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from coordinator_harness import DECODE, DEMO_FOLDER, OPTIONS, System, running, until
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.config import CoordinatorOptions, DiscoveryOptions, ModelOptions
from baton.framed import GREETING
from baton.v1 import inference_pb2 as api
from coordinator import grpc_api, http_api, limits, link
from coordinator.server import Coordinator
from tests.authority import Authority, Files

POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
Wire = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def dial(port: int, **tls: Any) -> Wire:
    return await asyncio.open_connection("127.0.0.1", port, **tls)


async def ask(wire: Wire, what: bytes = HEALTH) -> int:
    """The status of an answer with a length, all of which is read."""
    wire[1].write(what)
    head = (await wire[0].readuntil(b"\r\n\r\n")).decode().lower()
    await wire[0].readexactly(int(head.partition("content-length: ")[2].split()[0]))
    return int(head.split()[1])


async def hung_up(wire: Wire, timeout_s: float = 5.0) -> float:
    """Seconds until the other side hangs up, saying nothing more."""
    started = time.monotonic()
    async with asyncio.timeout(timeout_s):
        with contextlib.suppress(ConnectionError):
            while await wire[0].read(1 << 16):
                pass
    return time.monotonic() - started


async def trickle(wire: Wire, text: bytes, every_s: float) -> None:
    with contextlib.suppress(ConnectionError):
        for byte in text:
            wire[1].write(bytes([byte]))
            await wire[1].drain()
            await asyncio.sleep(every_s)


def refused(system: System, reason: str, door: str = "http") -> float:
    return system.metric("baton_connections_refused_total", door=door, reason=reason)


def opened(system: System, door: str = "http") -> float:
    return system.metric("baton_connections_open", door=door)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Authority(tmp_path_factory.mktemp("tls"), "ours").sign("all")


# HTTP


@pytest.mark.parametrize("said", [b"", b"G", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-A: b"])
def test_a_head_that_does_not_end_in_time_ends_its_connection(run, said: bytes) -> None:
    async def scenario() -> None:
        async with running(head_timeout_s=0.3) as system:
            wire = await dial(system.ports.http)
            wire[1].write(said)
            assert 0.2 < await hung_up(wire) < 3
            assert refused(system, "head_late") == 1
            await until(lambda: opened(system) == 0)

    run(scenario())


def test_slowloris_which_sends_a_byte_now_and_then_is_hung_up_on_again_and_again(run) -> None:
    async def scenario() -> None:
        async with running(head_timeout_s=0.3) as system:
            wire = await dial(system.ports.http)
            assert await ask(wire) == 200, "the first request is a good one, the next never ends"
            slow = asyncio.create_task(trickle(wire, b"GET /health HTTP/1.1\r\nX-A: " + b"a" * 1000, 0.02))
            assert 0.2 < await hung_up(wire) < 3
            await slow
            assert refused(system, "head_late") == 1

    run(scenario())


def test_a_body_that_does_not_end_in_time_is_a_408(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_api, "_BODY_TIMEOUT_S", 0.3)

    async def scenario() -> None:
        async with running(head_timeout_s=0.2) as system:
            wire = await dial(system.ports.http)
            slow = asyncio.create_task(trickle(wire, b" " * 900, 0.02))
            assert await ask(wire, POST % 900) == 408
            slow.cancel()

    run(scenario())


def test_a_request_under_way_is_not_hurried_and_a_connection_lives_as_long_as_it_is_used(run) -> None:
    async def scenario() -> None:
        async with running(head_timeout_s=0.2, idle_timeout_s=0.5) as system:
            worker = await system.worker("decode-0", DECODE)
            worker.pause_at = 1
            wire = await dial(system.ports.http)
            body = json.dumps({"prompt": "x", "max_tokens": 2}).encode()
            asked = asyncio.create_task(ask(wire, POST % len(body) + body))
            await asyncio.sleep(1.2)
            worker.go.set()
            assert await asked == 200
            for _ in range(4):
                await asyncio.sleep(0.25)
                assert await ask(wire) == 200
            assert await hung_up(wire) > 0.2, "then nothing is asked"
            assert refused(system, "head_late") == 0

    run(scenario())


@pytest.mark.parametrize(
    ("head", "code", "reason"),
    [
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431, "head_size"),
        (b"GET /health HTTP/1.1\r\nAuthorization: Bearer sk-secret" + b"k" * 9000 + b"\r\n\r\n", 431, "head_size"),
        (b"GET /health HTTP/1.1\r\n" + b"X-A: sk-secret\r\n" * 100 + b"\r\n", 431, "head_size"),
        (b"GET /health HTTP/1.1\r\nAuthorization: Bearer sk-secret\x00\r\n\r\n", 400, "malformed"),
        (b"sk-secret sk-secret\r\n\r\n", 400, "malformed"),
    ],
    ids=["line", "header", "headers", "byte", "noise"],
)  # fmt: skip
def test_a_head_that_is_too_large_or_none_is_refused_and_not_repeated(
    run, caplog: pytest.LogCaptureFixture, head: bytes, code: int, reason: str
) -> None:
    async def scenario() -> None:
        async with running() as system:
            wire = await dial(system.ports.http)
            wire[1].write(head)
            answer = await asyncio.wait_for(wire[0].read(), 5)
            assert answer.startswith((b"HTTP/1.0 %d" % code, b"HTTP/1.1 %d" % code)), answer
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
            assert b"secret" not in answer
            assert refused(system, reason) == 1

    caplog.set_level(0)
    run(scenario())
    assert "secret" not in caplog.text


def test_a_body_that_is_too_large_is_a_413(run) -> None:
    async def scenario() -> None:
        body = {"prompt": "x" * 2000}
        async with running(max_body_bytes=1000) as system, system.http.post("/v1/completions", json=body) as answer:
            assert answer.status == 413

    run(scenario())


def test_when_all_connections_are_taken_idle_ones_make_room_and_busy_ones_do_not(run) -> None:
    async def scenario() -> None:
        async with running(max_connections=3) as system:
            worker = await system.worker("decode-0", DECODE)
            worker.pause_at = 1
            wires = [await dial(system.ports.http) for _ in range(3)]
            for wire in wires:
                assert await ask(wire) == 200
            wires.append(await dial(system.ports.http))
            assert await ask(wires[3]) == 200, "there is room"
            assert await hung_up(wires[0]) < 3, "that of the one that was idle for longest"
            assert await ask(wires[1]) == 200
            assert refused(system, "made_room") == 1
            body = json.dumps({"prompt": "x", "max_tokens": 2}).encode()
            busy = [asyncio.create_task(ask(wire, POST % len(body) + body)) for wire in wires[1:]]
            await worker.wait_for(lambda: len(worker.assignments) == 3)
            assert await hung_up(await dial(system.ports.http)) < 3
            assert refused(system, "full") == 1
            worker.go.set()
            assert [await each for each in busy] == [200] * 3
            assert await ask(await dial(system.ports.http)) == 200

    run(scenario())


def test_connections_that_owe_a_head_make_room_too(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MIN_OWED_S", 0.2)

    async def scenario() -> None:
        async with running(max_connections=4) as system:
            slow = [await dial(system.ports.http) for _ in range(4)]
            for wire in slow:
                wire[1].write(b"GET /health HTTP/1.1\r\nX-Slow: ")
            await until(lambda: opened(system) == 4)
            assert await hung_up(await dial(system.ports.http)) < 3, "they may be about to say the rest"
            await asyncio.sleep(0.3)
            assert await ask(await dial(system.ports.http)) == 200
            assert (refused(system, "full"), refused(system, "made_room")) == (1, 1)

    run(scenario())


def test_one_address_has_no_more_connections_than_it_may(run) -> None:
    async def scenario() -> None:
        async with running(max_connections_per_address=2) as system:
            wires = [await dial(system.ports.http) for _ in range(2)]
            assert [await ask(wire) for wire in wires] == [200, 200]
            assert await hung_up(await dial(system.ports.http)) < 3
            assert refused(system, "address") == 1
            other = await asyncio.open_connection("127.0.0.1", system.ports.http, local_addr=("127.0.0.2", 0))
            assert await ask(other) == 200, "another one has its own"
            wires[0][1].close()
            await until(lambda: opened(system) == 2)
            assert await ask(await dial(system.ports.http)) == 200

    run(scenario())


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("fe80::1%eth0", "fe80::2", True),
    ],
)
def test_an_address_of_ipv6_stands_for_its_network(one: str, other: str, same: bool) -> None:
    assert (limits._client(one) == limits._client(other)) is same


def test_a_reader_that_does_not_read_is_hung_up_on_and_counted(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "READ_TIMEOUT_S", 0.3)

    async def scenario() -> None:
        async with running() as system:
            worker = await system.worker("decode-0", DECODE)
            worker.pause_at = 1900  # more than buffers hold, and not all: streams that end first need no abort
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.setblocking(False)
                await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", system.ports.http))
                asked = {"prompt": ["x"] * 16, "max_tokens": 2000, "stream": True, "ignore_eos": True}
                body = json.dumps(asked).encode()
                await asyncio.get_running_loop().sock_sendall(client, POST % len(body) + body)
                await until(lambda: system.metric("baton_slow_readers_total") == 1, 20)
                await worker.wait_for(lambda: len(worker.aborts) > 0)
                await until(lambda: opened(system) == 0)

    run(scenario())


# TLS


@contextlib.asynccontextmanager
async def with_tls(files: Files, **options: object) -> AsyncIterator[System]:
    coordinator = Coordinator(
        CoordinatorOptions(**(OPTIONS | options)), ModelOptions(), DEMO_FOLDER, DiscoveryOptions(), files.options(),
        files.public(),
    )  # fmt: skip
    ports = await coordinator.start()
    try:
        yield System(coordinator, ports, None, None, None, None)  # type: ignore[arg-type]
    finally:
        await coordinator.stop()


def test_a_handshake_that_never_ends_is_ended_and_counts_as_a_connection(run, files: Files) -> None:
    async def scenario() -> None:
        async with with_tls(files, head_timeout_s=0.5, max_connections=2) as system:
            context = ssl.create_default_context(cafile=files.ca)
            silent = [await dial(system.ports.http) for _ in range(2)]
            silent[0][1].write(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a hello
            await until(lambda: opened(system) == 2)
            with pytest.raises((ConnectionError, ssl.SSLError)):
                await dial(system.ports.http, ssl=context, server_hostname="localhost")
            assert refused(system, "full") == 1
            for wire in silent:
                assert await hung_up(wire) < 3
            await until(lambda: opened(system) == 0)
            assert refused(system, "handshake") == 2
            wire = await dial(system.ports.http, ssl=context, server_hostname="localhost")
            assert await ask(wire) == 200
            wire[1].write(b"G")
            assert 0.3 < await hung_up(wire) < 3
            await until(lambda: opened(system) == 0)

    run(scenario())


def test_a_handshake_on_grpcs_port_that_never_ends_is_ended(run, files: Files) -> None:
    async def scenario() -> None:
        async with with_tls(files, head_timeout_s=0.5) as system:
            wire = await dial(system.ports.grpc)
            assert await hung_up(wire) < 5

    run(scenario())


def test_workers_handshakes_that_never_end_are_ended_and_counted(run, files: Files) -> None:
    async def scenario() -> None:
        async with with_tls(files, heartbeat_interval_s=0.1, heartbeat_timeout_s=0.4) as system:
            wire = await dial(system.ports.link)
            assert await hung_up(wire) < 3
            assert refused(system, "handshake", "link") == 1
            assert opened(system, "link") == 0

    run(scenario())


# gRPC


def test_grpc_has_a_largest_message_and_largest_headers(run) -> None:
    async def scenario() -> None:
        async with running(max_body_bytes=1000) as system:
            for text, metadata in (("x" * 2000, ()), ("x", (("x-large", "y" * 100_000),))):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await system.inference.Tokenize(api.TokenizeRequest(text=text), metadata=metadata, timeout=5)
                assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert (await system.inference.Tokenize(api.TokenizeRequest(text="x"), timeout=5)).token_ids

    run(scenario())


def test_a_connection_to_grpcs_port_that_says_nothing_is_ended_and_one_that_asks_nothing_too(run) -> None:
    async def scenario() -> None:
        async with running(head_timeout_s=0.3, idle_timeout_s=0.5) as system:
            assert await hung_up(await dial(system.ports.grpc)) < 5
            await system.inference.ListModels(api.ListModelsRequest(), timeout=5)
            assert system.channel.get_state() is grpc.ChannelConnectivity.READY
            async with asyncio.timeout(10):
                await system.channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
            await system.inference.ListModels(api.ListModelsRequest(), timeout=5)

    run(scenario())


def test_grpc_has_no_more_connections_than_it_may(run) -> None:
    async def scenario() -> None:
        async with running(max_connections=2) as system:
            wires = [await dial(system.ports.grpc) for _ in range(2)]
            preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
            for wire in wires:
                wire[1].write(preface)
                assert await wire[0].read(9)
            third = await dial(system.ports.grpc)
            third[1].write(preface)
            assert await hung_up(third) < 5
            wires[0][1].close()

            async def served() -> bool:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    async with grpc.aio.insecure_channel(f"127.0.0.1:{system.ports.grpc}") as channel:
                        stub = health_pb2_grpc.HealthStub(channel)
                        return bool(await stub.Check(health_pb2.HealthCheckRequest(), timeout=5))
                return False

            async with asyncio.timeout(10):
                while not await served():
                    await asyncio.sleep(0.05)

    run(scenario())


def test_a_client_that_pings_without_end_is_told_to_go(run) -> None:
    async def scenario() -> None:
        async with running() as system:
            wire = await dial(system.ports.grpc)
            wire[1].write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
            heard, pinged = b"", 0
            async with asyncio.timeout(10):
                while b"too_many_pings" not in heard:
                    wire[1].write(b"\x00\x00\x08\x06\x00\x00\x00\x00\x00" + pinged.to_bytes(8, "big"))
                    heard += await wire[0].read(1 << 16)
                    pinged += 1
            assert grpc_api.MAX_PING_STRIKES <= pinged < 2 * grpc_api.MAX_PING_STRIKES + 10

    run(scenario())


def test_calls_that_need_no_key_and_last_for_ever_leave_room_for_others(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_api, "MAX_OPEN_CALLS", 3)

    async def scenario() -> None:
        async with running() as system:
            stub = health_pb2_grpc.HealthStub(system.channel)
            watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
            for watch in watches:
                assert await watch.read()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Watch(health_pb2.HealthCheckRequest()).read()
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert (await system.inference.ListModels(api.ListModelsRequest(), timeout=5)).models
            watches[0].cancel()

            async def watch_again() -> bool:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    return bool(await stub.Watch(health_pb2.HealthCheckRequest()).read())
                return False

            async with asyncio.timeout(5):
                while not await watch_again():
                    await asyncio.sleep(0.01)

    run(scenario())


# The link


def test_a_stranger_at_the_link_says_little_and_not_for_long(run) -> None:
    async def scenario() -> None:
        async with running(heartbeat_interval_s=0.1, heartbeat_timeout_s=0.5) as system:
            large = await dial(system.ports.link)
            large[1].write(GREETING + (link.MAX_REGISTRATION_BYTES + 1).to_bytes(4, "little"))
            assert await hung_up(large) < 0.4, "at once"
            slow = await dial(system.ports.link)
            saying = asyncio.create_task(trickle(slow, GREETING + b"\xff\0\0\0" + b"a" * 255, 0.02))
            assert 0.3 < await hung_up(slow) < 3
            await saying
            assert refused(system, "stranger", "link") == 2
            await system.worker("decode-0", DECODE)
            assert opened(system, "link") == 1

    run(scenario())


def test_strangers_at_the_link_take_no_room_from_each_other_for_ever(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "MAX_UNREGISTERED", 3)

    async def scenario() -> None:
        async with running(heartbeat_interval_s=0.1, heartbeat_timeout_s=0.5) as system:
            silent = [await dial(system.ports.link) for _ in range(4)]
            assert await hung_up(silent[3]) < 0.4
            assert refused(system, "full", "link") == 1
            for wire in silent[:3]:
                await hung_up(wire)
            await system.worker("decode-0", DECODE)

    run(scenario())


def test_no_more_connections_are_taken_than_there_are_descriptors_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limit = (1024, 1 << 20)

    def set_limit(which: int, both: tuple[int, int]) -> None:
        nonlocal limit
        if both[1] == resource.RLIM_INFINITY:
            raise PermissionError("more than the kernel has")
        limit = both

    monkeypatch.setattr(resource, "setrlimit", set_limit)
    monkeypatch.setattr(resource, "getrlimit", lambda which: limit)
    assert limits.most_connections(8192) == 8192
    assert limit == (1 << 20, 1 << 20), "as far as it may be"
    assert caplog.text == ""
    for least in (1024, 4096), (4096, resource.RLIM_INFINITY):
        limit = least
        assert limits.most_connections(8192) == (4096 - limits.RESERVED_DESCRIPTORS) // 3
        assert "raise ulimit -n" in caplog.text
        caplog.clear()


def test_accepted_connections_send_small_answers_at_once() -> None:
    """Without waiting for more (Nagle's way), which costs a stream 40 ms here and there."""
    listening = limits._listening(socket.AF_INET, ("127.0.0.1", 0), False)
    listening.setblocking(True)
    with listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_a_full_table_of_descriptors_makes_nobody_wait_for_ever(
    run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel says that there are none, and then that there are."""
    monkeypatch.setattr(limits, "BREATHE_S", 0.1)
    accept, left = socket.socket.accept, [2]

    def short(self: socket.socket) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(24, "Too many open files")
        return accept(self)

    async def scenario() -> None:
        async with running() as system:
            monkeypatch.setattr(socket.socket, "accept", short)
            assert await asyncio.wait_for(ask(await dial(system.ports.http)), 5) == 200
            assert refused(system, "descriptors") == 2

    run(scenario())
    assert "raise ulimit -n" in caplog.text
