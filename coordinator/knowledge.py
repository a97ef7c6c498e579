"""What the coordinator knows of the workers' caches, in one of two ways: as they tell it, or as it guesses.

Both know prompts by chained hashes whose root has the tenant's salt (`baton.block_names.root_name`), so that a tenant
finds only what requests with its own salt have left.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from msgspec import Struct

from baton.block_names import root_name
from baton.errors import PeerError
from baton.token_ids import count
from baton.v1 import worker_link_pb2 as wire
from coordinator.block_keys import BlockKeys, KeyMemo
from coordinator.kv_index import KvIndex, Vectors, WorkerCaches
from coordinator.policies.base import NOTHING_CACHED, Cached
from coordinator.prefixes import Life, PrefixMemory, strides
from coordinator.worker_table import WorkerTable
from coordinator.workers import Worker

events = logging.getLogger("baton.events")
SILENT_S = 10.0
"""A worker that has told nothing for so long after it joined is not going to."""


class Prompt(Struct, frozen=True):
    """What is to be found in caches."""

    packed: bytes
    """Its tokens (`baton.token_ids`)."""
    cache_salt: str
    version: str
    """Of the model."""


class CacheKnowledge(ABC):
    """Of the workers in `table`, whose rows all answers are about."""

    mode: ClassVar[str]
    wants_events: ClassVar[bool]
    """Whether workers are to send KvEvents."""

    def __init__(self, table: WorkerTable) -> None:
        self._table = table

    @abstractmethod
    def match(self, prompt: Prompt) -> Cached:
        """What workers of the prompt's version hold of it."""

    @abstractmethod
    def forget(self, worker: Worker) -> None:
        """It is gone."""

    @abstractmethod
    def on_beat(self, worker: Worker) -> None:
        """A heartbeat came."""

    @abstractmethod
    def on_events(self, worker: Worker, message: wire.KvEvents) -> None:
        """A worker told. It is lost where nobody can mean what it said."""

    @abstractmethod
    def computed(self, worker: Worker, prompt: Prompt) -> None:
        """A token of this worker came, so it has the KV of these tokens now."""

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """JSON-ready."""


class Told(CacheKnowledge):
    """Exact, as of the workers' last messages."""

    mode, wants_events = "exact", True

    def __init__(self, table: WorkerTable, max_entries: int) -> None:
        super().__init__(table)
        self.index = KvIndex(max_entries)
        self._memo = KeyMemo()
        self._caches: dict[int, WorkerCaches] = {}
        """By row, of workers that sent a heartbeat."""
        self._silent: set[int] = set()
        self._is_full = False

    def match(self, prompt: Prompt) -> Cached:
        found: Vectors | None = None
        for group in self._table.groups_of(prompt.version):
            root = root_name(group.model_fingerprint, cache_salt=prompt.cache_salt)
            keys = BlockKeys(root, group.page_size_tokens, prompt.packed, self._memo)
            tokens = self.index.match(keys, len(self._table))
            tokens *= group.page_size_tokens
            found = tokens if found is None else np.maximum(found, tokens, out=found)
        return NOTHING_CACHED if found is None else Cached(np.minimum(found, count(prompt.packed) - 1, out=found))

    def computed(self, worker: Worker, prompt: Prompt) -> None:
        """It tells by itself."""

    def on_events(self, worker: Worker, message: wire.KvEvents) -> None:
        if worker.lost.is_set():
            return
        try:
            is_wanted = self.index.apply(self._of(worker), message)
        except PeerError as error:
            worker.lose(str(error))
            return
        if is_wanted:
            _ask(worker)
        self._silent.discard(worker.row)
        if self.index.refused and not self._is_full:
            self._is_full = True
            events.warning(
                "the index of KV blocks is full: more blocks are cached than --kv-index-blocks; some are not known"
            )

    def on_beat(self, worker: Worker) -> None:
        if worker.lost.is_set():
            return
        caches = self._of(worker)
        if self.index.beat(caches, worker.heartbeat.kv_sequence):
            _ask(worker)
        is_silent = not caches.told and time.monotonic() - worker.joined_s > SILENT_S
        if is_silent and worker.row not in self._silent:
            self._silent.add(worker.row)
            events.warning(
                "worker %s does not tell what its caches hold: prompts are routed as if they held nothing; "
                "upgrade it, or start the coordinator with --kv-routing approximate", worker.id,
            )  # fmt: skip

    def forget(self, worker: Worker) -> None:
        self._silent.discard(worker.row)
        if (caches := self._caches.pop(worker.row, None)) is not None:
            self.index.close(caches)

    def _of(self, worker: Worker) -> WorkerCaches:
        if (caches := self._caches.get(worker.row)) is None:
            caches = self._caches[worker.row] = self.index.open(worker.row)
        return caches

    def workers(self) -> Iterator[tuple[str, WorkerCaches]]:
        """Each with its id."""
        for row, caches in self._caches.items():
            yield self._table.ids[row], caches

    def status(self) -> dict[str, Any]:
        now_s = time.monotonic()
        return {
            "mode": self.mode,
            "blocks": len(self.index),
            "entries": self.index.num_entries,
            "bytes": self.index.num_bytes,
            "refused": self.index.refused,
            "silent_workers": sorted(self._table.ids[row] for row in self._silent),
            "lag_s": round(max((caches.lag_s(now_s) for caches in self._caches.values()), default=0.0), 3),
        }


def _ask(worker: Worker) -> None:
    worker.send(wire.CoordinatorMessage(send_kv_snapshot=wire.SendKvSnapshot()))


class Guessed(CacheKnowledge):
    """From what was sent where, and not told otherwise."""

    mode, wants_events = "approximate", False

    def __init__(self, table: WorkerTable) -> None:
        super().__init__(table)
        self._memory = PrefixMemory()
        self._rows: dict[Life, int] = {}

    def match(self, prompt: Prompt) -> Cached:
        tokens = np.zeros((1, len(self._table)))
        for fingerprint in {group.model_fingerprint for group in self._table.groups_of(prompt.version)}:
            names = strides(root_name(fingerprint, cache_salt=prompt.cache_salt), prompt.packed)
            for held in self._memory.holders(names):
                if (row := self._rows.get(held.life)) is not None:
                    tokens[:, row] = np.maximum(tokens[:, row], held.num_tokens)
        return Cached(np.minimum(tokens, count(prompt.packed) - 1, out=tokens))

    def computed(self, worker: Worker, prompt: Prompt) -> None:
        if not worker.lost.is_set():
            self._rows[_life(worker)] = worker.row
            root = root_name(worker.registration.model_fingerprint, cache_salt=prompt.cache_salt)
            self._memory.record(strides(root, prompt.packed), _life(worker))

    def on_events(self, worker: Worker, message: wire.KvEvents) -> None:
        """It was not asked to, and nothing is made of it."""

    def on_beat(self, worker: Worker) -> None:
        if not worker.lost.is_set():
            self._rows[_life(worker)] = worker.row  # one that only dialled again has what it had

    def forget(self, worker: Worker) -> None:
        if self._rows.get(_life(worker)) == worker.row:
            del self._rows[_life(worker)]

    def status(self) -> dict[str, Any]:
        return {"mode": self.mode, "strides": len(self._memory)}


def _life(worker: Worker) -> Life:
    return Life(worker.id, worker.registration.incarnation)


def open_knowledge(mode: str, table: WorkerTable, max_entries: int) -> CacheKnowledge:
    """`mode` is that of `--kv-routing`."""
    return Told(table, max_entries) if mode == Told.mode else Guessed(table)
