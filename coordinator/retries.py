"""How fast attempts may be repeated that living workers failed: in proportion to what clients newly ask. Pure.

A token bucket with debt: an admission adds RETRIES_PER_ADMISSION, time adds FLOOR_PER_S, a retry takes 1. A retry that
finds it empty waits until its share has come, MAX_DELAY_S at most; it is never refused. Retries after a worker's death
are not paid for: a worker dies once, and what it had must always find another.
"""

import time
from collections.abc import Callable

RETRIES_PER_ADMISSION = 0.2
FLOOR_PER_S = 4.0
BURST = 32.0
MAX_DELAY_S = 5.0


class RetryBudget:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tokens = BURST
        self._at_s = clock()

    def admitted(self, num_streams: int) -> None:
        self._tokens = min(BURST, self._tokens + RETRIES_PER_ADMISSION * num_streams)

    def take(self) -> float:
        """Take a retry; seconds that it has to wait."""
        now = self._clock()
        self._tokens = min(BURST, self._tokens + (now - self._at_s) * FLOOR_PER_S)
        self._at_s = now
        self._tokens = max(self._tokens - 1.0, -MAX_DELAY_S * FLOOR_PER_S)
        return max(0.0, -self._tokens / FLOOR_PER_S)
