"""Beginnings of prompts out of the prefix cache of another worker: the tokens of transformers, whatever goes wrong.

The prefill worker stands in for a decode worker here, so that either of the two can be the holder.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from baton.config import EngineOptions, HandoverOptions, TierOptions
from baton.v1 import worker_link_pb2 as wire
from engine.engine import Engine
from engine.loading import LoadedModel
from engine.requests import LeasedBlocks
from tests.engine.tiny_models import VOCAB_SIZE, reference_generate, write_tiny_model
from tests.relay.pair import Pair, Stream, Worker, load, relay

PAGE, NEW_TOKENS = 16, 8
OPTIONS = EngineOptions(dtype="float32", kv_memory="8MiB", max_batch_tokens=64, speculate="off")
HANDOVER = HandoverOptions(lease_s=1.0, heartbeat_interval_s=0.1, heartbeat_timeout_s=1.0, pull_timeout_s=2.0)
PROMPT = torch.randint(3, VOCAB_SIZE, (300,), generator=torch.Generator().manual_seed(5)).tolist()
FETCHABLE = len(PROMPT) // PAGE * PAGE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, list[int]]:
    torch.set_num_threads(1)
    folder = write_tiny_model(tmp_path_factory.mktemp("model"), "llama3")
    return load(folder), reference_generate(folder, [PROMPT], NEW_TOKENS)[0].tokens


class Case:
    """A pair whose prefill worker, the holder, has computed PROMPT; the decode worker has not."""

    def __init__(self, pair: Pair, expected: list[int]) -> None:
        assert pair.prefill is not None
        self.pair, self.expected, self.holder = pair, expected, pair.prefill

    async def warm(self) -> None:
        await self.ask(at=self.holder)
        # Computing takes so long that fetching would always pay: a tiny model computes a block as fast as it asks.
        await self.pair.decode.shell.shell.steps.call(pretend_to_be_slow)

    async def ask(self, at: Worker | None = None, holder: Worker | None = None, salt: str = "") -> Stream:
        at = at or self.pair.decode
        _, stream = self.pair.start(PROMPT, NEW_TOKENS, remote=False, holder=holder, at=at, cache_salt=salt)
        await self.pair.finished(stream, at.name)
        assert stream.output == self.expected
        return stream

    async def ends(self, **counters: float) -> None:
        """Both pools are whole, and the decode worker counted just this."""
        await self.pair.whole()
        found = self.pair.decode.counters()
        assert {name: found[name] for name in counters} == counters
        assert found["handover_failures"] == found["local_prefill_fallbacks"] == 0


def pretend_to_be_slow(engine: Engine) -> None:
    engine._scheduler.sources.block_compute_s = 0.1


def serve(
    model: tuple[LoadedModel, list[int]],
    story: "Callable[[Case], asyncio.Future[None]]",
    handover: HandoverOptions = HANDOVER,
    **options: object,
) -> None:
    async def run() -> None:
        async with relay(model[0], prefill=OPTIONS, decode=OPTIONS, handover=handover, **options) as pair:  # type: ignore[arg-type]
            case = Case(pair, model[1])
            await case.warm()
            await story(case)

    asyncio.run(run())


def test_what_another_worker_has_is_fetched_and_only_the_rest_is_computed(
    model: tuple[LoadedModel, list[int]],
) -> None:
    async def story(case: Case) -> None:
        await case.ask(holder=case.holder)
        await case.ends(
            prompt_tokens_fetched=FETCHABLE, prompt_tokens_computed=len(PROMPT) - FETCHABLE, prefix_fetches=1,
            prefix_fetches_empty=0, prefix_fetches_failed=0, prompt_tokens_received=0,
        )  # fmt: skip
        assert case.holder.counters()["prefix_blocks_lent"] == FETCHABLE // PAGE
        again = await case.ask(holder=case.holder)
        assert again.cached_tokens["decode"] == FETCHABLE, "what was fetched is in its own cache now"
        await case.ends(prefix_fetches=1)

    serve(model, story)


def test_a_worker_that_drains_lends_what_it_has_and_ends_when_its_readers_are_done(
    model: tuple[LoadedModel, list[int]],
) -> None:
    async def story(case: Case) -> None:
        shell = case.holder.shell.shell
        finished = asyncio.create_task(shell.finished())
        await asyncio.sleep(0)
        assert not finished.done(), "nobody had it drain"
        shell.on_drain()
        await case.ask(holder=case.holder)
        await case.ends(prompt_tokens_fetched=FETCHABLE, prefix_fetches=1, prefix_fetches_empty=0)
        await asyncio.wait_for(finished, 10)
        assert await shell.drained(10)
        assert shell.lender is not None
        shell.lender.lends = False
        case.pair.decode.shell.shell.steps.submit(forget_everything)
        await case.ask(holder=case.holder)
        await case.ends(prefix_fetches_empty=1)

    serve(model, story)


def test_a_prefill_worker_fetches_a_conversation_from_the_worker_that_decoded_it(
    model: tuple[LoadedModel, list[int]], tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path, "llama3")
    turn = [*PROMPT, *model[1], *PROMPT[:40]]
    expected = reference_generate(folder, [turn], NEW_TOKENS)[0].tokens

    async def story(case: Case) -> None:
        pair = case.pair
        await case.ask()  # both have the prompt, and only the decode worker the answer
        pair.prefill.shell.shell.steps.submit(forget_everything)  # type: ignore[union-attr]
        await case.holder.shell.shell.steps.call(pretend_to_be_slow)
        _, stream = pair.start(turn, NEW_TOKENS, remote=True, holder=pair.decode)
        await pair.finished(stream)
        assert stream.output == expected
        await pair.whole()
        here = (len(PROMPT) + NEW_TOKENS - 1) // PAGE * PAGE
        assert case.holder.counters()["prompt_tokens_fetched"] == here
        assert pair.decode.counters()["local_prefill_fallbacks"] == 0

    serve(model, story)


def forget_everything(engine: Engine) -> None:
    evict(engine, engine._scheduler._allocator.num_available)


def evict(engine: Engine, count: int) -> None:
    from engine.blocks import Owner, OwnerKind

    allocator, owner = engine._scheduler._allocator, Owner(OwnerKind.REQUEST, "evicts")
    assert allocator.allocate(owner, count) is not None
    allocator.release_all(owner)


def test_a_holder_that_has_nothing_costs_a_question(model: tuple[LoadedModel, list[int]]) -> None:
    async def story(case: Case) -> None:
        await case.holder.shell.shell.steps.call(forget_everything)
        await case.ask(holder=case.holder)
        await case.ends(
            prefix_fetches=1, prefix_fetches_empty=1, prefix_fetches_failed=0, prompt_tokens_computed=len(PROMPT)
        )

    serve(model, story)


def test_blocks_of_another_tenant_are_not_found(model: tuple[LoadedModel, list[int]]) -> None:
    async def story(case: Case) -> None:
        await case.ask(holder=case.holder, salt="another tenant")
        await case.ends(prefix_fetches=1, prefix_fetches_empty=1, prompt_tokens_fetched=0)

    serve(model, story)


def test_what_the_holder_evicts_between_the_question_and_the_lease_is_computed(
    model: tuple[LoadedModel, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Engine.lease

    def evicted(engine: Engine, lease_id: str, names: Sequence[bytes]) -> LeasedBlocks:
        tables = engine._scheduler.tables
        evict(engine, engine._scheduler._allocator.num_available)
        assert not tables.cache.lookup(names)
        return lease(engine, lease_id, names)

    monkeypatch.setattr(Engine, "lease", evicted)

    async def story(case: Case) -> None:
        await case.ask(holder=case.holder)
        await case.ends(prefix_fetches=1, prefix_fetches_empty=1, prompt_tokens_computed=len(PROMPT))

    serve(model, story)


@pytest.mark.parametrize(
    "faults", ["corrupt=1-", "drop=1-", "misplace=1-", "raise=1", "stale=1", "stall=1", "duplicate=1-", "reorder=1-"]
)
def test_whatever_a_lane_does_the_tokens_are_right(model: tuple[LoadedModel, list[int]], faults: str) -> None:
    async def story(case: Case) -> None:
        await case.ask(holder=case.holder)
        harmless = faults.startswith(("duplicate", "reorder"))
        await case.ends(prefix_fetches=1, prefix_fetches_failed=0 if harmless else 1)
        assert (case.pair.decode.counters()["prompt_tokens_fetched"] == FETCHABLE) == harmless
        if faults == "corrupt=1-":
            assert case.pair.decode.counters()["handover_checksum_failures"] > 0

    serve(model, story, replace(HANDOVER, lanes=f"faulty:shm?{faults}", pull_timeout_s=0.5))


def test_a_holder_of_another_life_is_not_believed_and_left_alone_for_a_while(
    model: tuple[LoadedModel, list[int]],
) -> None:
    async def story(case: Case) -> None:
        case.holder.identity = replace(case.holder.identity, incarnation=999_999)
        await case.ask(holder=case.holder)
        await case.ends(prefix_fetches=1, prefix_fetches_failed=1, prompt_tokens_fetched=0)
        await case.pair.decode.shell.shell.steps.call(forget_everything)
        await case.ask(holder=case.holder)
        await case.ends(prefix_fetches=1)

    serve(model, story)


def test_a_busy_holder_is_not_waited_for_longer_than_computing_takes(model: tuple[LoadedModel, list[int]]) -> None:
    """It says what it has in the middle of a step, but takes no lease before the end of it."""

    async def story(case: Case) -> None:
        def not_so_slow(engine: Engine) -> None:
            engine._scheduler.sources.block_compute_s = 0.02

        await case.pair.decode.shell.shell.steps.call(not_so_slow)
        free = threading.Event()
        case.holder.shell.shell.steps.submit(lambda _: free.wait(30))
        await case.ask(holder=case.holder)
        found = case.pair.decode.counters()
        assert (found["prefix_fetches"], found["prefix_fetches_failed"], found["prompt_tokens_fetched"]) == (1, 1, 0)
        free.set()
        await case.ends(prefix_fetches=1)

    serve(model, story)


@pytest.mark.parametrize("num_turns", [0, 1, 5, 20, 60])
def test_an_abort_at_any_moment_leaves_both_pools_whole(model: tuple[LoadedModel, list[int]], num_turns: int) -> None:
    async def story(case: Case) -> None:
        request_id, _ = case.pair.start(PROMPT, 200, remote=False, holder=case.holder)
        for _ in range(num_turns):
            await asyncio.sleep(0.001)
        for _ in range(2):
            case.pair.decode.shell.shell.on_abort(case.pair.decode, wire.AttemptId(request_id=request_id, attempt=1))
        await case.pair.whole()
        await case.ask(holder=case.holder)
        await case.pair.whole()

    serve(model, story)


def test_an_abort_while_blocks_are_pulled_leaves_both_pools_whole(model: tuple[LoadedModel, list[int]]) -> None:
    async def story(case: Case) -> None:
        request_id, _ = case.pair.start(PROMPT, 200, remote=False, holder=case.holder)
        async with asyncio.timeout(30):
            while case.holder.counters()["prefix_blocks_lent"] == 0:
                await asyncio.sleep(0)
        case.pair.decode.shell.shell.on_abort(case.pair.decode, wire.AttemptId(request_id=request_id, attempt=1))
        await case.ends(prompt_tokens_fetched=0, requests_aborted=1)

    serve(model, story, replace(HANDOVER, lanes="faulty:shm?stall=1"))


def test_tiers_come_before_other_workers(model: tuple[LoadedModel, list[int]]) -> None:
    async def story(case: Case) -> None:
        await case.ask()
        async with asyncio.timeout(30):
            while case.pair.decode.counters()["kv_host_stored"] < FETCHABLE // PAGE:
                await asyncio.sleep(0.005)
        await case.pair.decode.shell.shell.steps.call(forget_everything)
        await case.ask(holder=case.holder)
        await case.ends(prefix_fetches=0, prompt_tokens_loaded=FETCHABLE)

    serve(model, story, decode_tiers=TierOptions(host_kv_memory="64MiB"))


def test_many_at_once_are_all_right(model: tuple[LoadedModel, list[int]]) -> None:
    async def story(case: Case) -> None:
        await asyncio.gather(*(case.ask(holder=case.holder) for _ in range(6)))
        await case.pair.whole()
        assert case.pair.decode.counters()["prefix_fetches_failed"] == 0

    serve(model, story)
