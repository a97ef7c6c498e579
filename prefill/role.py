"""The prefill role.

Life of a hand-over on the offering side:

1. Assigned: the hand-over is opened for the one decode worker that the assignment names; the engine queues the prompt.
   Where that worker lends its pool, the prompt waits a moment for the blocks that it reserves there, and is computed
   into them: each step says how far they are written, and the last word is that nothing writes there any more.
   What comes too late or does not fit is counted, and goes on as follows. Otherwise what the tiers or the prefix cache
   of another worker have of the prompt is brought here first, where that is sooner than computing it.
2. Each step that finishes blocks offers them, group of layers by group of layers: the decode worker pulls the first
   while the next are computed, and the last while the last layer goes on.
3. The last chunk also samples the first token. It leaves straight to the coordinator, and closes the offer.
4. The engine request is over; its blocks belong to the lease. They go back to the pool when the decode worker
   releases them, or after its death or the end of the lease, when nobody can read them any more.
"""

import asyncio
import logging
from dataclasses import dataclass
from functools import partial

from baton.token_ids import count
from baton.v1 import worker_link_pb2 as wire
from engine.engine import Engine
from engine.requests import Computed, Ended, EndReason, Handover, Placement, Reserved, TokenOutput
from kvtransfer.direct import Placed
from kvtransfer.offers import OfferServer
from kvtransfer.wire import PeerIdentity, PeerRef
from worker.roles import Attempt, RoleHandler, engine_request, step_logprob
from worker.shell import WorkerShell

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Lease:
    """A hand-over until both the engine and its reader are done with it."""

    attempt: Attempt
    timer: asyncio.TimerHandle | None = None
    """Of a prompt that waits, or waited, for blocks of its reader."""
    submitted: bool = False
    """To the engine; or it never will be."""
    placed: bool = False
    """The engine computes into blocks of the reader."""
    num_blocks: int = 0
    num_tokens: int = 0
    token: TokenOutput | None = None
    computing: bool = True
    resolved: bool = False
    quarantined: bool = False


class PrefillRole(RoleHandler):
    role = wire.ROLE_PREFILL

    def __init__(self, shell: WorkerShell, page_size: int, direct_wait_s: float = 0.0) -> None:
        """`direct_wait_s`: how long a prompt waits for blocks of a decode worker that lends them."""
        self._shell = shell
        self._page_size = page_size
        self._direct_wait_s = direct_wait_s
        self._offers: OfferServer | None = None
        self._leases: dict[str, Lease] = {}

    def serve_offers(self, offers: OfferServer) -> None:
        """The server that this role offers through; its callbacks are the role's `on_lease_*`."""
        self._offers = offers

    @property
    def offers(self) -> OfferServer:
        assert self._offers is not None, "serve_offers comes before the first assignment"
        return self._offers

    def assign(self, attempt: Attempt) -> None:
        peer = attempt.assignment.decode
        try:
            self.offers.open(attempt.key, PeerRef(peer.worker_id, peer.incarnation, peer.handover_address))
        except ValueError as error:
            self._shell.end(attempt, wire.END_REASON_ERROR, str(error))
            return
        lease = self._leases[attempt.key] = Lease(attempt)
        if self.offers.expects_placement(PeerIdentity(peer.worker_id, peer.incarnation)):
            loop = asyncio.get_running_loop()
            lease.timer = loop.call_later(self._direct_wait_s, self._submit, lease, None)
        else:
            self._submit(lease, None)

    def on_want(self, key: str, placed: Placed | None) -> None:
        """The decode worker has reserved its blocks; `placed`: those that may be written into."""
        lease = self._leases.get(key)
        if lease is not None and not lease.submitted:
            self._submit(lease, placed)
        elif placed is not None:  # too late
            self._shell.counters["handover_direct_fallbacks"] += lease is not None and lease.timer is None
            self.offers.written(key, 0, stopped=True)

    def _submit(self, lease: Lease, placed: Placed | None) -> None:
        lease.submitted = True
        key, num_tokens = lease.attempt.key, count(lease.attempt.assignment.token_ids)
        placement = _placement(placed, num_tokens, self._page_size) if placed is not None else None
        if lease.timer is not None:
            lease.timer.cancel()
            self._shell.counters["handover_direct_fallbacks"] += placement is None
        if placement is None:
            self.offers.written(key, 0, stopped=True)
        lease.placed = placement is not None
        fingerprint = self._shell.model_fingerprint
        request = engine_request(lease.attempt.assignment, key, fingerprint, Handover.GIVE, placement)
        self._shell.submit(lease.attempt, request)

    def on_reserved(self, attempt: Attempt, reserved: Reserved) -> None:
        fetch = self._shell.fetch_prefix(attempt, reserved)
        self._shell.arrivals.start(attempt.key, reserved, count(attempt.assignment.token_ids), fetch)

    def on_computed(self, attempt: Attempt, computed: Computed) -> None:
        lease = self._leases[attempt.key]
        if not lease.placed:
            if computed.block_ids:
                blocks = computed.first_block, computed.block_ids, computed.generations
                self.offers.offer(attempt.key, *blocks, computed.num_layers)
            if not computed.is_whole:
                return
        elif not computed.last:
            self.offers.written(attempt.key, computed.first_block + len(computed.block_ids), stopped=False)
        lease.num_blocks = computed.first_block + len(computed.block_ids)
        lease.num_tokens = computed.num_tokens

    def on_token(self, attempt: Attempt, token: TokenOutput) -> None:
        self._leases[attempt.key].token = token

    def on_ended(self, attempt: Attempt, ended: Ended) -> None:
        lease = self._leases[attempt.key]
        lease.computing = False
        if ended.reason is EndReason.HANDED_OVER and lease.token is not None:
            token = lease.token
            close = self.offers.written_all if lease.placed else self.offers.close
            logprob = step_logprob(token.logprobs).SerializeToString() if token.logprobs is not None else b""
            close(attempt.key, lease.num_blocks, lease.num_tokens, token.token_id, token.index, logprob)
        else:
            self.offers.written(attempt.key, lease.num_blocks, stopped=True)
            self.offers.fail(attempt.key, "the stream ended with its first token")
        self._settle(attempt.key, lease)

    def abort(self, attempt: Attempt) -> None:
        key = attempt.key
        self._shell.arrivals.abort(key)
        lease = self._leases.get(key)
        if lease is not None:
            lease.computing, lease.submitted = False, True
            if lease.timer is not None:
                lease.timer.cancel()
            if lease.placed:
                self._stop_writing(key, lease.num_blocks)
            self.offers.fail(key, "aborted")
            self._settle(key, lease)

    def _stop_writing(self, key: str, num_blocks: int) -> None:
        """The engine has been told to abort: when it gets to this, no step of it writes for the request any more."""
        loop = asyncio.get_running_loop()
        stopped = partial(self.offers.written, key, num_blocks, stopped=True)
        self._shell.steps.submit(lambda engine: loop.call_soon_threadsafe(stopped))

    def on_lease_released(self, key: str, verified: bool) -> None:
        """The reader is done, whether or not it got everything."""
        if lease := self._leases.get(key):
            lease.resolved = True
            if lease.placed and lease.computing:
                # Nobody waits for it, and the blocks that it writes into are kept from everyone until it has ended.
                self._shell.steps.submit(lambda engine: engine.abort(key))
            self._settle(key, lease)

    def on_lease_quarantined(self, key: str) -> None:
        """The lease ended while the reader may still be at it."""
        if lease := self._leases.get(key):
            lease.quarantined = True
            self._settle(key, lease)

    def on_lease_resolved(self, key: str) -> None:
        """Nobody can read the blocks of an ended lease any more."""
        self.on_lease_released(key, False)

    def unfinished(self) -> int:
        return len(self._leases)

    def _settle(self, key: str, lease: Lease) -> None:
        # While the engine computes, the request itself owns the blocks, and there is no lease to give back.
        if lease.computing or self._leases.get(key) is not lease:
            return
        if lease.resolved:
            del self._leases[key]
            self._shell.steps.submit(lambda engine: _give_back(engine, key))
        elif lease.quarantined:
            self._shell.steps.submit(lambda engine: engine.quarantine_lease(key))


def _placement(placed: Placed, num_tokens: int, page_size: int) -> Placement | None:
    """None where a prompt does not fit. At least its last token is computed, and needs a block to be written into."""
    fits = -(-num_tokens // page_size) == len(placed.block_ids) and placed.num_cached_blocks * page_size < num_tokens
    return Placement(placed.block_ids, placed.num_cached_blocks) if fits else None


def _give_back(engine: Engine, key: str) -> None:
    """The blocks are the lease's, or in quarantine."""
    engine.release_lease(key)
    engine.resolve(key)
