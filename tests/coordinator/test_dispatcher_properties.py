"""Any order of tokens, deaths, refusals, failures, joins, drains, aborts and changes of who gets traffic ends with
right streams, each wholly of one model version, and nothing left over."""

import asyncio
from dataclasses import dataclass, field

from fake_worker import token_at
from hypothesis import given, settings
from hypothesis import strategies as st
from outbox import Outbox

from baton.config import CoordinatorOptions
from baton.token_ids import count, unpack
from baton.v1 import worker_link_pb2 as wire
from coordinator.delivery import Choice, Request
from coordinator.detokenizer import TextStream, WindowDetokenizer
from coordinator.dispatch import Dispatcher
from coordinator.failures import RequestFailed
from coordinator.metrics import Metrics
from coordinator.rollout import Rollout
from coordinator.shadows import Shadows
from coordinator.workers import Worker, WorkerRegistry

MAX_TOKENS = 6
ROLLOUTS = [
    Rollout(),
    Rollout({"v1": 1.0, "v2": 1.0}),
    Rollout({"v2": 1.0, "v1": 0.0}),
    Rollout({"v1": 1.0}, {"v2": 1.0}),
]


def token_of(version: str, prompt: list[int], index: int) -> int:
    return token_at(prompt, index) + (version == "v2")


@dataclass
class Run:
    """An assignment that a worker has taken up."""

    assignment: wire.Assignment
    next_index: int
    over: bool = False


@dataclass
class Model:
    """A worker that does what the test says, on the other side of a Worker's outbox."""

    worker: Worker
    runs: list[Run] = field(default_factory=list)
    reservation: int = 0

    def beat(self) -> wire.WorkerHeartbeat:
        return wire.WorkerHeartbeat(
            blocks=wire.BlockCounts(total=64, free=64), running_requests=len(self.live),
            reservation=self.reservation, reservation_cleared=self.reservation != 0,
        )  # fmt: skip

    def read(self) -> None:
        while self.worker.link:
            message = self.worker.link.popleft()
            if message.HasField("assignment"):
                assert all(run.assignment.id != message.assignment.id for run in self.runs), "told twice"
                sent = count(message.assignment.token_ids) - message.assignment.num_prompt_tokens
                self.runs.append(Run(message.assignment, sent))
            elif message.HasField("reserve"):
                self.reservation = self.reservation or message.reserve.token
            elif message.HasField("unreserve") and message.unreserve.token == self.reservation:
                self.reservation = 0
            elif message.HasField("abort"):
                for run in self.runs:
                    run.over = run.over or run.assignment.id == message.abort.id

    @property
    def live(self) -> list[Run]:
        return [run for run in self.runs if not run.over]


class World:
    def __init__(self) -> None:
        self.registry = WorkerRegistry("demo")
        options = CoordinatorOptions(max_attempts=4, worker_return_s=0, local_prefill_tokens=2)
        metrics = Metrics()
        self.dispatcher = Dispatcher(options, self.registry, metrics)
        self.shadows = Shadows(self.dispatcher, metrics, 3, options.max_requests, self._copy)
        self.models: list[Model] = []
        self.requests: list[Request] = []
        self.num_joined = 0

    def _copy(self, request: Request, copy: Request) -> None:
        for choice in request.choices:
            self._choice(copy, choice.prompt)

    @staticmethod
    def _choice(request: Request, prompt: list[int]) -> None:
        text = TextStream(WindowDetokenizer(lambda ids: "".join(map(chr, ids))))
        Choice(request, 0, prompt, wire.EngineSampling(max_tokens=MAX_TOKENS), text, False)

    def join(self, *roles: int, version: str = "v1") -> None:
        self.num_joined += 1
        worker = self.registry.register(
            wire.Registration(
                protocol_version=wire.LINK_PROTOCOL_VERSION,
                worker_id=f"w{self.num_joined % 4}", incarnation=self.num_joined, roles=roles,
                page_size_tokens=16, total_blocks=64, max_model_tokens=512, model="demo", handover_address="x",
                model_version=version, model_fingerprint=version,
            ),
            Outbox(),
        )  # fmt: skip
        self.models.append(Model(worker))

    def ask(self, prompt_length: int, n: int) -> None:
        request = Request(f"r{len(self.requests)}")
        for _ in range(n):
            self._choice(request, list(range(prompt_length)))
        try:
            self.dispatcher.start(request)
        except RequestFailed:
            return
        self.requests.append(request)
        self.shadows.started(request)

    def say(self, model: Model, **message: object) -> None:
        """As the link does: a lost worker is not heard."""
        if not model.worker.lost.is_set():
            self.dispatcher.on_message(model.worker, wire.WorkerMessage(**message))

    def token(self, model: Model, run: Run, index: int, lie: int = 0) -> None:
        assignment = run.assignment
        prompt = unpack(assignment.token_ids)[: assignment.num_prompt_tokens]
        token_id = token_of(model.worker.version, prompt, index) + lie
        step = wire.StepTokens(handles=[assignment.handle], indices=[index], token_ids=[token_id])
        self.say(model, tokens=step)

    def end(self, model: Model, run: Run, reason: int, num_tokens: int) -> None:
        run.over = True
        self.say(model, ending=wire.Ending(id=run.assignment.id, reason=reason, num_tokens=num_tokens))

    def advance(self, model: Model, run: Run) -> None:
        self.token(model, run, run.next_index)
        run.next_index += 1
        if run.next_index == MAX_TOKENS:
            self.end(model, run, wire.END_REASON_LENGTH, MAX_TOKENS)
        elif run.assignment.role == wire.ROLE_PREFILL:
            self.end(model, run, wire.END_REASON_HANDED_OVER, run.next_index)

    def act(self, draw: st.DataObject) -> None:
        actions = ["token"] * 8 + ["ask", "join", "lose", "refuse", "fail", "repeat", "lie", "skip", "abort"]
        actions += ["drain", "roll out"]
        action = draw.draw(st.sampled_from(actions))
        if action == "join":
            roles = draw.draw(st.sampled_from([(wire.ROLE_DECODE,), (wire.ROLE_PREFILL,), (1, 2)]))
            return self.join(*roles, version=draw.draw(st.sampled_from(["v1", "v2"])))
        if action == "roll out":
            said = draw.draw(st.sampled_from(ROLLOUTS))
            self.dispatcher.versions.rollout = said
            return self.shadows.rolled_out(said)
        if action == "drain" and self.models:
            model = draw.draw(st.sampled_from(self.models))
            self.say(model, heartbeat=wire.WorkerHeartbeat(draining=True))
            self.dispatcher.move_from(model.worker)
            return None
        if action == "ask":
            return self.ask(draw.draw(st.sampled_from([1, 40])), draw.draw(st.integers(1, 2)))
        if action == "abort" and self.requests:
            return self.dispatcher.abort(draw.draw(st.sampled_from(self.requests)))
        if action == "lose" and self.models:
            return draw.draw(st.sampled_from(self.models)).worker.lose("the test says so")
        live = [(model, run) for model in self.models for run in model.live]
        if not live:
            return None
        model, run = draw.draw(st.sampled_from(live))
        index = run.next_index
        if action == "refuse":
            run.over = True
            self.say(model, admission=wire.Admission(id=run.assignment.id, accepted=False))
        elif action == "fail":
            self.end(model, run, wire.END_REASON_ERROR, index)
        elif action in ("repeat", "lie") and index > 0:
            self.token(model, run, draw.draw(st.integers(0, index - 1)), lie=action == "lie")
        elif action == "skip":
            self.token(model, run, index + 1)
        elif action == "token":
            self.advance(model, run)
        return None


def check(world: World) -> None:
    dispatcher = world.dispatcher
    clients = [request for request in dispatcher.requests.values() if not request.shadow]
    assert dispatcher.num_streams == sum(len(request.choices) for request in clients)
    for model in world.models:
        for leg in model.worker.legs.values():
            assert leg.choice.request.version == model.worker.version
            assert leg.choice.request.shadow or leg.choice.request in world.requests
    for request in world.requests:
        assert request.ended == (request.id not in dispatcher.requests)
        for choice in request.choices:
            right = [token_of(request.version, choice.prompt, index) for index in range(MAX_TOKENS)]
            assert choice.stream.tokens == right[: len(choice.stream.tokens)]
            if choice.finish_reason == "length":
                assert len(choice.stream.tokens) == MAX_TOKENS


async def play(draw: st.DataObject) -> None:
    world = World()
    world.join(wire.ROLE_DECODE)
    world.join(wire.ROLE_PREFILL)
    world.ask(40, 1)
    for _ in range(draw.draw(st.integers(0, 60))):
        for _ in range(draw.draw(st.integers(1, 3))):  # in one turn: before workers are told of what was routed in it
            world.act(draw)
        await asyncio.sleep(0)
        for model in world.models:
            model.read()
        check(world)
    # Everybody finishes what it has; then nothing is left anywhere.
    for _ in range(200):
        for model in world.models:
            model.read()
            for run in model.live:
                world.advance(model, run)
            world.say(model, heartbeat=model.beat())
        await asyncio.sleep(0)
    check(world)
    assert world.dispatcher.requests == {}
    assert world.dispatcher.idle.is_set()
    assert len(world.dispatcher.admission) == 0
    for model in world.models:
        assert model.worker.legs == {}
    for request in world.requests:
        text = {choice.number: "" for choice in request.choices}
        try:
            while deltas := await request.deltas():
                for delta in deltas:
                    text[delta.choice] += delta.text
        except RequestFailed:
            pass
        for choice in request.choices:
            assert text[choice.number] == "".join(map(chr, choice.stream.tokens))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_happens_streams_are_right_and_nothing_is_left(draw: st.DataObject) -> None:
    asyncio.run(play(draw))
