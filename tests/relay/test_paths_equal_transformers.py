"""Whatever path a request takes, its greedy tokens and logprobs are those of transformers on the same weights."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from baton.config import EngineOptions
from engine.pool import BlockShape
from tests.engine.tiny_models import FAMILIES, reference_generate, write_tiny_model
from tests.relay.pair import Stream, load, relay

PAGE, NEW_TOKENS, VOCABULARY = 16, 8, 199
LENGTHS = (1, PAGE - 1, PAGE, PAGE + 1, 700)
BIG = EngineOptions(dtype="float32", page_size=PAGE, kv_memory="8MiB", max_batch_tokens=1024)
CHUNKED = EngineOptions(dtype="float32", page_size=PAGE, kv_memory="8MiB", max_batch_tokens=96)


class Oracle:
    """A tiny random model, prompts, and what transformers says about them."""

    def __init__(self, folder: Path, family: str) -> None:
        self.folder = write_tiny_model(folder, family)
        generator = torch.Generator().manual_seed(7)
        lengths = [*LENGTHS, *range(20, 20 + 3 * 11, 3)]
        self.prompts = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
        self.expected = reference_generate(self.folder, self.prompts, NEW_TOKENS)
        self.model = load(self.folder)

    def check(self, number: int, stream: Stream) -> None:
        reference = self.expected[number]
        assert stream.output == reference.tokens
        for index, expected in enumerate(reference.logprobs):
            assert stream.logprobs[index] == pytest.approx(expected, abs=1e-4)

    @property
    def lengths(self) -> list[int]:
        return list(range(len(LENGTHS)))


@pytest.fixture(scope="module", params=FAMILIES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Oracle(tmp_path_factory.mktemp(request.param), request.param)
    torch.set_num_threads(threads)


def test_local_prefill_in_one_chunk(oracle: Oracle) -> None:
    async def run() -> None:
        async with relay(oracle.model, decode=BIG) as pair:
            for number in oracle.lengths:
                oracle.check(number, await pair.generate(oracle.prompts[number], NEW_TOKENS))
            await pair.whole()

    asyncio.run(run())


def test_chunked_prefill_and_prefix_cache(oracle: Oracle) -> None:
    async def run() -> None:
        async with relay(oracle.model, decode=CHUNKED) as pair:
            for number in oracle.lengths:
                first = await pair.generate(oracle.prompts[number], NEW_TOKENS)
                again = await pair.generate(oracle.prompts[number], NEW_TOKENS)
                oracle.check(number, first)
                oracle.check(number, again)
                shareable = oracle.model.config.shareable_tokens(len(oracle.prompts[number]))
                full = min(len(oracle.prompts[number]), shareable) // PAGE * PAGE
                assert again.cached_tokens["decode"] >= max(full - 1, 0), "the second time came from the cache"
            await pair.whole()

    asyncio.run(run())


@pytest.mark.parametrize("lane", ["shm", "tcp"])
def test_handed_over(oracle: Oracle, lane: str) -> None:
    async def run() -> None:
        async with relay(oracle.model, lanes=lane, prefill=CHUNKED, decode=BIG) as pair:
            for number in oracle.lengths:
                stream = await pair.generate(oracle.prompts[number], NEW_TOKENS, remote=True)
                oracle.check(number, stream)
                assert "prefill" in stream.senders[0], "the first token came from the prefill worker"
            await pair.whole()
            counters = pair.decode.counters()
            assert counters["handover_blocks_received"] >= 700 // PAGE
            assert counters["handover_failures"] == counters["local_prefill_fallbacks"] == 0
            assert pair.decode.shell.shell.lanes_in_use() == {"prefill": lane}

    asyncio.run(run())


@pytest.mark.parametrize(("there", "here"), [(16, 32), (32, 16)])
def test_handed_over_between_page_sizes(oracle: Oracle, there: int, here: int) -> None:
    """The second time part of the prompt is here already: fewer blocks are pulled, and those here are not written."""

    async def run() -> None:
        giver, taker = replace(CHUNKED, page_size=there), replace(BIG, page_size=here)
        async with relay(oracle.model, prefill=giver, decode=taker) as pair:
            for number in (*oracle.lengths, *oracle.lengths):
                stream = await pair.generate(oracle.prompts[number], NEW_TOKENS, remote=True)
                oracle.check(number, stream)
            await pair.whole()
            counters = pair.decode.counters()
            assert counters["handover_blocks_converted"] == counters["handover_blocks_received"] >= 700 // there
            assert counters["handover_failures"] == counters["local_prefill_fallbacks"] == 0

    asyncio.run(run())


@pytest.mark.parametrize("number", range(len(LENGTHS)))
def test_preempted_and_resumed(oracle: Oracle, number: int) -> None:
    """An older request grows into the second block of a pool that holds no more than both had at first."""
    older = LENGTHS.index(PAGE - 1)
    num_blocks = 1 + (LENGTHS[number] + PAGE) // PAGE
    block_bytes = BlockShape.of(oracle.model.config, PAGE, oracle.model.dtype).block_bytes
    options = replace(BIG, kv_memory=str(num_blocks * block_bytes))

    async def run() -> None:
        async with relay(oracle.model, decode=options) as pair:
            both = threading.Event()
            pair.decode.shell.shell.steps.submit(
                lambda _: both.wait(30)
            )  # or the older one has grown when the other comes
            streams = [pair.start(oracle.prompts[each], NEW_TOKENS, remote=False)[1] for each in (older, number)]
            both.set()
            oracle.check(older, await pair.finished(streams[0]))
            oracle.check(number, await pair.finished(streams[1]))
            await pair.whole()
            assert pair.decode.counters()["preemptions"] > 0

    asyncio.run(run())


def test_sixteen_requests_batched_half_of_them_handed_over(oracle: Oracle) -> None:
    async def run() -> None:
        async with relay(oracle.model, prefill=CHUNKED, decode=CHUNKED) as pair:
            streams = [
                pair.start(prompt, NEW_TOKENS, remote=number % 2 == 0)[1]
                for number, prompt in enumerate(oracle.prompts[:16])
            ]
            for number, stream in enumerate(streams):
                oracle.check(number, await pair.finished(stream))
            await pair.whole()

    asyncio.run(run())
