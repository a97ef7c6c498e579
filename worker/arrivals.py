"""Requests whose blocks are written from outside the engine: by another worker, or from the tiers.

The engine reserved the blocks. One task a request sees to it that they are filled; when it ends, nothing writes them
any more, and the engine goes on with what is right. A request that is aborted meanwhile leaves its blocks in
quarantine until then. A peer that writes by itself may be slow to stop: the request goes on in other blocks meanwhile.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from engine.block_tables import fence_id
from engine.requests import Reserved, TokenLogprobs
from kvtransfer.tiers.store import BlockStore
from worker.step_loop import StepLoop

LOAD_TIMEOUT_S = 30.0
"""A load that takes longer is a miss; the rest is computed."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """The first `num_tokens` positions are right; `first_token` is the output token that came with them."""

    num_tokens: int
    first_token: int | None = None
    same_bits: bool = True
    """Whether they are what would have been computed here."""
    fence: asyncio.Future[None] | None = None
    """While this is not done, a peer may still write behind these positions."""
    first_logprobs: TokenLogprobs | None = None


Fetch = Callable[[int], Awaitable[Arrived]]
"""Gets the blocks from that position on; when it returns, nothing writes any more, save behind the fence."""


class Arrivals:
    """Runs on the asyncio thread. `crash`: what is to be done about a fault of this process."""

    def __init__(
        self, steps: StepLoop, store: BlockStore | None, page_size: int, crash: Callable[[BaseException], None]
    ) -> None:
        self._steps = steps
        self._store = store
        self._page_size = page_size
        self._crash = crash
        self._cancelled: dict[str, threading.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, key: str, reserved: Reserved, num_tokens: int, fetch: Fetch | None = None) -> None:
        """Load what is stored, then `fetch` what comes from elsewhere; `num_tokens` positions are wanted in all."""
        self._cancelled[key] = threading.Event()
        task = asyncio.get_running_loop().create_task(self._fill(key, reserved, num_tokens, fetch))
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def abort(self, key: str, untouched: bool = False) -> None:
        """End the request in the engine; its blocks come back as soon as nothing writes them, which is now if they are
        `untouched`: that takes no step more than the abort, whatever else is going on here."""
        if (cancelled := self._cancelled.get(key)) is not None:
            cancelled.set()
        if cancelled is None or untouched:
            # Without a task, a reservation may be on its way from the engine; nothing has begun to write, or ever will.
            self._steps.submit(lambda engine: (engine.abort(key), engine.resolve(key)))
        else:
            self._steps.submit(lambda engine: engine.abort(key))

    async def _fill(self, key: str, reserved: Reserved, num_tokens: int, fetch: Fetch | None) -> None:
        cancelled = self._cancelled[key]
        num_loaded = 0
        try:
            first = reserved.num_cached_blocks
            if self._store is not None and reserved.stored:
                places = reserved.block_ids[first : first + len(reserved.stored)]
                deadline = time.monotonic() + LOAD_TIMEOUT_S
                num_loaded = await self._store.load(reserved.stored, places, deadline, cancelled, reserved.tenant)
            here = first + num_loaded
            arrived = Arrived(min(here * self._page_size, num_tokens))
            if fetch is not None and not cancelled.is_set():
                arrived = await fetch(here)
            if cancelled.is_set() and arrived.fence is not None:
                await arrived.fence
        finally:
            del self._cancelled[key]
        if cancelled.is_set():
            self._steps.submit(lambda engine: engine.resolve(key))
            return
        loaded, fenced = num_loaded * self._page_size, arrived.fence is not None
        self._steps.submit(
            lambda engine: engine.receive(
                key, arrived.num_tokens, arrived.first_token, loaded, arrived.same_bits, fenced, arrived.first_logprobs
            )
        )
        if arrived.fence is not None:
            await arrived.fence
            self._steps.submit(lambda engine: engine.resolve(fence_id(key)))

    def _reap(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        # Trouble of a peer or a disk ends in fewer blocks; anything raised is a fault of this process, and blocks whose
        # state is unknown must not outlive it.
        if not task.cancelled() and (error := task.exception()) is not None:
            self._crash(error)
