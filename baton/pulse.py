"""Signs of life between two processes: when the next is due, and when the other side has given none for too long."""

import asyncio
import math
import time
from collections.abc import Iterable


class Pulse:
    """Times of one process towards its peers: a heartbeat every `interval_s`, and silence of `timeout_s` is death.

    It looks when a silence would be over, so that one is noticed after `timeout_s` and not up to an interval later.
    After a look that was late by itself (this process was stopped or starved) messages may lie unread: for half of
    `timeout_s` nobody is judged. Times are those of `time.monotonic()`.
    """

    def __init__(self, interval_s: float, timeout_s: float) -> None:
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._next_beat = time.monotonic()
        self._judges_from = 0.0
        self._due = self._next_beat
        self._stood_still_at = -math.inf

    async def rest(self, heard: Iterable[float]) -> bool:
        """Until something is to be done. True: send a heartbeat. False: look who is silent.

        `heard`: when each peer gave its last sign of life; of one that is lost no longer.
        """
        ends = [max(at + self._timeout_s, self._judges_from) for at in heard]
        self._due = due = min([self._next_beat, *ends])
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        now = time.monotonic()
        if now - due > self._interval_s:
            self._judges_from = now + self._timeout_s / 2
        if now - due > self._timeout_s / 2:
            self._stood_still_at = now
        if now < self._next_beat:
            return False
        self._next_beat = now + self._interval_s
        return True

    @property
    def judges(self) -> bool:
        """This process kept its own time lately: what it has not heard, nobody said."""
        return time.monotonic() >= self._judges_from

    @property
    def stood_still(self) -> bool:
        """This process did so for long enough that peers may have hung up on it, and is only now reading what came."""
        now = time.monotonic()
        return now - self._due > self._timeout_s / 2 or now - self._stood_still_at < 2 * self._interval_s

    def silent(self, heard: float) -> bool:
        """Whether a peer that was heard last then counts as dead."""
        return self.judges and time.monotonic() - heard >= self._timeout_s
