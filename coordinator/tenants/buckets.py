"""Token buckets: so many a minute, evenly, and a minute's worth at once after a pause (Turner, 1986).

A bucket may be drawn below zero: what an answer takes is known only when it has come. Then nothing is given until the
debt is paid, so over a long time no more is used than the limit says, whatever the answers were.

Pure: the time comes from outside.
"""

import math


class Bucket:
    def __init__(self, per_minute: int | None, now_s: float) -> None:
        """`per_minute` None: no limit."""
        self.per_minute = per_minute
        self._level = float(per_minute or 0)
        self._at_s = now_s

    def set_limit(self, per_minute: int | None, now_s: float) -> None:
        """What was used stays used; who had no limit begins with a full minute's worth."""
        old, level = self.per_minute, self.level(now_s)
        self.per_minute = per_minute
        if per_minute is not None:
            self._level = float(per_minute) if old is None else min(level, float(per_minute))

    def level(self, now_s: float) -> float:
        """What may be had now; below zero while a debt is open."""
        if self.per_minute is None:
            return math.inf
        self._level = min(self.per_minute, self._level + (now_s - self._at_s) * self.per_minute / 60)
        self._at_s = now_s
        return self._level

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until so much may be had, 0 for now. More than the bucket ever holds may be had when it is full."""
        if self.per_minute is None:
            return 0.0
        return max(0.0, min(amount, self.per_minute) - self.level(now_s)) * 60 / self.per_minute

    def take(self, amount: float, now_s: float) -> None:
        """Whatever there is; a negative amount gives back."""
        self._level = min(self.level(now_s) - amount, float(self.per_minute or 0))

    def full_after_s(self, now_s: float) -> float:
        return 0.0 if self.per_minute is None else self.wait_s(self.per_minute, now_s)
