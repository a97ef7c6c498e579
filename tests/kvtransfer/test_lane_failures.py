"""Peers that stop, die, come back or talk nonsense in the middle of a pull: real processes and real sockets.

In every case the bytes are right or a TransferError comes within the deadline, and nothing is written afterwards.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import xxhash

from baton.errors import TransferError
from kvtransfer.lanes import streams, tcp
from kvtransfer.lanes.base import BlockRead, LaneClient, LaneEndpoint
from kvtransfer.lanes.registry import LANES
from kvtransfer.memory import PoolMemory
from kvtransfer.pulls import Part, WantedBytes, pull_and_verify
from tests.kvtransfer.world import BLOCK_BYTES, NUM_BLOCKS, ROOT, new_memory

LANES_HERE = ("shm", "cma", "tcp")
SHAPE = (32, 1 << 20)
ALL = [BlockRead(block, 0, SHAPE[0] - 1 - block) for block in range(SHAPE[0])]
DEADLINE_S = 0.8

SERVE = """
import json, sys
from kvtransfer.lanes.registry import LANES
from tests.kvtransfer.world import new_memory
memory = new_memory(1, *map(int, sys.argv[2:]))
server = LANES[sys.argv[1]].serve("127.0.0.1")
endpoint = server.start(memory)
print(json.dumps([endpoint.lane, endpoint.address, endpoint.token]), flush=True)
sys.stdin.read()
"""


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


class Peer:
    """A process that serves a pool by one lane until it is killed."""

    def __init__(self, lane: str, shape: tuple[int, int]) -> None:
        command = [sys.executable, "-c", SERVE, lane, *map(str, shape)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self.process.stdout is not None
        self.endpoint = LaneEndpoint(*json.loads(self.process.stdout.readline()))

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)
        if number == signal.SIGSTOP:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)


@contextlib.contextmanager
def peer_and_client(lane: str, shape: tuple[int, int] = SHAPE) -> Iterator[tuple[Peer, LaneClient, PoolMemory]]:
    peer, target = Peer(lane, shape), PoolMemory.create(*shape)
    client = LANES[lane].connect(peer.endpoint, target, soon())
    try:
        yield peer, client, target
    finally:
        peer.end()
        client.close()


class Puller(threading.Thread):
    """Pulls everything over and over, each time checking what came, until it fails or is told to end."""

    def __init__(self, client: LaneClient, target: PoolMemory) -> None:
        super().__init__()
        self._client, self._target = client, target
        self._expected = np.random.default_rng(1).integers(0, 256, SHAPE, np.uint8)[::-1]
        self.pulled = threading.Event()
        self.enough = threading.Event()
        self.failure: TransferError | None = None
        self.wrong = False
        self.start()

    def run(self) -> None:
        while not self.enough.is_set():
            try:
                self._client.pull(ALL, soon(DEADLINE_S))
            except TransferError as error:
                self.failure = error
                return
            self.wrong |= not np.array_equal(self._target.blocks, self._expected)
            self.pulled.set()


def stays(memory: PoolMemory) -> bool:
    before = xxhash.xxh3_64_intdigest(memory.buffer)
    time.sleep(0.15)
    return xxhash.xxh3_64_intdigest(memory.buffer) == before


@pytest.mark.parametrize("lane", LANES_HERE)
def test_a_peer_that_stops_in_the_middle_is_read_on_or_left_at_the_deadline(lane):
    with peer_and_client(lane) as (peer, client, target):
        puller = Puller(client, target)
        assert puller.pulled.wait(5)
        peer.signal(signal.SIGSTOP)
        stopped = time.monotonic()
        if lane == "tcp":
            puller.join(5)
            assert "deadline" in str(puller.failure)
            assert time.monotonic() - stopped < DEADLINE_S + 1
        else:  # its memory can be read although it does not run
            puller.pulled.clear()
            assert puller.pulled.wait(5)
            puller.enough.set()
            puller.join(5)
            assert puller.failure is None
        assert not puller.wrong
        peer.signal(signal.SIGCONT)
        assert stays(target)
        client.pull(ALL, soon())  # and it is good again


@pytest.mark.parametrize("lane", LANES_HERE)
def test_a_peer_that_is_killed_in_the_middle_is_noticed_at_once(lane):
    with peer_and_client(lane) as (peer, client, target):
        puller = Puller(client, target)
        assert puller.pulled.wait(5)
        peer.signal(signal.SIGKILL)
        killed = time.monotonic()
        puller.join(5)
        assert puller.failure is not None
        assert not puller.wrong
        assert time.monotonic() - killed < DEADLINE_S
        assert stays(target)
        peer.process.wait(5)
        with pytest.raises(TransferError):
            client.pull(ALL, soon(DEADLINE_S))
        with pytest.raises(TransferError):
            LANES[lane].connect(peer.endpoint, target, soon(DEADLINE_S))
        assert stays(target)


def test_lane_cma_does_not_read_a_process_that_has_ended():
    with peer_and_client("cma") as (peer, client, target):
        peer.process.kill()
        os.waitid(os.P_PID, peer.process.pid, os.WEXITED | os.WNOWAIT)  # a zombie: its number is still its own
        with pytest.raises(TransferError):
            client.pull(ALL, soon())
        peer.end()
        with pytest.raises(TransferError, match="ended"):
            client.pull(ALL, soon())
        assert not target.blocks.any()


def test_a_tcp_peer_restarted_at_the_same_port_is_not_read_by_who_knew_the_old_one(monkeypatch):
    old, target = tcp.TcpLaneServer("127.0.0.1"), new_memory()
    endpoint = old.start(new_memory(seed=1))
    client = LANES["tcp"].connect(endpoint, target, soon())
    old.close()
    port = int(endpoint.address.rpartition(":")[2])
    listener = socket.create_server(("127.0.0.1", port))
    monkeypatch.setattr(tcp.socket, "create_server", lambda *_, **__: listener)
    new = tcp.TcpLaneServer("127.0.0.1")
    assert new.start(new_memory(seed=2)).address == endpoint.address
    for _ in range(2):  # over the old connection, then over a new one
        with pytest.raises(TransferError):
            client.pull([BlockRead(0, 0, 0)], soon(2))
    assert not target.blocks.any()
    new.close()


class Proxy:
    """Between a tcp lane's two ends; `tamper(bytes) -> bytes` sees what the server says once `begin` is called."""

    def __init__(self, endpoint: LaneEndpoint, tamper: Callable[[bytes], bytes]) -> None:
        host, _, port = endpoint.address.rpartition(":")
        self._server = (host, int(port))
        self._tamper = tamper
        self.begin = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = LaneEndpoint("tcp", f"127.0.0.1:{self._listener.getsockname()[1]}", endpoint.token)
        self._sockets: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                self._sockets += [client, server]
                threading.Thread(target=self._forward, args=(client, server, None), daemon=True).start()
                threading.Thread(target=self._forward, args=(server, client, self._tamper), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, tamper: Callable[[bytes], bytes] | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                target.sendall(tamper(data) if tamper and self.begin.is_set() else data)

    def close(self) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@contextlib.contextmanager
def through_proxy(tamper: Callable[[bytes], bytes]) -> Iterator[tuple[Proxy, LaneClient, PoolMemory, PoolMemory]]:
    source, target = new_memory(seed=1), new_memory()
    server = tcp.TcpLaneServer("127.0.0.1")
    proxy = Proxy(server.start(source), tamper)
    client = LANES["tcp"].connect(proxy.endpoint, target, soon())
    try:
        yield proxy, client, source, target
    finally:
        client.close()
        proxy.close()
        server.close()


SMALL = [BlockRead(block, 0, block) for block in range(NUM_BLOCKS)]


def test_a_half_open_connection_is_left_at_the_deadline():
    """The other end lost its network: nothing comes any more, and nothing says that it will not."""
    with through_proxy(lambda data: b"") as (proxy, client, _, target):
        proxy.begin.set()
        start = time.monotonic()
        with pytest.raises(TransferError, match="deadline"):
            client.pull(SMALL, soon(0.3))
        assert time.monotonic() - start < 1
        assert not target.blocks.any()


def test_data_that_comes_after_the_deadline_is_written_nowhere():
    def late(data: bytes) -> bytes:
        time.sleep(0.4)
        return data

    with through_proxy(late) as (proxy, client, source, target):
        proxy.begin.set()
        with pytest.raises(TransferError, match="deadline"):
            client.pull(SMALL, soon(0.2))
        assert not target.blocks.any()
        time.sleep(0.5)
        assert not target.blocks.any()
        proxy.begin.clear()
        client.pull(SMALL, soon())
        assert (target.blocks == source.blocks).all()


def test_an_answer_that_comes_twice_is_not_taken_for_the_next_one():
    with through_proxy(lambda data: data + data) as (proxy, client, source, target):
        proxy.begin.set()
        with contextlib.suppress(TransferError):  # small enough to come in one piece, and then it is right
            client.pull([BlockRead(3, 0, 5, 0, 256)], soon(1))
        proxy.begin.clear()
        with contextlib.suppress(TransferError):
            client.pull([BlockRead(4, 0, 6, 0, 256)], soon(1))
            assert (target.blocks[6, :256] == source.blocks[4, :256]).all(), "success means the right bytes"
        client.pull(SMALL, soon())
        assert (target.blocks == source.blocks).all()


def test_a_puller_that_reads_nothing_loses_its_connection_and_disturbs_nobody(monkeypatch):
    monkeypatch.setattr(streams, "SEND_STALL_S", 0.3)
    source, target = PoolMemory.create(*SHAPE), PoolMemory.create(*SHAPE)
    source.blocks[:] = 7
    server = tcp.TcpLaneServer("127.0.0.1")
    endpoint = server.start(source)
    host, _, port = endpoint.address.rpartition(":")
    wanted = np.zeros(SHAPE[0], tcp._WANTED)
    wanted["block"], wanted["length"] = np.arange(SHAPE[0]), SHAPE[1]
    with socket.create_connection((host, int(port))) as lazy:
        lazy.sendall(tcp._REQUEST.pack(endpoint.token, len(wanted), 1) + wanted.tobytes())
        client = LANES["tcp"].connect(endpoint, target, soon())
        client.pull(ALL, soon())
        assert (target.blocks == 7).all()
        client.close()
        until = soon()
        while server._peers and time.monotonic() < until:
            time.sleep(0.01)
        assert not server._peers
    server.close()


def test_corrupt_bytes_of_a_network_are_no_blocks():
    """Lanes move bytes; that flipped ones are found is the checksum's work, whatever the lane."""

    def flip(data: bytes) -> bytes:
        return data[:-1] + bytes([data[-1] ^ 1]) if len(data) > BLOCK_BYTES else data

    with through_proxy(flip) as (proxy, client, source, target):
        sums = [xxhash.xxh3_64_intdigest(source.blocks[read.remote_block]) for read in SMALL]
        wanted = [WantedBytes(read, [Part(BLOCK_BYTES, sum_)]) for read, sum_ in zip(SMALL, sums, strict=True)]
        proxy.begin.set()
        outcome = pull_and_verify(client, target, wanted, soon(2), threading.Event())
        assert outcome.failure is not None
        done = outcome.num_verified
        assert (target.blocks[:done] == source.blocks[:done]).all()
        proxy.begin.clear()
        outcome = pull_and_verify(client, target, wanted, soon(), threading.Event())
        assert (outcome.num_verified, outcome.failure) == (NUM_BLOCKS, None)
