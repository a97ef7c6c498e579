"""The route that makes clients wait least, by prediction: the new one until its stream runs, and all whom it delays.

    remote   queue of the prefill worker + computing what it has not + what of the hand-over is left then
    local    queue of the decode worker + computing what it has not
    both     what the stream, and the longer steps of its neighbours, cost while it is decoded

Computing counts once more for each request of that worker: the streams of a decode worker wait meanwhile, and as many
prompts will queue behind this one as queue now. At a worker that only decodes it counts once more for the stream that
comes meanwhile: an idle one prefills where that is sooner, not where it is as good. Mooncake's Conductor predicts TTFT
in these terms; that the others' delay is weighed like the new one's own is ours. It is what decides between local and
remote, and what keeps a busy worker for prompts that it has. Where nobody has measured a rate of prefill yet, the least
loaded are taken, and the rule of short prompts holds.
"""

import numpy as np

from coordinator.estimates import ANSWER_TOKENS, compute_s, decode_s, fetch_saves_s, filled, load_s, tail_s
from coordinator.policies.base import Placement, PrefillChoice, Work
from coordinator.policies.least_loaded import LeastLoaded
from coordinator.worker_table import Rows, Vector

SHORT_LIST = 8
"""Pairs are compared of so many decode and so many prefill workers, the best by themselves: only the hand-over depends
on both."""


class CostBased(LeastLoaded):
    name = "cost_based"

    def place(self, work: Work, decoders: Rows, prefillers: Rows) -> Placement:
        _, requests, waiting, _, stream_s, local_s, handover_s = self._table.loads(decoders)
        _, queued, queue, _, _, remote_s, fetch_s = self._table.loads(prefillers)
        local_s = filled(local_s, remote_s)
        if not local_s.any():
            return super().place(work, decoders, prefillers)
        self._turn += 1
        answer_tokens = min(ANSWER_TOKENS, work.total_tokens - work.num_tokens)
        stay = np.asarray(decode_s(filled(stream_s), requests, answer_tokens))
        is_mixed = self._table.prefills[decoders] > 0
        delayed = requests + ~is_mixed
        here = stay + waiting * local_s + (1 + delayed) * self._compute_s(work, decoders, local_s, handover_s)
        best = self._least(here, requests)
        local = Placement(int(decoders[best]), None, PrefillChoice.LOCAL_SOONER)
        if is_mixed[best]:
            local = local._replace(choice=PrefillChoice.LOCAL_MIXED)
        if not len(prefillers):
            return local if is_mixed[best] else local._replace(choice=PrefillChoice.LOCAL_NO_WORKER)
        if is_mixed.all():
            return local
        stay[is_mixed] = np.inf  # a mixed worker prefills for itself
        remote_s = filled(remote_s, local_s)
        computing = self._compute_s(work, prefillers, remote_s, fetch_s)
        there = queue * remote_s + (1 + queued) * computing
        some, others = _shortest(stay), _shortest(there)
        missing = work.num_tokens - work.cached.anywhere(decoders[some])
        tail = tail_s(missing[:, None], filled(handover_s)[some, None], computing[others])
        pairs = stay[some, None] + there[others] + tail
        at, by = divmod(self._least(pairs.ravel(), requests[some].repeat(len(others))), len(others))
        if here[best] <= pairs[at, by]:
            return local
        return Placement(int(decoders[some[at]]), int(prefillers[others[by]]), PrefillChoice.REMOTE)

    def _compute_s(self, work: Work, rows: Rows, token_s: Vector, handover_s: Vector) -> Vector:
        """Seconds until each of these workers has the KV of the whole prompt, once it begins."""
        held, cached = work.cached.anywhere(rows), work.cached
        seconds = np.asarray(compute_s(work.num_tokens - held, token_s))
        if cached.most:
            seconds -= fetch_saves_s(np.maximum(cached.most - held, 0), token_s, handover_s)
        if cached.has_tiers:
            pool, host, disk = cached.tokens.take(rows, axis=1)
            seconds += load_s(host - pool, disk - host, self._table.kv_bytes_per_token[rows], token_s)
        return seconds

    def _least(self, cost: Vector, requests: Vector) -> int:
        """Where the least cost is; of equals that with the fewest requests, and then they take turns."""
        best = np.flatnonzero(cost == cost.min())
        return int(best[0]) if len(best) == 1 else self._pick(best, (requests[best],))


def _shortest(cost: Vector) -> Rows:
    return np.argpartition(cost, SHORT_LIST)[:SHORT_LIST] if len(cost) > SHORT_LIST else np.arange(len(cost))
