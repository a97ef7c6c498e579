"""Discovery: where coordinators announce the address of their link, and workers look for it.

What was found last stays in use for as long as nothing newer is known; see `worker.links` for what that means. A
discovery that fails says so in `trouble`, tells `on_lost`, and goes on trying; nothing here ends a process.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable


class Discovery(ABC):
    trouble = ""
    """Why it does not answer at the moment; empty while it does."""

    @abstractmethod
    async def announce(self, address: str) -> None:
        """Keep this coordinator's address found by all, until cancelled."""

    @abstractmethod
    async def watch(self, on_change: Callable[[frozenset[str]], None]) -> None:
        """Tell the addresses of all coordinators now and whenever they change, until cancelled."""


class Fixed(Discovery):
    """Addresses from configuration: always the same, whether somebody is there or not."""

    def __init__(self, addresses: frozenset[str]) -> None:
        self._addresses = addresses

    async def announce(self, address: str) -> None:
        await asyncio.Event().wait()

    async def watch(self, on_change: Callable[[frozenset[str]], None]) -> None:
        on_change(self._addresses)
        await asyncio.Event().wait()
