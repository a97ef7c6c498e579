"""A worker that serves two coordinators: each hears of its own attempts alone, and the loss of one costs only those."""

import asyncio
import itertools
from pathlib import Path

import pytest
import torch

from baton.config import EngineOptions, TierOptions
from baton.token_ids import pack
from baton.v1 import worker_link_pb2 as wire
from engine.loading import LoadedModel
from tests.engine.tiny_models import VOCAB_SIZE, reference_generate, write_tiny_model
from tests.relay.pair import load, relay

OPTIONS = EngineOptions(dtype="float32", kv_memory="8MiB", max_batch_tokens=64)
GENERATOR = torch.Generator().manual_seed(9)
PROMPTS = [torch.randint(3, VOCAB_SIZE, (40,), generator=GENERATOR).tolist() for _ in range(4)]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, list[list[int]]]:
    torch.set_num_threads(1)
    folder: Path = write_tiny_model(tmp_path_factory.mktemp("model"), "llama3")
    return load(folder), [each.tokens for each in reference_generate(folder, PROMPTS, NEW_TOKENS)]


_incarnations = itertools.count(1)


class Coordinator:
    """One link's other end, which numbers its attempts from 1 like any other."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.coordinator = next(_incarnations)
        self.tokens: dict[int, list[int]] = {}
        self.endings: dict[str, int] = {}
        self.heartbeats = 0
        self.refusals: list[bool] = []
        self._changed = asyncio.Event()

    def send(self, message: wire.WorkerMessage) -> None:
        kind = message.WhichOneof("message")
        if kind == "tokens":
            for handle, token in zip(message.tokens.handles, message.tokens.token_ids, strict=True):
                self.tokens[handle].append(token)
        elif kind == "ending":
            self.endings[message.ending.id.request_id] = message.ending.reason
        elif kind == "heartbeat":
            self.heartbeats += 1
        elif kind == "admission" and not message.admission.accepted:
            self.refusals.append(message.admission.reserved)
        self._changed.set()

    def assignment(self, handle: int, prompt: list[int], max_tokens: int = NEW_TOKENS) -> wire.Assignment:
        self.tokens[handle] = []
        return wire.Assignment(
            id=self.id(handle), handle=handle, role=wire.ROLE_DECODE, token_ids=pack(prompt),
            num_prompt_tokens=len(prompt),
            sampling=wire.EngineSampling(top_p=1.0, repetition_penalty=1.0, max_tokens=max_tokens), deadline_s=60,
        )  # fmt: skip

    def id(self, handle: int) -> wire.AttemptId:
        return wire.AttemptId(request_id=f"{self.name}-{handle}", attempt=1)

    async def until(self, num_endings: int = 0, num_tokens: int = 0) -> None:
        async with asyncio.timeout(30):
            while len(self.endings) < num_endings or sum(map(len, self.tokens.values())) < num_tokens:
                self._changed.clear()
                await self._changed.wait()


def test_handles_of_two_coordinators_collide_and_each_gets_its_own_tokens(
    model: tuple[LoadedModel, list[list[int]]],
) -> None:
    async def run() -> None:
        async with relay(model[0], decode=OPTIONS) as pair:
            shell = pair.decode.shell.shell
            one, two = Coordinator("one"), Coordinator("two")
            for number, prompt in enumerate(PROMPTS):
                link = (one, two)[number % 2]
                shell.on_assignment(link, link.assignment(number // 2 + 1, prompt))
            await one.until(num_endings=2)
            await two.until(num_endings=2)
            assert [one.tokens[1], two.tokens[1], one.tokens[2], two.tokens[2]] == model[1]
            assert set(one.endings) == {"one-1", "one-2"}
            await pair.whole()

    asyncio.run(run())


def test_a_lost_link_aborts_its_own_attempts_and_no_others(model: tuple[LoadedModel, list[list[int]]]) -> None:
    async def run() -> None:
        async with relay(model[0], decode=OPTIONS) as pair:
            shell = pair.decode.shell.shell
            one, two = Coordinator("one"), Coordinator("two")
            shell.on_assignment(one, one.assignment(1, PROMPTS[0], 400))
            shell.on_assignment(two, two.assignment(1, PROMPTS[1]))
            await one.until(num_tokens=1)
            shell.on_abort(two, one.id(1))  # not its own
            assert not one.endings
            shell.on_lost(one)
            assert one.endings == {"one-1": wire.END_REASON_ABORTED}
            await two.until(num_endings=1)
            assert two.tokens[1] == model[1][1]
            await pair.whole()

    asyncio.run(run())


def test_pins_belong_to_their_link_though_two_have_one_name(model: tuple[LoadedModel, list[list[int]]]) -> None:
    async def run() -> None:
        async with relay(model[0], decode=OPTIONS, decode_tiers=TierOptions(host_kv_memory="4MiB")) as pair:
            shell = pair.decode.shell.shell
            one, two = Coordinator("one"), Coordinator("two")
            blocks = len(PROMPTS[0]) // OPTIONS.page_size
            shell.on_assignment(one, one.assignment(1, PROMPTS[0]))
            shell.on_assignment(two, two.assignment(1, PROMPTS[1]))
            await one.until(num_endings=1)
            await two.until(num_endings=1)
            for link, prompt in ((one, PROMPTS[0]), (two, PROMPTS[1])):
                shell.on_pin(link, wire.Pin(id="pin", token_ids=pack(prompt), ttl_s=60))

            async def pinned(expected: int) -> None:
                async with asyncio.timeout(20):
                    while pair.decode.counters()["kv_host_pinned"] != expected:
                        await asyncio.sleep(0.01)

            await pinned(2 * blocks)
            shell.on_lost(one)
            await pinned(blocks)
            shell.on_unpin(two, "pin")
            await pinned(0)

    asyncio.run(run())


def test_a_worker_is_one_coordinators_alone_only_when_nothing_of_the_other_is_left(
    model: tuple[LoadedModel, list[list[int]]],
) -> None:
    async def run() -> None:
        async with relay(model[0], decode=OPTIONS) as pair:
            shell = pair.decode.shell.shell
            one, two = Coordinator("one"), Coordinator("two")
            shell.on_assignment(two, two.assignment(1, PROMPTS[1], 400))
            await two.until(num_tokens=1)
            shell.on_reserve(one, 77)
            for handle, prompt in ((2, PROMPTS[2]), (3, PROMPTS[3])):
                shell.on_assignment(two, two.assignment(handle, prompt))
            assert two.refusals == [True, True]
            await two.until(num_tokens=3)
            assert (shell.heartbeat().reservation, shell.heartbeat().reservation_cleared) == (77, False)
            shell.on_abort(two, two.id(1))
            assert not shell.heartbeat().reservation_cleared, "a step of it may still go on"
            async with asyncio.timeout(20):
                while not shell.heartbeat().reservation_cleared:
                    await asyncio.sleep(0.005)
            assert shell.steps.load.running == 0
            shell.on_assignment(one, one.assignment(1, PROMPTS[0]))
            await one.until(num_endings=1)
            assert one.tokens[1] == model[1][0]
            shell.on_unreserve(two, 77)
            assert shell.heartbeat().reservation_wanted
            shell.on_lost(one)
            shell.on_assignment(two, two.assignment(4, PROMPTS[1]))
            await two.until(num_endings=2)
            assert two.tokens[4] == model[1][1]
            await pair.whole()

    asyncio.run(run())
