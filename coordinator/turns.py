"""Requests that come give way to those that run: a turn of the event loop begins only so many, and the others wait in
line. Those that begin together go on together, stage by stage.

One takes half a millisecond. Of a thousand that come at once, or come back because their coordinator died, the last
would keep every stream from its next token for as long as all of them take.

Requests come in crowds, because streams end at the steps of their workers. All that is done for one is more code and
data than a processor's first caches hold: the next one finds nothing of it there. A stage is less, and is done for all
before the next one, which takes a sixth less time for all of it (cohort scheduling: Larus and Parkes, 2002).
"""

import asyncio
from collections import deque
from typing import Final

EACH: Final = 32
"""Requests a turn. A turn looks once at every socket: with fewer of them that would be a good part of the work."""


class Turns:
    """In the event loop's thread. Who waits is a call of a client, of which connections bound the number."""

    def __init__(self, each: int = EACH) -> None:
        self._each = each
        self._left = each
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._turn_ends = False
        """Something will be called then."""

    def __len__(self) -> int:
        """That wait."""
        return len(self._waiting)

    async def begin(self) -> None:
        """Wait until this turn, or one of the next, has room; whoever came first goes first. Ends a stage."""
        loop = asyncio.get_running_loop()
        if not self._turn_ends:
            self._turn_ends = True
            loop.call_soon(self._next)
        if self._left:  # nobody waits
            self._left -= 1
            await stage()
            return
        place = loop.create_future()
        self._waiting.append(place)
        await place

    def _next(self) -> None:
        self._left = self._each
        while self._left and self._waiting:
            place = self._waiting.popleft()
            if not place.done():  # else its client hung up
                place.set_result(None)
                self._left -= 1
        self._turn_ends = self._left < self._each
        if self._turn_ends:
            asyncio.get_running_loop().call_soon(self._next)


async def stage() -> None:
    """Let those that began in the same turn come as far as this before anybody goes on."""
    await asyncio.sleep(0)
