"""Two coordinators over the same workers, poison at one, every message as late as it may be: no innocent is ended."""

import asyncio
import random
from collections import deque
from collections.abc import Sequence

import pytest
from fake_worker import token_at
from outbox import Outbox
from test_dispatcher_properties import Model, Run, World
from test_poison_properties import MAX_TOKENS, POISON

from baton.token_ids import count, unpack
from baton.v1 import worker_link_pb2 as wire
from coordinator import quarantine
from coordinator.delivery import Choice, Request
from coordinator.detokenizer import TextStream, WindowDetokenizer
from coordinator.failures import FailureKind


class Door(World):
    """One coordinator. What workers say waits in `said`, by worker, until it arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.said: dict[str, deque[wire.WorkerMessage]] = {}

    def submit(self, id: str, prompt: list[int]) -> Request:
        request = Request(id)
        sampling = wire.EngineSampling(max_tokens=MAX_TOKENS)
        Choice(request, 0, prompt, sampling, TextStream(WindowDetokenizer(lambda ids: "x" * len(ids))), False)
        self.dispatcher.start(request)
        self.requests.append(request)
        return request

    def say(self, model: Model, **message: object) -> None:
        self.said[model.worker.id].append(wire.WorkerMessage(**message))

    def advance(self, model: Model, run: Run) -> None:
        self.token(model, run, run.next_index)
        run.next_index += 1
        if run.next_index == MAX_TOKENS:
            self.end(model, run, wire.END_REASON_LENGTH, MAX_TOKENS)

    def hear(self, model: Model, count: int) -> None:
        said = self.said[model.worker.id]
        for _ in range(min(count, len(said))):
            super().say(model, **{said[0].WhichOneof("message"): getattr(said[0], said[0].WhichOneof("message"))})
            said.popleft()


class Host:
    """A worker, which both coordinators have."""

    def __init__(self, number: int, doors: Sequence[Door]) -> None:
        registration = wire.Registration(
            protocol_version=wire.LINK_PROTOCOL_VERSION,
            worker_id=f"w{number}", incarnation=number, roles=[wire.ROLE_DECODE],
            page_size_tokens=16, total_blocks=64, max_model_tokens=512, model="demo", handover_address="x",
        )  # fmt: skip
        self.doors = doors
        self.models = [Model(door.registry.register(registration, Outbox())) for door in doors]
        for door in doors:
            door.said[registration.worker_id] = deque()
        self.holder: Model | None = None
        self.token = 0
        self.cleared = self.wanted = False

    def read(self, door: Door, model: Model) -> None:
        while model.worker.link:
            message = model.worker.link.popleft()
            if message.HasField("assignment") and self.holder not in (None, model):
                refusal = wire.Admission(id=message.assignment.id, accepted=False, reserved=True)
                door.say(model, admission=refusal)
            elif message.HasField("assignment"):
                sent = count(message.assignment.token_ids) - message.assignment.num_prompt_tokens
                model.runs.append(Run(message.assignment, sent))
            elif message.HasField("abort"):
                for run in model.runs:
                    run.over = run.over or run.assignment.id == message.abort.id
            elif message.HasField("reserve"):
                if self.holder is None:
                    self.holder, self.token = model, message.reserve.token
                self.beat()
            elif message.HasField("unreserve"):
                if message.unreserve.token == self.token and model is self.holder:
                    self.holder, self.token, self.cleared, self.wanted = None, 0, False, False
                self.wanted |= message.unreserve.token == self.token != 0
                self.beat()

    def beat(self) -> None:
        if self.holder is not None:
            self.cleared |= not any(each.live for each in self.models if each is not self.holder)
        running = sum(len(each.live) for each in self.models)
        beat = wire.WorkerHeartbeat(
            blocks=wire.BlockCounts(total=64, free=64), running_requests=running, reservation=self.token,
            reservation_cleared=self.cleared, reservation_wanted=self.wanted,
        )  # fmt: skip
        for door, model in zip(self.doors, self.models, strict=True):
            door.say(model, heartbeat=beat)


class Fleet:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.doors = [Door(), Door()]
        self.num_hosts = self.kills = 0
        self.hosts: list[Host] = []
        self.stretch = rng.choice([None, 0, 1, 15, 17, 30])
        self.place = rng.randrange(MAX_TOKENS)
        self.dying: list[tuple[int, Door, Model]] = []
        """Turns until a coordinator notices, and what it loses."""

    def join(self) -> None:
        self.num_hosts += 1
        self.hosts.append(Host(self.num_hosts, self.doors))

    def fatal(self, run: Run) -> bool:
        if POISON not in unpack(run.assignment.token_ids):
            return False
        started = count(run.assignment.token_ids) - run.assignment.num_prompt_tokens
        return run.next_index >= (self.place if self.stretch is None else started + self.stretch)

    def die(self, host: Host) -> None:
        """What it said last may be lost, and one coordinator may notice long before the other."""
        self.kills += 1
        self.hosts.remove(host)
        self.join()
        for door, model in zip(self.doors, host.models, strict=True):
            said = door.said[model.worker.id]
            for _ in range(self.rng.randrange(len(said) + 1)):
                said.pop()
            self.dying.append((self.rng.randrange(6), door, model))

    def step(self) -> None:
        for host in list(self.hosts):
            for door, model in zip(self.doors, host.models, strict=True):
                if self.rng.random() < 0.6:
                    host.read(door, model)
            if any(self.fatal(run) for model in host.models for run in model.live):
                self.die(host)
                continue
            for door, model in zip(self.doors, host.models, strict=True):
                for run in model.live:
                    if self.rng.random() < 0.7:
                        door.advance(model, run)
            if self.rng.random() < 0.5:
                host.beat()
        dying, self.dying = self.dying, []
        for turns, door, model in dying:
            if turns:
                door.hear(model, self.rng.randrange(4))
                self.dying.append((turns - 1, door, model))
            else:
                door.hear(model, 10**6)
                model.worker.lose("the test says so")
        for host in self.hosts:
            for door, model in zip(self.doors, host.models, strict=True):
                door.hear(model, self.rng.choice([0, 1, 3, 30]))


async def play(rng: random.Random) -> int:
    fleet = Fleet(rng)
    for _ in range(rng.randrange(1, 7)):
        fleet.join()
    at = sorted(rng.randrange(60) for _ in range(rng.randrange(1, 7)))
    poisons: list[Request] = []
    innocents: list[Request] = []
    for turn in range(6000):
        if len(innocents) < 24 and rng.random() < 0.4:
            number = len(innocents)
            innocents.append(fleet.doors[number % 2].submit(f"i{number}", [number] * 3))
        while len(poisons) < len(at) and turn >= at[len(poisons)]:
            poisons.append(fleet.doors[0].submit(f"p{len(poisons)}", [POISON, len(poisons)]))
        fleet.step()
        await asyncio.sleep(0)
        if (
            len(poisons) == len(at)
            and len(innocents) == 24
            and not any(door.dispatcher.requests for door in fleet.doors)
        ):
            break
    assert [door.dispatcher.requests for door in fleet.doors] == [{}, {}], "somebody was forgotten"
    for poison in poisons:
        assert poison.failure is not None or poison.choices[0].finish_reason == "length"
        assert poison.failure is None or poison.failure.kind is FailureKind.POISON
    for request in innocents:
        choice = request.choices[0]
        assert request.failure is None, request.failure
        assert choice.stream.tokens == [token_at(choice.prompt, index) for index in range(MAX_TOKENS)]
    assert fleet.kills <= 8 * len(poisons)
    return fleet.kills


@pytest.mark.parametrize("seed", range(60))
def test_innocents_of_both_end_right_and_poison_kills_few(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "PATIENCE_S", -1.0)
    monkeypatch.setattr(quarantine, "MAX_CLOSED_S", 1e9)
    asyncio.run(play(random.Random(seed)))
