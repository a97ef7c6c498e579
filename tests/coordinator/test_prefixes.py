"""What the coordinator remembers of who holds which beginning, and what it tells the workers of a request."""

import asyncio

import pytest
from fake_worker import token_at
from outbox import Outbox

from baton.block_names import root_name
from baton.config import CoordinatorOptions
from baton.token_ids import count, pack, unpack
from baton.v1 import worker_link_pb2 as wire
from coordinator import assignments
from coordinator.delivery import Choice, Request
from coordinator.detokenizer import TextStream, WindowDetokenizer
from coordinator.dispatch import Dispatcher
from coordinator.failures import FailureKind, RequestFailed
from coordinator.metrics import Metrics
from coordinator.prefixes import STRIDE_TOKENS, Held, Life, PrefixMemory, strides
from coordinator.workers import Worker, WorkerRegistry

ROOT = root_name("model")
A, B, C = Life("a", 1), Life("b", 2), Life("c", 3)
TOKENS = list(range(1000))


def names(num_strides: int, tokens: list[int] = TOKENS) -> list[bytes]:
    return strides(ROOT, pack(tokens[: num_strides * STRIDE_TOKENS]))


def test_equal_beginnings_have_equal_names_and_the_end_of_a_stride_has_none() -> None:
    assert len(strides(ROOT, pack(TOKENS))) == len(TOKENS) // STRIDE_TOKENS
    assert strides(ROOT, pack(TOKENS))[:3] == names(3)
    other = [*TOKENS[:200], 5, *TOKENS[201:]]
    assert names(3) == names(3, other)
    assert not set(names(15)[3:]) & set(names(15, other)[3:])
    assert not set(names(15)) & set(strides(root_name("model", cache_salt="tenant"), pack(TOKENS)))


def test_the_longest_beginning_comes_first_and_of_equals_the_latest() -> None:
    memory = PrefixMemory()
    memory.record(names(4), A)
    memory.record(names(9), B)
    memory.record(names(4), C)
    expected = [Held(B, 9 * STRIDE_TOKENS), Held(C, 4 * STRIDE_TOKENS), Held(A, 4 * STRIDE_TOKENS)]
    assert memory.holders(names(12)) == expected
    assert memory.holders(names(2))[0] == Held(C, 2 * STRIDE_TOKENS)
    assert memory.holders(names(12, [7, *TOKENS])) == []


def test_a_new_life_replaces_the_old_one() -> None:
    memory = PrefixMemory()
    memory.record(names(3), A)
    memory.record(names(1), Life("a", 9))
    assert memory.holders(names(1)) == [Held(Life("a", 9), STRIDE_TOKENS)]


def test_memory_is_bounded_and_loses_ends_before_beginnings() -> None:
    memory = PrefixMemory(max_strides=10)
    memory.record(names(8), A)
    memory.record(names(6, [1, *TOKENS]), B)
    assert len(memory) == 10
    assert memory.holders(names(8)) == [Held(A, 4 * STRIDE_TOKENS)]
    assert memory.holders(names(6, [1, *TOKENS])) == [Held(B, 6 * STRIDE_TOKENS)]


class World:
    """A dispatcher and workers whose messages are read out of their outboxes."""

    def __init__(self) -> None:
        self.registry = WorkerRegistry("demo")
        options = CoordinatorOptions(routing="least_loaded", kv_routing="approximate")
        self.dispatcher = Dispatcher(options, self.registry, Metrics())
        self.num_requests = 0

    def join(self, name: str, *roles: int, incarnation: int = 1) -> Worker:
        return self.registry.register(
            wire.Registration(
                protocol_version=wire.LINK_PROTOCOL_VERSION,
                worker_id=name, incarnation=incarnation, roles=roles, page_size_tokens=16,
                total_blocks=640, max_model_tokens=4096, model="demo", handover_address=f"tcp://{name}",
            ),
            Outbox(),
        )  # fmt: skip

    async def ask(self, tokens: list[int]) -> None:
        self.begin(tokens)
        await asyncio.sleep(0)  # until the workers have been told

    def begin(self, tokens: list[int], max_tokens: int = 4) -> Choice:
        self.num_requests += 1
        request = Request(f"r{self.num_requests}")
        text = TextStream(WindowDetokenizer(lambda ids: "".join(map(chr, ids))))
        choice = Choice(request, 0, tokens, wire.EngineSampling(max_tokens=max_tokens), text, False)
        self.dispatcher.start(request)
        return choice

    def beat(self, worker: Worker, **figures: object) -> None:
        blocks = wire.BlockCounts(total=640, free=640)
        said = wire.WorkerHeartbeat(blocks=blocks, **figures)  # type: ignore[arg-type]
        self.dispatcher.on_message(worker, wire.WorkerMessage(heartbeat=said))

    @staticmethod
    def assigned(worker: Worker) -> wire.Assignment:
        found = []
        while worker.link:
            message = worker.link.popleft()
            if message.HasField("assignment"):
                found.append(message.assignment)
        (assignment,) = found
        return assignment

    def answer(self, worker: Worker, assignment: wire.Assignment, num_tokens: int) -> list[int]:
        prompt = unpack(assignment.token_ids)[: assignment.num_prompt_tokens]
        tokens = [token_at(prompt, index) for index in range(num_tokens)]
        for index, token in enumerate(tokens):
            step = wire.StepTokens(handles=[assignment.handle], indices=[index], token_ids=[token])
            self.dispatcher.on_message(worker, wire.WorkerMessage(tokens=step))
        return tokens


MIXED = (wire.ROLE_PREFILL, wire.ROLE_DECODE)


def test_the_worker_that_computes_is_told_who_has_the_beginning() -> None:
    async def run() -> None:
        world = World()
        first = world.join("first", *MIXED)
        await world.ask(TOKENS)
        assignment = world.assigned(first)
        assert not assignment.holders
        world.beat(first, draining=True)  # the next one goes elsewhere
        second = world.join("second", *MIXED)
        await world.ask(TOKENS)
        assert not world.assigned(second).holders, (
            "nothing has been computed yet, and a worker that leaves is not asked"
        )
        world.beat(first)
        world.beat(second, draining=True)
        generated = world.answer(first, assignment, 4)
        world.beat(first, running_requests=5)
        world.beat(second)
        longer = [*TOKENS, *generated, *range(100)]
        await world.ask(longer)
        (holder,) = world.assigned(second).holders
        assert (holder.worker.worker_id, holder.worker.incarnation) == ("first", 1)
        assert holder.worker.handover_address == "tcp://first"
        assert holder.num_tokens == (len(TOKENS) + 3) // STRIDE_TOKENS * STRIDE_TOKENS

    asyncio.run(run())


def test_of_two_roles_only_the_one_that_computes_is_told() -> None:
    async def run() -> None:
        world = World()
        prefill, decode = world.join("p", wire.ROLE_PREFILL), world.join("d", wire.ROLE_DECODE)
        await world.ask(TOKENS)
        world.answer(prefill, world.assigned(prefill), 1)
        world.answer(decode, world.assigned(decode), 4)
        other = world.join("other", wire.ROLE_PREFILL)
        world.beat(prefill, waiting_prefill_tokens=10_000)
        await world.ask([*TOKENS, *range(100)])  # more than the decode worker would compute by itself
        assert {holder.worker.worker_id for holder in world.assigned(other).holders} == {"p", "d"}
        assert not world.assigned(decode).holders

    asyncio.run(run())


def test_a_worker_is_not_told_of_what_it_has_itself_or_of_an_older_life() -> None:
    async def run() -> None:
        world = World()
        first = world.join("first", *MIXED)
        await world.ask(TOKENS)
        world.answer(first, world.assigned(first), 4)
        await world.ask(TOKENS)
        assignment = world.assigned(first)
        assert not assignment.holders
        world.answer(first, assignment, 4)
        second = world.join("second", *MIXED)
        world.beat(world.join("first", *MIXED, incarnation=2), running_requests=5)
        await world.ask(TOKENS)
        assert not world.assigned(second).holders

    asyncio.run(run())


def test_what_is_over_before_anybody_was_told_nobody_is_told_and_who_is_gone_is_named_to_nobody() -> None:
    async def run() -> None:
        world = World()
        prefill, decode = world.join("p", wire.ROLE_PREFILL), world.join("d", wire.ROLE_DECODE)
        world.dispatcher.abort(world.begin([*TOKENS, *range(100)]).request)
        goes_on = world.begin([*TOKENS, *range(200)])
        assert [leg.worker for leg in world.dispatcher.legs(goes_on)] == [prefill, decode]
        prefill.lose("the test says so")
        for _ in range(3):
            await asyncio.sleep(0)
        assert not [message for message in prefill.link if message.HasField("assignment")]
        assignment = world.assigned(decode)
        assert count(assignment.token_ids) == len(TOKENS) + 200
        assert not assignment.HasField("prefill")
        world.answer(decode, assignment, 4)
        assert goes_on.finish_reason == "length"

    asyncio.run(run())


def test_of_an_attempt_that_another_follows_in_the_same_turn_nobody_is_told() -> None:
    async def run() -> None:
        world = World()
        prefill, decode = world.join("p", wire.ROLE_PREFILL), world.join("d", wire.ROLE_DECODE)
        world.begin([*TOKENS, *range(100)])
        world.beat(prefill, draining=True)
        assert world.dispatcher.move_from(prefill) == (1, 0)
        await asyncio.sleep(0)
        assert not [message for message in prefill.link if message.HasField("assignment")]
        assignment = world.assigned(decode)
        assert (assignment.id.attempt, assignment.HasField("prefill")) == (2, False)

    asyncio.run(run())


def test_a_request_that_workers_cannot_be_told_of_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def issue(choice: Choice, model: str) -> bytes:
        if choice.num_prompt_tokens == 5:
            raise ValueError("it quotes a prompt")
        return b""

    async def run() -> None:
        monkeypatch.setattr(assignments, "issue", issue)
        world = World()
        worker = world.join("w", *MIXED)
        fails, goes_on = world.begin([7] * 5), world.begin([7] * 6)
        await asyncio.sleep(0)
        with pytest.raises(RequestFailed, match="internal error") as failed:
            await fails.request.deltas()
        assert failed.value.kind is FailureKind.INTERNAL
        world.answer(worker, world.assigned(worker), 4)
        assert goes_on.finish_reason == "length"
        assert worker.legs == {}

    asyncio.run(run())
