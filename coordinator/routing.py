"""Which workers serve an attempt: the rules that hold under every policy. What is best of the rest a policy says.

In this order, and each rule only among what the ones before leave: able to hold the request; not one that failed it;
not one that fails everybody lately; not where suspects crowd; for decode, one whose pool has room now. No I/O.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.estimates import compute_s, itl_s
from coordinator.policies import POLICIES
from coordinator.policies.base import Placement, PrefillChoice, Work
from coordinator.worker_table import Rows, Vector, WorkerTable


@dataclass(frozen=True, slots=True)
class Route:
    decode: str
    prefill: str | None
    """None: the decode worker prefills by itself."""
    choice: PrefillChoice
    work: Work
    """What was to be routed."""
    cached_tokens: int = 0
    """That whoever computes the prompt should find in its caches."""
    ttft_s: float = 0.0
    """Predicted for this request there, from now to its first token; 0 where nothing is known."""
    itl_s: float = 0.0
    """Predicted from one of its tokens to the next; 0 where nothing is known."""
    own_s: float = 0.0
    """Of `ttft_s`, what it would also take with nothing else there; 0 where nothing is known."""


class Router:
    """`policy` is a name of `POLICIES`. A prompt of which at most `local_prefill_tokens` are uncached is prefilled by
    its decode worker, where no prediction says who does it sooner."""

    def __init__(self, table: WorkerTable, policy: str, local_prefill_tokens: int) -> None:
        self._table = table
        self.policy = POLICIES[policy](table, local_prefill_tokens)

    def choose(self, work: Work, rows: Rows) -> Route | None:
        """Of these workers, which accept new work; None if none of them can decode this."""
        table = self._table
        decoders = rows[table.decodes[rows] > 0]
        if not len(decoders) or (work.avoid and all(table.ids[row] in work.avoid for row in decoders.tolist())):
            able = rows[(table.stands_in[rows] > 0) & (table.context_tokens[rows] >= work.total_tokens)]
            able = able[[table.ids[row] not in work.avoid for row in able.tolist()]] if work.avoid else able
            if len(able):
                return self._route(work, self.policy.stand_in(work, self._with_room(work, self._kept(work, able))))
        decoders = decoders[table.context_tokens[decoders] >= work.total_tokens]
        if not len(decoders):
            return None
        decoders = self._with_room(work, self._kept(work, decoders))
        prefillers = rows[(table.prefills[rows] > 0) & (table.context_tokens[rows] > work.num_tokens)]
        return self._route(work, self.policy.place(work, decoders, self._kept(work, prefillers)))

    def _kept(self, work: Work, rows: Rows) -> Rows:
        """Those that failed nobody, as far as there are any."""
        if work.avoid:
            rows = self._least(rows, dict.fromkeys(work.avoid, 1))
        for bad in (work.trouble, work.crowd):
            if bad:
                rows = self._least(rows, bad)
        return rows

    def _least(self, rows: Rows, by_id: Mapping[str, int]) -> Rows:
        bad = self._table.spread(by_id)[rows]
        return rows[bad == bad.min()] if len(rows) else rows

    def _with_room(self, work: Work, rows: Rows) -> Rows:
        """Those with blocks for the known tokens and the next one, as far as there are any."""
        table = self._table
        fits = work.num_tokens // table.page_size_tokens[rows] + 1 <= table.free_blocks[rows]
        return rows[fits] if fits.any() else rows

    def _route(self, work: Work, placement: Placement) -> Route:
        table, decode = self._table, placement.decode
        computes = decode if placement.prefill is None else placement.prefill
        pool, host, disk = work.cached[:, computes].tolist() if work.cached.shape[1] else (0, 0, 0)
        # A rate that this worker has not measured is that of any other worker, if one has.
        per_token = _known(table.prefill_s, computes)
        uncached, peers = work.num_tokens - disk, max(0, work.most_cached - disk)
        token_bytes, peer_s = table.kv_bytes_per_token[computes], table.handover_s[computes]
        own_s = float(compute_s(uncached, host - pool, disk - host, peers, token_bytes, per_token, peer_s))
        ttft_s = float(table.waiting_prefill_tokens[computes]) * per_token + own_s
        each_s = itl_s(_known(table.stream_s, decode), table.requests[decode] + 1)
        prefill = None if placement.prefill is None else table.ids[placement.prefill]
        return Route(table.ids[decode], prefill, placement.choice, work, disk, ttft_s, float(each_s), own_s)


def _known(rates: Vector, row: int) -> float:
    if rates[row] or not rates.any():
        return float(rates[row])
    return float(rates[rates > 0].mean())
