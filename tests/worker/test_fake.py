"""A fake worker says what a real one would: tokens by step, admissions, endings, and why it refuses."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from baton.token_ids import pack
from baton.v1 import worker_link_pb2 as wire
from worker.fake import FakeWorker, Pace, token_at

VOCABULARY = list(range(100, 400))
PROMPT = [5, 6, 7]
DECODE, PREFILL = wire.ROLE_DECODE, wire.ROLE_PREFILL


@dataclass(eq=False)
class Heard:
    """A link: what its coordinator was told."""

    coordinator: int = 1
    messages: list[wire.WorkerMessage] = field(default_factory=list)

    def send(self, message: wire.WorkerMessage) -> None:
        self.messages.append(message)

    def tokens(self, handle: int = 1) -> list[tuple[int, int]]:
        steps = [message.tokens for message in self.messages if message.HasField("tokens")]
        rows = [row for step in steps for row in zip(step.handles, step.indices, step.token_ids, strict=True)]
        return [(index, token_id) for found, index, token_id in rows if found == handle]

    def of(self, kind: str) -> list[Any]:
        return [getattr(message, kind) for message in self.messages if message.HasField(kind)]

    def ends(self) -> list[str]:
        return [wire.EndReason.Name(each.reason).removeprefix("END_REASON_") for each in self.of("ending")]


def worker(step_s: float = 0.0, prefill_tokens_per_s: float = 0.0) -> FakeWorker:
    return FakeWorker(Pace(step_s, prefill_tokens_per_s), VOCABULARY, total_blocks=64)


def assignment(handle: int = 1, max_tokens: int = 4, tokens: list[int] | None = None, **more: Any) -> wire.Assignment:
    sampling = wire.EngineSampling(max_tokens=max_tokens, **more.pop("sampling", {}))
    return wire.Assignment(
        **{
            "id": wire.AttemptId(request_id=f"r-{handle}", attempt=1), "handle": handle, "role": DECODE,
            "token_ids": pack([*PROMPT, *(tokens or [])]), "num_prompt_tokens": len(PROMPT), "sampling": sampling,
        } | more
    )  # fmt: skip


@asynccontextmanager
async def running(fake: FakeWorker) -> AsyncIterator[None]:
    stepping = asyncio.create_task(fake.run())
    try:
        async with asyncio.timeout(10):
            yield
    finally:
        stepping.cancel()
        await asyncio.gather(stepping, return_exceptions=True)


async def until(heard: Heard, count: int) -> None:
    while len(heard.ends()) < count:
        await asyncio.sleep(0.001)


def test_a_stream_has_its_tokens_its_admission_and_its_end() -> None:
    async def main() -> None:
        fake, heard = worker(), Heard()
        async with running(fake):
            fake.on_assignment(heard, assignment())
            await until(heard, 1)
        assert heard.tokens() == [(index, token_at(PROMPT, index, VOCABULARY)) for index in range(4)]
        assert [each.accepted for each in heard.of("admission")] == [True]
        assert heard.messages[0].HasField("admission")
        assert heard.ends() == ["LENGTH"]
        assert heard.of("ending")[0].num_tokens == 4

    asyncio.run(main())


def test_the_next_attempt_goes_on_where_the_last_one_stopped() -> None:
    async def main() -> None:
        fake, other, first, second = worker(), worker(), Heard(), Heard()
        async with running(fake), running(other):
            fake.on_assignment(first, assignment())
            await until(first, 1)
            had = [token_id for _, token_id in first.tokens()][:2]
            other.on_assignment(second, assignment(tokens=had))
            await until(second, 1)
        assert second.tokens() == first.tokens()[2:]

    asyncio.run(main())


def test_a_prefill_worker_says_one_token_and_hands_over() -> None:
    async def main() -> None:
        fake, heard = worker(), Heard()
        async with running(fake):
            fake.on_assignment(heard, assignment(role=PREFILL))
            await until(heard, 1)
        assert heard.tokens() == [(0, token_at(PROMPT, 0, VOCABULARY))]
        assert heard.ends() == ["HANDED_OVER"]

    asyncio.run(main())


def test_a_stop_token_ends_a_stream_once_it_has_enough() -> None:
    stop = token_at(PROMPT, 1, VOCABULARY)
    for min_tokens, num_tokens, end in ((0, 2, "STOP"), (2, 4, "LENGTH")):

        async def main(min_tokens: int = min_tokens, num_tokens: int = num_tokens, end: str = end) -> None:
            fake, heard = worker(), Heard()
            async with running(fake):
                sampling = {"stop_token_ids": [stop], "min_tokens": min_tokens}
                fake.on_assignment(heard, assignment(sampling=sampling))
                await until(heard, 1)
            assert len(heard.tokens()) == num_tokens
            assert heard.ends() == [end]

        asyncio.run(main())


def test_all_streams_of_a_link_share_the_message_of_a_step() -> None:
    async def main() -> None:
        fake, heard, elsewhere = worker(), Heard(), Heard(2)
        for handle in (1, 2, 3):
            fake.on_assignment(heard, assignment(handle))
        fake.on_assignment(elsewhere, assignment(4, sampling={"logprobs": 0}))
        fake.step(asyncio.get_running_loop().time())
        assert [list(each.handles) for each in heard.of("tokens")] == [[1, 2, 3]]
        assert [list(each.handles) for each in elsewhere.of("tokens")] == [[4]]
        assert len(elsewhere.of("tokens")[0].logprobs) == 1

    asyncio.run(main())


def test_prompts_are_computed_one_after_the_other_and_decode_waits_for_its_prefill() -> None:
    async def main() -> None:
        fake, heard = worker(prefill_tokens_per_s=1.0), Heard()
        now = asyncio.get_running_loop().time()
        fake.on_assignment(heard, assignment(1))
        fake.on_assignment(heard, assignment(2))
        fake.on_assignment(heard, assignment(3, prefill=wire.HandoverPeer(worker_id="p")))
        beat = fake.heartbeat()
        assert (beat.running_requests, beat.waiting_requests, beat.waiting_prefill_tokens) == (0, 3, 9)
        for after_s, handles in ((2.9, []), (3.5, [1, 3]), (6.5, [1, 2, 3])):
            heard.messages.clear()
            fake.step(now + after_s)
            assert [handle for each in heard.of("tokens") for handle in each.handles] == handles

    asyncio.run(main())


def test_it_keeps_to_its_pace() -> None:
    async def main() -> None:
        fake, heard, loop = worker(step_s=0.02), Heard(), asyncio.get_running_loop()
        async with running(fake):
            started = loop.time()
            fake.on_assignment(heard, assignment(max_tokens=6))
            await until(heard, 1)
        assert loop.time() - started >= 5 * 0.02

    asyncio.run(main())


def test_an_abort_is_answered_and_a_lost_coordinator_is_told_nothing() -> None:
    async def main() -> None:
        fake, heard, lost = worker(), Heard(), Heard(2)
        fake.on_assignment(heard, assignment(1))
        fake.on_assignment(lost, assignment(2))
        fake.on_abort(lost, assignment(1).id)  # not its own
        assert heard.ends() == []
        fake.on_abort(heard, assignment(1).id)
        fake.on_lost(lost)
        assert heard.ends() == ["ABORTED"]
        assert not lost.messages
        beat = fake.heartbeat()
        assert beat.running_requests == 0
        assert beat.blocks.free == beat.blocks.total == 64

    asyncio.run(main())


def test_a_deadline_ends_an_attempt() -> None:
    async def main() -> None:
        fake, heard = worker(), Heard()
        fake.on_assignment(heard, assignment(deadline_s=5.0))
        fake.step(asyncio.get_running_loop().time() + 6)
        assert heard.ends() == ["DEADLINE"]

    asyncio.run(main())


def test_a_draining_worker_finishes_what_it_has_and_takes_nothing_new() -> None:
    async def main() -> None:
        fake, heard, said = worker(), Heard(), Heard()
        fake.say_to_all = said.send
        fake.on_assignment(heard, assignment(1))
        fake.on_drain()
        assert said.of("heartbeat")[0].draining
        fake.on_assignment(heard, assignment(2))
        refusal = heard.of("admission")[0]
        assert (refusal.accepted, refusal.draining) == (False, True)
        assert not fake.drained.is_set()
        async with running(fake):
            await until(heard, 1)
        assert fake.drained.is_set()

    asyncio.run(main())


def test_whoever_reserves_it_has_it_alone() -> None:
    async def main() -> None:
        fake, holder, other = worker(), Heard(1), Heard(2)
        fake.on_assignment(other, assignment(1))
        fake.on_reserve(holder, 77)
        assert (fake.heartbeat().reservation, fake.heartbeat().reservation_cleared) == (77, False)
        fake.on_abort(other, assignment(1).id)
        assert fake.heartbeat().reservation_cleared
        fake.on_assignment(other, assignment(2))
        assert other.of("admission")[-1].reserved
        fake.on_unreserve(holder, 77)
        assert fake.heartbeat().reservation == 0

    asyncio.run(main())


def test_an_attempt_that_is_here_already_is_refused() -> None:
    async def main() -> None:
        fake, heard = worker(), Heard()
        fake.on_assignment(heard, assignment(1))
        fake.on_assignment(heard, assignment(1))
        assert [each.accepted for each in heard.of("admission")] == [False]
        fake.step(asyncio.get_running_loop().time())
        assert len(heard.tokens()) == 1

    asyncio.run(main())


def test_token_ids_that_are_cut_are_refused_and_cost_nobody_else_anything() -> None:
    async def main() -> None:
        fake, heard = worker(), Heard()
        fake.on_assignment(heard, assignment(1))
        cut = assignment(2)
        cut.id.attempt, cut.token_ids = 2, cut.token_ids[:-1]
        fake.on_assignment(heard, cut)
        (refusal,) = heard.of("admission")
        assert not refusal.accepted
        assert "token ids" in refusal.reason
        fake.step(asyncio.get_running_loop().time())
        assert len(heard.tokens()) == 1

    asyncio.run(main())


@pytest.mark.parametrize("prompt", [[1], [1, 2, 3], list(range(500))])
def test_tokens_are_of_the_vocabulary_and_differ_by_prompt(prompt: list[int]) -> None:
    tokens = [token_at(prompt, index, VOCABULARY) for index in range(100)]
    assert set(tokens) <= set(VOCABULARY)
    assert len(set(tokens)) > 50
    assert tokens != [token_at([*prompt, 9], index, VOCABULARY) for index in range(100)]
