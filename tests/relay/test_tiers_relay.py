"""Prompts whose KV comes back from host memory or disk: the tokens of transformers, and nothing computed twice."""

import asyncio
import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from baton.config import EngineOptions, TierOptions, validate
from baton.errors import ConfigurationError
from baton.token_ids import pack
from baton.v1 import worker_link_pb2 as wire
from engine.loading import LoadedModel
from tests.engine.tiny_models import VOCAB_SIZE, reference_generate, write_tiny_model
from tests.relay.pair import Pair, Worker, load, relay

PAGE, NEW_TOKENS = 16, 8
OPTIONS = EngineOptions(dtype="float32", kv_memory="8MiB", max_batch_tokens=64, speculate="off")
NUM_PROMPTS, PROMPT_TOKENS = 4, 200
LOADABLE = PROMPT_TOKENS // PAGE * PAGE


def random_prompt(seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (PROMPT_TOKENS,), generator=generator).tolist()


PROMPTS = [random_prompt(seed) for seed in range(NUM_PROMPTS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, list[list[int]]]:
    torch.set_num_threads(1)
    folder = write_tiny_model(tmp_path_factory.mktemp("model"), "llama3")
    return load(folder), [each.tokens for each in reference_generate(folder, PROMPTS, NEW_TOKENS)]


def block_bytes(model: LoadedModel) -> int:
    config = model.config
    return config.num_layers * config.num_kv_heads * 2 * PAGE * config.head_dim * 4


def small_pool(model: LoadedModel) -> EngineOptions:
    """Room for one prompt and a half, so that every prompt pushes the one before it out."""
    num_blocks = (PROMPT_TOKENS + NEW_TOKENS) // PAGE + 1 + LOADABLE // PAGE // 2
    return EngineOptions(
        dtype="float32", kv_memory=str(num_blocks * block_bytes(model)), max_batch_tokens=64, speculate="off",
    )  # fmt: skip


async def saved(worker: Worker, tier: str, num_blocks: int) -> None:
    async with asyncio.timeout(30):
        while worker.counters()[f"kv_{tier}_stored"] < num_blocks:
            await asyncio.sleep(0.005)


async def serve_all(
    pair: Pair, expected: list[list[int]], tier: str, workers: Sequence[Worker], remote: bool = False
) -> None:
    """Every prompt once; each is saved before the next one may push it out of the pool."""
    for number, prompt in enumerate(PROMPTS):
        assert (await pair.generate(prompt, NEW_TOKENS, remote=remote)).output == expected[number]
        for worker in workers:
            await saved(worker, tier, (number + 1) * (LOADABLE // PAGE))


def host(size: str = "64MiB") -> TierOptions:
    return TierOptions(host_kv_memory=size)


def on_disk(folder: Path) -> TierOptions:
    return TierOptions(disk_kv_folder=str(folder), disk_kv_memory="128MiB")


def test_a_prompt_that_was_pushed_out_of_the_pool_is_loaded_from_host_memory(
    model: tuple[LoadedModel, list[list[int]]],
) -> None:
    async def run() -> None:
        async with relay(model[0], decode=small_pool(model[0]), decode_tiers=host()) as pair:
            await serve_all(pair, model[1], "host", [pair.decode])
            before = pair.decode.counters()
            for prompt, expected in zip(PROMPTS, model[1], strict=True):
                assert (await pair.generate(prompt, NEW_TOKENS)).output == expected
            after = pair.decode.counters()
            assert after["prompt_tokens_loaded"] - before["prompt_tokens_loaded"] == NUM_PROMPTS * LOADABLE
            computed = after["prompt_tokens_computed"] - before["prompt_tokens_computed"]
            assert computed == NUM_PROMPTS * (PROMPT_TOKENS - LOADABLE)
            await pair.whole()

    asyncio.run(run())


def test_a_prefill_worker_hands_over_what_it_loaded(model: tuple[LoadedModel, list[list[int]]]) -> None:
    async def run() -> None:
        async with relay(
            model[0], prefill=small_pool(model[0]), decode=small_pool(model[0]), prefill_tiers=host()
        ) as pair:
            assert pair.prefill is not None
            await serve_all(pair, model[1], "host", [pair.prefill], remote=True)
            for prompt, expected in zip(PROMPTS, model[1], strict=True):
                assert (await pair.generate(prompt, NEW_TOKENS, remote=True)).output == expected
            assert pair.prefill.counters()["prompt_tokens_loaded"] == NUM_PROMPTS * LOADABLE
            assert pair.decode.counters()["local_prefill_fallbacks"] == 0
            await pair.whole()

    asyncio.run(run())


def test_a_decode_worker_takes_from_its_peer_only_what_its_tiers_lack(
    model: tuple[LoadedModel, list[list[int]]],
) -> None:
    async def run() -> None:
        async with relay(model[0], prefill=OPTIONS, decode=small_pool(model[0]), decode_tiers=host()) as pair:
            await serve_all(pair, model[1], "host", [pair.decode], remote=True)
            before = pair.decode.counters()
            for prompt, expected in zip(PROMPTS, model[1], strict=True):
                assert (await pair.generate(prompt, NEW_TOKENS, remote=True)).output == expected
            after = pair.decode.counters()
            assert after["prompt_tokens_loaded"] - before["prompt_tokens_loaded"] == NUM_PROMPTS * LOADABLE
            received = after["handover_blocks_received"] - before["handover_blocks_received"]
            assert received == NUM_PROMPTS, "the last block, which is not full and has no name"
            await pair.whole()

    asyncio.run(run())


def test_a_worker_that_starts_again_finds_its_blocks_on_disk_and_wrong_bytes_are_computed_again(
    model: tuple[LoadedModel, list[list[int]]], tmp_path: Path
) -> None:
    async def first() -> None:
        async with relay(model[0], decode=OPTIONS, decode_tiers=on_disk(tmp_path)) as pair:
            await serve_all(pair, model[1], "disk", [pair.decode])

    async def again(num_loaded: int, num_wrong: int) -> None:
        async with relay(model[0], decode=OPTIONS, decode_tiers=on_disk(tmp_path)) as pair:
            assert (await pair.generate(PROMPTS[0], NEW_TOKENS)).output == model[1][0]
            counters = pair.decode.counters()
            assert counters["prompt_tokens_loaded"] == num_loaded
            assert (counters["kv_disk_checksum_failures"] > 0) == (num_wrong > 0)
            await pair.whole()

    asyncio.run(first())
    asyncio.run(again(LOADABLE, 0))
    for path in tmp_path.rglob("*.kv"):
        content = bytearray(path.read_bytes())
        content[::512] = bytes(each ^ 1 for each in content[::512])
        path.write_bytes(content)
    asyncio.run(again(0, 0))  # not even the records are believed


def test_a_prompt_that_another_worker_computed_is_loaded_from_the_shared_store(
    model: tuple[LoadedModel, list[list[int]]], tmp_path: Path
) -> None:
    shared = TierOptions(shared_kv_folder=str(tmp_path), shared_kv_memory="64MiB")

    async def compute() -> None:
        async with relay(model[0], decode=OPTIONS, decode_tiers=shared) as pair:
            await serve_all(pair, model[1], "shared", [pair.decode])

    async def find() -> None:
        async with relay(model[0], decode=OPTIONS, decode_tiers=shared) as pair:
            for prompt, expected in zip(PROMPTS, model[1], strict=True):
                assert (await pair.generate(prompt, NEW_TOKENS)).output == expected
            assert pair.decode.counters()["prompt_tokens_loaded"] == NUM_PROMPTS * LOADABLE
            await pair.whole()

    asyncio.run(compute())
    asyncio.run(find())


@pytest.mark.parametrize("write_policy", ["through", "eviction"])
@pytest.mark.parametrize("remote", [True, False])
def test_a_request_that_gave_its_blocks_back_loads_them_and_asks_its_peer_for_nothing(
    model: tuple[LoadedModel, list[list[int]]], remote: bool, write_policy: str
) -> None:
    """Two streams outgrow the pool, so that the later one is preempted, after its hand-over where there is one."""

    async def run() -> None:
        small = small_pool(model[0])
        tiers = TierOptions(host_kv_memory="64MiB", kv_write_policy=write_policy)
        async with relay(model[0], prefill=OPTIONS, decode=small, decode_tiers=tiers) as pair:
            prompts = [PROMPTS[0][: 9 * PAGE + 8], PROMPTS[1][: 7 * PAGE + 8]]
            alone = [(await pair.generate(prompt, 60, cache_salt="alone")).output for prompt in prompts]
            before = pair.decode.counters()
            streams = [pair.start(prompt, 60, remote=remote)[1] for prompt in prompts]
            for stream, expected in zip(streams, alone, strict=True):
                assert (await pair.finished(stream)).output == expected
            after = pair.decode.counters()
            assert after["preemptions"] > before["preemptions"]
            assert after["prompt_tokens_loaded"] > before["prompt_tokens_loaded"]
            assert after["handover_failures"] == after["local_prefill_fallbacks"] == 0
            await pair.whole()

    asyncio.run(run())


def test_with_policy_eviction_blocks_are_written_only_when_the_pool_needs_their_room(
    model: tuple[LoadedModel, list[list[int]]],
) -> None:
    """The pool has room for three prompts."""

    async def run() -> None:
        blocks = LOADABLE // PAGE
        options = dataclasses.replace(small_pool(model[0]), kv_memory=str((3 * blocks + 4) * block_bytes(model[0])))
        tiers = TierOptions(host_kv_memory="64MiB", kv_write_policy="eviction")
        async with relay(model[0], decode=options, decode_tiers=tiers) as pair:
            store = pair.decode.parts.store
            assert store is not None
            save, asked = store.save, []
            store.save = lambda unsaved: (asked.extend(unsaved), save(unsaved))[1]
            for number, prompt in enumerate(PROMPTS):
                assert (await pair.generate(prompt, NEW_TOKENS)).output == model[1][number]
                await saved(pair.decode, "host", len(asked))
                assert bool(asked) == (number > 0), "one prompt and its successor have room"
            assert len(asked) < NUM_PROMPTS * blocks
            before = pair.decode.counters()
            assert before["kv_saves_too_late"] == before["kv_saves_dropped"] == 0
            assert (await pair.generate(PROMPTS[0], NEW_TOKENS)).output == model[1][0]
            after = pair.decode.counters()
            found = sum(after[name] - before[name] for name in ("prompt_tokens_loaded", "prompt_tokens_cached"))
            assert found == LOADABLE
            assert after["prompt_tokens_loaded"] > before["prompt_tokens_loaded"]
            await pair.whole()

    asyncio.run(run())


def test_a_pinned_prefix_is_kept_when_a_flood_pushes_others_out_of_the_tier(
    model: tuple[LoadedModel, list[list[int]]],
) -> None:
    """Prompts 0 and 1 are of equal age, and 0 is pinned. The tier has room for six prompts."""

    async def run() -> None:
        blocks = LOADABLE // PAGE
        tier = host(str(6 * blocks * block_bytes(model[0])))
        async with relay(model[0], decode=small_pool(model[0]), decode_tiers=tier) as pair:
            link, shell = pair.decode, pair.decode.shell.shell
            shell.on_pin(link, wire.Pin(id="pin", token_ids=pack(PROMPTS[0]), ttl_s=60))
            shell.on_pin(link, wire.Pin(id="gone", token_ids=pack(PROMPTS[1]), ttl_s=60))
            shell.on_unpin(link, "gone")  # before its names are known
            flood = [random_prompt(seed) for seed in range(100, 112)]
            for number, prompt in enumerate([*PROMPTS[:2], *flood], 1):
                await pair.generate(prompt, NEW_TOKENS)
                await saved(pair.decode, "host", number * blocks)
            assert pair.decode.counters()["kv_host_pinned"] == blocks
            for number, loaded in ((0, LOADABLE), (1, 0)):
                before = pair.decode.counters()["prompt_tokens_loaded"]
                assert (await pair.generate(PROMPTS[number], NEW_TOKENS)).output == model[1][number]
                assert pair.decode.counters()["prompt_tokens_loaded"] - before == loaded
            shell.on_lost(link)
            assert pair.decode.counters()["kv_host_pinned"] == 0
            await pair.whole()

    asyncio.run(run())


def test_a_prompt_that_nobody_used_for_too_long_is_computed_again(
    model: tuple[LoadedModel, list[list[int]]], tmp_path: Path
) -> None:
    folder, shared = tmp_path / "disk", tmp_path / "shared"
    shared.mkdir()
    tiers = TierOptions(
        host_kv_memory="64MiB", disk_kv_folder=str(folder), disk_kv_memory="128MiB", shared_kv_folder=str(shared),
        shared_kv_memory="64MiB", kv_ttl_s=100.0,
    )  # fmt: skip

    async def run() -> None:
        async with relay(model[0], decode=small_pool(model[0]), decode_tiers=tiers) as pair:
            for tier in ("host", "disk", "shared"):
                await serve_all(pair, model[1], tier, [pair.decode])
            store = pair.decode.parts.store
            assert store is not None
            host_tier, disk_tier, shared_store = store._tiers
            monotonic, wall = host_tier._clock, disk_tier._wall_clock
            host_tier._clock = shared_store._clock = lambda: monotonic() + 101
            disk_tier._wall_clock = lambda: wall() + 101
            for path in shared.glob("*/*/*.kv"):
                os.utime(path, (time.time() - 101, time.time() - 101))
            before = pair.decode.counters()["prompt_tokens_loaded"]
            assert (await pair.generate(PROMPTS[0], NEW_TOKENS)).output == model[1][0]
            after = pair.decode.counters()
            assert after["prompt_tokens_loaded"] == before
            assert after["kv_host_expired"] == after["kv_disk_expired"] == NUM_PROMPTS * LOADABLE // PAGE
            await pair.whole()

    asyncio.run(run())


@pytest.mark.parametrize("remote", [False, True])
def test_a_tenant_has_its_share_of_a_tier_and_its_answers_are_everybodys(
    model: tuple[LoadedModel, list[list[int]]], remote: bool
) -> None:
    """The tier has room for five prompts, a tenant may have two. Prompt 0 is nobody's, and stays."""

    async def run() -> None:
        blocks = LOADABLE // PAGE
        tiers = TierOptions(host_kv_memory=str(5 * blocks * block_bytes(model[0])), kv_tenant_share=0.4)
        small = small_pool(model[0])
        async with relay(model[0], prefill=OPTIONS if remote else None, decode=small, decode_tiers=tiers) as pair:
            num_saved = 0
            for salt, number in [("", 0), ("a", 0), ("b", 1), *(("a", number) for number in (1, 2, 3))]:
                stream = await pair.generate(PROMPTS[number], NEW_TOKENS, remote=remote, cache_salt=salt)
                assert stream.output == model[1][number]
                num_saved += blocks
                await saved(pair.decode, "host", num_saved)
            counters = pair.decode.counters()
            assert counters["kv_host_over_share"] == 2 * blocks
            assert counters["kv_host_evicted"] == counters["prompt_tokens_loaded"] == 0
            for salt, number, loaded in (("", 0, LOADABLE), ("b", 1, LOADABLE), ("a", 2, LOADABLE), ("a", 0, 0)):
                before = pair.decode.counters()["prompt_tokens_loaded"]
                stream = await pair.generate(PROMPTS[number], NEW_TOKENS, remote=remote, cache_salt=salt)
                assert stream.output == model[1][number]
                assert pair.decode.counters()["prompt_tokens_loaded"] - before == loaded
            await pair.whole()

    asyncio.run(run())


@pytest.mark.parametrize("remote", [False, True])
def test_an_abort_while_blocks_are_loaded_leaves_the_pool_whole(
    model: tuple[LoadedModel, list[list[int]]], remote: bool
) -> None:
    async def run() -> None:
        async with relay(
            model[0],
            prefill=small_pool(model[0]),
            decode=small_pool(model[0]),
            prefill_tiers=host(),
            decode_tiers=host(),
        ) as pair:
            workers = [worker for worker in (pair.prefill if remote else None, pair.decode) if worker is not None]
            await serve_all(pair, model[1], "host", workers, remote)
            for number in range(12):
                request_id, _ = pair.start(PROMPTS[number % NUM_PROMPTS], 200, remote=remote)
                for _ in range(number * 3):
                    await asyncio.sleep(0)
                for worker in workers:
                    worker.shell.shell.on_abort(worker, wire.AttemptId(request_id=request_id, attempt=1))
            await pair.whole()
            assert (await pair.generate(PROMPTS[0], NEW_TOKENS, remote=remote)).output == model[1][0]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("flag", "value"),
    [("kv_tenant_share", 0.0), ("kv_tenant_share", 1.5), ("kv_ttl_s", -1.0), ("kv_write_policy", "no")],
)
def test_settings_of_tiers_that_cannot_work_are_refused_by_their_flag(flag: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match="--" + flag.replace("_", "-")):
        validate(TierOptions(**{flag: value}))
