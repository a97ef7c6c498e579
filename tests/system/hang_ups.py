"""200 clients of a coordinator with a prefill and a decode worker hang up: how long until every block is free again.

All in this process, so that each step of both engines can be looked at: real HTTP, links, engines, hand-over. Run as a
module it prints what it saw as JSON; `test_hang_ups` judges it.
"""

import argparse
import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import engine
from baton.config import CoordinatorOptions, EngineOptions, HandoverOptions, ModelOptions
from baton.discovery import Fixed
from baton.model_folder import tokenizer_fingerprint
from baton.v1 import worker_link_pb2 as wire
from cli.assembly import Wired, assemble, wire_up
from coordinator.server import Coordinator
from decode.role import DecodeRole
from engine.blocks import OwnerKind
from engine.engine import Engine, OnOutput
from engine.loading import load_model
from engine.requests import StepOutput
from engine.sequence import Phase
from kvtransfer.taking import Taking
from kvtransfer.wire import PeerIdentity
from worker.links import CoordinatorLinks
from worker.roles import Link

MODEL = Path(engine.__file__).parent / "demo_model"
TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Shape:
    """Which of the two workers the others wait for, and where streams must be when their clients hang up."""

    decode: EngineOptions
    phases: frozenset[str]


PREFILL = EngineOptions(kv_memory="96MiB", max_batch_tokens=256)
SHAPES = {
    "prefill_is_busy": Shape(
        EngineOptions(kv_memory="192MiB", max_batch_tokens=128, max_running=96),
        frozenset({"prefill: waiting", "decode: waiting", "decode: receiving", "decode: decoding"}),
    ),
    "decode_is_busy": Shape(
        EngineOptions(kv_memory="48MiB", max_batch_tokens=128, max_running=32),
        frozenset({"prefill: leased", "decode: waiting", "decode: decoding"}),
    ),
}


@dataclass
class Freed:
    """One attempt at one worker that had to do with it when its client hung up."""

    worker: str
    phase: str
    steps: int
    """Of the engine that came to their end after the abort arrived, until nothing of the pool was the attempt's."""
    ms: float
    """From the arrival of the abort."""
    ms_from_hang_up: float


@dataclass
class Seen:
    """What a run saw."""

    phases: dict[str, int] = field(default_factory=dict)
    """When the first client hung up."""
    freed: list[Freed] = field(default_factory=list)
    step_ms: dict[str, float] = field(default_factory=dict)
    """The longest step of each engine from the first hang-up on."""
    coordinator_requests: int = 0


class Watch:
    """Looks at one worker's pool before each step, and at each abort that arrives."""

    def __init__(self, name: str, wired: Wired, core: Engine) -> None:
        self.name = name
        self.shell = wired.shell
        self.scheduler = core._scheduler
        self.phases: dict[str, str] = {}
        """Of every attempt that this worker had to do with when the first client hung up, by key; as of its abort."""
        self.freed: dict[str, Freed] = {}
        self.longest_step_s = 0.0
        self.hung_up: dict[str, float] = {}
        """When the client of each stream hung up, by request id."""
        self.others: list[Watch] = []
        self._arrived: dict[str, tuple[float, int]] = {}
        """When an abort came, and how many steps there had been."""
        self._heard: dict[str, tuple[float, int]] = {}
        """The same of aborts at other workers: those that only hold a lease are told by these."""
        self._counters = core.counters
        on_abort, step = wired.shell.on_abort, core.step

        def abort(link: Link, id: wire.AttemptId) -> None:
            key = f"{id.request_id}/{id.attempt}"
            again = key in self._arrived
            self._arrived.setdefault(key, self._now())
            if key in self.phases:
                self.phases[key] = self._phase(key)
            for other in self.others:
                other._heard.setdefault(key, other._now())
            on_abort(link, id)
            if not again:  # steps are counted from when the engine has it: this thread may have stood still before that
                self._arrived[key] = self._arrived[key][0], self._now()[1]

        def watched(on_output: OnOutput | None = None) -> StepOutput:
            self.look()  # commands come before a step
            began = time.monotonic()
            output = step(on_output)
            if self.hung_up:
                self.longest_step_s = max(self.longest_step_s, time.monotonic() - began)
            return output

        wired.shell.on_abort = abort  # type: ignore[method-assign]
        core.step = watched  # type: ignore[method-assign]

    def _now(self) -> tuple[float, int]:
        return time.monotonic(), int(self._counters["engine_steps"])

    def note_phases(self) -> None:
        """In the engine's thread."""
        self.phases = {key: self._phase(key) for key in self.scheduler._sequences}
        for owner in self.scheduler._allocator.owners():
            if owner.kind is OwnerKind.LEASE:
                self.phases.setdefault(owner.id, "leased")

    def _phase(self, key: str) -> str:
        sequence, taking = self.scheduler._sequences.get(key), self._takings().get(key)
        if sequence is None:
            return self.phases.get(key, "leased")
        if sequence.is_exposed or (taking is not None and taking.pull is not None):
            return "handing over"
        if sequence.phase is Phase.RUNNING:
            return "prefilling" if sequence.num_uncomputed > 1 else "decoding"
        return sequence.phase.value

    def _takings(self) -> dict[str, Taking]:
        role = self.shell._roles.get(wire.ROLE_DECODE)
        return role._intake._takings if isinstance(role, DecodeRole) else {}

    def look(self) -> None:
        """Who has let go of everything, in the engine's thread."""
        owners = set()
        for owner in self.scheduler._allocator.owners():
            owners.add(owner.id.removesuffix(" (fenced)"))
            if owner.kind is OwnerKind.LEASE and owner.id in self._arrived:
                self.phases[owner.id] = "leased"  # by the end of the step that ran when the abort came, or before
        now, steps = self._now()
        for key in self.phases.keys() - self.freed.keys() - owners - self.scheduler._sequences.keys():
            hung_up = self.hung_up.get(key.rpartition("-")[0])
            if hung_up is None:
                del self.phases[key]  # it came to its own end before
                continue
            arrived, before = self._arrived.get(key) or self._heard.get(key) or (now, steps)
            phase = self.phases[key] if key in self._arrived else "leased"
            self.freed[key] = Freed(self.name, phase, steps - before, 1e3 * (now - arrived), 1e3 * (now - hung_up))


class Client:
    """One streaming request over a connection of its own, closed the hard way."""

    def __init__(self, number: int) -> None:
        self.id = f"hang-up-client-{number:04}"
        self.num_events = 0

    async def start(self, port: int, prompt: list[int]) -> None:
        body = {"model": "demo", "prompt": prompt, "max_tokens": 1500, "stream": True, "ignore_eos": True}
        data = json.dumps(body).encode()
        reader, self.writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nX-Request-Id: {self.id}\r\n"
        )
        self.writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        self.reading = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(65536):
            self.num_events += data.count(b"data: {")

    def hang_up(self) -> float:
        self.reading.cancel()
        self.writer.transport.abort()
        return time.monotonic()


async def until(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {TIMEOUT_S} s: {what()}")
        await asyncio.sleep(0.002)


async def run(shape: Shape, num_clients: int, gap_s: float, seed: int) -> Seen:
    """`gap_s`: between two hang-ups, in a random order; 0: all at once."""
    rng, seen = random.Random(seed), Seen()
    async with AsyncExitStack() as stack:
        options = CoordinatorOptions(
            port=0, grpc_port=0, link_port=0, local_prefill_tokens=0, max_requests=1000,
            service_classes="standard=0/0",  # all are taken, however long they will wait
            heartbeat_timeout_s=TIMEOUT_S,  # everything shares one thread with a machine that may be busy
        )  # fmt: skip
        coordinator = Coordinator(options, ModelOptions(), MODEL)
        ports = await coordinator.start()
        stack.push_async_callback(coordinator.stop)
        prefill, decode = watches = [
            await add_worker(stack, "prefill", wire.ROLE_PREFILL, PREFILL, ports.link),
            await add_worker(stack, "decode", wire.ROLE_DECODE, shape.decode, ports.link),
        ]
        prefill.others, decode.others = [decode], [prefill]
        await until(lambda: len(coordinator.registry.workers) == len(watches), lambda: "both workers are there")
        # Short prompts first, which decode while long ones are in all the phases before.
        clients = [Client(number) for number in range(num_clients)]
        for number, client in enumerate(clients):
            length = rng.randrange(20, 60) if number < num_clients // 4 else rng.randrange(300, 900)
            await client.start(ports.http, [rng.randrange(10, 4000) for _ in range(length)])
        await until(
            lambda: len(decode.scheduler._sequences) == num_clients,
            lambda: f"{num_clients} streams are where they will decode, not {len(decode.scheduler._sequences)}",
        )
        await until(
            lambda: sum(client.num_events > 2 for client in clients) >= num_clients // 8, lambda: "streams that decode"
        )
        deadline = time.monotonic() + TIMEOUT_S
        while not seen.phases.keys() >= shape.phases:
            if time.monotonic() > deadline:
                raise AssertionError(f"streams are {seen.phases}, not everywhere in {sorted(shape.phases)}")
            await asyncio.sleep(0.01)
            for watch in watches:
                await watch.shell.steps.call(lambda engine, watch=watch: watch.note_phases())
            seen.phases = dict(
                Counter(f"{watch.name}: {phase}" for watch in watches for phase in watch.phases.values())
            )
        for client in rng.sample(clients, len(clients)):
            at = client.hang_up()
            for watch in watches:
                watch.hung_up[client.id] = at
            if gap_s:
                await asyncio.sleep(gap_s)
        for watch in watches:
            while watch.phases.keys() != watch.freed.keys():
                await watch.shell.steps.call(lambda engine, watch=watch: watch.look())
            load = await watch.shell.steps.call(lambda engine: engine.load())
            assert load.blocks.free + load.blocks.cached == load.blocks.total, f"{watch.name}: {load}"
            assert load.running == load.waiting == 0
            await watch.shell.steps.call(lambda engine: engine.check_idle())
        seen.freed = [freed for watch in watches for freed in watch.freed.values()]
        seen.step_ms = {watch.name: 1e3 * watch.longest_step_s for watch in watches}
        seen.coordinator_requests = len(coordinator.dispatcher.requests)
        return seen


async def add_worker(
    stack: AsyncExitStack, name: str, role: "wire.Role.ValueType", options: EngineOptions, link_port: int
) -> Watch:
    parts = assemble(load_model(MODEL), options)
    me = PeerIdentity(name, random.getrandbits(60))
    late: list[CoordinatorLinks] = []

    def crashed(error: BaseException) -> None:
        os.abort()  # its thread has said why

    wiring = wire_up(parts, me, [role], HandoverOptions(), "127.0.0.1", lambda said: late[0].send_all(said), crashed)
    wired = await stack.enter_async_context(wiring)
    watch = Watch(name, wired, parts.engine)
    registration = parts.registration()
    registration.MergeFrom(
        wire.Registration(
            worker_id=name, incarnation=me.incarnation, roles=[role], host="127.0.0.1",
            handover_address=wired.handover_address, model="demo", lanes=["shm"],
            tokenizer_fingerprint=tokenizer_fingerprint(MODEL),
        )
    )  # fmt: skip
    links = CoordinatorLinks(registration, wired.shell, wired.shell.heartbeat)
    late.append(links)
    serving = asyncio.create_task(links.run(Fixed(frozenset({f"127.0.0.1:{link_port}"})), TIMEOUT_S))
    stack.push_async_callback(asyncio.wait, {serving}, timeout=5.0)
    stack.callback(serving.cancel)
    return watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="prefill_is_busy")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--gap-s", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        json.dumps(
            asdict(asyncio.run(run(SHAPES[arguments.shape], arguments.clients, arguments.gap_s, arguments.seed)))
        )
    )


if __name__ == "__main__":
    main()
