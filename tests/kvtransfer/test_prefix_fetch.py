"""Blocks asked for by name: what a holder answers, what a fetch makes of it, and what a peer that lies gets."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import pytest

from baton.v1 import handover_pb2 as pb
from kvtransfer import prefix_fetch
from kvtransfer.intake import Intake
from kvtransfer.lanes.registry import parse_lanes
from kvtransfer.offers import OfferServer
from kvtransfer.prefix_fetch import Holder, PrefixFetcher
from kvtransfer.wire import MAX_WANT_NAMES, PeerIdentity, PeerRef
from tests.kvtransfer.world import (
    DECODE,
    LAYOUT,
    OPTIONS,
    PREFILL,
    Owner,
    RawOfferer,
    RawPuller,
    new_memory,
    scattered,
)

NAMES = [bytes([number]) * 16 for number in range(12)]
LIMIT_S = 5.0


@dataclass
class World:
    """A holder that has the blocks in `held`, and a worker that fetches. `hold_back`: what it says is all it does."""

    offers: OfferServer
    owner: Owner
    fetcher: PrefixFetcher
    peer: PeerRef
    counters: dict[str, float]
    source: object
    target: object
    held: list[int] = field(default_factory=list)
    num_leased: int | None = None
    hold_back: bool = False
    asked: list[str] = field(default_factory=list)

    def on_ask(self, key: str, peer: PeerIdentity, names: Sequence[bytes]) -> None:
        self.asked.append(key)
        found = min(len(names), len(self.held))
        self.offers.found(key, found)
        if found and not self.hold_back:
            blocks = self.held[: found if self.num_leased is None else self.num_leased]
            self.offers.open(key, PeerRef(peer.worker_id, peer.incarnation, ""))
            self.offers.offer(key, 0, blocks, self.source.generations[blocks].tolist())
            self.offers.close(key, len(blocks), 0, 0, 0)

    async def fetch(self, local: Sequence[int], names: Sequence[bytes] = NAMES, limit_s: float = LIMIT_S) -> int:
        return (await self.fetcher.fetch("r", self.peer, names, local, limit_s)).num_blocks

    def counted(self) -> tuple[float, float, float]:
        return tuple(self.counters.get(f"prefix_fetches{each}", 0) for each in ("", "_empty", "_failed"))


@contextlib.asynccontextmanager
async def world(lanes: str = "fake") -> AsyncIterator[World]:
    source, target, owner = new_memory(seed=1), new_memory(), Owner()
    counters: dict[str, float] = {}
    late: list[World] = []
    offers = OfferServer(
        PREFILL, LAYOUT, source, [lane.serve("127.0.0.1") for lane in parse_lanes(lanes)], OPTIONS, {},
        owner.on_released, owner.on_quarantined, owner.on_resolved, on_ask=lambda *asked: late[0].on_ask(*asked),
    )  # fmt: skip
    address = await offers.start("127.0.0.1")
    intake = Intake(DECODE, LAYOUT, target, parse_lanes(lanes), OPTIONS, counters)
    fetcher = PrefixFetcher(DECODE, intake, LAYOUT.block_bytes, counters)
    peer = PeerRef(PREFILL.worker_id, PREFILL.incarnation, address)
    late.append(World(offers, owner, fetcher, peer, counters, source, target))
    try:
        yield late[0]
    finally:
        await intake.stop()
        await offers.stop()
        source.close()
        target.close()


@pytest.mark.parametrize("num_held", [1, 5, len(NAMES), 20])
def test_as_many_leading_blocks_as_the_holder_has_arrive_and_its_lease_is_released(num_held: int) -> None:
    async def run() -> None:
        async with world() as w:
            w.held = scattered(num_held)
            local = scattered(len(NAMES), seed=1)
            expected = min(num_held, len(NAMES))
            assert await w.fetch(local) == expected
            assert (w.source.blocks[w.held[:expected]] == w.target.blocks[local[:expected]]).all()
            await w.owner.has_seen(w.asked[0], "released", "verified")
            assert w.counted() == (1, 0, 0)
            assert w.counters.get("handover_failures", 0) == 0

    asyncio.run(run())


def test_a_holder_without_any_says_so_at_once_and_nothing_is_left_of_it() -> None:
    async def run() -> None:
        async with world() as w:
            start = time.monotonic()
            assert await w.fetch(scattered(len(NAMES))) == 0
            assert time.monotonic() - start < LIMIT_S * prefix_fetch.ANSWER_SHARE
            assert w.counted() == (1, 1, 0)
            assert not w.offers.is_awaited(w.asked[0])
            assert w.fetcher.prospect([Holder(w.peer, 160)]) is not None, "that is no failure"

    asyncio.run(run())


def test_what_is_gone_by_the_time_of_the_lease_is_not_waited_for() -> None:
    async def run() -> None:
        async with world() as w:
            w.held, w.num_leased = scattered(8), 3
            assert await w.fetch(scattered(len(NAMES))) == 3
            w.num_leased = 0
            assert await w.fetch(scattered(len(NAMES))) == 0
            assert w.counted() == (2, 1, 0)

    asyncio.run(run())


def test_a_holder_that_finds_blocks_and_offers_none_costs_the_limit_and_is_known_to_be_slow() -> None:
    async def run() -> None:
        async with world() as w:
            w.held, w.hold_back = scattered(4), True
            start = time.monotonic()
            assert await w.fetch(scattered(len(NAMES)), limit_s=0.4) == 0
            assert 0.3 < time.monotonic() - start < 2.0
            assert w.counted() == (1, 0, 1)
            prospect = w.fetcher.prospect([Holder(w.peer, 160)])
            assert prospect is not None
            assert prospect.wait_s == 0.4
            # A holder that comes to it later finds that nobody waits.
            async with asyncio.timeout(5):
                while w.offers.is_awaited(w.asked[0]):
                    await asyncio.sleep(0.01)

    asyncio.run(run())


def test_a_holder_that_does_not_answer_is_given_up_soon_and_left_alone() -> None:
    async def run() -> None:
        silent = RawOfferer()
        async with world() as w:
            there, w.peer = w.peer, silent.peer
            start = time.monotonic()
            assert await w.fetch(scattered(len(NAMES)), limit_s=0.4) == 0
            assert time.monotonic() - start < 0.3
            assert w.counted() == (1, 0, 1)
            assert w.fetcher.prospect([Holder(w.peer, 160)]) is None
            other = Holder(PeerRef("another", 5, there.address), 64)
            prospect = w.fetcher.prospect([Holder(w.peer, 160), other])
            assert prospect is not None
            assert prospect.holder == other
        silent.close()

    asyncio.run(run())


def test_a_cancelled_fetch_returns_and_the_lease_ends() -> None:
    async def run() -> None:
        async with world("faulty:fake?stall=1") as w:
            w.held = scattered(len(NAMES))
            fetch = asyncio.create_task(w.fetch(scattered(len(NAMES), seed=1), limit_s=30.0))
            async with asyncio.timeout(5):
                while not w.asked:
                    await asyncio.sleep(0.005)
            w.fetcher.cancel("r")
            assert await asyncio.wait_for(fetch, 5) < len(NAMES)
            await w.owner.has_seen(w.asked[0], "released", "unverified")
            assert w.counted()[2] == 0, "whoever cancels knows"
            w.fetcher.cancel("r")  # of nothing

    asyncio.run(run())


def test_what_fetching_costs_is_learned() -> None:
    async def run() -> None:
        async with world() as w:
            before = w.fetcher.prospect([Holder(w.peer, 160)])
            w.held = scattered(len(NAMES))
            await w.fetch(scattered(len(NAMES), seed=1))
            after = w.fetcher.prospect([Holder(w.peer, 160)])
            assert before is not None
            assert after is not None
            assert before.wait_s == prefix_fetch.ASSUMED_WAIT_S
            assert 0 < after.wait_s != before.wait_s
            assert 0 < after.block_s != before.block_s

    asyncio.run(run())


def test_a_peer_that_claims_more_than_it_was_asked_for_is_not_believed() -> None:
    async def run() -> None:
        liar = RawOfferer()
        async with world() as w:
            endpoint = w.offers._endpoints[0]
            w.peer = liar.peer
            fetch = asyncio.create_task(w.fetch(scattered(len(NAMES))))
            await liar.accept(endpoint)
            want = (await liar.next("want")).want
            assert list(want.names) == NAMES
            await liar.send(found=pb.Found(handover_id=want.handover_id, num_blocks=len(NAMES) + 1))
            assert await fetch == 0
            assert w.counted() == (1, 0, 1)
        liar.close()

    asyncio.run(run())


def test_a_peer_that_repeats_itself_asks_once() -> None:
    async def run() -> None:
        async with world() as w:
            w.hold_back, w.held = True, scattered(4)
            puller = RawPuller(w.peer.address)
            assert (await puller.hello()).accepted
            for _ in range(2):
                await puller.send(want=pb.Want(handover_id="twice", names=NAMES))
            assert (await puller.next("found")).found.num_blocks == 4
            assert await puller.hears_no("found", 0.1)
            assert w.asked == ["twice"]
            puller.close()

    asyncio.run(run())


def test_a_peer_that_asks_for_too_many_is_dropped() -> None:
    async def run() -> None:
        async with world() as w:
            puller = RawPuller(w.peer.address)
            assert (await puller.hello()).accepted
            await puller.send(want=pb.Want(handover_id="many", names=[b"x" * 16] * (MAX_WANT_NAMES + 1)))
            assert not (await puller.next("hello_reply")).hello_reply.accepted
            assert not w.asked
            puller.close()

    asyncio.run(run())
