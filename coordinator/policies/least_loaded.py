"""Decode: fewest requests, then most room. Prefill: shortest queue of tokens. Knows nothing of caches."""

from collections.abc import Sequence

from coordinator.estimates import Vector
from coordinator.policies.base import RoutingPolicy, Work
from coordinator.worker_table import Rows


class LeastLoaded(RoutingPolicy):
    name = "least_loaded"

    def decode_costs(self, work: Work, rows: Rows) -> Sequence[Vector]:
        return self._table.requests[rows], -self._table.free_tokens[rows]

    def prefill_costs(self, work: Work, rows: Rows) -> Sequence[Vector]:
        return self._table.waiting_prefill_tokens[rows], self._table.requests[rows]
