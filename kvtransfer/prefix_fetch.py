"""The beginning of a prompt out of another worker's prefix cache, when that is sooner than computing it.

Whoever knows of a holder names it; nobody promises that it still has the blocks. So a fetch is short:

1. `prospect` picks the holder that saves the most by what is known of it, and connects while the request still waits.
2. `fetch` asks it for the blocks by name. It says at once how many it seems to have: none is the end of it.
3. What it has it leases and offers, as a prefill worker does; the blocks are pulled and checked by the `Intake`.

A holder that does not answer, dies or sends wrong bytes is left alone for a while. One that is merely too slow is known
for it from then on, which large prompts may still be worth.
"""

import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvtransfer.intake import CANCELLED, Intake, IntakeResult
from kvtransfer.taking import Answer
from kvtransfer.wire import MAX_WANT_NAMES, PeerIdentity, PeerRef

log = logging.getLogger(__name__)

MIN_ANSWER_S, MAX_ANSWER_S, ANSWER_SHARE = 0.1, 1.0, 0.25
"""For a holder to say how many blocks it has, connecting included: a share of what computing them would take."""
FETCH_TIMEOUT_S = 30.0
RETRY_S = 5.0
"""How long a holder that failed is left alone."""
BELIEVED_S = 60.0
"""How long a holder is judged by what was measured of it."""
ASSUMED_BYTES_PER_S, ASSUMED_WAIT_S = 1e9, 0.02
"""Of every holder, until its first fetch was measured."""
MAX_PEERS = 1024
"""Of which is known what they cost."""
_WEIGHT = 0.3


class Holder(NamedTuple):
    """A worker that should have the first `num_tokens` tokens of a prompt."""

    peer: PeerRef
    num_tokens: int


@dataclass(slots=True)
class Cost:
    """Of blocks of one holder, as measured: from asking until the first is offered, and of each."""

    wait_s: float
    block_s: float
    measured_at: float | None = None
    closed_until: float = 0.0

    def learn(self, wait_s: float, block_s: float) -> None:
        weight = 1.0 if self.measured_at is None else _WEIGHT
        self.wait_s += weight * (wait_s - self.wait_s)
        self.block_s += weight * (block_s - self.block_s)
        self.measured_at = time.monotonic()


class Prospect(NamedTuple):
    """What to expect of a fetch."""

    holder: Holder
    wait_s: float
    block_s: float


class Fetched(NamedTuple):
    num_blocks: int
    """Leading blocks that are here and right; nothing is written any more."""
    same_bits: bool = True


class PrefixFetcher:
    """Every method is called on the event loop's thread."""

    def __init__(self, me: PeerIdentity, intake: Intake, block_bytes: int, counters: dict[str, float]) -> None:
        self._intake = intake
        self._block_bytes = block_bytes
        self._counters = counters
        self._costs: OrderedDict[PeerRef, Cost] = OrderedDict()
        self._prefix = f"prefix/{me.incarnation:x}"
        self._numbers = itertools.count(1)
        self._fetches: dict[str, str] = {}

    def prospect(self, holders: Sequence[Holder]) -> Prospect | None:
        """The first of the holders that is not to be left alone; a connection to it is made meanwhile."""
        now = time.monotonic()
        for holder in holders:
            cost = self._cost(holder.peer)
            if now >= cost.closed_until:
                self._intake.dial(holder.peer)
                return Prospect(holder, cost.wait_s, cost.block_s)
        return None

    async def fetch(
        self, key: str, peer: PeerRef, names: Sequence[bytes], block_ids: Sequence[int], limit_s: float
    ) -> Fetched:
        """Write those of the named blocks that the peer has into these of the pool, within `limit_s` seconds.

        As many leading ones as come right and in time. `key` is for `cancel`. Never raises for trouble of the peer.
        """
        names = names[:MAX_WANT_NAMES]
        fetch_id = self._fetches[key] = f"{self._prefix}/{next(self._numbers)}"
        limit_s = min(limit_s, FETCH_TIMEOUT_S)
        answer_s = min(max(ANSWER_SHARE * limit_s, MIN_ANSWER_S), MAX_ANSWER_S)
        start = time.monotonic()
        try:
            places = block_ids[: len(names)]
            deadline = start + limit_s
            result = await self._intake.take(fetch_id, peer, places, 0, deadline, names=names, answer_s=answer_s)
        finally:
            del self._fetches[key]
        self._count("prefix_fetches", 1)
        self._count("prefix_fetches_empty", result.num_blocks == 0 and result.failure is None)
        took_s = time.monotonic() - start
        self._count("prefix_fetch_seconds", took_s)
        self._judge(peer, result, took_s, limit_s)
        return Fetched(result.num_blocks, result.same_bits)

    def _judge(self, peer: PeerRef, result: IntakeResult, took_s: float, limit_s: float) -> None:
        cost = self._cost(peer)
        num_found, wait_s, pull_s = result.answer or Answer(None, None, None)
        is_slow = took_s >= limit_s and bool(num_found)
        if wait_s is not None and pull_s is not None and result.num_blocks:
            cost.learn(wait_s, pull_s / result.num_blocks)
        elif is_slow:
            cost.learn(limit_s, cost.block_s)
        if result.failure not in (None, CANCELLED):
            self._count("prefix_fetches_failed", 1)
            if not is_slow:
                cost.closed_until = time.monotonic() + RETRY_S
            log.warning("a prefix was not fetched from worker %s: %s", peer.worker_id, result.failure)

    def cancel(self, key: str) -> None:
        """The fetch of that key, if there is one, returns soon."""
        if key in self._fetches:
            self._intake.cancel(self._fetches[key])

    def _cost(self, peer: PeerRef) -> Cost:
        cost = self._costs.get(peer)
        if cost is None or (cost.measured_at is not None and time.monotonic() - cost.measured_at > BELIEVED_S):
            cost = self._costs[peer] = Cost(ASSUMED_WAIT_S, self._block_bytes / ASSUMED_BYTES_PER_S)
            if len(self._costs) > MAX_PEERS:
                self._costs.popitem(last=False)
        return cost

    def _count(self, name: str, amount: float) -> None:
        self._counters[name] = self._counters.get(name, 0.0) + amount
