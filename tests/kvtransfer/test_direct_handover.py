"""Both ends of a hand-over whose blocks are written in place: who may write where, and until when."""

import asyncio
import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from baton.errors import TransferError
from baton.v1 import handover_pb2 as pb
from kvtransfer.direct import DirectServer, Lending, Placed
from kvtransfer.intake import CANCELLED, Intake, IntakeResult
from kvtransfer.lanes.base import LaneEndpoint, OtherHostError
from kvtransfer.lanes.registry import parse_lanes
from kvtransfer.memory import PoolMemory
from kvtransfer.offers import OfferServer
from kvtransfer.wire import PeerRef
from tests.kvtransfer.world import (
    BLOCK_BYTES,
    DECODE,
    DECODE_REF,
    LAYOUT,
    NUM_BLOCKS,
    OPTIONS,
    PREFILL,
    ROOT,
    Owner,
    fill,
    new_memory,
    scattered,
)


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs a coroutine as a test."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        asyncio.run(test(**arguments))

    return run


SETTINGS = replace(OPTIONS, lanes="fake", direct_wait_s=1.0)


@dataclass
class World:
    """A prefill worker that writes, and a decode worker that lends its pool."""

    owner: Owner
    offers: OfferServer
    intake: Intake
    direct: DirectServer
    source: PoolMemory
    target: PoolMemory
    peer: PeerRef
    counters: dict[str, float]
    wants: dict[str, Placed | None] = field(default_factory=dict)

    def take(self, local: Sequence[int], first_block: int = 0) -> "asyncio.Task[IntakeResult]":
        return asyncio.create_task(self.intake.take("h", self.peer, local, first_block, time.monotonic() + 10))

    async def want(self) -> Placed | None:
        async with asyncio.timeout(5):
            while "h" not in self.wants:
                await asyncio.sleep(0.001)
        return self.wants["h"]

    async def placed(self) -> Placed:
        placed = await self.want()
        assert placed is not None
        return placed

    async def recalled(self) -> None:
        """The writer knows that its peer wants the pool back: nothing new is written there."""
        async with asyncio.timeout(5):
            while self.direct.lends(DECODE):
                await asyncio.sleep(0.001)

    def write(self, placed: Placed, start: int, end: int, value: int) -> None:
        blocks = np.frombuffer(self.source.buffer, np.uint8).reshape(-1, BLOCK_BYTES)
        blocks[list(placed.block_ids[start:end])] = value


@contextlib.asynccontextmanager
async def world(**options: float) -> AsyncIterator[World]:
    settings = replace(SETTINGS, **options)
    source, target = PoolMemory.create(NUM_BLOCKS, BLOCK_BYTES, num_peer_blocks=4 * NUM_BLOCKS), new_memory()
    fill(source)
    direct, owner, counters = DirectServer(source), Owner(), dict[str, float]()
    lanes = [lane.serve("127.0.0.1") for lane in parse_lanes(settings.lanes)]
    callbacks = owner.on_released, owner.on_quarantined, owner.on_resolved
    wants: dict[str, Placed | None] = {}
    offers = OfferServer(PREFILL, LAYOUT, source, lanes, settings, {}, *callbacks, direct, wants.__setitem__)
    address = await offers.start("127.0.0.1")
    intake = Intake(DECODE, LAYOUT, target, parse_lanes(settings.lanes), settings, counters)
    peer = PeerRef(PREFILL.worker_id, PREFILL.incarnation, address)
    try:
        yield World(owner, offers, intake, direct, source, target, peer, counters, wants)
    finally:
        await intake.stop()
        await offers.stop()
        source.close()
        target.close()


@in_loop
async def test_a_row_is_written_in_place_and_closed_with_the_first_token() -> None:
    async with world() as pair:
        local = scattered(8)
        taking = pair.take(local, first_block=2)
        pair.offers.open("h", DECODE_REF)
        placed = await pair.placed()
        assert placed.num_cached_blocks == 2
        pair.write(placed, 2, 5, value=1)
        pair.offers.written("h", 5, stopped=False)
        pair.write(placed, 5, 8, value=1)
        pair.offers.written_all("h", 8, 128, 7, 3)
        assert await taking == IntakeResult(8, 128, 7, 3)
        assert (pair.target.blocks[local[2:]] == 1).all()
        assert pair.counters["handover_blocks_direct"] == 6


@in_loop
async def test_a_hand_over_that_ends_early_is_fenced_until_the_writer_has_stopped() -> None:
    async with world() as pair:
        taking = pair.take(scattered(8))
        pair.offers.open("h", DECODE_REF)
        await pair.placed()
        pair.offers.written("h", 3, stopped=False)
        pair.offers.fail("h", "test")
        result = await taking
        assert (result.num_blocks, result.failure) == (3, "the peer gave up: test")
        assert result.fence is not None
        await asyncio.sleep(0.1)
        assert not result.fence.done()
        pair.offers.written("h", 3, stopped=True)
        await asyncio.wait_for(result.fence, 5)


@in_loop
async def test_a_cancelled_hand_over_is_fenced_too() -> None:
    async with world() as pair:
        taking = pair.take(scattered(8))
        pair.offers.open("h", DECODE_REF)
        await pair.placed()
        pair.intake.cancel("h")
        result = await taking
        assert result.failure == CANCELLED
        assert result.fence is not None
        assert not result.fence.done()
        pair.offers.written("h", 0, stopped=True)
        await asyncio.wait_for(result.fence, 5)


@in_loop
async def test_a_lost_connection_keeps_the_fence_until_the_writer_has_given_the_pool_back() -> None:
    async with world() as pair:
        taking = pair.take(scattered(8))
        pair.offers.open("h", DECODE_REF)
        placed = await pair.placed()
        (link,) = pair.intake._users
        link._lose("test")
        result = await taking
        assert result.fence is not None
        await pair.recalled()
        assert not result.fence.done()
        pair.write(placed, 0, 8, value=9)  # what a step in flight does; it still may
        pair.offers.written("h", 8, stopped=True)
        await asyncio.wait_for(result.fence, 5)


@in_loop
async def test_a_lease_that_ends_while_the_row_is_written_leaves_the_fence_up() -> None:
    async with world(lease_s=0.3) as pair:
        taking = pair.take(scattered(8))
        pair.offers.open("h", DECODE_REF)
        placed = await pair.placed()
        (link,) = pair.intake._users
        link._tasks[-1].cancel()  # it renews nothing any more
        pair.offers.written("h", 3, stopped=False)
        result = await taking
        assert (result.num_blocks, result.failure) == (3, "the lease ended")
        await pair.owner.has_seen("h", "quarantined")
        await pair.owner.has_seen("h", "resolved")
        assert result.fence is not None
        assert not result.fence.done()
        pair.write(placed, 3, 8, value=9)  # what a step in flight does; it still may
        pair.offers.written("h", 3, stopped=True)
        await asyncio.wait_for(result.fence, 5)


@in_loop
async def test_a_declined_placement_is_pulled_into_and_not_before_it_was_declined() -> None:
    async with world() as pair:
        local, remote = scattered(8), scattered(8, seed=2)
        taking = pair.take(local)
        pair.offers.open("h", DECODE_REF)
        await pair.placed()
        pair.offers.offer("h", 0, remote, pair.source.generations[remote].tolist())
        pair.offers.close("h", 8, 128, 7, 3)
        await asyncio.sleep(0.1)
        assert not taking.done()
        assert not pair.target.blocks.any()
        pair.offers.written("h", 0, stopped=True)
        assert await taking == IntakeResult(8, 128, 7, 3)
        assert (pair.source.blocks[remote] == pair.target.blocks[local]).all()


@pytest.mark.parametrize("wrong", ["generation", "block", "twice", "lending", "nothing"])
@in_loop
async def test_a_placement_that_is_not_what_was_lent_is_not_written_into(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def place(intake: Intake, want: pb.Want, lending: Lending, block_ids: Sequence[int]) -> None:
        generations = intake._memory.generations[list(block_ids)].tolist()
        ids = list(block_ids)
        match wrong:
            case "generation":
                generations[3] += 1
            case "block":
                ids[3] = NUM_BLOCKS
            case "twice":
                ids[3] = ids[4]
            case "nothing":
                ids, generations = [], []
        number = lending.number ^ (wrong == "lending")
        want.placement.CopyFrom(pb.Placement(lending=number, block_ids=ids, generations=generations))

    monkeypatch.setattr(Intake, "_place", place)
    async with world() as pair:
        local, remote = scattered(8), scattered(8, seed=2)
        taking = pair.take(local)
        pair.offers.open("h", DECODE_REF)
        assert await pair.want() is None
        pair.offers.offer("h", 0, remote, pair.source.generations[remote].tolist())
        pair.offers.close("h", 8, 128, 7, 3)
        assert await taking == IntakeResult(8, 128, 7, 3)


@in_loop
async def test_a_pool_is_given_back_when_its_owner_leaves_and_the_last_writer_has_stopped() -> None:
    async with world() as pair:
        taking = pair.take(scattered(4))
        pair.offers.open("h", DECODE_REF)
        await pair.placed()
        await pair.intake.stop()
        assert (await taking).failure is not None
        await pair.recalled()
        assert len(pair.source._peers) == 1
        pair.offers.written("h", 0, stopped=True)
        assert not pair.source._peers


@pytest.mark.parametrize("change", ["token", "host", "blocks"])
@in_loop
async def test_a_pool_is_lent_to_nobody_else_than_the_peer(change: str) -> None:
    memory = PoolMemory.create(4, 4096, num_peer_blocks=64)
    server, mine = DirectServer(memory), PoolMemory.create(4, 8192 if change == "blocks" else 4096)
    endpoint = server.start()
    token = endpoint.token ^ (change == "token")
    address = ("elsewhere/" if change == "host" else "") + endpoint.address
    kind = OtherHostError if change == "host" else TransferError
    with pytest.raises(kind):
        await asyncio.to_thread(
            Lending.connect, LaneEndpoint("direct", address, token), mine, DECODE, time.monotonic() + 5
        )
    assert not server.lends(DECODE)
    assert not memory._peers
    await server.close()


WRITER = """
import asyncio, sys
from kvtransfer.direct import DirectServer
from kvtransfer.memory import PoolMemory
async def main():
    server = DirectServer(PoolMemory.create(4, 4096, num_peer_blocks=64))
    endpoint = server.start()
    print(endpoint.address, endpoint.token, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@in_loop
async def test_a_fence_outlasts_a_stopped_process_and_falls_with_a_dead_one() -> None:
    words = [sys.executable, "-c", WRITER]
    process = await asyncio.to_thread(subprocess.Popen, words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        address, token = (await asyncio.to_thread(process.stdout.readline)).split()
        endpoint = LaneEndpoint("direct", address, int(token))
        lending = await asyncio.to_thread(
            Lending.connect, endpoint, PoolMemory.create(4, 4096), DECODE, time.monotonic() + 5
        )
        lending.watch(lambda lending, fenced: None)
        fence = lending.fence("h")
        os.kill(process.pid, signal.SIGSTOP)
        lending.recall()
        await asyncio.sleep(0.2)
        assert not fence.done()
        process.kill()
        await asyncio.wait_for(fence, 5)
    finally:
        process.kill()
        process.wait()
