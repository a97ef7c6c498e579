"""What tests of discovery wait for."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager


class Seen:
    def __init__(self) -> None:
        self.now: frozenset[str] = frozenset()
        self.times = 0
        self._changed = asyncio.Event()

    def __call__(self, addresses: frozenset[str]) -> None:
        self.now = addresses
        self.times += 1
        self._changed.set()

    async def becomes(self, *addresses: str) -> None:
        while self.now != set(addresses) or not self.times:
            self._changed.clear()
            await self._changed.wait()


@asynccontextmanager
async def running(*work: Awaitable[None]) -> AsyncIterator[None]:
    """Until the block ends, which must be within 20 s; nothing of it may end by itself."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        async with asyncio.timeout(20):
            yield
        assert not [task for task in tasks if task.done()]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(promise: Callable[[], bool]) -> None:
    while not promise():
        await asyncio.sleep(0.01)
