"""The decode role.

Life of an attempt on the decode side:

1. Assigned with a prefill peer: the engine reserves blocks for the whole prompt, in its turn. Without one: the engine
   prefills in chunks beside its decodes, and the story ends here.
2. Reserved: the blocks that the prefix cache does not hold are taken in from the peer, chunk by chunk, each checked.
3. Complete: the first token came with the closing of the offer; the request joins the batch.
4. Anything short of complete: what was verified is kept, the rest is prefilled here. The client sees a pause.
5. Aborted while blocks are coming in: they are quarantined until no transfer can write them.
"""

import asyncio
import logging
import time

from baton.v1 import worker_link_pb2 as wire
from engine.requests import Ended, Handover, Reserved
from kvtransfer.intake import Intake, IntakeResult
from kvtransfer.wire import PeerRef
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
        self._takes: dict[str, asyncio.Task[None]] = {}
        self._aborted: set[str] = set()

    def assign(self, attempt: Attempt) -> None:
        remote = attempt.assignment.HasField("prefill")
        handover = Handover.TAKE if remote else Handover.NONE
        request = engine_request(attempt.assignment, attempt.key, self._shell.model_fingerprint, handover)
        self._shell.submit(attempt, request)
        if remote:
            self._intake.expect(attempt.key, _peer(attempt))

    def on_reserved(self, attempt: Attempt, reserved: Reserved) -> None:
        task = asyncio.create_task(self._take(attempt, reserved))
        task.add_done_callback(self._reap)
        self._takes[attempt.key] = task

    def _reap(self, task: "asyncio.Task[None]") -> None:
        # An intake reports every trouble of a peer in its result; anything raised is a fault of this process, and
        # blocks whose transfer is in an unknown state must not outlive it.
        if not task.cancelled() and (error := task.exception()) is not None:
            self._shell.crash(error)

    async def _take(self, attempt: Attempt, reserved: Reserved) -> None:
        key = attempt.key
        num_tokens = len(attempt.assignment.token_ids)
        num_blocks = -(-num_tokens // self._page_size)
        deadline_s = attempt.assignment.deadline_s or DEFAULT_DEADLINE_S
        try:
            result = await self._intake.take(
                key,
                _peer(attempt),
                reserved.block_ids[:num_blocks],
                reserved.num_cached_blocks,
                time.monotonic() + deadline_s,
            )
        finally:
            del self._takes[key]
        if key in self._aborted:
            self._aborted.discard(key)
            self._shell.steps.submit(lambda engine: engine.resolve(key))
            return
        self._received(attempt, result, num_blocks, reserved.num_cached_blocks)

    def _received(self, attempt: Attempt, result: IntakeResult, num_blocks: int, num_cached_blocks: int) -> None:
        key, num_tokens = attempt.key, len(attempt.assignment.token_ids)
        verified = min(max(result.num_blocks, num_cached_blocks) * self._page_size, num_tokens)
        if result.failure is not None or result.num_blocks < num_blocks:
            self._shell.counters["local_prefill_fallbacks"] += 1
            log.warning("hand-over of %s: %s; %d of %d tokens are here, the rest is prefilled locally",
                        key, result.failure, verified, num_tokens)  # fmt: skip
        first_token = result.first_token_id
        if first_token is not None and first_token >= self._vocab_size:
            first_token = None  # no token of this model: sample it here
        self._shell.steps.submit(lambda engine: engine.receive(key, verified, first_token, result.same_bits))

    def abort(self, attempt: Attempt) -> None:
        key = attempt.key
        self._shell.steps.submit(lambda engine: engine.abort(key))
        self._intake.cancel(key)
        if key in self._takes:
            self._aborted.add(key)
        else:
            # A reservation may be on its way from the engine; no transfer has begun, so none can touch its blocks.
            self._shell.steps.submit(lambda engine: engine.resolve(key))

    def on_ended(self, attempt: Attempt, ended: Ended) -> None:
        """Nothing to give back: the engine owns every block."""

    def unfinished(self) -> int:
        return len(self._takes)


def _peer(attempt: Attempt) -> PeerRef:
    peer = attempt.assignment.prefill
    return PeerRef(peer.worker_id, peer.incarnation, peer.handover_address)
