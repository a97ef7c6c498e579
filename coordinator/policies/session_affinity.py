"""A session always goes to the same worker, unless that is overloaded; then to its next one.

Rendezvous hashing (Thaler and Ravishankar, 1998): each session ranks the workers by a hash of both, so that a worker
that comes or goes changes nothing for sessions of others, and all coordinators agree. The bound on the load is that of
"Consistent Hashing with Bounded Loads" (Mirrokni, Thorup and Zadimoghaddam, 2018).
"""

from collections.abc import Sequence

import numpy as np

from coordinator.estimates import Vector
from coordinator.policies.base import RoutingPolicy, Work
from coordinator.worker_table import Rows

BOUND = 1.25
"""Of the mean load; what a worker has above this and one request goes to others."""
_MIX = np.uint64(0xFF51AFD7ED558CCD)
_SHIFT = np.uint64(33)


class SessionAffinity(RoutingPolicy):
    name = "session_affinity"
    reads_session = True

    def decode_costs(self, work: Work, rows: Rows) -> Sequence[Vector]:
        return _overloaded(self._table.requests[rows], 1), self._rank(work, rows)

    def prefill_costs(self, work: Work, rows: Rows) -> Sequence[Vector]:
        return _overloaded(self._table.waiting_prefill_tokens[rows], work.num_tokens), self._rank(work, rows)

    def _rank(self, work: Work, rows: Rows) -> Vector:
        mixed = self._table.seeds[rows] ^ np.uint64(work.session)
        for _ in range(2):  # the finisher of MurmurHash3
            mixed = (mixed ^ (mixed >> _SHIFT)) * _MIX
        return (mixed ^ (mixed >> _SHIFT)).astype(np.float64)


def _overloaded(loads: Vector, one: float) -> Vector:
    is_over: Vector = (loads > BOUND * loads.mean() + one).astype(np.float64)
    return is_over
