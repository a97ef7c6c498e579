"""Whatever mix of poison and of operators that kill workers: innocents end right, and poison kills few workers."""

import asyncio
import random

import pytest
from fake_worker import token_at
from outbox import Outbox
from test_dispatcher_properties import Model, Run, World

from baton.token_ids import count, unpack
from baton.v1 import worker_link_pb2 as wire
from coordinator import quarantine
from coordinator.delivery import Choice, Request
from coordinator.detokenizer import TextStream, WindowDetokenizer
from coordinator.failures import FailureKind

POISON = 1_000_000
MAX_TOKENS = 60


class Fleet(World):
    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng = rng
        self.kills = 0
        self.operator_kills = rng.randrange(6)
        self.same_place = rng.random() < 0.5
        self.place = rng.randrange(MAX_TOKENS)
        self.stretch = rng.choice([0, 1, 15, 16, 17, 30])
        self.hit_a_lane = False

    def join(self, *roles: int) -> None:
        self.num_joined += 1
        registration = wire.Registration(
            protocol_version=wire.LINK_PROTOCOL_VERSION,
            worker_id=f"w{self.num_joined}", incarnation=self.num_joined, roles=roles,
            page_size_tokens=16, total_blocks=64, max_model_tokens=512, model="demo", handover_address="x",
        )  # fmt: skip
        self.models.append(Model(self.registry.register(registration, Outbox())))

    def submit(self, id: str, prompt: list[int]) -> Request:
        request = Request(id)
        sampling = wire.EngineSampling(max_tokens=MAX_TOKENS)
        Choice(request, 0, prompt, sampling, TextStream(WindowDetokenizer(lambda ids: "x" * len(ids))), False)
        self.dispatcher.start(request)
        self.requests.append(request)
        return request

    def lose(self, model: Model) -> None:
        """Another one comes for it first: this test is not about the last worker."""
        self.join(*model.worker.registration.roles)
        model.worker.lose("the test says so")
        self.models.remove(model)

    def kills_now(self, run: Run) -> bool:
        if POISON not in unpack(run.assignment.token_ids):
            return False
        started = count(run.assignment.token_ids) - run.assignment.num_prompt_tokens
        return run.next_index >= (self.place if self.same_place else started + self.stretch)

    def advance(self, model: Model, run: Run) -> None:
        peer = run.assignment.prefill.worker_id if run.assignment.HasField("prefill") else ""
        if run.next_index == 0 and any(other.worker.id == peer for other in self.models):
            (request,) = (each for each in self.requests if run.assignment.id.request_id == f"{each.id}-0")
            if not request.choices[0].stream.tokens:
                return  # the first token comes from there
        self.token(model, run, run.next_index)
        run.next_index += 1
        if run.next_index == MAX_TOKENS:
            self.end(model, run, wire.END_REASON_LENGTH, MAX_TOKENS)
        elif run.assignment.role == wire.ROLE_PREFILL:
            self.end(model, run, wire.END_REASON_HANDED_OVER, run.next_index)

    def step(self) -> None:
        for model in list(self.models):
            model.read()
            fatal = [run for run in model.live if self.kills_now(run)]
            if fatal:
                self.kills += 1
                self.lose(model)
                continue
            if self.operator_kills and self.rng.random() < 0.01:
                if model.worker.id in self.dispatcher.quarantine.closed:
                    if self.hit_a_lane:
                        continue  # nobody can tell an operator who does so twice from poison
                    self.hit_a_lane = True
                self.operator_kills -= 1
                self.lose(model)
                continue
            for run in model.live:
                if self.rng.random() < 0.7:
                    self.advance(model, run)
            self.say(model, heartbeat=model.beat())


async def play(rng: random.Random) -> None:
    fleet = Fleet(rng)
    for _ in range(rng.randrange(1, 6)):
        fleet.join(wire.ROLE_DECODE)
    for _ in range(rng.randrange(3)):
        fleet.join(wire.ROLE_PREFILL)
    poison = None
    at = rng.randrange(30)
    innocents: list[Request] = []
    for turn in range(4000):
        if len(innocents) < 25 and rng.random() < 0.3:
            innocents.append(fleet.submit(f"i{len(innocents)}", [len(innocents)] * rng.choice([1, 40])))
        if turn == at:
            poison = fleet.submit("poison", [POISON] * rng.choice([1, 40]))
        fleet.step()
        await asyncio.sleep(0)
        if turn > at and len(innocents) == 25 and not fleet.dispatcher.requests:
            break
    assert poison is not None
    assert fleet.dispatcher.requests == {}, "somebody was forgotten"
    assert not fleet.dispatcher.quarantine.busy
    if fleet.same_place or fleet.stretch < MAX_TOKENS:
        assert poison.failure is not None or poison.choices[0].finish_reason == "length"
    if poison.failure is not None:
        assert poison.failure.kind is FailureKind.POISON
    assert fleet.kills <= 8
    for request in innocents:
        choice = request.choices[0]
        assert request.failure is None, request.failure
        assert choice.stream.tokens == [token_at(choice.prompt, index) for index in range(MAX_TOKENS)]


@pytest.mark.parametrize("seed", range(100))
def test_innocents_end_right_and_poison_kills_few(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "PATIENCE_S", -1.0)
    monkeypatch.setattr(quarantine, "MAX_CLOSED_S", 1e9)
    asyncio.run(play(random.Random(seed)))
