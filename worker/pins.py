"""Prefixes that a coordinator wants kept in this worker's tiers.

They belong to its link: a coordinator that registers this worker again sends all of its pins again, so when the link
breaks every pin goes. What the pool holds of a prefix is saved at once, as nobody might come to save it later.
"""

import asyncio
import itertools
from collections.abc import Callable
from functools import partial

from baton.block_names import tenant_name
from baton.token_ids import unpack
from baton.v1 import worker_link_pb2 as wire
from engine.engine import Engine
from engine.requests import EngineRequest, SamplingParams
from kvtransfer.tiers.store import BlockStore
from kvtransfer.wire import spawn
from worker.step_loop import StepLoop

_numbers = itertools.count()


class Pins:
    """Those of one link. Runs on the asyncio thread.

    `root` names what the KV of a tenant's prompts depends on, by its salt.
    """

    def __init__(self, engine: Engine, steps: StepLoop, store: BlockStore, root: Callable[[str], bytes]) -> None:
        self._names = engine.names
        self._steps = steps
        self._store = store
        self._root = root
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._prefix = f"{next(_numbers)}/"
        """Of its keys in the store, which pins of other links share."""

    def pin(self, pin: wire.Pin) -> None:
        """Keep the whole blocks of its prefix until it is unpinned or its time is over."""
        task = self._tasks[pin.id] = spawn(self._pin(pin))
        task.add_done_callback(partial(self._done, pin.id))

    def unpin(self, id: str) -> None:
        if id in self._tasks:
            self._tasks.pop(id).cancel()
        self._store.unpin(self._prefix + id)

    def unpin_all(self) -> None:
        for id in list(self._tasks):
            self.unpin(id)
        self._store.unpin_all(self._prefix)

    async def _pin(self, pin: wire.Pin) -> None:
        root = self._root(pin.cache_salt)
        tokens = tuple(unpack(pin.token_ids))
        prompt = EngineRequest(pin.id, tokens, len(tokens), SamplingParams(), root)
        names = await asyncio.to_thread(self._names, prompt)  # hashing a long prompt takes milliseconds
        if self._store.pin(self._prefix + pin.id, names, pin.ttl_s):
            self._steps.submit(lambda engine: engine.save_cached(names, tenant_name(pin.cache_salt)))

    def _done(self, id: str, task: "asyncio.Task[None]") -> None:
        if self._tasks.get(id) is task:
            del self._tasks[id]
