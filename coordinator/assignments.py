"""What the workers of an attempt are told: what to compute, with whom, and who else has the beginning of the prompt."""

from collections.abc import Collection, Sequence

import numpy as np

from baton.v1 import worker_link_pb2 as wire
from coordinator.delivery import Choice
from coordinator.policies.base import Work
from coordinator.tickets import issue
from coordinator.timelines import traceparent_of
from coordinator.workers import Leg, Worker, WorkerRegistry

MAX_HOLDERS = 2
"""Workers that an assignment names."""


def assign(
    choice: Choice, legs: Sequence[Leg], work: Work, registry: WorkerRegistry, deadline_s: float, model: str
) -> None:
    """Tell the worker of each leg of one attempt. They give up after `deadline_s` from now; `model` is for tickets."""
    request = choice.request
    common = wire.Assignment(
        id=legs[0].id, token_ids=choice.packed(), num_prompt_tokens=choice.num_prompt_tokens, sampling=choice.sampling,
        cache_salt=request.cache_salt, deadline_s=deadline_s, traceparent=traceparent_of(request),
    )  # fmt: skip
    request.caller.assign(common)
    for leg in legs:
        message = wire.CoordinatorMessage(assignment=common)
        assignment = message.assignment
        assignment.handle, assignment.role = leg.handle, wire.ROLE_DECODE if leg.decode else wire.ROLE_PREFILL
        for other in legs:
            if other is not leg:
                (assignment.decode if other.decode else assignment.prefill).CopyFrom(other.worker.peer)
        if not (leg.decode and leg.paired):
            assignment.holders.extend(holders(work, leg.worker, registry, choice.avoid))
        if leg.decode and not request.shadow:
            assignment.ticket = issue(choice, model)
        leg.worker.send(message)


def holders(work: Work, worker: Worker, registry: WorkerRegistry, avoid: Collection[str]) -> list[wire.PrefixHolder]:
    """Whom `worker`, which computes the prompt, may ask for its beginning (docs/kv.md, "Prefixes from other workers").

    Those whose pools should hold more of it than any cache of its own, the most first. One that drains may be
    asked: what it has is all that a moved stream need not compute again.
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
