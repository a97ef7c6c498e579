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

from coordinator.estimates import (
    ANSWER_TOKENS,
    Vector,
    all_known,
    any_known,
    compute_s,
    decode_s,
    filled,
    load_s,
    tail_s,
)
from coordinator.policies.base import Placement, PrefillChoice, Work
from coordinator.policies.least_loaded import LeastLoaded
from coordinator.worker_table import Rows

SHORT_LIST = 8
"""Where something is left of the hand-over, pairs are compared of so many decode and so many prefill workers, the best
by themselves."""


class CostBased(LeastLoaded):
    name = "cost_based"

    def place(self, work: Work, decoders: Rows, prefillers: Rows) -> Placement:
        # One vector of both, the decode workers first: a call of numpy costs more than its arithmetic.
        rows, split = np.concatenate((decoders, prefillers)), len(decoders)
        requests, waiting, stream_s, token_s, handover_s = self._table.loads(rows)
        if not all_known(token_s):
            if not any_known(token_s):
                return super().place(work, decoders, prefillers)
            local_s, remote_s = token_s[:split], token_s[split:]
            token_s = np.concatenate((filled(local_s, remote_s), filled(remote_s, local_s)))
        self._turn += 1
        missing = work.num_tokens - work.cached.anywhere(rows)
        computing = self._compute_s(work, rows, missing, token_s)
        delayed = requests + 1
        delayed[:split] += 1
        is_mixed = self._table.prefills[decoders] > 0 if self._table.has_mixed else None
        if is_mixed is not None:
            delayed[:split] -= is_mixed
        cost = waiting * token_s + delayed * computing
        here, there = cost[:split], cost[split:]
        answer_tokens = min(ANSWER_TOKENS, work.total_tokens - work.num_tokens)
        stay = np.asarray(decode_s(filled(stream_s[:split]), requests[:split], answer_tokens))
        here += stay
        best = self._least(here, requests)
        local = PrefillChoice.LOCAL_SOONER if len(prefillers) else PrefillChoice.LOCAL_NO_WORKER
        if is_mixed is not None:
            if is_mixed[best]:
                local = PrefillChoice.LOCAL_MIXED
            if is_mixed.all():
                return Placement(int(decoders[best]), None, local)
            stay[is_mixed] = np.inf  # a mixed worker prefills for itself
        if not len(prefillers):
            return Placement(int(decoders[best]), None, local)
        at, by = self._least(stay, requests), self._least(there, requests[split:])
        takes_s = filled(handover_s[:split])
        tail = max(float(missing[at] * takes_s[at] - computing[split + by]), 0.0)
        if tail:  # only the hand-over depends on both: another pair may have less of it left
            some, others = _shortest(stay), _shortest(there)
            tails = np.asarray(tail_s(missing[some, None], takes_s[some, None], computing[split + others]))
            pairs = stay[some, None] + there[others] + tails
            first, second = divmod(self._least(pairs.ravel(), requests[some].repeat(len(others))), len(others))
            at, by, tail = int(some[first]), int(others[second]), float(tails[first, second])
        if here[best] <= stay[at] + there[by] + tail:
            return Placement(int(decoders[best]), None, local)
        return Placement(int(decoders[at]), int(prefillers[by]), PrefillChoice.REMOTE)

    def _compute_s(self, work: Work, rows: Rows, missing: Vector, token_s: Vector) -> Vector:
        """Seconds until each of these workers has the KV of the whole prompt, once it begins."""
        seconds = np.asarray(compute_s(missing, token_s))
        cached = work.cached
        if cached.most:
            elsewhere = np.maximum(missing - (work.num_tokens - cached.most), 0.0)
            seconds -= elsewhere * self._table.saves_s.take(rows)
        if cached.has_tiers:
            pool, host, disk = cached.tokens.take(rows, axis=1)
            seconds += load_s(host - pool, disk - host, self._table.kv_bytes_per_token[rows], token_s)
        return seconds

    def _least(self, cost: Vector, requests: Vector) -> int:
        """Where the least cost is; of equals that with the fewest requests, and then they take turns."""
        at = int(cost.argmin())
        best = (cost == cost[at]).nonzero()[0]
        return at if len(best) == 1 else self._pick(best, (requests[best],))


def _shortest(cost: Vector) -> Rows:
    return np.argpartition(cost, SHORT_LIST)[:SHORT_LIST] if len(cost) > SHORT_LIST else np.arange(len(cost))
