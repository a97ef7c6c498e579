"""How long a new stream will wait for its first token, from what this coordinator sees itself. Pure: times are given.

Little's law: whoever waits behind `work` that is served at `rate` waits work / rate. It holds for the part of a queue
that one coordinator sees, whatever others put into it.
"""

from collections.abc import Hashable

STREAM_WORK = 64.0
"""What a stream costs beside the tokens of its prompt, in tokens."""
ENOUGH_STARTS = 8
MIN_MEMORY_S, MAX_MEMORY_S = 2.0, 60.0
CALIBRATION_MEMORY_S = 30.0
CALIBRATION_PRIOR_S = 0.5
MIN_RATIO, MAX_RATIO = 0.125, 32.0


class Backlog:
    """Streams that wait for their first token, and the rate at which such streams are served while several wait.

    While one or none waits a fleet is not at its limit, so that time says nothing about it. What was seen is forgotten
    over the time that ENOUGH_STARTS streams take, because free slots fill faster than slots become free.
    """

    def __init__(self) -> None:
        self.work = 0.0
        self._waiting: dict[Hashable, float] = {}
        self._served = self._starts = self._busy_s = 0.0
        self._at_s = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, key: Hashable, work: float, now_s: float) -> None:
        self._advance(now_s)
        self._waiting[key] = work
        self.work += work

    def started(self, key: Hashable, now_s: float) -> None:
        """The first token is here. Idempotent."""
        if key not in self._waiting:
            return
        self._advance(now_s)
        if len(self._waiting) > 1:
            self._served += self._waiting[key]
            self._starts += 1.0
        self.remove(key, now_s)

    def remove(self, key: Hashable, now_s: float) -> None:
        """It ended. Idempotent."""
        if key in self._waiting:
            self._advance(now_s)
            work = self._waiting.pop(key)
            self.work = self.work - work if self._waiting else 0.0

    def rate(self, now_s: float) -> float:
        """Work a second; 0 while nothing is known."""
        self._advance(now_s)
        return self._served / self._busy_s if self._served and self._busy_s else 0.0

    def _advance(self, now_s: float) -> None:
        elapsed_s, self._at_s = max(0.0, now_s - self._at_s), now_s
        if len(self._waiting) < 2:
            return
        needed_s = ENOUGH_STARTS * self._busy_s / self._starts if self._starts else 0.0
        keep = 2.0 ** (-elapsed_s / min(MAX_MEMORY_S, max(MIN_MEMORY_S, needed_s)))
        self._served, self._starts = self._served * keep, self._starts * keep
        self._busy_s = self._busy_s * keep + elapsed_s


class Calibration:
    """How right somebody's predictions were lately: the ratio to correct them by, and the error that is left.

    Sums that decay, so that a prediction counts by its length: nobody cares how wrong a millisecond was.
    """

    def __init__(self, min_ratio: float = MIN_RATIO) -> None:
        self._min_ratio = min_ratio
        self._predicted_s = self._measured_s = CALIBRATION_PRIOR_S
        self._error_s = 0.0
        self._at_s = 0.0

    def learn(self, predicted_s: float, measured_s: float, now_s: float) -> None:
        keep = 2.0 ** (-max(0.0, now_s - self._at_s) / CALIBRATION_MEMORY_S)
        self._at_s = now_s
        self._error_s = self._error_s * keep + abs(measured_s - self.ratio * predicted_s)
        rest = CALIBRATION_PRIOR_S * (1.0 - keep)
        self._predicted_s = self._predicted_s * keep + rest + predicted_s
        self._measured_s = self._measured_s * keep + rest + measured_s

    @property
    def ratio(self) -> float:
        """Of measured to predicted times."""
        return min(MAX_RATIO, max(self._min_ratio, self._measured_s / self._predicted_s))

    @property
    def error(self) -> float:
        """Of corrected predictions, as a share of what was measured; 0 while nothing is known."""
        return self._error_s / self._measured_s
