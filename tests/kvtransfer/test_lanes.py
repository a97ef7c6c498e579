import ctypes
import errno
import itertools
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import ConfigurationError, TransferError
from baton.tls import Tls, inside
from kvtransfer.lanes import cma, copying, cuda_ipc, tcp
from kvtransfer.lanes.base import ANY_GENERATION, BlockRead, LaneClient, LaneEndpoint, LaneServer, OtherHostError
from kvtransfer.lanes.copying import batches, coalesce
from kvtransfer.lanes.host import boot_id
from kvtransfer.lanes.registry import LANES, Lane, parse_lanes
from kvtransfer.lanes.streams import TlsStream
from kvtransfer.memory import PoolMemory
from tests.authority import Authority
from tests.kvtransfer import fake_cuda
from tests.kvtransfer.world import BLOCK_BYTES, NUM_BLOCKS, new_memory, scattered

NAMES = ("shm", "cma", "tcp", "fake", "cuda_ipc")
KNOWN = {**LANES, "cuda_ipc": fake_cuda.lane(fake_cuda.FakeCuda())}


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


class Served:
    """A pool served by a lane, and an empty one connected to it."""

    def __init__(self, name: str) -> None:
        self.source, self.target = new_memory(seed=1), new_memory()
        self.source.device_pointer = self.source.blocks.ctypes.data
        self.server: LaneServer = KNOWN[name].serve("127.0.0.1")
        self.endpoint = self.server.start(self.source)
        self.client: LaneClient = KNOWN[name].connect(self.endpoint, self.target, soon())

    def reads(self, remote: list[int], local: list[int]) -> list[BlockRead]:
        generations = self.source.generations[remote].tolist()
        return [BlockRead(*read) for read in zip(remote, generations, local, strict=True)]

    def close(self) -> None:
        self.client.close()
        self.server.close()


@pytest.fixture(params=NAMES)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    world = Served(request.param)
    yield world
    world.close()


pieces = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(1, 3)), max_size=12)


@given(pieces, st.integers(1, 7))
def test_coalescing_keeps_every_byte_in_order_and_joins_all_neighbours(pieces, max_bytes):
    remote, local, lengths = (np.array([piece[place] for piece in pieces], np.int64) for place in range(3))
    runs = list(zip(*coalesce(remote, local, lengths, max_bytes), strict=True))
    wanted = [(there + k, here + k) for there, here, length in pieces for k in range(length)]
    assert [(there + k, here + k) for there, here, length in runs for k in range(length)] == wanted
    assert all(1 <= length <= max_bytes for _, _, length in runs)
    for (there, here, length), after in itertools.pairwise(runs):
        assert (after[0] - there, after[1] - here) != (length, length) or length == max_bytes


@given(st.lists(st.integers(1, 9), max_size=20), st.integers(1, 5), st.integers(1, 12))
def test_batches_are_as_long_as_their_bounds_allow(lengths, max_count, max_bytes):
    rows = [lengths[part] for part in batches(np.array(lengths, np.int64), max_count, max_bytes)]
    assert list(itertools.chain(*rows)) == lengths
    assert all(len(row) <= max_count and (sum(row) <= max_bytes or len(row) == 1) for row in rows)
    for row, after in itertools.pairwise(rows):
        assert len(row) == max_count or sum(row) + after[0] > max_bytes


@settings(max_examples=40, deadline=None)
@given(st.data())
@pytest.mark.parametrize("name", NAMES)
def test_every_lane_copies_exactly_the_blocks_asked_for(name, data):
    served = _shared(name)
    count = data.draw(st.integers(0, NUM_BLOCKS))
    remote = data.draw(st.permutations(range(NUM_BLOCKS)))[:count]
    local = data.draw(st.sampled_from([list(range(NUM_BLOCKS)), scattered(NUM_BLOCKS, 3)]))[:count]
    served.target.blocks[:] = 0
    served.client.pull(served.reads(list(remote), local), soon())
    expected = np.zeros_like(served.target.blocks)
    expected[local] = served.source.blocks[list(remote)]
    assert (served.target.blocks == expected).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(0, 31), st.integers(1, 32)), max_size=40))
@pytest.mark.parametrize("name", NAMES)
def test_every_lane_copies_exactly_the_parts_of_blocks_asked_for(name, parts):
    served = _shared(name)
    unit = BLOCK_BYTES // 32
    reads = [
        BlockRead(remote, int(served.source.generations[remote]), local, first * unit, min(count, 32 - first) * unit)
        for remote, local, first, count in parts
    ]
    served.target.blocks[:] = 0
    expected = np.zeros_like(served.target.blocks)
    for read in reads:
        part = slice(read.offset, read.offset + read.num_bytes)
        expected[read.local_block, part] = served.source.blocks[read.remote_block, part]
    served.client.pull(reads, soon())
    assert (served.target.blocks == expected).all()


def test_a_part_without_a_length_goes_to_the_end_of_its_block(served):
    served.client.pull([BlockRead(3, 0, 5, offset=100)], soon())
    assert (served.target.blocks[5, 100:] == served.source.blocks[3, 100:]).all()
    assert not served.target.blocks[5, :100].any()
    assert not served.target.blocks[6].any()


@pytest.mark.parametrize(
    "read",
    [
        BlockRead(0, 0, 0, 0, 0),
        BlockRead(0, 0, 0, 0, -2),
        BlockRead(0, 0, 0, -1, 8),
        BlockRead(0, 0, 0, 0, BLOCK_BYTES + 1),
        BlockRead(0, 0, 0, 1, BLOCK_BYTES),
        BlockRead(0, 0, 0, BLOCK_BYTES),
        BlockRead(0, 0, 0, 2**40, 8),
        BlockRead(0, 0, NUM_BLOCKS),
        BlockRead(0, 0, -1),
        BlockRead(-1, 0, 0),
        BlockRead(2**32 - 1, 0, 0),
    ],
)
def test_a_read_that_is_not_inside_of_a_block_moves_nothing(served, read):
    with pytest.raises(TransferError):
        served.client.pull([BlockRead(1, 0, 1), read], soon())
    assert not served.target.blocks.any()
    served.client.pull([BlockRead(1, 0, 1)], soon())


@pytest.mark.parametrize(
    ("block", "offset", "length"),
    [
        (NUM_BLOCKS, 0, 8),
        (2**64 - 1, 0, 8),
        (0, BLOCK_BYTES, 8),
        (0, 2**64 - 8, 16),
        (0, 8, BLOCK_BYTES),
        (0, 0, 2**64 - 1),
        (0, 0, 0),
    ],
)
def test_the_tcp_lane_sends_nothing_from_outside_of_its_blocks(block, offset, length):
    served = Served("tcp")
    host, _, port = served.endpoint.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as peer:
        peer.sendall(tcp._REQUEST.pack(served.endpoint.token, 1, 0) + struct.pack("<4Q", block, 0, offset, length))
        answer = b""
        while part := peer.recv(65536):
            answer += part
    assert tcp._ANSWER.unpack(answer)[0] == tcp._BAD_REQUEST
    served.close()


def test_any_generation_matches_whatever_a_block_holds(served):
    served.source.generations[4] = 9
    served.client.pull([BlockRead(4, ANY_GENERATION, 0)], soon())
    assert (served.target.blocks[0] == served.source.blocks[4]).all()


_kept: dict[str, Served] = {}


def _shared(name: str) -> Served:
    """One pair for all examples of a property."""
    if name not in _kept:
        _kept[name] = Served(name)
    return _kept[name]


@pytest.fixture(scope="module", autouse=True)
def _end_shared() -> Iterator[None]:
    yield
    for world in _kept.values():
        world.close()


def test_a_block_of_another_generation_is_refused(served):
    reads = served.reads([1, 2], [3, 4])
    served.source.generations[2] += 1
    with pytest.raises(TransferError, match="no longer holds"):
        served.client.pull(reads, soon())
    served.client.pull(served.reads([1, 2], [3, 4]), soon())  # the lane is still good


def test_a_block_that_changes_while_it_is_copied_is_refused(served, monkeypatch):
    def bump_after(copy):
        def copy_then_bump(*arguments):
            result = copy(*arguments)
            served.source.generations[5] += 1
            return result

        return copy_then_bump

    def bump_at_the_end():
        served.source.generations[5] += 1
        yield from ()

    monkeypatch.setattr(copying, "_copy_runs", bump_after(copying._copy_runs))
    monkeypatch.setattr(tcp, "_ranges", bump_after(tcp._ranges))
    monkeypatch.setattr(cuda_ipc, "batches", lambda *arguments: itertools.chain(batches(*arguments), bump_at_the_end()))
    monkeypatch.setattr(cma, "batches", lambda *arguments: itertools.chain(batches(*arguments), bump_at_the_end()))
    with pytest.raises(TransferError, match="no longer holds"):
        served.client.pull(served.reads([5], [0]), soon())


def test_a_block_outside_of_the_peers_pool_is_refused(served):
    with pytest.raises(TransferError):
        served.client.pull([BlockRead(NUM_BLOCKS, 0, 0)], soon())


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_token_is_refused(name):
    served = Served(name)
    with pytest.raises(TransferError):
        KNOWN[name].connect(replace(served.endpoint, token=served.endpoint.token ^ 1), served.target, soon())
    served.client.pull(served.reads([0], [0]), soon())
    served.close()


@pytest.mark.parametrize("name", ["shm", "cma", "tcp"])
def test_a_pool_with_blocks_of_another_size_is_refused(name):
    served = Served(name)
    with pytest.raises(TransferError, match="bytes"):
        KNOWN[name].connect(served.endpoint, new_memory(block_bytes=BLOCK_BYTES * 2), soon())
    served.close()


@pytest.mark.parametrize(
    "endpoint",
    [
        LaneEndpoint("shm", f"{boot_id()}/baton-kv-of-nobody", 1),
        LaneEndpoint("shm", "not an address", 1),
        LaneEndpoint("cma", "not an address", 1),
        LaneEndpoint("cma", f"{boot_id()}/1/2/3", 1),
        LaneEndpoint("cma", f"{boot_id()}/-1/1/1/1/1/1/{BLOCK_BYTES}", 1),
        LaneEndpoint("cma", f"{boot_id()}/{2**31}/1/1/1/1/1/{BLOCK_BYTES}", 1),
        LaneEndpoint("cma", f"{boot_id()}/{os.getpid()}/{2**70}/1/1/1/1/{BLOCK_BYTES}", 1),
        LaneEndpoint("cma", f"{boot_id()}/{2**22 + 1}/1/8/8/8/1/{BLOCK_BYTES}", 1),
        LaneEndpoint("fake", "fake-of-another-process", 1),
        LaneEndpoint("tcp", "127.0.0.1:1", 1),
        LaneEndpoint("tcp", "not an address", 1),
    ],
)
def test_a_peer_that_a_lane_does_not_reach_is_a_transfer_error(endpoint):
    with pytest.raises(TransferError):
        LANES[endpoint.lane].connect(endpoint, new_memory(), soon(1))


@pytest.mark.parametrize("name", ["shm", "cma"])
def test_a_lane_of_one_host_says_when_the_peer_is_on_another(name):
    served = Served(name)
    elsewhere = "0" * 36 + served.endpoint.address[36:]
    with pytest.raises(OtherHostError):
        KNOWN[name].connect(replace(served.endpoint, address=elsewhere), served.target, soon())
    served.close()


def test_nothing_can_be_pulled_once_the_server_is_closed(served):
    served.client.pull(served.reads([0], [0]), soon())
    served.server.close()
    with pytest.raises(TransferError):
        served.client.pull(served.reads([1], [1]), soon(1))


def test_an_expired_or_cancelled_pull_copies_nothing(served):
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(TransferError, match="cancelled"):
        served.client.pull(served.reads([1], [1]), soon(), cancelled)
    with pytest.raises(TransferError, match="deadline"):
        served.client.pull(served.reads([1], [1]), soon(-1))
    assert not served.target.blocks.any()


def test_threads_pull_side_by_side(served):
    rows = [scattered(16, seed) for seed in range(8)]
    errors: list[Exception] = []

    def pull(index: int) -> None:
        local = list(range(index * 8, index * 8 + 8))
        try:
            for _ in range(10):
                served.client.pull(served.reads(rows[index][:8], local), soon())
        except TransferError as error:
            errors.append(error)

    threads = [threading.Thread(target=pull, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not errors
    for index, row in enumerate(rows):
        assert (served.target.blocks[index * 8 : index * 8 + 8] == served.source.blocks[row[:8]]).all()


def test_tcp_splits_what_is_too_much_for_one_request():
    source, target = PoolMemory.create(3000, 64), PoolMemory.create(3000, 64)
    source.blocks[:] = np.random.default_rng(0).integers(0, 256, source.blocks.shape, np.uint8)
    server = LANES["tcp"].serve("127.0.0.1")
    client = LANES["tcp"].connect(server.start(source), target, soon())
    client.pull([BlockRead(block, 0, 2999 - block) for block in range(3000)], soon())
    assert (target.blocks[::-1] == source.blocks).all()
    client.close()
    server.close()


@pytest.mark.parametrize("name", ["shm", "tcp"])
def test_strangers_and_garbage_do_not_disturb_the_others(name):
    served = Served(name)
    for payload in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(4096)):
        if name == "shm":
            stranger = socket.socket(socket.AF_UNIX)
            stranger.connect("\0" + served.endpoint.address.rpartition("/")[2])
        else:
            host, _, port = served.endpoint.address.rpartition(":")
            stranger = socket.create_connection((host, int(port)))
        stranger.sendall(payload)
        stranger.close()
    served.client.pull(served.reads([0], [0]), soon())
    assert KNOWN[name].connect(served.endpoint, served.target, soon()) is not None
    served.close()


@pytest.mark.parametrize("bad", ["generation", "block"])
def test_a_large_tcp_pull_is_spread_over_connections_and_fails_as_one(monkeypatch, bad):
    monkeypatch.setattr(tcp, "MAX_SPREAD", 4)
    monkeypatch.setattr(tcp, "SPREAD_BYTES", BLOCK_BYTES)
    served = Served("tcp")
    remote = scattered(40, 1)
    exchange, together = served.client._exchange, threading.Barrier(4)

    def with_others(*args):
        together.wait(10)
        exchange(*args)

    served.client._exchange = with_others
    served.client.pull(served.reads(remote, list(range(40))), soon())
    served.client._exchange = exchange
    assert (served.target.blocks[:40] == served.source.blocks[remote]).all()
    assert len(served.client._idle) == 4
    reads = served.reads(remote, list(range(40)))
    wrong = {"remote_generation": 5} if bad == "generation" else {"remote_block": NUM_BLOCKS}
    reads[33] = reads[33]._replace(**wrong)
    with pytest.raises(TransferError, match="no longer holds" if bad == "generation" else "no such blocks"):
        served.client.pull(reads, soon())
    served.client.pull(served.reads([1], [2]), soon())
    served.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "ours")


@pytest.fixture(scope="module")
def tls(authority) -> Tls:
    return inside(authority.sign("worker", names="").options())


def test_lane_tcp_with_tls_moves_the_same_bytes_and_none_in_the_clear(tls, monkeypatch):
    monkeypatch.setattr(tcp, "SPREAD_BYTES", 8 * BLOCK_BYTES)
    source, target = new_memory(seed=1), new_memory()
    lane = parse_lanes("tcp", tls)[0]
    server = lane.serve("127.0.0.1")
    client = lane.connect(server.start(source), target, soon())
    assert all(isinstance(stream, TlsStream) for stream in client._idle)
    for seed in (1, 2):
        remote = scattered(NUM_BLOCKS, seed)
        client.pull([BlockRead(there, 0, here) for here, there in enumerate(remote)], soon())
        assert (target.blocks == source.blocks[remote]).all()
    client.close()
    server.close()


@pytest.mark.parametrize("stranger", ["plain puller", "plain server", "another authority"])
def test_tls_and_strangers_do_not_talk(tls, stranger, authority, tmp_path, caplog):
    theirs = inside(Authority(tmp_path, "theirs").sign("worker").options()) if stranger == "another authority" else None
    serving, pulling = (None, tls) if stranger == "plain server" else (tls, theirs)
    server = tcp.TcpLaneServer("127.0.0.1", serving)
    endpoint = server.start(new_memory(seed=1))
    with pytest.raises(TransferError):
        tcp.TcpLaneClient.connect(endpoint, new_memory(), soon(1), pulling)
    if serving is not None:
        tcp.TcpLaneClient.connect(endpoint, new_memory(), soon(), tls).close()  # the others go on
        assert caplog.text.count("lane tcp: a peer was refused") == 1
        assert tls.counters.pop("tls_refused") >= 1
    server.close()


def test_no_lane_carries_blocks_in_the_clear_beside_tls(tls, monkeypatch):
    monkeypatch.setitem(LANES, "wire", Lane("wire", LANES["tcp"].serve, LANES["tcp"].connect))
    with pytest.raises(ConfigurationError, match="lane wire cannot be encrypted"):
        parse_lanes("shm,wire", tls)
    assert [lane.name for lane in parse_lanes("shm,cma,tcp", tls)] == ["shm", "cma", "tcp"]


class MuteServer:
    """Takes a tcp lane's request, answers with `answer`, then says nothing more until it is closed."""

    def __init__(self, answer: bytes, tls: Tls | None = None) -> None:
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = LaneEndpoint("tcp", f"127.0.0.1:{self._listener.getsockname()[1]}", 1)
        self.answer = answer
        self.connections: list[socket.socket] = []
        self.answered = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        probe, _ = self._listener.accept()
        if self._tls is not None:
            probe = self._tls.server.wrap_socket(probe, server_side=True)
        self.connections.append(probe)
        probe.recv(65536)
        probe.sendall(tcp._ANSWER.pack(0, 1, BLOCK_BYTES) + tcp._STATUS.pack(0))
        probe.recv(65536)
        probe.sendall(self.answer)
        self.answered.set()

    def close(self) -> None:
        for open_socket in (*self.connections, self._listener):
            open_socket.close()


HALF_A_BLOCK = tcp._ANSWER.pack(0, 2, BLOCK_BYTES) + bytes(BLOCK_BYTES // 2)


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("answer", [b"", HALF_A_BLOCK])
def test_a_stalled_tcp_peer_is_left_at_the_deadline_and_on_cancellation(answer, encrypted, request):
    tls = request.getfixturevalue("tls") if encrypted else None
    mute, target = MuteServer(answer, tls), new_memory()
    client = tcp.TcpLaneClient.connect(mute.endpoint, target, soon(), tls)
    cancelled = threading.Event()
    threading.Timer(0.1, cancelled.set).start()
    start = time.monotonic()
    with pytest.raises(TransferError, match="cancelled"):
        client.pull([BlockRead(0, 0, 0)], soon(), cancelled)
    assert time.monotonic() - start < 1.5
    mute.close()

    mute = MuteServer(answer, tls)
    client = tcp.TcpLaneClient.connect(mute.endpoint, target, soon(), tls)
    with pytest.raises(TransferError, match="deadline"):
        client.pull([BlockRead(0, 0, 0)], soon(0.2))
    mute.close()


def test_a_whole_answer_to_another_request_is_no_answer():
    old = tcp._ANSWER.pack(0, 1, BLOCK_BYTES) + bytes(BLOCK_BYTES) + tcp._STATUS.pack(0)
    mute = MuteServer(old)
    client = tcp.TcpLaneClient.connect(mute.endpoint, new_memory(), soon())
    with pytest.raises(TransferError, match="another request"):
        client.pull([BlockRead(0, 0, 0)], soon())
    mute.close()


def test_a_tcp_peer_that_dies_in_mid_block_is_a_transfer_error():
    mute = MuteServer(HALF_A_BLOCK)
    client = tcp.TcpLaneClient.connect(mute.endpoint, new_memory(), soon())
    threading.Thread(target=lambda: mute.answered.wait(5) and mute.close(), daemon=True).start()
    with pytest.raises(TransferError, match=r"closed|lost"):
        client.pull([BlockRead(0, 0, 0)], soon())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("shm,rdma", "'rdma'"),
        ("shm,shm", "once"),
        ("shm,faulty:shm", "once"),
        ("faulty:rdma", "'rdma'"),
        ("faulty:shm?explode=1", "'explode'"),
        ("faulty:shm?corrupt=often", "corrupt=often"),
        ("faulty", "'faulty'"),
    ],
)
def test_an_unknown_lane_is_a_configuration_error_that_says_why(text, says):
    with pytest.raises(ConfigurationError, match=says):
        parse_lanes(text)


def test_lanes_are_parsed_in_order_and_a_faulty_lane_keeps_its_name_on_the_wire():
    lanes = parse_lanes(" faulty:shm?corrupt=3&seed=5 , tcp")
    assert [lane.name for lane in lanes] == ["shm", "tcp"]
    assert lanes[0].faults is not None
    assert lanes[0].faults.seed == 5
    assert lanes[1].faults is None


@pytest.mark.parametrize("part", ["start time", "probe"])
def test_lane_cma_does_not_read_a_process_that_got_the_peers_number(part):
    served = Served("cma")
    place = served.endpoint.address.split("/")
    if part == "start time":
        place[2] = str(int(place[2]) - 1)
    else:  # another process image: something else lies where the token was
        place[3] = place[5]
    with pytest.raises(TransferError, match="another one" if part == "start time" else "token"):
        LANES["cma"].connect(replace(served.endpoint, address="/".join(place)), served.target, soon())
    served.close()


def test_lane_cma_goes_on_where_the_kernel_stopped(monkeypatch):
    """Whatever number of bytes one call copies, the rest follows; where nothing more comes it is an error."""
    served = Served("cma")
    draw, whole = random.Random(1), cma.read_memory

    def some(pid, remote, local):
        lengths = remote["length"].tolist()
        keep = draw.randint(1, sum(lengths))
        rows = [row.copy() for row in (remote, local)]
        for index, length in enumerate(lengths):
            for row in rows:
                row["length"][index] = min(length, max(0, keep))
            keep -= length
        return whole(pid, *rows)

    monkeypatch.setattr(cma, "read_memory", some)
    remote = scattered(40, 1)
    served.client.pull(served.reads(remote, list(range(40))), soon())
    assert (served.target.blocks[:40] == served.source.blocks[remote]).all()
    monkeypatch.undo()
    served.source.close()  # unmapped, as after a crash of everything but the process
    with pytest.raises(TransferError):
        served.client.pull([BlockRead(1, 0, 1)], soon())
    served.close()


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 5))
def test_lane_cma_finds_the_generation_of_every_block(ids, stretch):
    blocks = np.array(ids, np.int64) * 150 * stretch
    place = cma._Place("", 1, 1, 8, 1 << 20, 1, 10_000, 8)
    watch = cma._Watch.of(place, blocks)
    base, there = watch.words.ctypes.data, np.full(len(watch.words), -1)
    for remote, local in zip(watch.remote.tolist(), watch.local.tolist(), strict=True):
        start = (local[0] - base) // 8
        there[start : start + local[1] // 8] = remote[0] + 8 * np.arange(remote[1] // 8)
    assert there[0] == place.probe
    assert (there[1:] >= place.generations).all()
    assert (there[watch.places] == place.generations + 8 * blocks).all()
    assert len(watch.words) <= 1 + len(set(ids)) * (cma._NEAR + 1)


def test_a_kernel_that_forbids_lane_cma_is_told_apart_from_a_peer_that_is_gone(monkeypatch):
    def denied(*arguments):
        ctypes.set_errno(errno.EPERM)
        return -1

    monkeypatch.setattr(cma, "_vm_readv", denied)
    with pytest.raises(ConfigurationError, match="ptrace_scope"):
        LANES["cma"].serve("127.0.0.1").start(new_memory())
    monkeypatch.setattr(cma, "_vm_readv", None)
    with pytest.raises(ConfigurationError, match="process_vm_readv"):
        LANES["cma"].serve("127.0.0.1").start(new_memory())
