"""The less loaded of two at random (Mitzenmacher, 2001): almost as even as looking at all, and several coordinators
that see the same loads do not all run to the same worker."""

import random
from collections.abc import Sequence

import numpy as np

from coordinator.estimates import Vector
from coordinator.policies.base import Work
from coordinator.policies.least_loaded import LeastLoaded
from coordinator.worker_table import Rows, WorkerTable


class PowerOfTwo(LeastLoaded):
    name = "power_of_two"

    def __init__(self, table: WorkerTable, local_prefill_tokens: int, seed: int | None = None) -> None:
        super().__init__(table, local_prefill_tokens)
        self._random = random.Random(seed)

    def decode_costs(self, work: Work, rows: Rows) -> Sequence[Vector]:
        return self._left_out(rows), *super().decode_costs(work, rows)

    def prefill_costs(self, work: Work, rows: Rows) -> Sequence[Vector]:
        return self._left_out(rows), *super().prefill_costs(work, rows)

    def _left_out(self, rows: Rows) -> Vector:
        cost = np.ones(len(rows))
        cost[self._random.sample(range(len(rows)), min(2, len(rows)))] = 0
        return cost
