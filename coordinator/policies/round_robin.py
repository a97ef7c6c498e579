"""Workers take turns. What the others are measured against."""

from collections.abc import Sequence

from coordinator.estimates import Vector
from coordinator.policies.base import RoutingPolicy, Work
from coordinator.worker_table import Rows


class RoundRobin(RoutingPolicy):
    name = "round_robin"

    def decode_costs(self, work: Work, rows: Rows) -> Sequence[Vector]:
        return ()

    def prefill_costs(self, work: Work, rows: Rows) -> Sequence[Vector]:
        return ()
