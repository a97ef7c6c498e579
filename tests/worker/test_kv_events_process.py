"""A real worker process behind a raw link: what it tells of its caches is what it holds, also after a gap."""

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from baton.block_names import root_name
from baton.framed import Framed
from baton.token_ids import pack
from baton.v1 import worker_link_pb2 as wire
from engine.prefix_cache import NameChain

PAGE, PROMPT_TOKENS, NEW_TOKENS, TIMEOUT_S = 16, 100, 8, 60.0
POOL, HOST, DISK = wire.KV_TIER_POOL, wire.KV_TIER_HOST, wire.KV_TIER_DISK


class Coordinator:
    """Knows of one worker what that says, and asks anew where a message is missing."""

    def __init__(self) -> None:
        self.registration = wire.Registration()
        self.told: dict[int, set[bytes]] | None = None
        self.num_snapshots = 0
        self.heartbeat = wire.WorkerHeartbeat()
        self.tokens: dict[int, list[int]] = {}
        self.ended: set[str] = set()
        self.misses_one = False
        self.changed = asyncio.Condition()
        self._link: Framed[wire.WorkerMessage] | None = None
        self._sequence = 0

    def connected(self, link: Framed[wire.WorkerMessage]) -> None:
        self._link = link
        self._hearing = asyncio.create_task(self._hear(link))
        welcome = wire.Welcome(
            coordinator_incarnation=7, heartbeat_interval_s=0.1, heartbeat_timeout_s=30, kv_events=True
        )
        self.send(welcome=welcome)

    def send(self, **message: Any) -> None:
        if self._link is not None:
            self._link.send(wire.CoordinatorMessage(**message))

    async def beat(self) -> None:
        while True:
            self.send(heartbeat=wire.CoordinatorHeartbeat())
            await asyncio.sleep(0.1)

    async def _hear(self, link: Framed[wire.WorkerMessage]) -> None:
        while (message := await link.read()) is not None:
            match message.WhichOneof("message"):
                case "registration":
                    self.registration = message.registration
                case "heartbeat":
                    self._look(message.heartbeat.kv_sequence)
                    self.heartbeat = message.heartbeat
                case "tokens":
                    for handle, token in zip(message.tokens.handles, message.tokens.token_ids, strict=True):
                        self.tokens.setdefault(handle, []).append(token)
                case "ending":
                    self.ended.add(message.ending.id.request_id)
                case "kv_events" if self.misses_one:
                    self.misses_one = False
                case "kv_events":
                    self._on_events(message.kv_events)
            async with self.changed:
                self.changed.notify_all()

    def _look(self, sequence: int) -> None:
        if sequence > self._sequence:
            self.told = None
            self._sequence = sequence
            self.send(send_kv_snapshot=wire.SendKvSnapshot())

    def _on_events(self, events: wire.KvEvents) -> None:
        if not events.snapshot:
            self._look(events.sequence - 1)
        else:
            self.num_snapshots += 1
            self.told = {POOL: set(), HOST: set(), DISK: set()}
        self._sequence = events.sequence
        for change in events.changes if self.told is not None else ():
            stored, removed = cut(change.stored), cut(change.removed)
            assert self.told is not None
            assert not stored & self.told[change.tier]
            assert removed <= self.told[change.tier]
            self.told[change.tier] = (self.told[change.tier] | stored) - removed

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(TIMEOUT_S), self.changed:
            await self.changed.wait_for(condition)

    async def knows(self, tier: int, names: set[bytes]) -> None:
        await self.until(lambda: self.told is not None and self.told[tier] == names)

    async def serve(self, number: int) -> set[bytes]:
        """One request; names of the blocks that it fills."""
        rng = random.Random(number)
        prompt = [rng.randrange(300, 2000) for _ in range(PROMPT_TOKENS)]
        id = wire.AttemptId(request_id=f"r{number}", attempt=1)
        assignment = wire.Assignment(
            id=id, handle=number, role=wire.ROLE_DECODE, token_ids=pack(prompt), num_prompt_tokens=len(prompt),
            deadline_s=60, sampling=wire.EngineSampling(top_p=1.0, repetition_penalty=1.0, max_tokens=NEW_TOKENS),
        )  # fmt: skip
        self.send(assignment=assignment)
        await self.until(lambda: id.request_id in self.ended)
        computed = [*prompt, *self.tokens[number][:-1]]  # the last token's KV is not needed
        names = NameChain(root_name(self.registration.model_fingerprint), PAGE, 1 << 40).extend(computed)
        return {name[:8] for name in names}


def cut(names: bytes) -> set[bytes]:
    assert len(names) % 8 == 0
    return {names[start : start + 8] for start in range(0, len(names), 8)}


@asynccontextmanager
async def worker(folder: Path) -> AsyncIterator[Coordinator]:
    coordinator = Coordinator()
    server = await asyncio.get_running_loop().create_server(
        lambda: Framed(wire.WorkerMessage, coordinator.connected), "127.0.0.1", 0
    )
    port = server.sockets[0].getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "cli.main", "mixed", "--coordinator", f"127.0.0.1:{port}", "--dtype", "float32",
        "--kv-memory", "1536KiB", "--host-kv-memory", "2MiB", "--disk-kv-folder", str(folder), "--speculate", "off",
        "--disk-kv-memory", "64MiB", "--max-batch-tokens", "64", "--parent-pid", str(os.getpid()),
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    beating = asyncio.create_task(coordinator.beat())
    try:
        yield coordinator
    finally:
        process.terminate()
        async with asyncio.timeout(TIMEOUT_S):
            await process.wait()
        beating.cancel()
        server.close()


@pytest.mark.slow
def test_a_snapshot_and_all_changes_since_are_what_a_worker_holds(tmp_path: Path) -> None:
    async def run() -> None:
        # 1. Nothing at first; then what is computed appears, and goes where there is no room.
        async with worker(tmp_path) as it:
            await it.until(lambda: it.told is not None)
            assert it.told == {POOL: set(), HOST: set(), DISK: set()}
            names: set[bytes] = set()
            for number in range(1, 7):
                names |= await it.serve(number)
                await it.knows(DISK, names)
            await it.until(lambda: len(it.told[POOL]) == it.heartbeat.blocks.cached > 0)
            assert it.told[POOL] < names, "some were evicted"
            assert it.told[HOST] <= names
            assert len(it.told[HOST]) * it.registration.block_bytes <= 2 << 20
            assert it.heartbeat.kv_sequence > 1
            assert it.heartbeat.prefill_tokens_per_s > 0
            assert it.heartbeat.step_s > 0
            assert it.num_snapshots == 1
            # 2. A message is lost: the gap is seen, and a snapshot says what the changes would have said.
            it.misses_one = True
            names |= await it.serve(7)
            await it.until(lambda: it.num_snapshots == 2)
            await it.knows(DISK, names)
            await it.until(lambda: len(it.told[POOL]) == it.heartbeat.blocks.cached)
            # 3. Asked again, with nothing lost: the same.
            before = it.told
            it.send(send_kv_snapshot=wire.SendKvSnapshot())
            await it.until(lambda: it.num_snapshots == 3)
            await it.until(lambda: it.told == before)
        # 4. Another life has what is on the disk, and nothing else.
        async with worker(tmp_path) as it:
            await it.knows(DISK, names)
            assert it.told[POOL] == it.told[HOST] == set()

    asyncio.run(run())
