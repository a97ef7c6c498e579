"""A coordinator and workers as real processes, with a relay on every wire, and what can be seen of them."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import grpc.aio

from baton.v1 import handover_pb2 as handover
from baton.v1 import worker_link_pb2 as wire
from tests.faults.processes import Nursery, num_descriptors, send
from tests.faults.relay import (
    Addresses,
    Connection,
    Cuts,
    GrpcMessages,
    Relay,
    ZmtpMessages,
    any_bytes,
    http2_frames,
    zmtp_frames,
)

LINK, PEERS = "link", "peers"
"""The networks that a worker can be cut off from: its coordinator, other workers."""
START_TIMEOUT_S, IDLE_TIMEOUT_S = 90.0, 60.0
OPTIONS = ("--dtype", "float32", "--threads", "1", "--kv-memory", "48MiB", "--max-batch-tokens", "32")
"""Prompts are computed in many small steps, so that there is time for something to happen between two of them."""


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


@dataclass
class Leg:
    """A worker's part in an attempt, as its link shows it."""

    attempt: int
    num_tokens: int
    max_tokens: int
    handle: int


@dataclass
class Worker:
    name: str
    kind: str
    link: Relay
    pid: int = 0
    pids: list[int] = field(default_factory=list)
    incarnation: int = 0
    legs: dict[str, Leg] = field(default_factory=dict)
    """Live parts by attempt: assigned, and neither ended nor aborted."""


class LinkTap(Connection):
    """What passes on a worker's link to its coordinator."""

    def __init__(self, fleet: "Fleet", worker: Worker) -> None:
        super().__init__({worker.name})
        self._fleet, self._worker = fleet, worker
        self._messages = GrpcMessages(), GrpcMessages()
        self._passing: tuple[list[Event], list[Event]] = [], []
        worker.legs.clear()

    async def before(self, frame: bytes, from_client: bool) -> bytes:
        events: list[Event] = []
        for data in self._messages[from_client].of(frame):
            if from_client:
                message = wire.WorkerMessage.FromString(data)
                if message.WhichOneof("message") == "registration":
                    self._worker.incarnation = message.registration.incarnation
                    frame = await self._fleet.with_relayed_offers(frame, self._worker.name)
                events += self._said(message)
            else:
                events += self._told(wire.CoordinatorMessage.FromString(data))
        self._passing[from_client][:] = events
        for event in events:
            self._fleet.tell(event)
        return frame

    def after(self, from_client: bool) -> None:
        for event in self._passing[from_client]:
            self._fleet.tell(Event(**{**vars(event), "arrived": True}))

    def _told(self, message: wire.CoordinatorMessage) -> list[Event]:
        legs = self._worker.legs
        if message.WhichOneof("message") == "assignment":
            given = message.assignment
            key = _key(given.id)
            legs[key] = Leg(given.id.attempt, len(given.token_ids), given.sampling.max_tokens, given.handle)
            return [Event("assigned", self._worker.name, key, given.id.attempt)]
        if message.WhichOneof("message") == "abort":
            legs.pop(_key(message.abort.id), None)
        return []

    def _said(self, message: wire.WorkerMessage) -> list[Event]:
        name, legs = self._worker.name, self._worker.legs
        match message.WhichOneof("message"):
            case "progress" if leg := legs.get(key := _key(message.progress.id)):
                computed = message.progress.computed_tokens
                return [Event("progress", name, key, leg.attempt, computed, computed >= leg.num_tokens)]
            case "tokens":
                by_handle = {leg.handle: (key, leg) for key, leg in legs.items()}
                return [
                    Event("token", name, key, leg.attempt, index, index == leg.max_tokens - 1)
                    for handle, index in zip(message.tokens.handles, message.tokens.indices, strict=True)
                    if handle in by_handle
                    for key, leg in [by_handle[handle]]
                ]
            case "ending":
                legs.pop(_key(message.ending.id), None)
            case "admission" if not message.admission.accepted:
                legs.pop(_key(message.admission.id), None)
            case "admission" if leg := legs.get(key := _key(message.admission.id)):
                return [Event("started", name, key, leg.attempt)]
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
                self._fleet.tell(Event(**{**vars(event), "arrived": True}))


class Fleet:
    """Runs while the context is open. `kinds`: how many workers of which kind, such as {"prefill": 2, "decode": 1}."""

    def __init__(self, nursery: Nursery, kinds: dict[str, int], *options: str, coordinator: Sequence[str] = ()) -> None:
        self.listener: Callable[[Event], None] | None = None
        self.cuts = Cuts()
        self._nursery, self._kinds = nursery, kinds
        self._options, self._coordinator_options = (*OPTIONS, *options), coordinator
        self._offers, self._lanes = Addresses(), Addresses()
        self._folder = tempfile.TemporaryDirectory(prefix="baton-faults-")
        self.logs = Path(self._folder.name)
        self.workers: dict[str, Worker] = {}

    async def __aenter__(self) -> Self:
        try:
            ports = await asyncio.to_thread(self._start_coordinator)
            self.url, self.grpc_address = f"http://127.0.0.1:{ports['http']}", f"127.0.0.1:{ports['grpc']}"
            self.http = aiohttp.ClientSession(
                self.url,
                timeout=aiohttp.ClientTimeout(total=None),
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
            )
            self.channel = grpc.aio.insecure_channel(self.grpc_address)
            for kind, number in self._kinds.items():
                for place in range(number):
                    await self._add(kind, f"{kind}-{place}", ports["link"])
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

    def _start_coordinator(self) -> dict[str, int]:
        read_fd, write_fd = os.pipe()
        words = ["--port", "0", "--grpc-port", "0", "--link-port", "0", "--parent-pid", str(os.getpid())]
        with (self.logs / "coordinator.log").open("a") as log:
            self.coordinator = subprocess.Popen(
                [sys.executable, "-P", "-m", "cli.main", "coordinator", *words, *self._coordinator_options,
                 "--announce-fd", str(write_fd)],
                pass_fds=[write_fd], stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        os.close(write_fd)
        with os.fdopen(read_fd) as pipe:
            ports: dict[str, int] = json.loads(pipe.read())
            return ports

    async def _add(self, kind: str, name: str, link_port: int) -> None:
        link = Relay(LINK, self.cuts, http2_frames, lambda: LinkTap(self, self.workers[name]))
        link.target = "127.0.0.1", link_port
        await link.start()
        self.workers[name] = Worker(name, kind, link)
        self.start(name)

    def start(self, name: str) -> None:
        """Start a worker, under the name and with the words that it had."""
        worker = self.workers[name]
        words = ["--worker-id", name, "--coordinator", f"127.0.0.1:{worker.link.port}"]
        words += ["--parent-pid", str(os.getpid()), *self._options]
        worker.pid = self._nursery.start([worker.kind, *words], self.logs / f"{name}.log")
        worker.pids.append(worker.pid)

    async def _stop(self) -> None:
        for worker in self.workers.values():
            for pid in worker.pids:
                send(pid, signal.SIGKILL)
            await worker.link.stop()
        await self._offers.stop()
        await self._lanes.stop()
        self.coordinator.kill()
        self.coordinator.wait(10)

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
        """What the worker sent and no relay has passed on yet is lost."""
        self.workers[name].link.sever()
        if offers := self._offers.of(name):
            offers.sever()

    # What can be seen

    async def status(self) -> dict[str, Any]:
        async with self.http.get("/status") as answer:
            result: dict[str, Any] = await answer.json()
            return result

    async def complete(self) -> bool:
        """Every worker is registered, in its present life."""
        seen = {worker["id"]: worker["pid"] for worker in (await self.status())["workers"]}
        return seen == {worker.name: worker.pid for worker in self.workers.values()}

    async def idle(self) -> bool:
        """No request anywhere, and every block of every worker free or cached."""
        status = await self.status()
        return not status["requests"] and all(
            worker["running"] == worker["waiting"] == 0
            and worker["blocks"]["free"] + worker["blocks"]["cached"] == worker["blocks"]["total"]
            for worker in status["workers"]
        )

    async def count_descriptors(self) -> None:
        """Of the coordinator, while it is idle: it should never have more at such a time."""
        counts = []
        for _ in range(10):
            counts.append(num_descriptors(self.coordinator.pid))
            await asyncio.sleep(0.05)
        self._idle_descriptors = min(counts)

    async def has_no_more_descriptors(self) -> bool:
        return num_descriptors(self.coordinator.pid) <= self._idle_descriptors

    async def wait_for(self, promise: Callable[[], Any], what: str, timeout_s: float = IDLE_TIMEOUT_S) -> float:
        """Seconds until the promise held."""
        began = time.monotonic()
        while not await promise():
            if time.monotonic() - began > timeout_s:
                raise NotKept(f"not within {timeout_s:g} s: {what}\n{json.dumps(await self.status(), indent=1)}")
            await asyncio.sleep(0.05)
        return time.monotonic() - began

    def log(self, num_lines: int = 60) -> str:
        """The end of what each process wrote."""
        logs = {path.name: path.read_text().splitlines()[-num_lines:] for path in sorted(self.logs.glob("*.log"))}
        return "\n".join("\n".join([f"--- {name}", *lines]) for name, lines in logs.items())


class NotKept(AssertionError):
    """Something that must come true did not in its time."""
