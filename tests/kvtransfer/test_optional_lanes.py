"""Lanes ucx and nixl between two processes, over what a machine without RDMA has: CMA, shared memory, TCP."""

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import astuple, replace

import numpy as np
import pytest
import xxhash

from baton.errors import ConfigurationError, TransferError
from kvtransfer.intake import Intake
from kvtransfer.lanes import nixl, ucx
from kvtransfer.lanes.base import BlockRead, LaneClient, LaneEndpoint
from kvtransfer.lanes.registry import LANES, parse_lanes
from kvtransfer.memory import PoolMemory
from tests.kvtransfer.world import (
    BLOCK_BYTES,
    DECODE,
    LAYOUT,
    NUM_BLOCKS,
    OPTIONS,
    ROOT,
    new_memory,
    offerer_process,
    scattered,
)

LANE_MODULES = {"ucx": ucx, "nixl": nixl}


def needs(lane: str) -> pytest.MarkDecorator:
    installed = any(importlib.util.find_spec(package) for package in LANE_MODULES[lane].PACKAGES)
    return pytest.mark.skipif(not installed, reason=f"no library for lane {lane}; `make optional-lanes` installs it")


needs_ucx, needs_nixl = needs("ucx"), needs("nixl")
LIBRARIES = [pytest.param("ucx", marks=needs_ucx), pytest.param("nixl", marks=needs_nixl)]
SHAPE = (NUM_BLOCKS, BLOCK_BYTES)
BIG = (32, 1 << 20)  # takes a while
EVERYTHING = [BlockRead(block, 0, block) for block in range(BIG[0])]


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


class Server:
    """The offering process (see lane_server.py) and what its pool holds."""

    def __init__(self, lane: str, seed: int = 1, shape: tuple[int, int] = SHAPE) -> None:
        command = [sys.executable, "-m", "tests.kvtransfer.lane_server", lane, *map(str, (seed, *shape))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self.process.stdout is not None
        self.endpoint = LaneEndpoint(*json.loads(self.process.stdout.readline()))
        self.blocks = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)

    def tell(self, *command: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)
        if number == signal.SIGSTOP:  # it has stopped once its parent can see that it has
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)


@contextlib.contextmanager
def served(lane: str, seed: int = 1, shape: tuple[int, int] = SHAPE) -> Iterator[Server]:
    server = Server(lane, seed, shape)
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def connected(server: Server, target: PoolMemory) -> Iterator[LaneClient]:
    client = LANES[server.endpoint.lane].connect(server.endpoint, target, soon())
    try:
        yield client
    finally:
        client.close()


@pytest.fixture(scope="module", params=LIBRARIES)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """For tests that leave it as it was: it takes a second to start."""
    with served(request.param) as running:
        yield running


def reads(remote: list[int], local: list[int]) -> list[BlockRead]:
    return [BlockRead(there, 0, here) for there, here in zip(remote, local, strict=True)]


def over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides talk over TCP, so that a server that does not run cannot be read; nixl does not unless told to."""
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    monkeypatch.setenv("UCX_PROTO_EMULATION_ENABLE", "y")


def stays(memory: PoolMemory) -> bool:
    before = xxhash.xxh3_64_intdigest(memory.buffer)
    time.sleep(0.3)
    return xxhash.xxh3_64_intdigest(memory.buffer) == before


def test_scattered_blocks_and_parts_of_blocks_arrive_unchanged(server):
    target, draw = new_memory(), np.random.default_rng(4)
    with connected(server, target) as client:
        for round_number in range(6):
            remote, local = scattered(40, round_number), scattered(40, round_number + 10)
            expected = target.blocks.copy()
            wanted = []
            for there, here in zip(remote, local, strict=True):
                offset = int(draw.integers(0, BLOCK_BYTES)) if round_number % 2 else 0
                length = int(draw.integers(1, BLOCK_BYTES - offset + 1)) if round_number % 2 else -1
                wanted.append(BlockRead(there, 0, here, offset, length))
                end = offset + length if length > 0 else BLOCK_BYTES
                expected[here, offset:end] = server.blocks[there, offset:end]
            client.pull(wanted, soon())
            assert (target.blocks == expected).all()
        client.pull([], soon())


@pytest.mark.parametrize("lane", LIBRARIES)
def test_what_is_too_much_for_one_turn_arrives_in_several(lane):
    with served(lane, shape=(3000, 64)) as server:
        target = new_memory(num_blocks=3000, block_bytes=64)
        with connected(server, target) as client:
            client.pull([BlockRead(block, 0, 2999 - block) for block in range(3000)], soon())
        assert (target.blocks[::-1] == server.blocks).all()


@pytest.mark.parametrize("lane", LIBRARIES)
def test_a_block_of_another_generation_is_refused_and_the_lane_is_still_good(lane):
    target = new_memory()
    with served(lane) as server, connected(server, target) as client:
        client.pull(reads([2], [2]), soon())
        server.tell("bump", 2)
        with pytest.raises(TransferError, match="no longer holds"):
            client.pull(reads([1, 2], [3, 4]), soon())
        with pytest.raises(TransferError, match=r"none is number|no such blocks"):
            client.pull(reads([NUM_BLOCKS], [0]), soon())
        client.pull([BlockRead(2, 1, 4)], soon())
        assert (target.blocks[4] == server.blocks[2]).all()


@pytest.mark.parametrize("lane", LIBRARIES)
def test_a_block_that_changes_while_it_is_copied_is_refused(lane, monkeypatch):
    with served(lane) as server, connected(server, new_memory()) as client:
        if lane == "ucx":
            server.tell("bump late", 5)
        else:
            looks = iter([lambda: None, lambda: server.tell("bump", 5)])
            look = nixl._NixlSession._look_at

            def bump_before_the_second_look(*arguments):
                next(looks)()
                return look(*arguments)

            monkeypatch.setattr(nixl._NixlSession, "_look_at", bump_before_the_second_look)
        with pytest.raises(TransferError, match="no longer holds"):
            client.pull(reads([5], [0]), soon())


def test_strangers_are_not_let_in_and_disturb_nobody(server):
    target = new_memory()
    with connected(server, target) as client:
        with pytest.raises(TransferError, match="token"):
            LANES[server.endpoint.lane].connect(
                replace(server.endpoint, token=server.endpoint.token ^ 1), target, soon()
            )
        host, _, port = server.endpoint.address.rpartition(":")
        token = server.endpoint.token.to_bytes(8, "little")
        for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", token + b"\xff\xff\xff\xff", token + bytes(4)):
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(garbage)
        client.pull(reads([0], [0]), soon())
        with connected(server, target) as another:
            another.pull(reads([1], [1]), soon())
        assert (target.blocks[:2] == server.blocks[:2]).all()


def test_a_peer_that_is_not_there_or_has_other_blocks_is_a_transfer_error(server):
    connect = LANES[server.endpoint.lane].connect
    for address in ("127.0.0.1:1", "not an address"):
        with pytest.raises(TransferError, match="reach"):
            connect(replace(server.endpoint, address=address), new_memory(), soon(1))
    with pytest.raises(TransferError, match="bytes"):
        connect(server.endpoint, new_memory(block_bytes=2 * BLOCK_BYTES), soon())


@pytest.mark.parametrize("lane", LIBRARIES)
def test_a_peer_that_is_killed_in_the_middle_of_a_pull_is_noticed_at_once(lane, monkeypatch):
    over_tcp(monkeypatch)
    target = new_memory(num_blocks=BIG[0], block_bytes=BIG[1])
    with served(lane, shape=BIG) as server, connected(server, target) as client:
        client.pull(reads([0], [0]), soon())
        server.signal(signal.SIGSTOP)  # the pull begins, and cannot end
        threading.Timer(0.3, server.signal, [signal.SIGKILL]).start()
        start = time.monotonic()
        with pytest.raises(TransferError):
            client.pull(EVERYTHING, soon(20))
        assert 0.2 < time.monotonic() - start < 5
        assert stays(target)
        with pytest.raises(TransferError):
            client.pull(reads([0], [0]), soon(1))


@pytest.mark.parametrize("lane", LIBRARIES)
def test_a_killed_peer_is_noticed_before_the_next_pull(lane):
    target = new_memory()
    with served(lane) as server, connected(server, target) as client:
        client.pull(reads([0], [0]), soon())
        server.close()
        with pytest.raises(TransferError):
            client.pull(reads([1], [1]), soon(5))
        assert not target.blocks[1:].any()


@pytest.mark.parametrize("how", ["deadline", "cancelled"])
@pytest.mark.parametrize("lane", LIBRARIES)
def test_a_stopped_peer_is_left_in_time(lane, how, monkeypatch):
    over_tcp(monkeypatch)
    target, cancelled = new_memory(num_blocks=BIG[0], block_bytes=BIG[1]), threading.Event()
    with served(lane, shape=BIG) as server, connected(server, target) as client:
        server.signal(signal.SIGSTOP)
        if how == "cancelled":
            threading.Timer(0.3, cancelled.set).start()
        start = time.monotonic()
        with pytest.raises(TransferError, match=how):
            client.pull(EVERYTHING, soon(0.3 if how == "deadline" else 20), cancelled)
        assert 0.2 < time.monotonic() - start < 1.0
        server.signal(signal.SIGCONT)
        assert stays(target)
        if lane == "ucx":  # 2. it came back. A server of nixl's dies of it, and therefore never answers over TCP
            client.pull(EVERYTHING, soon())
            assert (target.blocks == server.blocks).all()


@pytest.mark.parametrize("lane", LIBRARIES)
def test_a_peer_stopped_in_the_middle_of_a_transfer_writes_nothing_after_the_pull(lane, monkeypatch):
    over_tcp(monkeypatch)
    monkeypatch.setattr(ucx, "_unfinished", [])
    target = new_memory(num_blocks=BIG[0], block_bytes=BIG[1])
    for pause_s in (0.003, 0.006, 0.002, 0.008, 0.004, 0.012):
        with served(lane, shape=BIG) as server, connected(server, target) as client:
            client.pull(EVERYTHING, soon())
            target.blocks[:] = 0
            threading.Timer(pause_s, server.signal, [signal.SIGSTOP]).start()
            with contextlib.suppress(TransferError):
                client.pull(EVERYTHING, soon(0.3))
                assert (target.blocks == server.blocks).all()
            os.waitid(os.P_PID, server.process.pid, os.WSTOPPED | os.WNOWAIT)
            before = target.blocks.copy()
            server.signal(signal.SIGCONT)
            assert stays(target)
            assert (target.blocks == before).all()
            if before.any() and (before != server.blocks).any():
                return  # it was hit in the middle
    pytest.fail("no transfer was hit in its middle")


@pytest.mark.parametrize("lane", LIBRARIES)
def test_a_server_outlives_a_peer_that_is_killed_in_the_middle_of_a_pull(lane):
    with served(lane, shape=BIG) as server:
        for _ in range(2):
            command = [sys.executable, "-m", "tests.kvtransfer.lane_puller", json.dumps(astuple(server.endpoint))]
            command += map(str, BIG)
            puller = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            assert puller.stdout is not None
            assert puller.stdout.readline() == "pulling\n"
            puller.kill()
            puller.communicate(timeout=10)
        target = new_memory(num_blocks=BIG[0], block_bytes=BIG[1])
        with connected(server, target) as client:
            client.pull(EVERYTHING, soon())
        assert (target.blocks == server.blocks).all()


@needs_nixl
def test_nixl_reads_nobody_over_tcp_and_the_next_lane_is_taken(monkeypatch):
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    with served("nixl") as server:
        with pytest.raises(TransferError, match="nixl"):
            LANES["nixl"].connect(server.endpoint, new_memory(), soon())
        assert server.process.poll() is None


@pytest.mark.parametrize("server", [LIBRARIES[0]], indirect=True)
def test_ucx_is_given_up_when_too_many_receives_could_not_be_ended(server, monkeypatch):
    with connected(server, new_memory()) as client:
        monkeypatch.setattr(ucx, "_unfinished", [None] * ucx.MAX_UNFINISHED)
        client.pull(reads([0], [0]), soon())
        with pytest.raises(TransferError, match="restart"):
            LANES["ucx"].connect(server.endpoint, new_memory(), soon())


def test_an_expired_or_cancelled_pull_copies_nothing(server):
    target, cancelled = new_memory(), threading.Event()
    cancelled.set()
    with connected(server, target) as client:
        with pytest.raises(TransferError, match="cancelled"):
            client.pull(reads([1], [1]), soon(), cancelled)
        with pytest.raises(TransferError, match="deadline"):
            client.pull(reads([1], [1]), soon(-1))
        assert not target.blocks.any()


@pytest.mark.parametrize("lane", LIBRARIES)
def test_a_restarted_peer_is_another_one(lane):
    target = new_memory()
    with served(lane, seed=1) as first, connected(first, target) as client:
        client.pull(reads([0], [0]), soon())
        first.close()
        with served(lane, seed=2) as second, connected(second, target) as other:
            with pytest.raises(TransferError):
                client.pull(reads([1], [1]), soon(5))
            assert not target.blocks[1:].any()
            other.pull(reads([1], [1]), soon())
            assert (target.blocks[1] == second.blocks[1]).all()


def test_threads_and_clients_pull_side_by_side(server):
    target = new_memory()
    rows = [scattered(8, seed) for seed in range(8)]
    errors: list[TransferError] = []
    with connected(server, target) as one, connected(server, target) as other:

        def pull(index: int) -> None:
            try:
                for _ in range(10):
                    local = list(range(index * 8, index * 8 + 8))
                    (one if index % 2 else other).pull(reads(rows[index], local), soon(20))
            except TransferError as error:
                errors.append(error)

        threads = [threading.Thread(target=pull, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not errors
        for index, row in enumerate(rows):
            assert (target.blocks[index * 8 : index * 8 + 8] == server.blocks[row]).all()


@pytest.mark.parametrize("lane", LIBRARIES)
def test_a_closed_server_serves_nobody(lane):
    server, target = LANES[lane].serve("127.0.0.1"), new_memory()
    client = LANES[lane].connect(server.start(new_memory(seed=1)), target, soon())
    client.pull(reads([0], [0]), soon())
    server.close()
    with pytest.raises(TransferError):
        client.pull(reads([1], [1]), soon(2))
    client.close()
    assert not target.blocks[1:].any()


def test_a_server_that_nobody_uses_sleeps(server):
    with connected(server, new_memory()) as client:
        client.pull(reads([0], [0]), soon())
        before_s = _cpu_s(server.process.pid)
        time.sleep(1.0)
        assert _cpu_s(server.process.pid) - before_s < 0.2


def _cpu_s(pid: int) -> float:
    fields = (ROOT.parents[-1] / "proc" / str(pid) / "stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("lane", LIBRARIES)
def test_a_whole_hand_over_takes_the_lane(lane):
    async def scenario() -> None:
        target, options = new_memory(), replace(OPTIONS, heartbeat_timeout_s=5.0)
        intake = Intake(DECODE, LAYOUT, target, parse_lanes(f"{lane},tcp"), options, {})
        remote, local = scattered(40, 1), scattered(40, 2)
        task = asyncio.create_task(intake.take("h", offerer.peer, local, 0, soon(15)))
        offerer.tell("open", "h")
        for start in range(0, 40, 8):
            offerer.tell("offer", "h", start, remote[start : start + 8])
        offerer.tell("close", "h", 40)
        assert (await task).failure is None
        assert intake.lanes_in_use() == {"prefill-0": lane}
        assert (target.blocks[local] == new_memory(seed=1).blocks[remote]).all()
        await intake.stop()

    with offerer_process(lanes=lane, heartbeat_timeout_s=5.0) as offerer:
        asyncio.run(scenario())


@pytest.mark.parametrize("lane", LANE_MODULES)
def test_a_lane_without_its_library_says_so(lane, monkeypatch):
    LANE_MODULES[lane]._library.cache_clear()
    for name in ("ucxx", "ucxx._lib", "ucxx._lib.libucxx", "nixl_cu12._bindings", "nixl_cu13._bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigurationError, match="not installed"):
        LANES[lane].serve("127.0.0.1").start(new_memory())
    with pytest.raises(TransferError, match="not installed"):
        LANES[lane].connect(LaneEndpoint(lane, "127.0.0.1:1", 1), new_memory(), soon())
