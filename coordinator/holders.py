"""Whom a worker that computes a prompt may ask for its beginning: see docs/kv.md, "Prefixes from other workers"."""

from collections.abc import Collection

import numpy as np

from baton.v1 import worker_link_pb2 as wire
from coordinator.policies.base import Work
from coordinator.workers import Worker, WorkerRegistry

MAX_HOLDERS = 2
"""Workers that an assignment names."""


def holders(work: Work, worker: Worker, registry: WorkerRegistry, avoid: Collection[str]) -> list[wire.PrefixHolder]:
    """Those whose pools should hold more of the beginning than any cache of `worker`, the most first.

    One that drains may be asked: what it has is all that a moved stream need not compute again.
    """
    table, cached = registry.table, work.cached.tokens
    own = work.cached.at(worker.row)[2]
    if work.cached.most <= own:
        return []
    found: list[wire.PrefixHolder] = []
    rows = np.flatnonzero(cached[0] > own)
    for row in rows[np.argsort(-cached[0, rows], kind="stable")].tolist():
        other = registry.workers.get(table.ids[row])
        if other is None or other.row != row or other.lost.is_set() or other.id in avoid:
            continue
        if table.groups[row] != table.groups[worker.row] or not other.registration.handover_address:
            continue
        found.append(wire.PrefixHolder(worker=other.peer, num_tokens=int(cached[0, row])))
        if len(found) == MAX_HOLDERS:
            break
    return found
