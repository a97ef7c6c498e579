"""The decode role.

Life of an attempt on the decode side:

1. Assigned with a prefill peer: the engine reserves blocks for the whole prompt, in its turn. Without one: the engine
   prefills in chunks beside its decodes, after it loaded what the tiers hold and fetched what the prefix cache of
   another worker does, where that is sooner. The story ends here.
2. Reserved: the blocks that neither the prefix cache nor the tiers hold are taken in from the peer, chunk by chunk,
   each checked. A peer on this host may instead compute straight into them (`kvtransfer.direct`).
3. Complete: the first token came with the closing of the offer; the request joins the batch.
4. Anything short of complete: what was verified is kept, the rest is prefilled here. The client sees a pause.
5. Aborted while blocks are coming in: they are quarantined until no transfer can write them.
"""

import logging
import time
from functools import partial

from google.protobuf.message import DecodeError

from baton.token_ids import count
from baton.v1 import worker_link_pb2 as wire
from engine.requests import Ended, Handover, Reserved, TokenLogprobs
from kvtransfer.intake import CANCELLED, Intake
from kvtransfer.wire import PeerRef
from worker.arrivals import Arrived
from worker.roles import Attempt, RoleHandler, engine_request
from worker.shell import WorkerShell

log = logging.getLogger(__name__)
DEFAULT_DEADLINE_S = 600.0


class DecodeRole(RoleHandler):
    role = wire.ROLE_DECODE

    def __init__(self, shell: WorkerShell, intake: Intake, page_size: int, vocab_size: int) -> None:
        self._shell = shell
        self._intake = intake
        self._page_size = page_size
        self._vocab_size = vocab_size

    def assign(self, attempt: Attempt) -> None:
        remote = attempt.assignment.HasField("prefill")
        handover = Handover.TAKE if remote else Handover.NONE
        request = engine_request(attempt.assignment, attempt.key, self._shell.model_fingerprint, handover)
        self._shell.submit(attempt, request)
        if remote:
            self._intake.expect(attempt.key, _peer(attempt))

    def on_reserved(self, attempt: Attempt, reserved: Reserved) -> None:
        take = partial(self._take, attempt, reserved) if reserved.from_peer else None
        fetch = take or self._shell.fetch_prefix(attempt, reserved)
        self._shell.arrivals.start(attempt.key, reserved, count(attempt.assignment.token_ids), fetch)

    async def _take(self, attempt: Attempt, reserved: Reserved, first_block: int) -> Arrived:
        num_tokens = count(attempt.assignment.token_ids)
        num_blocks = -(-num_tokens // self._page_size)
        deadline_s = attempt.assignment.deadline_s or DEFAULT_DEADLINE_S
        peer, times = _peer(attempt), attempt.times
        times.take_s = attempt.age_s
        result = await self._intake.take(
            attempt.key, peer, reserved.block_ids[:num_blocks], first_block, time.monotonic() + deadline_s
        )
        times.taken_s, times.wire_s, times.handover_bytes = attempt.age_s, result.wire_s, result.num_bytes
        times.lane = self._intake.lanes_in_use().get(peer.worker_id, "")
        verified = min(max(result.num_blocks, first_block) * self._page_size, num_tokens)
        if result.failure == CANCELLED:
            return Arrived(verified, same_bits=result.same_bits, fence=result.fence)
        if result.failure is not None or result.num_blocks < num_blocks:
            self._shell.counters["local_prefill_fallbacks"] += 1
            log.warning("hand-over of %s: %s; %d of %d tokens are here, the rest is prefilled locally",
                        attempt.key, result.failure, verified, num_tokens,
                        extra={"fields": attempt.facts | {"peer": peer.worker_id}})  # fmt: skip
            self._shell.report_failed_prefill(attempt, verified)
        first_token = result.first_token_id
        if first_token is not None and first_token >= self._vocab_size:
            first_token = None  # no token of this model: sample it here
        return Arrived(verified, first_token, result.same_bits, result.fence, _logprobs(result.first_logprob))

    def abort(self, attempt: Attempt) -> None:
        untouched = self._intake.cancel(attempt.key)
        self._shell.arrivals.abort(attempt.key, untouched)

    def on_ended(self, attempt: Attempt, ended: Ended) -> None:
        """Nothing to give back: the engine owns every block."""


def _logprobs(data: bytes) -> TokenLogprobs | None:
    """None where the request asked for none, or they cannot be read: the coordinator may still have the peer's own."""
    if not data:
        return None
    try:
        told = wire.StepLogprob.FromString(data)
    except DecodeError:
        return None
    return TokenLogprobs(told.logprob, tuple(told.alternative_ids), tuple(told.alternative_logprobs))


def _peer(attempt: Attempt) -> PeerRef:
    peer = attempt.assignment.prefill
    return PeerRef(peer.worker_id, peer.incarnation, peer.handover_address)
