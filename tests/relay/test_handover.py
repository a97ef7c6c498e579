"""The two roles against each other, without a coordinator: aborts, deadlines, faults, resumed streams."""

import asyncio
import dataclasses
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from baton.config import EngineOptions, HandoverOptions
from baton.v1 import worker_link_pb2 as wire
from engine.loading import LoadedModel, load_model
from kvtransfer import outgoing
from tests.engine.tiny_models import VOCAB_SIZE, reference_generate, write_tiny_model
from tests.relay.pair import Pair, load, relay

OPTIONS = EngineOptions(dtype="float32", kv_memory="8MiB", max_batch_tokens=64)
HANDOVER = HandoverOptions(lease_s=1.0, heartbeat_interval_s=0.1, heartbeat_timeout_s=0.5, pull_timeout_s=2.0)
PROMPT = torch.randint(3, VOCAB_SIZE, (300,), generator=torch.Generator().manual_seed(3)).tolist()
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, list[int]]:
    torch.set_num_threads(1)
    folder = write_tiny_model(tmp_path_factory.mktemp("model"), "llama3")
    return load(folder), reference_generate(folder, [PROMPT], NEW_TOKENS)[0].tokens


@pytest.mark.parametrize("smallest_group", [outgoing.MIN_GROUP_BYTES, 1], ids=["whole blocks", "layer by layer"])
@pytest.mark.parametrize(
    "faults",
    ["", "corrupt=1", "corrupt=1-", "drop=1-", "misplace=1-", "duplicate=1-", "reorder=1-", "raise=1", "stale=1",
     "stall=1", "delay=1-", "flip=1"],
)  # fmt: skip
def test_whatever_a_lane_does_the_tokens_are_right(
    model: tuple[LoadedModel, list[int]], faults: str, smallest_group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outgoing, "MIN_GROUP_BYTES", smallest_group)

    async def run() -> None:
        lanes = f"faulty:shm?{faults}" if faults else "shm"
        handover = replace(HANDOVER, lanes=lanes, pull_timeout_s=0.5)
        async with relay(model[0], prefill=OPTIONS, decode=OPTIONS, handover=handover) as pair:
            stream = await pair.generate(PROMPT, NEW_TOKENS, remote=True)
            assert stream.output == model[1]
            await pair.whole()
            counters = pair.decode.counters()
            harmless = not faults or faults.startswith(("duplicate", "reorder", "delay", "flip"))
            assert (counters["local_prefill_fallbacks"] == 0) == harmless, "the fault happened, and was counted"

    asyncio.run(run())


def test_what_waits_for_a_reader_that_waits_for_room_is_free_as_soon_as_that_one_is_aborted(
    model: tuple[LoadedModel, list[int]],
) -> None:
    """The prefill worker is through with it, so only the decode worker is told; the lease would last for minutes."""

    async def run() -> None:
        patient = replace(HANDOVER, lease_s=300.0)
        decode = replace(OPTIONS, max_running=1)
        async with relay(model[0], prefill=OPTIONS, decode=decode, handover=patient) as pair:
            assert pair.prefill is not None
            busy, _ = pair.start(PROMPT[:40], 400, remote=False)
            waiting, stream = pair.start(PROMPT, NEW_TOKENS, remote=True)
            await pair.finished(stream, "prefill")
            assert stream.endings["prefill"].reason == wire.END_REASON_HANDED_OVER
            blocks = (await pair.prefill.shell.shell.steps.call(lambda engine: engine.load())).blocks
            assert blocks.leased > 0
            for request_id in (waiting, busy):
                pair.decode.shell.shell.on_abort(pair.decode, wire.AttemptId(request_id=request_id, attempt=1))
            await pair.whole()

    asyncio.run(run())


@pytest.mark.parametrize("moment", ["at once", "offered", "first token", "decoding"])
def test_an_abort_at_any_moment_leaves_both_pools_whole(model: tuple[LoadedModel, list[int]], moment: str) -> None:
    async def reached(pair: Pair, tokens: dict[int, int]) -> None:
        assert pair.prefill is not None
        offered = pair.prefill.counters
        signs = {
            "at once": lambda: True,
            "offered": lambda: offered()["handover_blocks_offered"] > 0,
            "first token": lambda: 0 in tokens,
            "decoding": lambda: 3 in tokens,
        }
        while not signs[moment]():
            await asyncio.sleep(0)

    async def run() -> None:
        async with relay(model[0], prefill=OPTIONS, decode=OPTIONS, handover=HANDOVER) as pair:
            assert pair.prefill is not None
            request_id, stream = pair.start(PROMPT, 200, remote=True)
            async with asyncio.timeout(30):
                await reached(pair, stream.tokens)
            for _ in range(2):  # aborting twice is aborting once
                for worker in (pair.prefill, pair.decode):
                    worker.shell.shell.on_abort(worker, wire.AttemptId(request_id=request_id, attempt=1))
            await pair.whole()
            assert stream.endings["decode"].reason == wire.END_REASON_ABORTED
            again = await pair.generate(PROMPT, NEW_TOKENS, remote=True)
            assert again.output == model[1]

    asyncio.run(run())


def test_a_lost_link_aborts_everything_on_that_worker(model: tuple[LoadedModel, list[int]]) -> None:
    async def run() -> None:
        async with relay(model[0], prefill=OPTIONS, decode=OPTIONS, handover=HANDOVER) as pair:
            assert pair.prefill is not None
            streams = [pair.start(PROMPT, 200, remote=number % 2 == 0)[1] for number in range(4)]
            for worker in (pair.prefill, pair.decode):
                worker.shell.shell.on_lost(worker)
            await pair.whole()
            assert all(stream.endings["decode"].reason == wire.END_REASON_ABORTED for stream in streams)

    asyncio.run(run())


def test_a_deadline_ends_an_attempt(model: tuple[LoadedModel, list[int]]) -> None:
    async def run() -> None:
        async with relay(model[0], decode=OPTIONS, handover=HANDOVER) as pair:
            stream = await pair.finished(pair.start(PROMPT, 600, remote=False, deadline_s=0.05)[1])
            assert stream.endings["decode"].reason == wire.END_REASON_DEADLINE
            await pair.whole()

    asyncio.run(run())


def test_a_decode_worker_that_never_asks_costs_the_prefill_worker_a_lease_not_its_blocks(
    model: tuple[LoadedModel, list[int]],
) -> None:
    async def run() -> None:
        async with relay(model[0], prefill=OPTIONS, decode=OPTIONS, handover=HANDOVER) as pair:
            assert pair.prefill is not None
            pair.decode.shell.shell.on_drain()  # it refuses the assignment, so nobody wants the blocks
            _, stream = pair.start(PROMPT, NEW_TOKENS, remote=True)
            await pair.finished(stream)
            assert "draining" in stream.refusals["decode"]
            await pair.finished(stream, "prefill")
            await pair.whole()
            assert pair.prefill.counters()["handover_leases_expired"] == 1

    asyncio.run(run())


def test_a_prefill_worker_of_another_life_is_not_believed(model: tuple[LoadedModel, list[int]]) -> None:
    async def run() -> None:
        async with relay(model[0], prefill=OPTIONS, decode=OPTIONS, handover=HANDOVER) as pair:
            assert pair.prefill is not None
            pair.prefill.identity = replace(pair.prefill.identity, incarnation=999_999)
            stream = await pair.generate(PROMPT, NEW_TOKENS, remote=True)
            assert stream.output == model[1]
            assert pair.decode.counters()["handover_blocks_received"] == 0
            assert pair.decode.counters()["local_prefill_fallbacks"] == 1

    asyncio.run(run())


@pytest.mark.parametrize("allowed", [False, True])
def test_kv_of_another_dtype_is_taken_only_where_allowed_and_never_shared(
    model: tuple[LoadedModel, list[int]], tmp_path: Path, allowed: bool
) -> None:
    giver = load_model(write_tiny_model(tmp_path, "llama3"), "bfloat16")
    assert giver.weights_fingerprint == model[0].weights_fingerprint

    async def run() -> None:
        options = replace(OPTIONS, dtype="bfloat16")
        takes = replace(OPTIONS, convert_kv_dtype=allowed)
        async with relay(model[0], prefill=options, decode=takes, handover=HANDOVER, giver=giver) as pair:
            stream = await pair.generate(PROMPT, NEW_TOKENS, remote=True)
            assert len(stream.output) == NEW_TOKENS
            counters = pair.decode.counters()
            assert (counters["handover_blocks_converted"] > 0) == allowed
            assert (counters["local_prefill_fallbacks"] == 0) == allowed
            again = await pair.generate(PROMPT, NEW_TOKENS)
            assert again.output == model[1], "computed here, or from blocks that were"
            assert (again.cached_tokens["decode"] == 0) == allowed
            await pair.whole()

    asyncio.run(run())


@pytest.mark.parametrize("remote", [False, True])
def test_a_later_attempt_continues_the_stream_of_an_earlier_one(
    model: tuple[LoadedModel, list[int]], remote: bool
) -> None:
    """Prompt and delivered tokens come as one row; sampling goes on where it stopped, also with a temperature."""
    sampling = wire.EngineSampling(
        temperature=0.9, top_p=0.95, seed=11, repetition_penalty=1.2, presence_penalty=0.3, min_tokens=8
    )

    async def run() -> None:
        async with relay(model[0], prefill=OPTIONS, decode=OPTIONS, handover=HANDOVER) as pair:
            whole = await pair.finished(pair.start(PROMPT, NEW_TOKENS, remote=remote, sampling=sampling)[1])
            for delivered in (1, 5, NEW_TOKENS - 1):
                row = PROMPT + whole.output[:delivered]
                _, stream = pair.start(row, NEW_TOKENS, remote=remote, num_prompt_tokens=len(PROMPT), sampling=sampling)
                await pair.finished(stream)
                assert stream.output == whole.output[delivered:]
                assert min(stream.tokens) == delivered
            await pair.whole()

    asyncio.run(run())


@pytest.mark.parametrize("direct_wait_s", [0.0, 5.0])
def test_both_workers_that_send_the_first_token_send_its_logprobs(
    model: tuple[LoadedModel, list[int]], direct_wait_s: float
) -> None:
    """The coordinator shows what it hears first, and a prefill worker may die between its two sends."""
    sampling = wire.EngineSampling(top_p=1.0, repetition_penalty=1.0, logprobs=3)

    async def run() -> None:
        handover = dataclasses.replace(HANDOVER, direct_wait_s=direct_wait_s)
        async with relay(model[0], prefill=OPTIONS, decode=OPTIONS, handover=handover) as pair:
            for prompt in (PROMPT, PROMPT[::-1]):  # pools are lent during the first
                stream = await pair.finished(pair.start(prompt, NEW_TOKENS, remote=True, sampling=sampling)[1])
                assert stream.senders[0] == {"prefill", "decode"}
                assert len(stream.first_logprobs["prefill"].alternative_ids) == 3
                assert stream.first_logprobs["decode"] == stream.first_logprobs["prefill"]
            await pair.whole()

    asyncio.run(run())


def test_a_request_that_can_never_fit_is_refused_by_both(model: tuple[LoadedModel, list[int]]) -> None:
    async def run() -> None:
        async with relay(model[0], prefill=OPTIONS, decode=OPTIONS, handover=HANDOVER) as pair:
            stream = await pair.finished(pair.start(PROMPT * 10, NEW_TOKENS, remote=True)[1])
            assert "tokens" in stream.refusals["decode"]
            await pair.whole()

    asyncio.run(run())


def test_blocks_wait_for_a_busy_decode_worker_for_as_long_as_it_lives(model: tuple[LoadedModel, list[int]]) -> None:
    """It reserves nothing for longer than a lease; its heartbeats keep the blocks, and nothing is computed twice."""
    handover = replace(HANDOVER, lease_s=0.3)

    async def run() -> None:
        async with relay(model[0], prefill=OPTIONS, decode=OPTIONS, handover=handover) as pair:
            assert pair.prefill is not None
            free = threading.Event()
            pair.decode.shell.shell.steps.submit(lambda _: free.wait(30))
            _, stream = pair.start(PROMPT, NEW_TOKENS, remote=True)
            await pair.finished(stream, "prefill")
            await asyncio.sleep(4 * handover.lease_s)
            free.set()
            await pair.finished(stream)
            assert stream.output == model[1]
            assert pair.prefill.counters()["handover_leases_expired"] == 0
            assert pair.decode.counters()["local_prefill_fallbacks"] == 0
            await pair.whole()

    asyncio.run(run())
