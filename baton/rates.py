"""How much a second, as measured lately."""

import math

MEMORY_S = 2.0
"""Measured seconds after which a measurement counts for a third. Time that was not measured lets nothing fade."""


class Rate:
    """Amounts over the seconds that they took, so that many small measurements weigh no more than few large ones."""

    def __init__(self) -> None:
        self._amount = 0.0
        self._seconds = 0.0

    def add(self, amount: float, seconds: float) -> None:
        fade = math.exp(-seconds / MEMORY_S)
        self._amount = fade * self._amount + amount
        self._seconds = fade * self._seconds + seconds

    @property
    def per_s(self) -> float:
        """0: nothing was measured yet. May be called from any thread."""
        amount, seconds = self._amount, self._seconds
        return amount / seconds if seconds else 0.0
