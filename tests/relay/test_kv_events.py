"""What a worker with a real engine and real tiers tells of them is what they hold."""

import asyncio
import math
from pathlib import Path

import pytest
import torch

from baton.block_names import root_name
from baton.config import EngineOptions, TierOptions
from baton.v1 import worker_link_pb2 as wire
from engine.loading import LoadedModel
from engine.prefix_cache import NameChain
from tests.engine.tiny_models import VOCAB_SIZE, write_tiny_model
from tests.relay.pair import Pair, Worker, load, relay

PAGE, NEW_TOKENS, PROMPT_TOKENS = 16, 8, 100
POOL, HOST, DISK = wire.KV_TIER_POOL, wire.KV_TIER_HOST, wire.KV_TIER_DISK


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    torch.set_num_threads(1)
    return load(write_tiny_model(tmp_path_factory.mktemp("model"), "llama3"))


def random_prompt(seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (PROMPT_TOKENS,), generator=generator).tolist()


class Listener:
    """A link whose coordinator wants to know."""

    coordinator, unsent_bytes = 77, 0

    def __init__(self, worker: Worker) -> None:
        self.kv_sequence = 0
        self.told: dict[int, set[bytes]] = {}
        self.worker = worker
        self.snapshots = 0
        worker.shell.shell.on_kv_wanted(self)

    def send(self, message: wire.WorkerMessage) -> None:
        events = message.kv_events
        assert events.sequence == self.kv_sequence
        if events.snapshot:
            self.snapshots += 1
            self.told = {POOL: set(), HOST: set(), DISK: set()}
        for change in events.changes:
            self.told[change.tier] |= short(change.stored)
            self.told[change.tier] -= short(change.removed)

    async def knows(self, names: set[bytes], *tiers: int) -> None:
        async with asyncio.timeout(20):
            while not self.told or any(
                self.told[tier] != short(b"".join(each[:8] for each in names)) for tier in tiers
            ):
                await asyncio.sleep(0.005)

    async def knows_the_pool(self) -> None:
        steps = self.worker.shell.shell.steps
        held = await steps.call(lambda engine: set(engine._scheduler.tables.cache._block_of))
        await self.knows(held, POOL)


def short(names: bytes) -> set[bytes]:
    return {names[start : start + 8] for start in range(0, len(names), 8)}


async def serve(pair: Pair, model: LoadedModel, seeds: range, remote: bool = False, saved: int = 0) -> set[bytes]:
    """Names of all blocks that get one. Where there are tiers, which had `saved` before, each has got there."""
    names: set[bytes] = set()
    for seed in seeds:
        prompt = random_prompt(seed)
        stream = await pair.generate(prompt, NEW_TOKENS, remote=remote)
        computed = [*prompt, *stream.output[:-1]]  # the last token's KV is not needed
        names |= set(NameChain(root_name(model.fingerprint), PAGE, 1 << 40).extend(computed))
        async with asyncio.timeout(20):
            while pair.decode.counters().get("kv_disk_stored", math.inf) < saved + len(names):
                await asyncio.sleep(0.005)
    return names


def test_pool_and_tiers_are_told_of_and_again_after_a_restart(model: LoadedModel, tmp_path: Path) -> None:
    config = model.config
    block_bytes = config.num_layers * config.num_kv_heads * 2 * PAGE * config.head_dim * 4
    small = EngineOptions(dtype="float32", kv_memory=str(16 * block_bytes), max_batch_tokens=64, speculate="off")
    tiers = TierOptions(
        host_kv_memory=str(24 * block_bytes), disk_kv_folder=str(tmp_path), disk_kv_memory="64MiB"
    )  # fmt: skip

    async def run() -> None:
        async with relay(model, decode=small, decode_tiers=tiers) as pair:
            before = await serve(pair, model, range(2))
            early = Listener(pair.decode)
            await early.knows(before, HOST, DISK)
            after = await serve(pair, model, range(2, 8), saved=len(before))
            await early.knows(before | after, DISK)
            await early.knows_the_pool()
            assert len(early.told[POOL]) < len(early.told[HOST]) < len(early.told[DISK]), "blocks went"
            late = Listener(pair.decode)
            async with asyncio.timeout(20):
                while early.told != late.told:
                    await asyncio.sleep(0.005)
            assert (early.snapshots, late.snapshots) == (1, 1)
            heartbeat = pair.decode.shell.shell.heartbeat()
            assert heartbeat.prefill_tokens_per_s > 0
            assert 0 < heartbeat.step_s < 10
            assert heartbeat.handover_bytes_per_s == 0
            assert heartbeat.counters["kv_snapshots_sent"] == 2
        async with relay(model, decode=small, decode_tiers=tiers) as pair:
            again = Listener(pair.decode)
            await again.knows(before | after, DISK)
            assert again.told[POOL] == again.told[HOST] == set()

    asyncio.run(run())


def test_both_sides_of_a_hand_over_have_the_blocks_and_the_taker_knows_how_fast_they_came(model: LoadedModel) -> None:
    options = EngineOptions(dtype="float32", kv_memory="8MiB", max_batch_tokens=64, speculate="off")

    async def run() -> None:
        async with relay(model, prefill=options, decode=options) as pair:
            assert pair.prefill is not None
            giver, taker = Listener(pair.prefill), Listener(pair.decode)
            names = await serve(pair, model, range(2), remote=True)
            await taker.knows(names, POOL)
            await giver.knows_the_pool()
            assert giver.told[POOL] <= taker.told[POOL]
            assert len(giver.told[POOL]) == 2 * (PROMPT_TOKENS // PAGE)
            assert pair.decode.shell.shell.heartbeat().handover_bytes_per_s > 0

    asyncio.run(run())
