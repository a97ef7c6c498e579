"""Prefill writes straight into blocks of the decode worker: right tokens, and no block handed out that it may write."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from baton.config import EngineOptions, HandoverOptions
from baton.v1 import worker_link_pb2 as wire
from engine.blocks import Owner, OwnerKind
from engine.engine import Engine
from engine.loading import LoadedModel
from engine.plan import OnLayer, StepPlan, StepResult
from tests.engine.tiny_models import VOCAB_SIZE, reference_generate, write_tiny_model
from tests.relay.pair import Pair, Worker, load, relay

OPTIONS = EngineOptions(dtype="float32", kv_memory="8MiB", max_batch_tokens=64)
HANDOVER = HandoverOptions(
    lease_s=5.0, heartbeat_interval_s=0.1, heartbeat_timeout_s=1.0, pull_timeout_s=2.0, direct_wait_s=5.0
)
PROMPT = torch.randint(3, VOCAB_SIZE, (300,), generator=torch.Generator().manual_seed(3)).tolist()
WARM = PROMPT[:5]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Path]:
    torch.set_num_threads(1)
    folder = write_tiny_model(tmp_path_factory.mktemp("model"), "llama3")
    return load(folder), folder


def expected(folder: Path, prompt: list[int]) -> list[int]:
    return reference_generate(folder, [prompt], NEW_TOKENS)[0].tokens


@asynccontextmanager
async def introduced(model: LoadedModel, first: list[int] = WARM, **options: float) -> AsyncIterator[Pair]:
    """Two workers that know each other: their first hand-over is pulled, as nothing is lent before."""
    async with relay(model, prefill=OPTIONS, decode=OPTIONS, handover=replace(HANDOVER, **options)) as pair:
        await pair.generate(first, 2, remote=True)
        await pair.whole()
        yield pair


def fallbacks(pair: Pair) -> float:
    """Since the two were introduced."""
    assert pair.prefill is not None
    return pair.prefill.counters()["handover_direct_fallbacks"] - 1


async def forget_cached(worker: Worker) -> None:
    def forget(engine: Engine) -> None:
        allocator, owner = engine._scheduler._allocator, Owner(OwnerKind.REQUEST, "everything")
        allocator.allocate(owner, allocator.num_available)
        allocator.release_all(owner)

    await worker.shell.shell.steps.call(forget)


@asynccontextmanager
async def writing(pair: Pair) -> AsyncIterator[tuple[threading.Event, threading.Event]]:
    """The prefill worker stops in the second step of the next prompt: sets the first event, waits for the second."""
    assert pair.prefill is not None
    is_held, go_on, steps = threading.Event(), threading.Event(), itertools.count(1)

    def hold(engine: Engine) -> None:
        run = engine._runner.run

        def held(plan: StepPlan, on_layer: OnLayer | None = None) -> StepResult:
            if next(steps) == 2:
                is_held.set()
                go_on.wait(30)
            return run(plan, on_layer)

        engine._runner.run = held  # type: ignore[method-assign]

    await pair.prefill.shell.shell.steps.call(hold)
    try:
        yield is_held, go_on
    finally:
        go_on.set()


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not reached():
            await asyncio.sleep(0.001)


async def quarantined(worker: Worker) -> int:
    return (await worker.shell.shell.steps.call(lambda engine: engine.load())).blocks.quarantined


def test_prefill_writes_into_the_decode_workers_blocks_and_nothing_is_pulled(model: tuple[LoadedModel, Path]) -> None:
    async def run() -> None:
        async with introduced(model[0]) as pair:
            pulled = pair.decode.counters()["handover_blocks_received"]
            stream = await pair.generate(PROMPT, NEW_TOKENS, remote=True)
            assert stream.output == expected(model[1], PROMPT)
            counters = pair.decode.counters()
            assert counters["handover_blocks_direct"] == -(-len(PROMPT) // 16)
            assert counters["handover_blocks_received"] == pulled
            assert counters["local_prefill_fallbacks"] == fallbacks(pair) == 0
            again = await pair.generate(PROMPT, NEW_TOKENS)
            assert again.output == stream.output
            assert again.cached_tokens["decode"] == len(PROMPT) // 16 * 16, "what was written can be shared"
            await pair.whole()

    asyncio.run(run())


@pytest.mark.parametrize("forgets", ["prefill", "decode", "nobody"])
@pytest.mark.parametrize("num_tokens", [300, 304])
def test_prefixes_that_either_side_has_are_used(model: tuple[LoadedModel, Path], forgets: str, num_tokens: int) -> None:
    prompt = (PROMPT + PROMPT)[:num_tokens]

    async def run() -> None:
        async with introduced(model[0], first=prompt[:160]) as pair:
            assert pair.prefill is not None
            for worker in (pair.prefill, pair.decode):
                if worker.name == forgets:
                    await forget_cached(worker)
            computed = pair.prefill.counters()["prompt_tokens_computed"]
            stream = await pair.generate(prompt, NEW_TOKENS, remote=True)
            assert stream.output == expected(model[1], prompt)
            assert pair.prefill.counters()["prompt_tokens_computed"] - computed == num_tokens - 160
            assert pair.decode.counters()["local_prefill_fallbacks"] == fallbacks(pair) == 0
            assert pair.decode.counters()["handover_blocks_direct"] == 19 - (0 if forgets == "decode" else 10)
            await pair.whole()

    asyncio.run(run())


def test_blocks_that_are_reserved_too_late_are_pulled_into(model: tuple[LoadedModel, Path]) -> None:
    async def run() -> None:
        async with introduced(model[0], direct_wait_s=0.01) as pair:
            assert pair.prefill is not None
            free = threading.Event()
            pair.decode.shell.shell.steps.submit(lambda _: free.wait(30))
            _, stream = pair.start(PROMPT, NEW_TOKENS, remote=True)
            await pair.finished(stream, "prefill")
            free.set()
            await pair.finished(stream)
            assert stream.output == expected(model[1], PROMPT)
            assert fallbacks(pair) == 1
            assert pair.decode.counters()["handover_blocks_direct"] == 0
            assert pair.decode.counters()["local_prefill_fallbacks"] == 0
            await pair.whole()

    asyncio.run(run())


def test_a_prompt_that_the_decode_worker_has_whole_is_handed_over_as_ever(model: tuple[LoadedModel, Path]) -> None:
    async def run() -> None:
        async with introduced(model[0], first=PROMPT[:288]) as pair:
            stream = await pair.generate(PROMPT[:288], NEW_TOKENS, remote=True)
            assert stream.output == expected(model[1], PROMPT[:288])
            assert fallbacks(pair) == 1
            await pair.whole()

    asyncio.run(run())


@pytest.mark.parametrize("moment", ["at once", "writing", "first token", "decoding"])
def test_an_abort_at_any_moment_leaves_both_pools_whole(model: tuple[LoadedModel, Path], moment: str) -> None:
    async def run() -> None:
        async with introduced(model[0]) as pair:
            assert pair.prefill is not None
            request_id, stream = pair.start(PROMPT, 200, remote=True)
            signs: dict[str, Callable[[], bool]] = {
                "at once": lambda: True,
                "writing": lambda: pair.decode.counters()["handover_blocks_direct"] > 0,
                "first token": lambda: 0 in stream.tokens,
                "decoding": lambda: 3 in stream.tokens,
            }
            await until(signs[moment])
            for _ in range(2):
                for worker in (pair.prefill, pair.decode):
                    worker.shell.shell.on_abort(worker, wire.AttemptId(request_id=request_id, attempt=1))
            await pair.whole()
            assert stream.endings["decode"].reason == wire.END_REASON_ABORTED
            again = await pair.generate(PROMPT, NEW_TOKENS, remote=True)
            assert again.output == expected(model[1], PROMPT)
            await pair.whole()

    asyncio.run(run())


def test_aborted_blocks_stay_in_quarantine_until_the_writer_has_stopped(model: tuple[LoadedModel, Path]) -> None:
    async def run() -> None:
        async with introduced(model[0]) as pair, writing(pair) as (is_held, go_on):
            assert pair.prefill is not None
            request_id, _ = pair.start(PROMPT, 200, remote=True)
            await until(lambda: pair.decode.counters()["handover_blocks_direct"] > 0 and is_held.is_set())
            for worker in (pair.decode, pair.prefill):
                worker.shell.shell.on_abort(worker, wire.AttemptId(request_id=request_id, attempt=1))
            await asyncio.sleep(0.1)
            assert await quarantined(pair.decode) == -(-(len(PROMPT) + 1) // 16)
            go_on.set()
            await pair.whole()

    asyncio.run(run())


@pytest.mark.parametrize("sign", ["gives up", "is lost"])
def test_a_request_goes_on_in_other_blocks_while_the_writer_does_not_stop(
    model: tuple[LoadedModel, Path], sign: str
) -> None:
    async def run() -> None:
        async with introduced(model[0]) as pair, writing(pair) as (is_held, go_on):
            assert pair.prefill is not None
            request_id, stream = pair.start(PROMPT, NEW_TOKENS, remote=True)
            await until(lambda: pair.decode.counters()["handover_blocks_direct"] > 0 and is_held.is_set())
            if sign == "gives up":
                pair.prefill.shell.shell._roles[wire.ROLE_PREFILL].offers.fail(f"{request_id}/1", "test")
            else:
                (link,) = pair.decode.shell.shell._roles[wire.ROLE_DECODE]._intake._users
                link._lose("test")
                offers = pair.prefill.shell.shell._roles[wire.ROLE_PREFILL].offers
                await until(lambda: not offers._connections)  # the writer knows before it goes on
            await pair.finished(stream)
            assert stream.output == expected(model[1], PROMPT)
            assert await quarantined(pair.decode) == -(-(len(PROMPT) + 1) // 16)
            assert pair.decode.counters()["local_prefill_fallbacks"] == 1
            go_on.set()
            await pair.whole()
            assert pair.prefill.counters()["prompt_tokens_computed"] < len(PROMPT), "the writer was told to stop"
            again = await pair.generate(PROMPT[:200], NEW_TOKENS, remote=True)
            assert again.output == expected(model[1], PROMPT[:200])
            await pair.whole()

    asyncio.run(run())
