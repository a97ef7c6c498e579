"""Hand-overs between workers with TLS, and what becomes of those who have none."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from baton.errors import PeerError
from baton.tls import Tls, inside
from kvtransfer import offers
from kvtransfer.link import PeerLink
from kvtransfer.sealing import Seal
from tests.authority import Authority
from tests.kvtransfer.world import DECODE_REF, Pair, RawPuller, pair, scattered


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "ours")


@pytest.fixture
def prefill(authority: Authority) -> Tls:
    return with_tls(authority, "prefill")


@pytest.fixture
def decode(authority: Authority) -> Tls:
    return with_tls(authority, "decode")


def with_tls(authority: Authority, who: str) -> Tls:
    tls = inside(authority.sign(who, names="").options())
    assert tls is not None
    return tls


def run(scenario: Callable[[Pair], Awaitable[None]], **options: object) -> None:
    async def main() -> None:
        async with pair(**{"heartbeat_timeout_s": 3.0, **options}) as world, asyncio.timeout(20):
            await scenario(world)

    asyncio.run(main())


@pytest.mark.parametrize("lane", ["shm", "tcp"])
def test_hand_overs_with_tls_arrive_whole(prefill: Tls, decode: Tls, lane: str) -> None:
    async def scenario(world: Pair) -> None:
        remote, local = scattered(40, 1), scattered(40, 2)
        tasks = [world.take(f"h{number}", local[number::4]) for number in range(4)]
        for number in range(4):
            world.offer_all(f"h{number}", remote[number::4])
        for number, task in enumerate(tasks):
            result = await task
            assert (result.num_blocks, result.first_token_id, result.failure) == (10, 7, None)
            await world.owner.has_seen(f"h{number}", "released", "verified")
        assert world.same_bytes(remote, local)
        assert not world.offers._strangers

    run(scenario, lanes=lane, tls=prefill, pull_tls=decode)
    assert not prefill.counters
    assert not decode.counters


@pytest.mark.parametrize(
    ("offering", "pulling", "says"),
    [
        ("tls", "plain", "talks TLS only; add --tls-cert"),
        ("plain", "tls", "talks no TLS; add --tls-cert"),
        ("tls", "another authority", "certificate"),
        ("another authority", "tls", "certificate"),
    ],
)
def test_a_worker_and_a_stranger_do_not_hand_over_and_both_say_why(
    prefill: Tls, decode: Tls, tmp_path: Path, offering: str, pulling: str, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = with_tls(Authority(tmp_path, "theirs"), "stranger")

    async def scenario(world: Pair) -> None:
        world.offers.open("h", DECODE_REF)
        started = time.monotonic()
        result = await world.take("h", [0, 1])
        assert time.monotonic() - started < 2.5, "nobody waited for a deadline"
        assert says in str(result.failure)
        assert not world.target.blocks.any()
        assert not world.offers._connections

    run(
        scenario,
        tls={"tls": prefill, "plain": None, "another authority": other}[offering],
        pull_tls={"tls": decode, "plain": None, "another authority": other}[pulling],
    )
    if offering == "tls":
        assert prefill.counters["tls_refused"] == 1
        assert caplog.text.count("hand-over: a peer was refused") == 1
    else:
        assert "refused" in caplog.text or "TLS" in caplog.text


def test_those_with_tls_are_served_while_strangers_knock_and_no_stranger_is_remembered_for_long(
    prefill: Tls, decode: Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offers, "MAX_STRANGERS", 3)

    async def scenario(world: Pair) -> None:
        hello = Seal(decode.client, False).shake()
        strangers = [RawPuller(world.peer.address) for _ in range(6)]
        for stranger in strangers[:5]:
            await stranger._socket.send(hello)  # and then nothing
        await strangers[5]._socket.send(b"\x08\x01 no TLS at all")
        await strangers[5]._socket.recv()  # the alert
        while len(world.offers._strangers) < 3:
            await asyncio.sleep(0.005)
        assert len(world.offers._strangers) == 3
        task = world.take("h", [0, 1, 2])
        world.offer_all("h", [5, 6, 7])
        assert (await task).failure is None
        while world.offers._strangers:
            await asyncio.sleep(0.005)
        for stranger in strangers:
            stranger.close()

    run(scenario, tls=prefill, pull_tls=decode, heartbeat_timeout_s=1.0)
    assert prefill.counters["tls_refused"] == 1


@pytest.mark.parametrize("change", ["a bit", "doubled", "left out"])
def test_a_frame_that_was_tampered_with_is_not_believed(
    prefill: Tls, decode: Tls, change: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By somebody on the wire, who sees the frames and has no key."""
    tampered: list[bytes] = []

    def meddle(link: PeerLink, frame: bytes) -> None:
        if link._seal is not None and link._seal.done and link._greeting.done() and not tampered:
            tampered.append(frame)
            frames = {"a bit": [frame[:-1] + bytes([frame[-1] ^ 1])], "doubled": [frame, frame], "left out": []}[change]
        else:
            frames = [frame]
        for each in frames:
            send(link, each)

    send = PeerLink._send_frame
    monkeypatch.setattr(PeerLink, "_send_frame", meddle)

    async def scenario(world: Pair) -> None:
        task = world.take("h", [0])
        world.offers.open("h", DECODE_REF)
        result = await task
        assert result.failure is not None
        assert "dropped the connection of worker decode-0: TLS between workers failed" in caplog.text
        assert "lost worker prefill-0 as a source of blocks: TLS between workers failed" in caplog.text
        assert not world.target.blocks.any()
        again = world.take("i", [0])  # over a new connection
        world.offer_all("i", [3])
        assert (await again).failure is None

    run(scenario, tls=prefill, pull_tls=decode)
    assert tampered


def test_a_puller_that_was_forgotten_begins_anew_and_is_no_stranger(
    prefill: Tls, decode: Tls, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(world: Pair) -> None:
        for number in range(2):
            task = world.take(f"h{number}", [number])
            world.offer_all(f"h{number}", [number + 5])
            assert (await task).failure is None
            for connection in list(world.offers._connections.values()):
                world.offers._drop(connection, "forgotten", False)
            while world.intake._users:  # its next heartbeat tells it
                await asyncio.sleep(0.005)

    run(scenario, tls=prefill, pull_tls=decode)
    assert caplog.text.count("lost worker prefill-0 as a source of blocks: TLS between workers failed") == 2
    assert not prefill.counters


def test_frames_of_one_connection_open_in_order_and_on_no_other(prefill: Tls, decode: Tls) -> None:
    def joined() -> tuple[Seal, Seal]:
        puller, server = Seal(decode.client, False), Seal(prefill.server, True)
        server.shake(puller.shake(server.shake(puller.shake())))
        assert puller.done
        assert server.done
        return puller, server

    puller, server = joined()
    for size in (1, 100, 1 << 20):
        assert server.open(puller.seal(b"x" * size)) == b"x" * size
        assert puller.open(server.seal(b"y" * size)) == b"y" * size
    assert b"prompt" not in puller.seal(b"prompt")
    other, _ = joined()
    with pytest.raises(PeerError, match="TLS between workers failed"):
        server.open(other.seal(b"from another connection"))
    with pytest.raises(PeerError, match="bad record mac"):
        puller.open(server.seal(b"what is said after a failure"))
