"""Both sides of a hand-over for tests: in one process, or the offering one in a process of its own."""

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import xxhash
import zmq
import zmq.asyncio

from baton.config import HandoverOptions
from baton.tls import Tls
from baton.v1 import handover_pb2 as pb
from kvtransfer.intake import Intake, IntakeResult
from kvtransfer.lanes.registry import parse_lanes
from kvtransfer.layout import BlockLayout
from kvtransfer.memory import PoolMemory
from kvtransfer.offers import OfferServer
from kvtransfer.wire import PROTOCOL_VERSION, Numbering, PeerIdentity, PeerRef

ROOT = Path(__file__).parents[2]
LAYOUT = BlockLayout("tiny", "float32", 2, 2, 16, 16)
NUM_BLOCKS = 64
BLOCK_BYTES = LAYOUT.block_bytes
OPTIONS = HandoverOptions(lease_s=5.0, heartbeat_interval_s=0.05, heartbeat_timeout_s=1.0, pull_timeout_s=2.0)
"""Heartbeats are fast, so that tests are; no busy machine keeps a loop waiting for a whole second."""
PREFILL = PeerIdentity("prefill-0", 11)
DECODE = PeerIdentity("decode-0", 22)
DECODE_REF = PeerRef(DECODE.worker_id, DECODE.incarnation, "")


def fill(memory: PoolMemory, seed: int = 1) -> None:
    """Every block gets bytes of its own that anybody who knows the seed can compute."""
    memory.blocks[:] = np.random.default_rng(seed).integers(0, 256, memory.blocks.shape, np.uint8)


def new_memory(seed: int | None = None, num_blocks: int = NUM_BLOCKS, block_bytes: int = BLOCK_BYTES) -> PoolMemory:
    memory = PoolMemory.create(num_blocks, block_bytes)
    if seed is not None:
        fill(memory, seed)
    return memory


class Owner:
    """Records what an OfferServer tells the owner of the blocks."""

    def __init__(self) -> None:
        self.events: list[tuple[str, ...]] = []
        self._changed = asyncio.Event()

    def _add(self, *event: str) -> None:
        self.events.append(event)
        self._changed.set()

    def on_released(self, handover_id: str, verified: bool) -> None:
        self._add(handover_id, "released", "verified" if verified else "unverified")

    def on_quarantined(self, handover_id: str) -> None:
        self._add(handover_id, "quarantined")

    def on_resolved(self, handover_id: str) -> None:
        self._add(handover_id, "resolved")

    async def has_seen(self, *event: str) -> None:
        async with asyncio.timeout(5):
            while event not in self.events:
                self._changed.clear()
                await self._changed.wait()


def offer_server(
    memory: PoolMemory, owner: Owner, counters: dict[str, float], options: HandoverOptions,
    layout: BlockLayout = LAYOUT, tls: Tls | None = None,
) -> OfferServer:  # fmt: skip
    lanes = [lane.serve("127.0.0.1") for lane in parse_lanes(options.lanes, tls)]
    callbacks = owner.on_released, owner.on_quarantined, owner.on_resolved
    return OfferServer(PREFILL, layout, memory, lanes, options, counters, *callbacks, tls=tls)


@dataclass
class Pair:
    """A prefill and a decode worker's ends in one event loop."""

    offers: OfferServer
    intake: Intake
    owner: Owner
    source: PoolMemory
    target: PoolMemory
    peer: PeerRef
    offer_counters: dict[str, float] = field(default_factory=dict)
    intake_counters: dict[str, float] = field(default_factory=dict)

    def take(
        self, handover_id: str, local: Sequence[int], first_block: int = 0, timeout_s: float = 10.0
    ) -> "asyncio.Task[IntakeResult]":
        deadline = time.monotonic() + timeout_s
        return asyncio.create_task(self.intake.take(handover_id, self.peer, local, first_block, deadline))

    def offer(self, handover_id: str, first_block: int, block_ids: Sequence[int]) -> None:
        self.offers.offer(handover_id, first_block, block_ids, self.source.generations[list(block_ids)].tolist())

    def offer_all(self, handover_id: str, block_ids: Sequence[int], chunk: int = 5) -> None:
        """A whole hand-over with first token 7 at index 3."""
        self.offers.open(handover_id, DECODE_REF)
        for start in range(0, len(block_ids), chunk):
            self.offer(handover_id, start, block_ids[start : start + chunk])
        self.offers.close(handover_id, len(block_ids), len(block_ids) * 16, 7, 3)

    def same_bytes(self, remote: Sequence[int], local: Sequence[int]) -> bool:
        return bool((self.source.blocks[list(remote)] == self.target.blocks[list(local)]).all())


@contextlib.asynccontextmanager
async def pair(
    lanes: str = "fake", pull_lanes: str = "", offered: BlockLayout = LAYOUT, layout: BlockLayout = LAYOUT,
    other_dtypes: bool = False, tls: Tls | None = None, pull_tls: Tls | None = None, **options: float,
) -> AsyncIterator[Pair]:  # fmt: skip
    """Both ends, connected by `lanes`; `pull_lanes` are those of the pulling side where they differ.

    `offered` and `layout` are the blocks of the offering and of the pulling side; `tls` and `pull_tls` likewise.
    """
    settings = replace(OPTIONS, lanes=lanes, **options)
    source, target = new_memory(seed=1, block_bytes=offered.block_bytes), new_memory(block_bytes=layout.block_bytes)
    owner = Owner()
    offer_counters: dict[str, float] = {}
    intake_counters: dict[str, float] = {}
    offers = offer_server(source, owner, offer_counters, settings, offered, tls)
    address = await offers.start("127.0.0.1")
    pulled_by = parse_lanes(pull_lanes or lanes, pull_tls)
    intake = Intake(DECODE, layout, target, pulled_by, settings, intake_counters, other_dtypes, pull_tls)
    peer = PeerRef(PREFILL.worker_id, PREFILL.incarnation, address)
    try:
        yield Pair(offers, intake, owner, source, target, peer, offer_counters, intake_counters)
    finally:
        await intake.stop()
        await offers.stop()
        source.close()
        target.close()


def scattered(count: int, seed: int = 0, num_blocks: int = NUM_BLOCKS) -> list[int]:
    """Block ids in random order, with some neighbours among them."""
    draw = random.Random(seed)
    start = draw.randrange(num_blocks)
    row = [(start + index) % num_blocks for index in range(count // 2)]
    rest = draw.sample([block for block in range(num_blocks) if block not in row], count - len(row))
    return row + rest


async def settles_unwritten(memory: PoolMemory) -> bool:
    """Whether nothing writes into `memory` any more."""
    before = xxhash.xxh3_64_intdigest(memory.buffer)
    await asyncio.sleep(0.15)
    return xxhash.xxh3_64_intdigest(memory.buffer) == before


class RawPuller:
    """A pulling worker made of a bare socket, which sends whatever a test wants it to."""

    def __init__(self, address: str, identity: PeerIdentity = DECODE) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.connect(address)
        self.identity = identity
        self.numbering = Numbering()
        self._incoming = Numbering()

    async def send(self, **body: object) -> None:
        await self._socket.send(self.numbering.stamp(pb.HandoverMessage(**body)))

    async def hello(
        self, expected: int = PREFILL.incarnation, version: int = PROTOCOL_VERSION, layout: BlockLayout = LAYOUT
    ) -> pb.HelloReply:
        hello = pb.Hello(
            protocol_version=version,
            worker_id=self.identity.worker_id,
            incarnation=self.identity.incarnation,
            expected_peer_incarnation=expected,
            layout=layout.to_proto(),
            lanes=["fake"],
        )
        await self.send(hello=hello)
        return (await self.next("hello_reply")).hello_reply

    async def next(self, kind: str) -> pb.HandoverMessage:
        """The next message of this kind; heartbeats and others are skipped."""
        async with asyncio.timeout(5):
            while True:
                message = self._incoming.accept(await self._socket.recv())
                if message.WhichOneof("message") == kind:
                    return message

    async def hears_no(self, kind: str, within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                await self.next(kind)
        except TimeoutError:
            return True
        return False

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class RawOfferer:
    """An offering worker made of a bare socket."""

    def __init__(self) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.peer = PeerRef(PREFILL.worker_id, PREFILL.incarnation, f"tcp://127.0.0.1:{port}")
        self.numbering = Numbering()
        self._incoming = Numbering()
        self._routing_id = b""

    async def next(self, kind: str) -> pb.HandoverMessage:
        async with asyncio.timeout(5):
            while True:
                self._routing_id, frame = await self._socket.recv_multipart()
                message = self._incoming.accept(frame)
                if message.WhichOneof("message") == kind:
                    return message

    async def send(self, **body: object) -> None:
        await self.send_frame(self.numbering.stamp(pb.HandoverMessage(**body)))

    async def send_frame(self, frame: bytes) -> None:
        await self._socket.send_multipart([self._routing_id, frame])

    async def accept(
        self, endpoint: pb.LaneEndpoint, heartbeat_timeout_s: float = 1.0, heartbeat_interval_s: float = 0.05
    ) -> None:
        await self.next("hello")
        await self.send(
            hello_reply=pb.HelloReply(
                accepted=True,
                incarnation=PREFILL.incarnation,
                lanes=[endpoint],
                lease_s=5,
                heartbeat_interval_s=heartbeat_interval_s,
                heartbeat_timeout_s=heartbeat_timeout_s,
            )
        )

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class OffererProcess:
    """A prefill worker's end in a real process, told what to do line by line (see offerer.py)."""

    def __init__(self, **settings: object) -> None:
        command = [sys.executable, "-m", "tests.kvtransfer.offerer", json.dumps(settings)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        hello = self.read()
        self.peer = PeerRef(PREFILL.worker_id, hello["incarnation"], hello["address"])

    def tell(self, *command: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def read(self) -> dict[str, object]:
        """The next line it prints; blocks."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)


@contextlib.contextmanager
def offerer_process(**settings: object):
    process = OffererProcess(**settings)
    try:
        yield process
    finally:
        process.close()
