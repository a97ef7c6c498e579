"""Deterministic mode through both roles: handed over or not, a stream has the same bits beside any number of others."""

import asyncio
import random
from collections.abc import Iterator

import pytest
import torch

from baton.config import EngineOptions
from baton.v1 import worker_link_pb2 as wire
from engine.loading import LoadedModel, load_model
from tests.engine.tiny_models import write_tiny_model
from tests.relay.pair import Pair, Stream, relay

SIZES = {"vocab_size": 224, "intermediate_size": 96, "head_dim": 32}
PROMPT, NEW_TOKENS = random.Random(7).choices(range(3, 199), k=150), 12
BIG = EngineOptions(kv_memory="8MiB", max_batch_tokens=512, speculate="off", deterministic=True)
SMALL = EngineOptions(kv_memory="8MiB", max_batch_tokens=80, speculate="off", deterministic=True)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = write_tiny_model(tmp_path_factory.mktemp("model"), "llama3", **SIZES)
    yield load_model(folder, request.param, deterministic=True)
    torch.set_num_threads(threads)


def sampling() -> wire.EngineSampling:
    return wire.EngineSampling(temperature=0.7, top_p=0.9, repetition_penalty=1.0, seed=5, logprobs=0)


async def stream_among(pair: Pair, num_neighbours: int, remote: bool, delivered: tuple[int, ...] = ()) -> Stream:
    """The stream of PROMPT while neighbours come and go, every other one handed over as well where there is a peer."""
    chooser = random.Random(num_neighbours)
    others = []
    for index in range(num_neighbours):
        tokens = chooser.choices(range(3, 199), k=chooser.randint(1, 120))
        handed_over = pair.prefill is not None and index % 2 == 0
        others.append(pair.start(tokens, chooser.randint(1, 30), remote=handed_over, sampling=sampling())[1])
        if index == num_neighbours // 2:
            await asyncio.sleep(0.02)  # so that those before are at some other point than those after
    _, stream = pair.start(
        [*PROMPT, *delivered], NEW_TOKENS, remote=remote, num_prompt_tokens=len(PROMPT), sampling=sampling()
    )
    for each in (*others, stream):
        await pair.finished(each)
    await pair.whole()
    return stream


async def alone(model: LoadedModel) -> Stream:
    async with relay(model, decode=BIG) as pair:
        return await stream_among(pair, 0, remote=False)


def same_bits(stream: Stream, expected: Stream, since: int = 0) -> None:
    assert stream.output == expected.output[since:]
    # float32 on the wire, as computed.
    assert stream.logprobs == {index: value for index, value in expected.logprobs.items() if index >= since}
    assert len(stream.logprobs) == NEW_TOKENS - since


@pytest.mark.parametrize("num_neighbours", [1, 7, 32])
@pytest.mark.parametrize("remote", [False, True], ids=["local", "handed over"])
def test_a_stream_has_the_bits_that_it_has_alone(model: LoadedModel, num_neighbours: int, remote: bool) -> None:
    async def run() -> None:
        expected = await alone(model)
        async with relay(model, prefill=SMALL, decode=BIG) as pair:
            stream = await stream_among(pair, num_neighbours, remote)
            same_bits(stream, expected)
            assert ("prefill" in stream.senders[0]) == remote
            assert pair.decode.counters()["local_prefill_fallbacks"] == 0
            again = await stream_among(pair, num_neighbours, remote)
            same_bits(again, expected)
            assert again.cached_tokens["decode"] > 0, "the second time its prefix is cached"

    asyncio.run(run())


@pytest.mark.parametrize("remote", [False, True], ids=["local", "handed over"])
def test_the_next_attempt_goes_on_with_the_same_bits(model: LoadedModel, remote: bool) -> None:
    """Prompt and delivered tokens are prefilled by a worker that has none of it, and never decoded them."""

    async def run() -> None:
        expected = await alone(model)
        for delivered in (1, 6, NEW_TOKENS - 1):
            async with relay(model, prefill=SMALL, decode=BIG) as pair:
                stream = await stream_among(pair, 7, remote, tuple(expected.output[:delivered]))
                same_bits(stream, expected, since=delivered)

    asyncio.run(run())
