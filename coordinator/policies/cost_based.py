"""The route that makes clients wait least, by prediction: the new one until its stream runs, and all whom it delays.

    remote   queue of the prefill worker + computing what it has not + what of the hand-over is left then
    local    queue of the decode worker + computing what it has not, which its running streams wait for as well
    both     what the stream, and the longer steps of its neighbours, cost while it is decoded

Mooncake's Conductor predicts TTFT in these terms; that the others' delay is weighed like the new one's own is ours. It
is what decides between local and remote: a busy decode worker prefills only what costs its streams little.
Where nobody has measured a rate of prefill yet, the least loaded are taken, and the rule of short prompts holds.
"""

import numpy as np

from coordinator.estimates import ANSWER_TOKENS, compute_s, decode_s, filled, handover_s
from coordinator.policies.base import Placement, PrefillChoice, Work
from coordinator.policies.least_loaded import LeastLoaded
from coordinator.worker_table import Rows, Vector

SHORT_LIST = 8
"""Pairs are compared of so many decode and so many prefill workers, the best by themselves: only the hand-over depends
on both."""


class CostBased(LeastLoaded):
    name = "cost_based"

    def place(self, work: Work, decoders: Rows, prefillers: Rows) -> Placement:
        table = self._table
        prefill_rates = table.prefill_s[prefillers]
        decode_rates = filled(table.prefill_s[decoders], prefill_rates)
        prefill_rates = filled(prefill_rates, decode_rates)
        if not decode_rates.any():
            return super().place(work, decoders, prefillers)
        self._turn += 1
        uncached, local = self._compute_s(work, decoders, decode_rates)
        requests = table.requests[decoders]
        answer_tokens = min(ANSWER_TOKENS, work.total_tokens - work.num_tokens)
        stay = decode_s(filled(table.step_s[decoders]), table.measured_requests[decoders], requests, answer_tokens)
        here = stay + table.waiting_prefill_tokens[decoders] * decode_rates + (1 + requests) * local
        mixed = table.prefills[decoders] > 0
        best_here = self._least(here, requests)
        choice = PrefillChoice.LOCAL_MIXED if mixed[best_here] else PrefillChoice.LOCAL_SOONER
        if not len(prefillers) and not mixed[best_here]:
            choice = PrefillChoice.LOCAL_NO_WORKER
        nearest = Placement(int(decoders[best_here]), None, choice)
        if not len(prefillers) or mixed.all():
            return nearest
        _, far = self._compute_s(work, prefillers, prefill_rates)
        there = far + table.waiting_prefill_tokens[prefillers] * prefill_rates
        stay = np.where(mixed, np.inf, stay)  # a mixed worker prefills for itself
        some, others = _shortest(stay), _shortest(there)
        num_bytes = uncached[some] * table.kv_bytes_per_token[decoders[some]]
        left = handover_s(num_bytes[:, None], filled(table.handover_s[decoders])[some, None], far[None, others])
        pairs = stay[some, None] + there[None, others] + left
        best = self._least(pairs.ravel(), np.broadcast_to(requests[some, None], pairs.shape).ravel())
        at, by = divmod(best, len(others))
        if here[best_here] <= pairs[at, by]:
            return nearest
        return Placement(int(decoders[some[at]]), int(prefillers[others[by]]), PrefillChoice.REMOTE)

    def _compute_s(self, work: Work, rows: Rows, rates: Vector) -> tuple[Vector, Vector]:
        """Tokens that are in no cache of each worker, and seconds until it has the KV of the whole prompt."""
        pool, host, disk = work.cached_in(rows)
        uncached = (work.num_tokens - disk).astype(np.float64)
        if not disk.any():
            return uncached, uncached * rates
        per_token = self._table.kv_bytes_per_token[rows]
        return uncached, np.asarray(compute_s(uncached, host - pool, disk - host, per_token, rates))

    def _least(self, cost: Vector, requests: Vector) -> int:
        """Where the least cost is; of equals that with the fewest requests, and then they take turns."""
        return self._pick(np.arange(len(cost)), (cost, requests))


def _shortest(cost: Vector) -> Rows:
    return np.argpartition(cost, SHORT_LIST)[:SHORT_LIST] if len(cost) > SHORT_LIST else np.arange(len(cost))
