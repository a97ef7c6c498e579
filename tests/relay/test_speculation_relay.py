"""A decode worker that guesses says after a hand-over what a worker that does not would say."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest
import torch

import cli.assembly
from baton.config import EngineOptions, HandoverOptions
from baton.v1 import worker_link_pb2 as wire
from cli.assembly import assemble, wire_up
from engine.loading import LoadedModel
from engine.speculation.policy import Policy
from tests.engine.tiny_models import VOCAB_SIZE, write_tiny_model
from tests.relay.pair import Pair, load

PLAIN = EngineOptions(dtype="float32", kv_memory="8MiB", max_batch_tokens=64, speculate="off")
QUOTED = torch.randint(3, VOCAB_SIZE, (50,), generator=torch.Generator().manual_seed(3)).tolist()
PROMPT = QUOTED * 4
NEW_TOKENS = 40
SAMPLINGS = {
    "greedy": wire.EngineSampling(top_p=1.0, repetition_penalty=1.0, logprobs=0),
    "seeded": wire.EngineSampling(temperature=0.7, top_p=0.95, seed=11, repetition_penalty=1.1, presence_penalty=0.2),
    "few words": wire.EngineSampling(
        temperature=0.5, top_p=1.0, seed=3, repetition_penalty=1.0,
        logit_bias=dict.fromkeys((5, 9, 17), 30.0),
    ),
}  # fmt: skip


class Eager(Policy):
    """Guesses whatever can be guessed, so that a test does not depend on the clock."""

    def choose(self, num_sequences: int, reach: dict[str, int]) -> dict[str, int]:
        return reach


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.assembly, "Policy", Eager)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    torch.set_num_threads(1)
    return load(write_tiny_model(tmp_path_factory.mktemp("model"), "llama3"))


@asynccontextmanager
async def relay_to(model: LoadedModel, speculate: str) -> AsyncIterator[Pair]:
    """The draft model is the model itself: guesses are right."""
    draft = model if speculate == "model" else None
    decode = replace(PLAIN, speculate=speculate, draft_model="itself" if draft else "")
    pair = Pair(assemble(model, PLAIN), assemble(model, decode, draft=draft))
    async with AsyncExitStack() as stack:
        for worker, role in ((pair.prefill, wire.ROLE_PREFILL), (pair.decode, wire.ROLE_DECODE)):
            assert worker is not None
            worker.wired = await stack.enter_async_context(
                wire_up(
                    worker.parts, worker.identity, [role], HandoverOptions(lanes="shm"), "127.0.0.1", worker.send,
                    worker.crashed,
                )
            )  # fmt: skip
        yield pair


async def streams_of(pair: Pair, delivered: dict[str, list[int]]) -> dict[str, list[int]]:
    """All samplings side by side, handed over; each goes on after what was delivered of it."""
    running = {
        name: pair.start(
            PROMPT + delivered.get(name, []), NEW_TOKENS, remote=True, num_prompt_tokens=len(PROMPT), sampling=sampling
        )[1]
        for name, sampling in SAMPLINGS.items()
    }
    for stream in running.values():
        await pair.finished(stream)
    await pair.whole()
    return {name: delivered.get(name, []) + stream.output for name, stream in running.items()}


@pytest.fixture(scope="module")
def expected(model: LoadedModel) -> dict[str, list[int]]:
    async def run() -> dict[str, list[int]]:
        async with relay_to(model, "off") as pair:
            streams = await streams_of(pair, {})
            assert pair.decode.counters()["draft_tokens"] == 0
            return streams

    return asyncio.run(run())


@pytest.mark.parametrize("speculate", ["ngram", "model"])
@pytest.mark.parametrize("num_delivered", [0, 9])
def test_a_stream_after_a_handover_is_the_same_whoever_guesses(
    model: LoadedModel, expected: dict[str, list[int]], speculate: str, num_delivered: int
) -> None:
    async def run() -> None:
        async with relay_to(model, speculate) as pair:
            delivered = {name: tokens[:num_delivered] for name, tokens in expected.items()}
            assert await streams_of(pair, delivered) == expected
            counters = pair.decode.counters()
            assert counters["handover_blocks_received"] > 0
            assert 0 < counters["draft_tokens_accepted"] <= counters["draft_tokens"]
            assert pair.prefill is not None
            assert pair.prefill.counters()["draft_tokens"] == 0

    asyncio.run(run())
