"""What the coordinator knows of caches: of whom it is, who never said anything, and that of the dead nothing counts."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace
from outbox import Outbox

from baton.block_names import block_name, root_name
from baton.token_ids import pack
from baton.v1 import worker_link_pb2 as wire
from coordinator.block_keys import KEY_BYTES
from coordinator.knowledge import SILENT_S, Guessed, Prompt, Told
from coordinator.workers import Worker, WorkerRegistry

TOKENS = list(range(1000))


class Cluster:
    def __init__(self, max_entries: int = 10_000) -> None:
        self.registry = WorkerRegistry("demo")
        self.told = Told(self.registry.table, max_entries)
        self.guessed = Guessed(self.registry.table)
        self.registry.on_lost = self.forget

    def forget(self, worker: Worker) -> None:
        self.told.forget(worker)
        self.guessed.forget(worker)

    def join(self, id: str, page_size: int = 16, **registration: Any) -> Worker:
        usual: dict[str, Any] = {"incarnation": 1, "model_version": "v", "model_fingerprint": "f"}
        return self.registry.register(
            wire.Registration(
                protocol_version=wire.LINK_PROTOCOL_VERSION,
                worker_id=id, roles=[wire.ROLE_DECODE], page_size_tokens=page_size, model="demo",
                total_blocks=640, max_model_tokens=4096, **(usual | registration),
            ),
            Outbox(),
        )  # fmt: skip

    def holds(self, worker: Worker, num_blocks: int, salt: str = "", sequence: int = 1) -> None:
        registration = worker.registration
        name, names = root_name(registration.model_fingerprint, cache_salt=salt), []
        size = registration.page_size_tokens
        for at in range(num_blocks):
            name = block_name(name, TOKENS[at * size : (at + 1) * size])
            names.append(name[:KEY_BYTES])
        change = wire.KvChange(tier=wire.KV_TIER_POOL, stored=b"".join(names))
        self.told.on_events(worker, wire.KvEvents(sequence=sequence, snapshot=sequence == 1, changes=[change]))

    def pool(self, *workers: Worker, salt: str = "", num_tokens: int = 1000) -> list[int]:
        cached = self.told.match(Prompt(pack(TOKENS[:num_tokens]), salt, "v"))
        return [cached.at(worker.row)[0] for worker in workers]


def in_a_loop(test: Callable[[], None]) -> None:
    async def run() -> None:
        test()
        await asyncio.sleep(0)

    asyncio.run(run())


def test_each_worker_is_matched_by_its_own_names() -> None:
    cluster = Cluster()
    small, large = cluster.join("small"), cluster.join("large", page_size=64)
    other = cluster.join("other", model_version="w", model_fingerprint="g")
    for worker in (small, large, other):
        cluster.holds(worker, 10)
    assert cluster.pool(small, large, other) == [160, 640, 0], "the other one is of another version"
    assert cluster.pool(small, large, salt="tenant") == [0, 0]
    assert cluster.pool(small, num_tokens=160) == [159], "the last token is computed in any case"


def test_a_worker_that_says_nothing_is_named(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster()
    worker = cluster.join("old")
    cluster.told.on_beat(worker)
    assert cluster.told.status()["silent_workers"] == []
    worker.joined_s -= SILENT_S + 1
    with caplog.at_level(logging.WARNING, "baton.events"):
        for _ in range(3):
            cluster.told.on_beat(worker)
    assert cluster.told.status()["silent_workers"] == ["old"]
    assert len(caplog.messages) == 1
    assert "--kv-routing approximate" in caplog.text
    cluster.holds(worker, 3)
    assert cluster.told.status()["silent_workers"] == []


def test_a_full_index_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster(max_entries=5)
    worker = cluster.join("w")
    with caplog.at_level(logging.WARNING, "baton.events"):
        cluster.holds(worker, 10)
        cluster.holds(worker, 20, sequence=2)
    assert ["--kv-index-blocks" in each for each in caplog.messages] == [True]
    assert cluster.told.status()["refused"] == 20
    assert cluster.pool(worker) == [80]


def test_nothing_of_a_dead_worker_is_believed_and_its_last_words_leave_nothing_behind() -> None:
    def test() -> None:
        cluster = Cluster()
        dead = cluster.join("w")
        cluster.holds(dead, 10)
        dead.lose("the test says so")
        cluster.registry.on_lost(dead)
        cluster.holds(dead, 10)
        cluster.told.on_beat(dead)
        assert not list(cluster.told.workers())
        again = cluster.join("w", incarnation=2)
        assert cluster.pool(dead, again) == [0, 0]

    in_a_loop(test)


def test_guesses_survive_that_a_worker_dials_again_and_not_its_death() -> None:
    def test() -> None:
        cluster = Cluster()
        prompt = Prompt(pack(TOKENS), "", "v")
        worker = cluster.join("w")
        cluster.guessed.computed(worker, prompt)
        assert cluster.guessed.match(prompt).at(worker.row) == [960] * 3
        assert cluster.guessed.match(replace(prompt, cache_salt="tenant")).most == 0
        again = cluster.join("w")
        cluster.forget(worker)
        cluster.guessed.on_beat(again)
        assert cluster.guessed.match(prompt).at(again.row)[0] == 960
        new = cluster.join("w", incarnation=2)
        cluster.forget(again)
        cluster.guessed.on_beat(new)
        assert cluster.guessed.match(prompt).most == 0

    in_a_loop(test)
