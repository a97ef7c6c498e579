"""A breaker for each worker: one that keeps failing by its own fault gets no work for a while. Pure but for its clock.

closed --FAILURES in a row--> open --back-off--> half-open: one probe --success--> closed
                                ^--------------------failure----'

It ranks workers and never forbids one: where every breaker is open, the least bad worker is used.
Circuit breakers are M. Nygard's ("Release It!").
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

FAILURES = 3
FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 60.0
PROBE_S = 10.0
"""A probe that has said nothing for so long is followed by another."""
MAX_BREAKERS = 1024


@dataclass(slots=True)
class _Breaker:
    failures: int = 0
    """In a row."""
    trips: int = 0
    """In a row. 0: closed."""
    until_s: float = 0.0
    """Open until then, half-open afterwards."""
    probe_until_s: float = 0.0


class Breakers:
    """By worker id: a worker that is started anew and fails anew is known. `on_event(worker_id, event)` counts."""

    def __init__(self, on_event: Callable[[str, str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._on_event = on_event
        self._clock = clock
        self._breakers: dict[str, _Breaker] = {}
        """Only of workers whose last attempt failed."""

    def failure(self, worker_id: str) -> None:
        """An attempt failed by this worker's own fault."""
        breaker = self._breakers.setdefault(worker_id, _Breaker())
        breaker.failures += 1
        now = self._clock()
        if breaker.failures >= FAILURES and now >= breaker.until_s:
            breaker.until_s = now + min(FIRST_BACKOFF_S * 2**breaker.trips, MAX_BACKOFF_S)
            breaker.trips += 1
            breaker.probe_until_s = 0.0
            self._on_event(worker_id, "opened")
        while len(self._breakers) > MAX_BREAKERS:
            del self._breakers[next(iter(self._breakers))]

    def success(self, worker_id: str) -> None:
        """It did its part of an attempt. What it began before its breaker opened closes none."""
        breaker = self._breakers.get(worker_id)
        if breaker is None or self._clock() < breaker.until_s:
            return
        del self._breakers[worker_id]
        if breaker.trips:
            self._on_event(worker_id, "closed")

    def trouble(self) -> dict[str, int]:
        """How bad each worker is that should get nothing now; those left out are good, or due for a probe."""
        now = self._clock()
        return {
            id: breaker.trips
            for id, breaker in self._breakers.items()
            if breaker.trips and now < max(breaker.until_s, breaker.probe_until_s)
        }

    def chosen(self, worker_id: str) -> None:
        """An attempt is sent to this worker: the probe, if one was due."""
        breaker = self._breakers.get(worker_id)
        if breaker is None or not breaker.trips:
            return
        now = self._clock()
        if now < breaker.until_s:
            self._on_event(worker_id, "overridden")
        elif now >= breaker.probe_until_s:
            breaker.probe_until_s = now + PROBE_S
            self._on_event(worker_id, "half_open")

    def state(self, worker_id: str) -> str:
        breaker = self._breakers.get(worker_id)
        if breaker is None or not breaker.trips:
            return "closed"
        return "open" if self._clock() < breaker.until_s else "half_open"
