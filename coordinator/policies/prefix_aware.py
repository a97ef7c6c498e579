"""Whoever holds most of the prompt, unless the load is too uneven; then the least loaded. SGLang's router's idea."""

from collections.abc import Sequence

from coordinator.estimates import Vector
from coordinator.policies.base import Work
from coordinator.policies.least_loaded import LeastLoaded
from coordinator.worker_table import Rows

UNEVEN_STREAMS, UNEVEN_PROMPTS, UNEVEN_RATIO = 32, 4, 1.5
"""Uneven: the most loaded decode, or prefill, worker has so many requests more than the least loaded one, and so many
times as many."""
MIN_SHARE = 0.1
"""Less of a prompt than this is no reason to go anywhere: system prompts that all share would be."""


class PrefixAware(LeastLoaded):
    name = "prefix_aware"

    def decode_costs(self, work: Work, rows: Rows) -> Sequence[Vector]:
        least = super().decode_costs(work, rows)
        return least if _is_uneven(self._table.requests[rows], UNEVEN_STREAMS) else (_missing(work, rows), *least)

    def prefill_costs(self, work: Work, rows: Rows) -> Sequence[Vector]:
        least = super().prefill_costs(work, rows)
        return least if _is_uneven(self._table.requests[rows], UNEVEN_PROMPTS) else (_missing(work, rows), *least)


def _is_uneven(loads: Vector, difference: float) -> bool:
    most, least = loads.max(), loads.min()
    return bool(most - least > difference and most > UNEVEN_RATIO * least)


def _missing(work: Work, rows: Rows) -> Vector:
    held = work.cached.anywhere(rows)
    held[held < MIN_SHARE * work.num_tokens] = 0
    return -held
