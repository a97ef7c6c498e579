"""Hand-overs between real processes, one of which is killed, stopped or restarted in the middle."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest

from kvtransfer.intake import Intake, IntakeResult
from kvtransfer.lanes.registry import parse_lanes
from kvtransfer.memory import PoolMemory
from kvtransfer.wire import PeerRef
from tests.kvtransfer.world import (
    DECODE,
    LAYOUT,
    OPTIONS,
    ROOT,
    OffererProcess,
    new_memory,
    offerer_process,
    scattered,
    settles_unwritten,
)

SOURCE = new_memory(seed=1)
BIG = (96, 1 << 20)  # long enough to be hit in the middle of a pull


class Puller:
    def __init__(self, lanes: str, shape: tuple[int, int] | None = None, **options: float) -> None:
        self.memory = PoolMemory.create(*shape) if shape else new_memory()
        self.counters: dict[str, float] = {}
        settings = replace(OPTIONS, **options)
        self.intake = Intake(DECODE, LAYOUT, self.memory, parse_lanes(lanes), settings, self.counters)

    def take(self, handover_id: str, peer: PeerRef, local: list[int]) -> "asyncio.Task[IntakeResult]":
        return asyncio.create_task(self.intake.take(handover_id, peer, local, 0, time.monotonic() + 15))

    async def received(self, num_blocks: int) -> None:
        async with asyncio.timeout(10):
            while self.counters.get("handover_blocks_received", 0) < num_blocks:
                await asyncio.sleep(0.002)

    def faults(self, name: str) -> int:
        plan = self.intake._lanes[0].faults
        return plan.injected[name] if plan else 0


@contextlib.asynccontextmanager
async def puller(lanes: str, shape: tuple[int, int] | None = None, **options: float) -> AsyncIterator[Puller]:
    world = Puller(lanes, shape, **options)
    try:
        yield world
    finally:
        await world.intake.stop()


@pytest.mark.parametrize("lane", ["shm", "cma", "tcp"])
def test_blocks_cross_processes_unchanged(lane):
    async def scenario(offerer: OffererProcess) -> None:
        async with puller("shm,cma,tcp") as world:
            remote, local = scattered(40, 1), scattered(40, 2)
            task = world.take("h", offerer.peer, local)
            offerer.tell("open", "h")
            for start in range(0, 40, 8):
                offerer.tell("offer", "h", start, remote[start : start + 8])
            offerer.tell("close", "h", 40)
            assert (await task).failure is None
            assert (world.memory.blocks[local] == SOURCE.blocks[remote]).all()
            assert world.intake.lanes_in_use() == {"prefill-0": lane}
            assert offerer.read() == {"event": ["h", "released", "verified"]}

    with offerer_process(lanes=lane) as offerer:
        asyncio.run(scenario(offerer))


@pytest.mark.parametrize("lane", ["shm", "cma", "tcp"])
def test_a_killed_offerer_leaves_the_blocks_verified_before_and_is_noticed_at_once(lane):
    async def scenario(offerer: OffererProcess) -> None:
        async with puller(lane, heartbeat_timeout_s=5.0) as world:
            task = world.take("h", offerer.peer, list(range(20)))
            offerer.tell("open", "h")
            offerer.tell("offer", "h", 0, list(range(30, 40)))
            await world.received(10)
            os.kill(offerer.process.pid, signal.SIGKILL)
            start = time.monotonic()
            result = await task
            assert time.monotonic() - start < 2.0, "not by silence, which takes five seconds"
            assert (result.num_blocks, result.failure) == (10, "it closed the connection")
            assert (world.memory.blocks[:10] == SOURCE.blocks[30:40]).all()
            assert await settles_unwritten(world.memory)
            assert world.counters["handover_peer_losses"] == 1

    with offerer_process(lanes=lane) as offerer:
        asyncio.run(scenario(offerer))


@pytest.mark.parametrize("lane", ["shm", "cma", "tcp"])
def test_an_offerer_killed_in_the_middle_of_a_pull_never_gives_a_wrong_byte(lane):
    async def scenario(offerer: OffererProcess) -> None:
        async with puller(f"faulty:{lane}?delay=1-&delay_s=0.1", BIG) as world:
            task = world.take("h", offerer.peer, list(range(96)))
            offerer.tell("open", "h")
            offerer.tell("offer", "h", 0, list(range(95, -1, -1)))
            await world.received(16)  # several more batches are offered, announced and not pulled yet
            os.kill(offerer.process.pid, signal.SIGKILL)
            result = await task
            assert 16 <= result.num_blocks < 96
            assert result.failure is not None
            assert world.faults("delay") >= 1
            expected = _contents(BIG)[95 : 95 - result.num_blocks : -1]
            assert (world.memory.blocks[: result.num_blocks] == expected).all()
            assert await settles_unwritten(world.memory)

    with offerer_process(lanes=lane, shape=BIG) as offerer:
        asyncio.run(scenario(offerer))


def _contents(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


def test_a_stopped_offerer_is_left_by_the_deadline_of_the_pull_when_heartbeats_are_slow():
    async def scenario(offerer: OffererProcess) -> None:
        async with puller("faulty:tcp?delay=1&delay_s=0.5", pull_timeout_s=0.8) as world:
            task = world.take("h", offerer.peer, [0, 1])
            offerer.tell("open", "h")
            offerer.tell("offer", "h", 0, [5, 6])
            while not world.faults("delay"):
                await asyncio.sleep(0.005)
            os.kill(offerer.process.pid, signal.SIGSTOP)  # the pull is about to ask it for the bytes
            start = time.monotonic()
            result = await task
            assert time.monotonic() - start < 3.0
            assert (result.num_blocks, result.failure) == (0, "the blocks did not arrive before the deadline")
            os.kill(offerer.process.pid, signal.SIGCONT)
            assert await settles_unwritten(world.memory)
            assert offerer.read() == {"event": ["h", "released", "unverified"]}

    with offerer_process(lanes="tcp", heartbeat_interval_s=1.0, heartbeat_timeout_s=9.0) as offerer:
        asyncio.run(scenario(offerer))


def test_a_stopped_offerer_falls_silent_and_what_it_says_later_is_not_heard():
    async def scenario(offerer: OffererProcess) -> None:
        async with puller("shm") as world:
            task = world.take("h", offerer.peer, list(range(4)))
            offerer.tell("open", "h")
            offerer.tell("offer", "h", 0, [5, 6])
            await world.received(2)
            os.kill(offerer.process.pid, signal.SIGSTOP)
            offerer.tell("offer", "h", 2, [7, 8])
            assert (await task).failure == "it fell silent"
            os.kill(offerer.process.pid, signal.SIGCONT)
            assert await settles_unwritten(world.memory)
            assert not world.memory.blocks[2:].any()
            # 2. it came back: the same process may be used again, over a new connection
            assert offerer.read() == {"event": ["h", "released", "unverified"]}
            task = world.take("g", offerer.peer, [0])
            offerer.tell("open", "g")
            offerer.tell("offer", "g", 0, [9])
            offerer.tell("close", "g", 1)
            assert (await task).failure is None
            assert (world.memory.blocks[0] == SOURCE.blocks[9]).all()

    with offerer_process(lanes="shm") as offerer:
        asyncio.run(scenario(offerer))


def test_a_restarted_offerer_at_the_same_address_is_refused_until_its_new_life_is_known():
    async def scenario(offerer: OffererProcess, world: Puller) -> None:
        task = world.take("h", offerer.peer, [0])
        offerer.tell("open", "h")
        offerer.tell("offer", "h", 0, [5])
        await world.received(1)
        offerer.close()
        assert (await task).failure is not None
        with offerer_process(lanes="shm", incarnation=12, seed=2, address=offerer.peer.address) as second:
            assert second.peer.address == offerer.peer.address
            stale = await world.take("h2", offerer.peer, [1])
            assert "restarted" in (stale.failure or "")
            assert not world.memory.blocks[1:].any()
            task = world.take("h3", second.peer, [1])
            second.tell("open", "h3")
            second.tell("offer", "h3", 0, [5])
            second.tell("close", "h3", 1)
            assert (await task).failure is None
            assert world.memory.blocks[1].any()
            assert (world.memory.blocks[1] != SOURCE.blocks[5]).any()

    async def main() -> None:
        with offerer_process(lanes="shm") as offerer:
            async with puller("shm") as world:
                await scenario(offerer, world)

    asyncio.run(main())


def test_the_blocks_of_a_killed_puller_come_back():
    with offerer_process(lanes="shm", heartbeat_timeout_s=5.0) as offerer:
        offerer.tell("open", "h")
        offerer.tell("offer", "h", 0, [1, 2])
        command = [sys.executable, "-m", "tests.kvtransfer.puller", offerer.peer.address, "2"]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert child.stdout is not None
        assert child.stdout.readline() == "verified\n"
        child.kill()
        child.communicate(timeout=10)
        start = time.monotonic()
        assert offerer.read() == {"event": ["h", "released", "unverified"]}
        assert time.monotonic() - start < 3.0, "the closed connection tells, not the silence"
