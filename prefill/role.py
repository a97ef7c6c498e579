"""The prefill role.

Life of a hand-over on the offering side:

1. Assigned: the hand-over is opened for the one decode worker that the assignment names; the engine queues the prompt.
2. Each step that finishes blocks offers them: the decode worker pulls chunk i while chunk i+1 is computed.
3. The last chunk also samples the first token. It leaves straight to the coordinator, and closes the offer.
4. The engine request is over; its blocks belong to the lease. They go back to the pool when the decode worker
   releases them, or after its death or the end of the lease, when nobody can read them any more.
"""

import logging
from dataclasses import dataclass

from baton.v1 import worker_link_pb2 as wire
from engine.engine import Engine
from engine.requests import Computed, Ended, EndReason, Handover, Reserved, TokenOutput
from kvtransfer.offers import OfferServer
from kvtransfer.wire import PeerRef
from worker.roles import Attempt, RoleHandler, engine_request
from worker.shell import WorkerShell

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Lease:
    """A hand-over until both the engine and its reader are done with it."""

    num_blocks: int = 0
    num_tokens: int = 0
    token: TokenOutput | None = None
    computing: bool = True
    resolved: bool = False
    quarantined: bool = False


class PrefillRole(RoleHandler):
    role = wire.ROLE_PREFILL

    def __init__(self, shell: WorkerShell) -> None:
        self._shell = shell
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
        self._leases[attempt.key] = Lease()
        request = engine_request(attempt.assignment, attempt.key, self._shell.model_fingerprint, Handover.GIVE)
        self._shell.submit(attempt, request)

    def on_reserved(self, attempt: Attempt, reserved: Reserved) -> None:
        self._shell.arrivals.start(attempt.key, reserved, len(attempt.assignment.token_ids))

    def on_computed(self, attempt: Attempt, computed: Computed) -> None:
        lease = self._leases[attempt.key]
        self.offers.offer(attempt.key, computed.first_block, computed.block_ids, computed.generations)
        lease.num_blocks = computed.first_block + len(computed.block_ids)
        lease.num_tokens = computed.num_tokens

    def on_token(self, attempt: Attempt, token: TokenOutput) -> None:
        self._leases[attempt.key].token = token

    def on_ended(self, attempt: Attempt, ended: Ended) -> None:
        lease = self._leases[attempt.key]
        lease.computing = False
        if ended.reason is EndReason.HANDED_OVER and lease.token is not None:
            token = lease.token
            self.offers.close(attempt.key, lease.num_blocks, lease.num_tokens, token.token_id, token.index)
        else:
            self.offers.fail(attempt.key, "the stream ended with its first token")
        self._settle(attempt.key, lease)

    def abort(self, attempt: Attempt) -> None:
        key = attempt.key
        self._shell.arrivals.abort(key)
        lease = self._leases.get(key)
        if lease is not None:
            lease.computing = False
            self.offers.fail(key, "aborted")
            self._settle(key, lease)

    def on_lease_released(self, key: str, verified: bool) -> None:
        """The reader is done, whether or not it got everything."""
        if lease := self._leases.get(key):
            lease.resolved = True
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


def _give_back(engine: Engine, key: str) -> None:
    """The blocks are the lease's, or in quarantine."""
    engine.release_lease(key)
    engine.resolve(key)
