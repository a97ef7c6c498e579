"""Why a worker has no link, where TLS is the reason: what it finds out about who listens."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from baton.framed import Framed, trouble
from baton.tls import COORDINATOR_NAME, Tls, inside
from baton.v1 import worker_link_pb2 as wire
from tests.authority import Authority

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "ours")


@pytest.fixture(scope="module")
def ours(authority: Authority) -> Tls:
    tls = inside(authority.sign("all").options(), COORDINATOR_NAME)
    assert tls is not None
    return tls


async def asked(listens: Tls | None, asks: Tls | None) -> str | None:
    server = await asyncio.get_running_loop().create_server(
        lambda: Framed(wire.WorkerMessage), "127.0.0.1", 0, ssl=listens.listener("link") if listens else None
    )
    try:
        return await trouble(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", asks)
    finally:
        server.close()


def test_what_goes_together_is_no_trouble(ours: Tls) -> None:
    assert asyncio.run(asked(ours, ours)) is None
    assert asyncio.run(asked(None, None)) is None


def test_what_does_not_go_together_is_named(ours: Tls, authority: Authority, tmp_path: Path) -> None:
    worker_only = inside(authority.sign("worker", names="").options())
    stranger = inside(Authority(tmp_path, "theirs").sign("all").options())
    assert worker_only is not None
    assert stranger is not None
    for listens, asks, says in (
        (ours, None, "talks TLS only"),
        (None, ours, "talks no TLS"),
        (ours, stranger, "certificate is not good: self-signed|certificate is not good: unable"),
        (stranger, ours, "certificate is not good: self-signed|certificate is not good: unable"),
        (worker_only, ours, "certificate is not good: Hostname mismatch"),
    ):
        found = asyncio.run(asked(listens, asks))
        assert found is not None
        assert any(each in found for each in says.split("|")), found


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        await reader.read()
    writer.close()


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(10)
    writer.close()


@pytest.mark.parametrize("behaves", [hang, hang_up], ids=["says nothing", "hangs up"])
def test_who_is_stopped_or_gone_is_not_taken_for_somebody_without_tls(ours: Tls, behaves: Serve) -> None:
    async def scenario() -> None:
        server = await asyncio.start_server(behaves, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        for tls in (None, ours):
            assert await trouble(f"127.0.0.1:{port}", tls) is None
        server.close()
        assert await trouble(f"127.0.0.1:{port}", ours) is None, "nobody listens"

    asyncio.run(asyncio.wait_for(scenario(), 10))
