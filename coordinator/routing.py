"""Which workers serve an attempt: the rules that hold under every policy. What is best of the rest a policy says.

In this order, and each rule only among what the ones before leave: able to hold the request; not one that failed it;
not one that fails everybody lately; not where suspects crowd; for decode, one whose pool has room now. No I/O.
"""

from collections.abc import Mapping

from msgspec import Struct

from coordinator.estimates import Vector, any_known, compute_s, itl_s, load_s, saves_s
from coordinator.policies import POLICIES
from coordinator.policies.base import Placement, PrefillChoice, Work
from coordinator.worker_table import Candidates, Rows, WorkerTable


class Route(Struct, frozen=True):
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
    turns: float = 0.0
    """Answers that must end first, over those that the worker computes side by side: 1 is the time of a whole answer,
    which `ttft_s` does not have."""


class Router:
    """`policy` is a name of `POLICIES`. A prompt of which at most `local_prefill_tokens` are uncached is prefilled by
    its decode worker, where no prediction says who does it sooner."""

    def __init__(self, table: WorkerTable, policy: str, local_prefill_tokens: int) -> None:
        self._table = table
        self.policy = POLICIES[policy](table, local_prefill_tokens)

    def choose(self, work: Work, candidates: Candidates) -> Route | None:
        """None if none of these workers can decode this."""
        table, (decoders, prefillers, stand_ins, context_tokens) = self._table, candidates
        if not len(decoders) or (work.avoid and all(table.ids[row] in work.avoid for row in decoders.tolist())):
            able = stand_ins[table.context_tokens[stand_ins] >= work.total_tokens]
            able = able[[table.ids[row] not in work.avoid for row in able.tolist()]] if work.avoid else able
            if len(able):
                return self._route(work, self.policy.stand_in(work, self._with_room(work, self._kept(work, able))))
        if work.total_tokens > context_tokens:
            decoders = decoders[table.context_tokens[decoders] >= work.total_tokens]
            prefillers = prefillers[table.context_tokens[prefillers] > work.num_tokens]
        if not len(decoders):
            return None
        decoders, prefillers = self._kept(work, decoders), self._kept(work, prefillers)
        placement = self.policy.place(work, decoders, prefillers)
        if table.free_tokens[placement.decode] <= work.num_tokens:  # seldom: so the others are not asked before
            placement = self.policy.place(work, self._with_room(work, decoders), prefillers)
        return self._route(work, placement)

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
        fits = self._table.free_tokens[rows] > work.num_tokens
        return rows[fits] if fits.any() else rows

    def _route(self, work: Work, placement: Placement) -> Route:
        table, decode = self._table, placement.decode
        computes = decode if placement.prefill is None else placement.prefill
        load = table.load(computes)
        decodes = load if computes == decode else table.load(decode)
        pool, host, disk = work.cached.at(computes)
        token_s = load.prefill_s or _mean(table.prefill_s)
        own_s = compute_s(work.num_tokens - disk, token_s)
        if work.cached.most > disk:
            own_s -= (work.cached.most - disk) * saves_s(token_s, load.handover_s)
        if disk > pool:
            own_s += load_s(host - pool, disk - host, float(table.kv_bytes_per_token[computes]), token_s)
        ttft_s = load.waiting_prefill_tokens * token_s + own_s
        places = float(table.max_running[decode])
        each_s = itl_s(decodes.stream_s or _mean(table.stream_s), min(decodes.requests + 1, places))
        turns = max(0.0, decodes.requests + 1 - places) / places if placement.prefill is None else 0.0
        prefill = None if placement.prefill is None else table.ids[placement.prefill]
        return Route(
            table.ids[decode], prefill, placement.choice, work, disk, float(ttft_s), float(each_s), float(own_s), turns
        )


def _mean(rates: Vector) -> float:
    """Of those workers that have measured theirs; 0 where nobody has."""
    return float(rates[rates > 0].mean()) if any_known(rates) else 0.0
