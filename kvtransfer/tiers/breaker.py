"""When a device that fails is left alone, and when it is tried again."""

from collections.abc import Callable
from typing import Final

RETRY_S: Final = 30.0
FAILURES_IN_A_ROW: Final = 3


class Breaker:
    """Open after failures in a row, for RETRY_S; then one more failure opens it again."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._num_failures = 0
        self._closed_from = 0.0
        self.reason = ""

    @property
    def is_open(self) -> bool:
        return self._num_failures >= FAILURES_IN_A_ROW and self._clock() < self._closed_from

    def fail(self, reason: str, is_final: bool = False) -> None:
        self._num_failures = max(self._num_failures + 1, FAILURES_IN_A_ROW if is_final else 0)
        self.reason = reason
        if self._num_failures >= FAILURES_IN_A_ROW:
            self._closed_from = self._clock() + RETRY_S

    def succeed(self) -> None:
        self._num_failures = 0
