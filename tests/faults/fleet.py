"""A coordinator and workers as real processes, with a relay on every wire, and what can be seen of them."""

import asyncio
import itertools
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import grpc.aio
from google.protobuf.message import DecodeError

from baton.framed import GREETING, LENGTH_BYTES
from baton.v1 import handover_pb2 as handover
from baton.v1 import worker_link_pb2 as wire
from tests.faults.processes import Nursery, num_descriptors, send
from tests.faults.relay import (
    Addresses,
    Connection,
    Cuts,
    Relay,
    ZmtpMessages,
    any_bytes,
    link_frames,
    zmtp_frames,
)
from tests.ports import free_port
from tests.system.cluster import ELSEWHERE, UNREFUSED
from tests.system.etcd import Etcd

LINK, PEERS, FRONT, STORE = "link", "peers", "front", "store"
"""Networks: worker and coordinator, two workers, clients and coordinator, etcd. A process can be cut off from each."""
START_TIMEOUT_S, IDLE_TIMEOUT_S = 120.0, 60.0
OPTIONS = ("--dtype", "float32", "--threads", "1", "--kv-memory", "48MiB", "--max-batch-tokens", "32")
"""Prompts are computed in many small steps, so that there is time for something to happen between two of them."""
LINK_HOST = "127.0.0.2"
"""Where coordinators are reached by workers: a relay on another address of this machine and the same port."""
PROBE_S, PROBE_TIMEOUT_S = 0.2, 1.0
PINGS = {
    "grpc.keepalive_time_ms": 1000,
    "grpc.keepalive_timeout_ms": 1000,
    "grpc.http2.ping_timeout_ms": 1000,  # or it takes a minute, whatever is said above
    "grpc.http2.max_pings_without_data": 0,
    "grpc.min_reconnect_backoff_ms": 1000,  # what a connection may take to be made; or 20 s
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 500,
}
"""How a client of gRPC notices a coordinator that hangs or is cut off; see docs/operations.md."""
MOVED_DESCRIPTORS, NEW_LIFE_DESCRIPTORS = 2, 4
"""More than counted at first: a connection of the clients that has moved; what another life has otherwise."""


@dataclass(frozen=True)
class Event:
    """A message between two processes. It has `arrived`, or is just about to be passed on."""

    kind: str
    """assigned, started, progress, token, offer, closed."""
    worker: str
    """Who says it, or is told."""
    attempt_id: str
    """stream/attempt, as the hand-over calls it."""
    attempt: int
    value: int = 0
    """Index of a token, or tokens computed."""
    is_last: bool = False
    arrived: bool = False
    coordinator: str = ""
    """On whose link it passes."""


@dataclass
class Leg:
    """A worker's part in an attempt, as its link shows it."""

    id: wire.AttemptId
    num_tokens: int
    max_tokens: int
    handle: int


@dataclass
class Process:
    """What can suffer."""

    name: str
    kind: str
    pid: int = 0
    pids: list[int] = field(default_factory=list)
    """All its lives."""


@dataclass
class Worker(Process):
    incarnation: int = 0
    legs_at: dict[str, dict[str, Leg]] = field(default_factory=dict)
    """By coordinator: live parts by attempt: assigned or adopted, and neither ended nor aborted."""
    known: dict[str, Leg] = field(default_factory=dict)
    """Everything that was ever assigned: a coordinator that adopts says less of it."""

    @property
    def legs(self) -> dict[str, Leg]:
        return {key: leg for legs in self.legs_at.values() for key, leg in legs.items()}


@dataclass
class Coordinator(Process):
    link: Relay = field(kw_only=True)
    http_port: int = field(default_factory=free_port)
    grpc_port: int = field(default_factory=free_port)
    ready: bool = False
    """As the balancer in front of it last saw it."""
    idle_descriptors: tuple[int, int] = 0, 0
    """Its process, and how many that has when it is idle."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"


class LinkTap(Connection):
    """What passes on a worker's link to a coordinator."""

    dialling = True

    def __init__(self, fleet: "Fleet", coordinator: str) -> None:
        super().__init__({coordinator})
        self._fleet, self._coordinator = fleet, coordinator
        self._worker = Worker("", "")
        self._passing: tuple[list[Event], list[Event]] = [], []
        self._registered = False

    async def before(self, frame: bytes, from_client: bool) -> bytes:
        if frame == GREETING:
            return frame
        if from_client:
            try:
                message = wire.WorkerMessage.FromString(frame[LENGTH_BYTES:])
            except DecodeError:
                raise ConnectionError("a worker whose link broke asks whether TLS is spoken here") from None
            if message.HasField("registration"):
                frame = await self._register(message.registration, frame)
            events = self._said(message)
        else:
            events = self._told(wire.CoordinatorMessage.FromString(frame[LENGTH_BYTES:]))
        self._passing[from_client][:] = events
        for event in events:
            self._fleet.tell(event)
        return frame

    async def _register(self, registration: wire.Registration, frame: bytes) -> bytes:
        self._worker = self._fleet.workers[registration.worker_id]
        self._worker.incarnation = registration.incarnation
        self._worker.legs_at[self._coordinator] = {}
        self.parties.add(self._worker.name)
        self._registered = True
        return await self._fleet.with_relayed_offers(frame, self._worker.name)

    def after(self, from_client: bool) -> None:
        self.dialling = self.dialling and not self._registered
        for event in self._passing[from_client]:
            self._fleet.tell(replace(event, arrived=True))

    def _event(self, kind: str, id: wire.AttemptId, value: int = 0, is_last: bool = False) -> Event:
        return Event(kind, self._worker.name, _key(id), id.attempt, value, is_last, coordinator=self._coordinator)

    def _told(self, message: wire.CoordinatorMessage) -> list[Event]:
        legs = self._worker.legs_at.get(self._coordinator, {})
        match message.WhichOneof("message"):
            case "assignment":
                given = message.assignment
                leg = Leg(given.id, len(given.token_ids), given.sampling.max_tokens, given.handle)
                legs[_key(given.id)] = self._worker.known[_key(given.id)] = leg
                return [self._event("assigned", given.id)]
            case "adopt" if its := self._worker.known.get(_key(message.adopt.id)):
                legs[_key(its.id)] = replace(its, handle=message.adopt.handle)
            case "abort":
                legs.pop(_key(message.abort.id), None)
        return []

    def _said(self, message: wire.WorkerMessage) -> list[Event]:
        legs = self._worker.legs_at.get(self._coordinator, {})
        match message.WhichOneof("message"):
            case "progress" if leg := legs.get(_key(message.progress.id)):
                computed = message.progress.computed_tokens
                return [self._event("progress", leg.id, computed, computed >= leg.num_tokens)]
            case "tokens":
                by_handle = {leg.handle: leg for leg in legs.values()}
                return [
                    self._event("token", its.id, index, index == its.max_tokens - 1)
                    for handle, index in zip(message.tokens.handles, message.tokens.indices, strict=True)
                    if (its := by_handle.get(handle))
                ]
            case "ending":
                legs.pop(_key(message.ending.id), None)
            case "admission" if not message.admission.accepted:
                legs.pop(_key(message.admission.id), None)
            case "admission" if leg := legs.get(_key(message.admission.id)):
                return [self._event("started", leg.id)]
        return []


def _key(id: wire.AttemptId) -> str:
    return f"{id.request_id}/{id.attempt}"


class HandoverTap(Connection):
    """What passes between a worker that pulls, the client, and one that offers."""

    def __init__(self, fleet: "Fleet", offerer: str) -> None:
        super().__init__({offerer})
        self._fleet, self._offerer, self._puller = fleet, offerer, ""
        self._messages = ZmtpMessages(), ZmtpMessages()
        self._passing: list[Event] = []

    async def before(self, frame: bytes, from_client: bool) -> bytes:
        if not from_client:
            self._passing = []
        for data in self._messages[from_client].of(frame):
            frame = await self._heard(handover.HandoverMessage.FromString(data), frame)
        return frame

    async def _heard(self, message: handover.HandoverMessage, frame: bytes) -> bytes:
        kind = message.WhichOneof("message")
        if kind == "hello":
            self._puller = message.hello.worker_id
            self.parties.add(self._puller)
        elif kind == "hello_reply":
            return await self._fleet.with_relayed_lane(frame, self._offerer, self._puller)
        elif kind in ("offer", "closed"):
            id = message.offer.handover_id if kind == "offer" else message.closed.handover_id
            number = id.rpartition("/")[2]
            self._passing = [Event(kind, self._offerer, id, int(number) if number.isdigit() else 0)]
            self._fleet.tell(self._passing[0])
        return frame

    def after(self, from_client: bool) -> None:
        if not from_client:
            for event in self._passing:
                self._fleet.tell(replace(event, arrived=True))


class Fleet:
    """Runs while the context is open. `kinds`: how many processes of which kind, such as {"prefill": 2, "decode": 1};
    one coordinator, where it is not said, and no etcd.

    Clients know one address: a balancer that passes each connection on to the next coordinator that says it is ready.
    """

    def __init__(self, nursery: Nursery, kinds: dict[str, int], *options: str, coordinator: Sequence[str] = ()) -> None:
        self.listener: Callable[[Event], None] | None = None
        self.cuts = Cuts()
        self._nursery, self._kinds = nursery, {"coordinator": 1, "etcd": 0, **kinds}
        self._options, self._coordinator_options = (*OPTIONS, *options), coordinator
        self._offers, self._lanes = Addresses(), Addresses()
        self._folder = tempfile.TemporaryDirectory(prefix="baton-faults-")
        self.logs = Path(self._folder.name)
        self.workers: dict[str, Worker] = {}
        self.coordinators: dict[str, Coordinator] = {}
        self.store: Process | None = None
        self._turn = itertools.count()
        self._fronts: list[Relay] = []
        self._background: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._direct = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=5.0), connector=aiohttp.TCPConnector(limit=0, force_close=True)
        )
        try:
            if self._kinds["etcd"]:
                await self._start_store()
            for number in range(self._kinds["coordinator"]):
                await self._add_coordinator(f"coordinator-{number}")
            http, grpc_port = [await self._start_front(name) for name in ("http_port", "grpc_port")]
            self.url, self.grpc_address = f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc_port}"
            self.http = aiohttp.ClientSession(
                self.url,
                timeout=aiohttp.ClientTimeout(total=None),
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                read_bufsize=1 << 20,
            )
            self.channel = self.new_channel()
            for kind in ("prefill", "decode", "mixed"):
                for place in range(self._kinds.get(kind, 0)):
                    name = f"{kind}-{place}"
                    self.workers[name] = Worker(name, kind)
                    self.start(name)
            self._background = [asyncio.create_task(self._probe(each)) for each in self.coordinators.values()]
            self.started_s = await self.wait_for(self.complete, "every worker is here", START_TIMEOUT_S)
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.http.close()
        await self.channel.close(None)
        await self._stop()
        self._folder.cleanup()

    async def _start_store(self) -> None:
        self._etcd = await asyncio.to_thread(Etcd, self.logs / "etcd")
        self.store = Process("etcd", "etcd", self._etcd.process.pid)
        self._store_relay = Relay(STORE, self.cuts, any_bytes, lambda: Connection({"etcd"}))
        host, _, port = self._etcd.url.removeprefix("etcd://").partition(":")
        self._store_relay.target = host, int(port)
        await self._store_relay.start()

    async def _add_coordinator(self, name: str) -> None:
        link = Relay(LINK, self.cuts, link_frames, lambda: LinkTap(self, name))
        port = free_port()
        link.target = "127.0.0.1", port
        await link.start(LINK_HOST, port)
        self.coordinators[name] = Coordinator(name, "coordinator", link=link)
        self.start(name)

    async def _start_front(self, port: str) -> int:
        def connected() -> Connection:
            living = [each for each in self.coordinators.values() if each.ready] or list(self.coordinators.values())
            chosen = living[next(self._turn) % len(living)]
            connection = Connection({chosen.name})
            connection.target = "127.0.0.1", getattr(chosen, port)
            return connection

        front = Relay(FRONT, self.cuts, any_bytes, connected)
        self._fronts.append(front)
        await front.start()
        return front.port

    async def _probe(self, coordinator: Coordinator) -> None:
        """As a balancer does, by the network that it uses."""
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
        while True:
            try:
                async with self._direct.get(coordinator.url + "/ready", timeout=timeout) as answer:
                    coordinator.ready = answer.status == 200 and not self.cuts.is_cut(FRONT, coordinator.name)
            except (aiohttp.ClientError, OSError, TimeoutError):
                coordinator.ready = False
            await asyncio.sleep(PROBE_S)

    def new_channel(self) -> grpc.aio.Channel:
        """A connection of its own, which the balancer passes on to whoever is ready now."""
        options = [*PINGS.items(), ("grpc.use_local_subchannel_pool", 1)]
        return grpc.aio.insecure_channel(self.grpc_address, options=options)

    @property
    def processes(self) -> dict[str, Process]:
        """All but etcd."""
        return {**self.workers, **self.coordinators}

    def start(self, name: str) -> None:
        """Start a process, under the name, with the words and at the ports that it had."""
        if self.store is not None and name == self.store.name:
            self._etcd.kill()  # waits for its end, which gives its port and its folder back
            self._etcd.launch()
            self.store.pid = self._etcd.process.pid
            return
        process = self.processes[name]
        # It has been killed; until its last thread is gone its ports are taken.
        while process.pid and Path(f"/proc/{process.pid}").exists():
            time.sleep(0.001)
        words = ["--parent-pid", str(os.getpid())]
        if self.store is not None:
            words += ["--discovery", f"etcd://127.0.0.1:{self._store_relay.port}"]
        if isinstance(process, Coordinator):
            ports = {"port": process.http_port, "grpc-port": process.grpc_port, "link-port": process.link.port}
            words += [word for flag, port in ports.items() for word in (f"--{flag}", str(port))]
            words += [
                "--advertise-host",
                LINK_HOST,
                "--discovery-ttl-s",
                "2",
                *ELSEWHERE,
                *UNREFUSED,
                *self._coordinator_options,
            ]
        else:
            if self.store is None:
                links = [f"{LINK_HOST}:{each.link.port}" for each in self.coordinators.values()]
                words += ["--coordinator", ",".join(links)]
            words += ["--worker-id", name, *(word.format(own=self.logs / name) for word in self._options)]
        process.pid = self._nursery.start([process.kind, *words], self.logs / f"{name}.log")
        process.pids.append(process.pid)

    async def _stop(self) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        for process in self.processes.values():
            for pid in process.pids:
                send(pid, signal.SIGKILL)
        for relay in (*self._fronts, *(each.link for each in self.coordinators.values())):
            await relay.stop()
        await self._offers.stop()
        await self._lanes.stop()
        await self._direct.close()
        if self.store is not None:
            await self._store_relay.stop()
            self._etcd.kill()

    def tell(self, event: Event) -> None:
        if self.listener is not None:
            self.listener(event)

    async def with_relayed_offers(self, frame: bytes, worker: str) -> bytes:
        """A registration that names a relay instead of the address where the worker's offers are served."""

        def relay() -> Relay:
            return Relay(PEERS, self.cuts, zmtp_frames, lambda: HandoverTap(self, worker))

        return await self._offers.replaced(frame, rb"tcp://([\d.]+):(\d+)", relay, worker)

    async def with_relayed_lane(self, frame: bytes, offerer: str, puller: str) -> bytes:
        """The same for lane tcp, in what an offerer answers to a puller."""

        def relay() -> Relay:
            return Relay(PEERS, self.cuts, any_bytes, lambda: Connection({offerer, puller}))

        return await self._lanes.replaced(frame, rb"(127\.0\.0\.1):(\d+)", relay, f"{offerer} {puller}")

    def sever(self, name: str) -> None:
        """What the process sent and no relay has passed on yet is lost."""
        for relay in (*self._fronts, *(each.link for each in self.coordinators.values())):
            relay.sever(name)
        if offers := self._offers.of(name):
            offers.sever()

    def coordinator_of(self, event: Event) -> Coordinator | None:
        """Who has the attempt that an event is about."""
        if event.coordinator:
            return self.coordinators[event.coordinator]
        for worker in self.workers.values():
            for name, legs in worker.legs_at.items():
                if event.attempt_id in legs:
                    return self.coordinators[name]
        return None

    def num_live_parts(self, process: Process) -> int:
        """Attempts that a process has a part in; all, where it is etcd."""
        if isinstance(process, Worker):
            return len(process.legs)
        everywhere = [legs for worker in self.workers.values() for legs in worker.legs_at.items()]
        return sum(len(legs) for name, legs in everywhere if process.kind == "etcd" or name == process.name)

    # What can be seen

    async def status(self, coordinator: Coordinator) -> dict[str, Any]:
        """Raises aiohttp.ClientError, OSError or TimeoutError where it does not answer."""
        async with self._direct.get(coordinator.url + "/status") as answer:
            result: dict[str, Any] = await answer.json()
            return result

    async def is_noticed(self, process: Process, incarnation: int) -> bool:
        """Whether a coordinator has dropped this life of a worker, or has found etcd silent."""
        for coordinator in self.coordinators.values():
            if isinstance(process, Worker):
                seen = {worker["id"]: worker["incarnation"] for worker in (await self.status(coordinator))["workers"]}
                if seen.get(process.name) != f"{incarnation:016x}":
                    return True
            elif not await self._has_store(coordinator):
                return True
        return False

    async def _has_store(self, coordinator: Coordinator) -> bool:
        async with self._direct.get(coordinator.url + "/metrics") as answer:
            return "baton_discovery_up 0.0" not in await answer.text()

    async def complete(self) -> bool:
        """Every worker is registered with every coordinator, in its present life, and etcd is there."""
        present = {worker.name: worker.pid for worker in self.workers.values()}
        for coordinator in self.coordinators.values():
            try:
                seen = {worker["id"]: worker["pid"] for worker in (await self.status(coordinator))["workers"]}
                has_store = await self._has_store(coordinator)
            except (aiohttp.ClientError, OSError, TimeoutError):
                return False
            if seen != present or not has_store:
                return False
        return all(coordinator.ready for coordinator in self.coordinators.values())

    async def idle(self) -> bool:
        """No request anywhere, and every block of every worker free or cached."""
        statuses = [await self.status(coordinator) for coordinator in self.coordinators.values()]
        return not any(status["requests"] for status in statuses) and all(
            worker["running"] == worker["waiting"] == 0
            and worker["blocks"]["free"] + worker["blocks"]["cached"] == worker["blocks"]["total"]
            for status in statuses
            for worker in status["workers"]
        )

    async def count_descriptors(self) -> None:
        """Of the coordinators, while they are idle: they should never have more at such a time."""
        for coordinator in self.coordinators.values():
            counts = []
            for _ in range(10):
                counts.append(num_descriptors(coordinator.pid))
                await asyncio.sleep(0.05)
            coordinator.idle_descriptors = coordinator.pid, max(counts)

    async def has_no_more_descriptors(self) -> bool:
        for coordinator in self.coordinators.values():
            pid, most = coordinator.idle_descriptors
            most += MOVED_DESCRIPTORS * (len(self.coordinators) > 1) + NEW_LIFE_DESCRIPTORS * (pid != coordinator.pid)
            if num_descriptors(coordinator.pid) > most:
                return False
        return True

    async def wait_for(self, promise: Callable[[], Any], what: str, timeout_s: float = IDLE_TIMEOUT_S) -> float:
        """Seconds until the promise held."""
        began = time.monotonic()
        while not await promise():
            if time.monotonic() - began > timeout_s:
                raise NotKept(f"not within {timeout_s:g} s: {what}\n{await self._all()}")
            await asyncio.sleep(0.05)
        return time.monotonic() - began

    async def _all(self) -> str:
        found: dict[str, Any] = {}
        for coordinator in self.coordinators.values():
            try:
                found[coordinator.name] = await self.status(coordinator)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                found[coordinator.name] = repr(error)
        return json.dumps(found, indent=1)

    def log(self, num_lines: int = 60) -> str:
        """The end of what each process wrote."""
        logs = {path.name: path.read_text().splitlines()[-num_lines:] for path in sorted(self.logs.glob("*.log"))}
        return "\n".join("\n".join([f"--- {name}", *lines]) for name, lines in logs.items())


class NotKept(AssertionError):
    """Something that must come true did not in its time."""
