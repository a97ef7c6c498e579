"""The route that makes clients wait least, by prediction: the new one until its stream runs, and all whom it delays.

    remote   queue of the prefill worker + computing what it has not + what of the hand-over is left then
    local    queue of the decode worker + computing what it has not
    both     what the stream, and the longer steps of its neighbours, cost while it is decoded

Computing counts once more for each request of that worker: the streams of a decode worker wait meanwhile, and as many
prompts will queue behind this one as queue now. Mooncake's Conductor predicts TTFT in these terms; that the others'
delay is weighed like the new one's own is ours. It is what decides between local and remote, and what keeps a busy
worker for prompts that it has. Where nobody has measured a rate of prefill yet, the least loaded are taken, and the
rule of short prompts holds.
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
        rates = table.prefill_s[prefillers]
        local_rates = filled(table.prefill_s[decoders], rates)
        if not local_rates.any():
            return super().place(work, decoders, prefillers)
        self._turn += 1
        requests = table.requests[decoders]
        answer_tokens = min(ANSWER_TOKENS, work.total_tokens - work.num_tokens)
        stay = np.asarray(decode_s(filled(table.stream_s[decoders]), requests, answer_tokens))
        computing = self._compute_s(work, decoders, local_rates)
        here = stay + table.waiting_prefill_tokens[decoders] * local_rates + (1 + requests) * computing
        near = self._least(here, requests)
        is_mixed = table.prefills[decoders] > 0
        if is_mixed[near]:
            choice = PrefillChoice.LOCAL_MIXED
        else:
            choice = PrefillChoice.LOCAL_SOONER if len(prefillers) else PrefillChoice.LOCAL_NO_WORKER
        local = Placement(int(decoders[near]), None, choice)
        if not len(prefillers) or is_mixed.all():
            return local
        rates = filled(rates, local_rates)
        computing = self._compute_s(work, prefillers, rates)
        there = table.waiting_prefill_tokens[prefillers] * rates + (1 + table.requests[prefillers]) * computing
        stay[is_mixed] = np.inf  # a mixed worker prefills for itself
        some, others = _shortest(stay), _shortest(there)
        rows = decoders[some]
        num_bytes = (work.num_tokens - work.cached_in(rows)[2]) * table.kv_bytes_per_token[rows]
        left = handover_s(num_bytes[:, None], filled(table.handover_s[rows])[:, None], computing[others])
        pairs = stay[some, None] + there[others] + left
        at, by = divmod(self._least(pairs.ravel(), requests[some].repeat(len(others))), len(others))
        if here[near] <= pairs[at, by]:
            return local
        return Placement(int(rows[at]), int(prefillers[others[by]]), PrefillChoice.REMOTE)

    def _compute_s(self, work: Work, rows: Rows, rates: Vector) -> Vector:
        """Seconds until each of these workers has the KV of the whole prompt, once it begins."""
        table, (pool, host, disk) = self._table, work.cached_in(rows)
        uncached, peers = work.num_tokens - disk, np.maximum(work.most_cached - disk, 0)
        if not (peers.any() or (pool != disk).any()):
            return np.asarray(uncached * rates)
        token_bytes, peer_s = table.kv_bytes_per_token[rows], table.handover_s[rows]
        return np.asarray(compute_s(uncached, host - pool, disk - host, peers, token_bytes, rates, peer_s))

    def _least(self, cost: Vector, requests: Vector) -> int:
        """Where the least cost is; of equals that with the fewest requests, and then they take turns."""
        return self._pick(np.arange(len(cost)), (cost, requests))


def _shortest(cost: Vector) -> Rows:
    return np.argpartition(cost, SHORT_LIST)[:SHORT_LIST] if len(cost) > SHORT_LIST else np.arange(len(cost))
