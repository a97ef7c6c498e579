"""The process shell that carries roles.

Life of an attempt in a worker:

1. A coordinator's Assignment arrives on its link. The shell admits it (not draining, no duplicate, role carried) and
   gives it to the role that it names; a deadline timer starts. All that is said about the attempt goes to that link.
2. The role submits an engine request. The engine's outputs come back once a step: tokens of all attempts leave as one
   StepTokens message a link, everything else goes to the attempt's role.
3. `end` reports the first ending and forgets the attempt; whatever still comes for it is dropped.
4. An abort, a deadline and a drain all go through `_abort`.
5. A broken link ends nothing at once: what another coordinator can go on with is kept for a while (`worker.orphans`).
"""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from functools import partial

from baton.block_names import root_name
from baton.errors import BatonError, PeerError
from baton.metrics import WORKER_COUNTERS
from baton.token_ids import unpack
from baton.v1 import worker_link_pb2 as wire
from engine.engine import Engine
from engine.requests import Elsewhere, Ended, EndReason, EngineRequest, Reserved, StepOutput, TokenOutput
from kvtransfer.prefix_fetch import Holder, PrefixFetcher
from kvtransfer.tiers.store import BlockStore, Unsaved
from kvtransfer.wire import PeerRef, spawn
from worker.arrivals import Arrivals, Arrived, Fetch
from worker.kv_events import KvReporter
from worker.link import LinkHandler
from worker.orphans import Orphans
from worker.pins import Pins
from worker.prefix_server import PrefixServer
from worker.reservation import Reservation
from worker.roles import Attempt, KvLink, Link, RoleHandler, step_logprob
from worker.step_loop import Command, StepLoop

log = logging.getLogger(__name__)
LINGER_S = 0.5
"""From the last attempt of a drained worker to its end."""
LOOK_UP_S = 0.05
"""What a request waits for a shared store to say which of its blocks it has."""

UNMEASURED_FETCH_S = 2.0
"""For the beginning of a prompt to come from another worker, until it is known how long computing it takes."""

_END_REASONS = {
    EndReason.STOP: wire.END_REASON_STOP,
    EndReason.LENGTH: wire.END_REASON_LENGTH,
    EndReason.ABORTED: wire.END_REASON_ABORTED,
    EndReason.HANDED_OVER: wire.END_REASON_HANDED_OVER,
}


def attempt_key(id: wire.AttemptId) -> str:
    return f"{id.request_id}/{id.attempt}"


def _root(model_fingerprint: str, cache_salt: str) -> bytes:
    return root_name(model_fingerprint, cache_salt=cache_salt)


def _holders(attempt: Attempt) -> list[Holder]:
    return [
        Holder(PeerRef(each.worker.worker_id, each.worker.incarnation, each.worker.handover_address), each.num_tokens)
        for each in attempt.assignment.holders
    ]


class WorkerShell(LinkHandler):
    """Carries roles over one engine. Everything here runs on the asyncio thread."""

    def __init__(
        self,
        engine: Engine,
        model_fingerprint: str,
        send_all: Callable[[wire.WorkerMessage], None],
        on_crash: Callable[[BaseException], None],
        page_size: int,
        store: BlockStore | None = None,
    ) -> None:
        """`send_all` tells every coordinator."""
        self.model_fingerprint = model_fingerprint
        self.counters: dict[str, float] = dict.fromkeys(WORKER_COUNTERS, 0.0)
        self.steps = StepLoop(engine, self._on_output, on_crash)
        self.arrivals = Arrivals(self.steps, store, page_size, on_crash)
        self.draining = False
        self.lanes_in_use: Callable[[], dict[str, str]] = dict
        self.handover_bytes_per_s: Callable[[], float] = float
        self.prefixes: PrefixFetcher | None = None
        """Gets beginnings of prompts from other workers."""
        self.lender: PrefixServer | None = None
        """Gives them to other workers."""
        self._send_all = send_all
        self._names = engine.names
        self._page_size = page_size
        self._look_ups: set[asyncio.Task[None]] = set()
        self._store = store
        self._pins: dict[Link, Pins] = {}
        self._new_pins: Callable[[], Pins] | None = None
        if store is not None:
            root = partial(_root, model_fingerprint)
            self._new_pins = partial(Pins, engine, self.steps, store, root)
        self._roles: dict[int, RoleHandler] = {}
        self._attempts: dict[str, Attempt] = {}
        self.orphans = Orphans(lambda attempt: self._abort(attempt.key, wire.END_REASON_ABORTED), self.counters)
        self._reservation = Reservation()
        self._kv = KvReporter(self.steps, store, self.counters)
        self._changed = asyncio.Event()

    def carry(self, role: RoleHandler) -> None:
        self._roles[role.role] = role

    # What coordinators say

    def on_assignment(self, link: Link, assignment: wire.Assignment) -> None:
        key = attempt_key(assignment.id)
        role = self._roles.get(assignment.role)
        if self.draining:
            self._refuse(link, assignment.id, "this worker is draining")
        elif role is None:
            self._refuse(link, assignment.id, "this worker does not carry that role")
        elif not self._reservation.admits(link):
            self._refuse(link, assignment.id, "another coordinator has this worker to itself")
        elif key in self._attempts:
            self._refuse(link, assignment.id, "this attempt is here already")
        else:
            try:
                tokens = unpack(assignment.token_ids)
            except PeerError as error:
                self._refuse(link, assignment.id, str(error))
                return
            attempt = Attempt(link, assignment.id, key, assignment.handle, assignment, role)
            attempt.coordinator = link.coordinator
            attempt.tokens = tokens[assignment.num_prompt_tokens :]
            attempt.num_tokens = len(attempt.tokens)
            self._attempts[key] = attempt
            if assignment.deadline_s > 0:
                loop = asyncio.get_running_loop()
                attempt.deadline = loop.call_later(assignment.deadline_s, self._expire, key)
            role.assign(attempt)

    def on_abort(self, link: Link, id: wire.AttemptId) -> None:
        attempt = self._attempts.get(attempt_key(id))
        if attempt is None:
            return
        # One that lost it, or from which it was claimed, has no say in it any more.
        if attempt.link is link or (attempt.orphaned and attempt.coordinator != link.coordinator):
            self._abort(attempt.key, wire.END_REASON_ABORTED)

    def on_pin(self, link: Link, pin: wire.Pin) -> None:
        if self._new_pins is None:
            return  # the coordinator knows that there is nothing to pin in
        if link not in self._pins:
            self._pins[link] = self._new_pins()
        self._pins[link].pin(pin)

    def on_unpin(self, link: Link, id: str) -> None:
        if link in self._pins:
            self._pins[link].unpin(id)

    def on_reserve(self, link: Link, token: int) -> None:
        self._reservation.reserve(link, token)
        self._beat()
        self._clear()

    def on_unreserve(self, link: Link, token: int) -> None:
        self._reservation.unreserve(link, token)
        self._beat()

    def on_drain(self) -> None:
        if not self.draining:
            log.info("draining: %d attempts run on", len(self._attempts))
            self.draining = True
            self._changed.set()
            self._beat()  # whatever comes now is refused

    def on_adopt(self, link: Link, adopt: wire.Adopt) -> None:
        key = attempt_key(adopt.id)
        if (attempt := self._attempts.get(key)) is not None and attempt.orphaned:
            attempt.link = link
        self.orphans.adopt(adopt.id, key, adopt.handle, link.coordinator)

    def on_claim(self, link: Link, claim: wire.Claim) -> None:
        self.orphans.claim(claim.request_id, link, list(self._attempts.values()), claim.tenant)

    def on_cached_tokens(self, cached: wire.CachedTokens) -> None:
        if attempt := self._attempts.get(attempt_key(cached.id)):
            attempt.cached_tokens = max(attempt.cached_tokens or 0, cached.num_tokens)

    def on_linked(self, link: Link) -> None:
        self.orphans.linked(link.coordinator, link.send)

    def on_kv_wanted(self, link: KvLink) -> None:
        self._kv.wanted(link)

    def on_lost(self, link: Link) -> None:
        lost = [each for each in self._attempts.values() if each.link is link and not each.orphaned]
        if lost:
            log.warning("link lost: %d of %d attempts wait for another coordinator", len(lost), len(self._attempts))
        self.orphans.lost(link.coordinator, lost)
        if link in self._pins:
            self._pins.pop(link).unpin_all()
        self._reservation.lost(link)
        self._kv.lost(link)

    def heartbeat(self) -> wire.WorkerHeartbeat:
        load, counters, rates = self.steps.load, self.steps.counters, self.steps.rates
        if self._store is not None:
            counters.update(self._store.counters)
        for name, value in self.counters.items():
            counters[name] = counters.get(name, 0.0) + value
        blocks, reservation = load.blocks, self._reservation
        return wire.WorkerHeartbeat(
            blocks=wire.BlockCounts(
                total=blocks.total, free=blocks.free, cached=blocks.cached, held=blocks.held,
                leased=blocks.leased, quarantined=blocks.quarantined,
            ),
            running_requests=load.running,
            waiting_requests=load.waiting,
            waiting_prefill_tokens=load.waiting_prefill_tokens,
            draining=self.draining,
            counters=counters,
            lanes_in_use=self.lanes_in_use(),
            reservation=reservation.token,
            reservation_cleared=reservation.cleared,
            reservation_wanted=reservation.wanted,
            prefill_tokens_per_s=rates.prompt_tokens_per_s,
            step_s=rates.token_s,
            handover_bytes_per_s=self.handover_bytes_per_s(),
        )  # fmt: skip

    def _beat(self) -> None:
        """All coordinators are to know now."""
        self._send_all(wire.WorkerMessage(heartbeat=self.heartbeat()))

    def _clear(self) -> None:
        """If nothing of other coordinators is here: the engine has nothing of them either after what it is at now."""
        token, loop = self._reservation.token, asyncio.get_running_loop()

        def cleared() -> None:
            self._reservation.clear(token)
            self._beat()

        if self._reservation.may_clear(self._attempts.values()):
            self.steps.submit(lambda engine: loop.call_soon_threadsafe(cleared))

    # What roles use

    def submit(self, attempt: Attempt, request: EngineRequest) -> None:
        """Hand an attempt to the engine; a refusal comes back to the coordinator as an Admission."""

        def add(engine: Engine) -> None:
            try:
                engine.add(request)
            except BatonError as error:
                loop.call_soon_threadsafe(self._on_refused, attempt, str(error))

        loop = asyncio.get_running_loop()
        if self.prefixes is not None and (prospect := self.prefixes.prospect(_holders(attempt))) is not None:
            elsewhere = Elsewhere(prospect.holder.num_tokens, prospect.wait_s, prospect.block_s)
            request = dataclasses.replace(request, elsewhere=elsewhere)
            attempt.holder = prospect.holder.peer
        if self._store is not None and self._store.must_ask:
            self._look_ups.add(task := spawn(self._look_up(attempt, request, add)))
            task.add_done_callback(self._look_ups.discard)
        else:
            self.steps.submit(add)

    def fetch_prefix(self, attempt: Attempt, reserved: Reserved) -> Fetch | None:
        """How the beginning of a prompt comes from another worker, where the engine counts on one."""
        return partial(self._fetch_prefix, attempt, reserved) if reserved.elsewhere else None

    def end(self, attempt: Attempt, reason: "wire.EndReason.ValueType", detail: str = "") -> None:
        if self._forget(attempt):
            attempt.times.total_s = attempt.age_s
            ending = wire.Ending(
                id=attempt.id, reason=reason, num_tokens=attempt.num_tokens, detail=detail, times=attempt.times
            )
            if not attempt.orphaned:
                attempt.link.send(wire.WorkerMessage(ending=ending))
            self.orphans.ended(attempt, ending)

    async def finished(self) -> None:
        """Wait until a coordinator had this worker drain, no attempt is left, and those to whom the last ones were
        moved have had the time to ask for their blocks."""
        while self._attempts or not self.draining:
            self._changed.clear()
            await self._changed.wait()
        await asyncio.sleep(LINGER_S)

    async def drained(self, timeout_s: float) -> bool:
        """Wait until no attempt and no hand-over needs this process; False when the time ran out first."""
        self.on_drain()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while busy := self._busy():
            if loop.time() >= deadline:
                return False
            if self.lender is not None and busy == self.lender.unfinished():
                self.lender.lends = False  # the last readers may finish
            self._changed.clear()
            # Releases of hand-overs do not pass through the shell, so it looks again after a while.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(0.1, max(deadline - loop.time(), 0.0)))
        return True

    # Inside

    def _busy(self) -> int:
        """Attempts, transfers and hand-overs that need this process."""
        lent = self.lender.unfinished() if self.lender is not None else 0
        handovers = sum(role.unfinished() for role in self._roles.values())
        return len(self._attempts) + len(self.arrivals) + handovers + lent

    async def _fetch_prefix(self, attempt: Attempt, reserved: Reserved, first_block: int) -> Arrived:
        assert self.prefixes is not None
        assert attempt.holder is not None, "the engine was told what to expect of it"
        names = (*reserved.stored, *reserved.elsewhere)[first_block - reserved.num_cached_blocks :]
        places = reserved.block_ids[first_block : first_block + len(names)]
        limit_s = reserved.compute_s or UNMEASURED_FETCH_S
        fetched = await self.prefixes.fetch(attempt.key, attempt.holder, names, places, limit_s)
        return Arrived((first_block + fetched.num_blocks) * self._page_size, same_bits=fetched.same_bits)

    async def _look_up(self, attempt: Attempt, request: EngineRequest, add: Command) -> None:
        """Give the shared store a moment to say what it has: the engine decides when it takes the request up."""
        assert self._store is not None
        try:
            names = await asyncio.to_thread(self._names, request)
            await self._store.look_up(names, time.monotonic() + LOOK_UP_S)
        finally:
            if self._attempts.get(attempt.key) is attempt:  # not aborted meanwhile
                self.steps.submit(add)

    def report_failed_prefill(self, attempt: Attempt, num_tokens: int) -> None:
        """The attempt's prefill worker did not hand over all; so many tokens are here."""
        progress = wire.Progress(id=attempt.id, computed_tokens=num_tokens, prefill_failed=True)
        if not attempt.orphaned:
            attempt.link.send(wire.WorkerMessage(progress=progress))

    def _refuse(self, link: Link, id: wire.AttemptId, reason: str) -> None:
        self.counters["requests_refused"] += 1
        admission = wire.Admission(id=id, accepted=False, reason=reason, draining=self.draining)
        admission.reserved = not self._reservation.admits(link)
        link.send(wire.WorkerMessage(admission=admission))

    def _on_refused(self, attempt: Attempt, reason: str) -> None:
        if self._forget(attempt):
            self.orphans.ended(attempt, wire.Ending(reason=wire.END_REASON_ERROR))
            self._refuse(attempt.link, attempt.id, reason)
            attempt.role.abort(attempt)

    def _forget(self, attempt: Attempt) -> bool:
        if self._attempts.get(attempt.key) is not attempt:
            return False
        del self._attempts[attempt.key]
        if attempt.deadline is not None:
            attempt.deadline.cancel()
        self._changed.set()
        asyncio.get_running_loop().call_soon(self._clear)  # after the engine has been told
        return True

    def _expire(self, key: str) -> None:
        self._abort(key, wire.END_REASON_DEADLINE)

    def _abort(self, key: str, reason: "wire.EndReason.ValueType") -> None:
        attempt = self._attempts.get(key)
        if attempt is None:
            return
        self.counters["requests_expired" if reason == wire.END_REASON_DEADLINE else "requests_aborted"] += 1
        self.end(attempt, reason)
        attempt.role.abort(attempt)
        if self.prefixes is not None:
            self.prefixes.cancel(key)

    def _on_output(self, output: StepOutput) -> None:
        for started in output.started:
            if attempt := self._attempts.get(started.request_id):
                if attempt.cached_tokens is None:
                    attempt.cached_tokens = started.num_cached_tokens
                    attempt.times.started_s = attempt.age_s
                if attempt.orphaned:
                    continue
                admission = wire.Admission(id=attempt.id, accepted=True, cached_tokens=started.num_cached_tokens)
                attempt.link.send(wire.WorkerMessage(admission=admission))
        if output.tokens:  # before what nobody waits for: each message is a write of its own
            self._send_tokens(output.tokens)
        for reserved in output.reserved:
            if attempt := self._attempts.get(reserved.request_id):
                attempt.role.on_reserved(attempt, reserved)
        if output.cached is not None:
            self._kv.on_cached(output.cached)
        if output.named and self._store is not None:
            self._store.save([Unsaved(each.name, each.block_id, each.generation, each.tenant) for each in output.named])
        for computed in output.computed:
            if attempt := self._attempts.get(computed.request_id):
                attempt.role.on_computed(attempt, computed)
                if not computed.is_whole or attempt.orphaned:
                    continue
                progress = wire.Progress(id=attempt.id, computed_tokens=computed.num_tokens)
                attempt.link.send(wire.WorkerMessage(progress=progress))
        for ended in output.ended:
            if attempt := self._attempts.get(ended.request_id):
                self._on_ended(attempt, ended)

    def _on_ended(self, attempt: Attempt, ended: Ended) -> None:
        attempt.num_tokens = ended.num_output_tokens
        attempt.role.on_ended(attempt, ended)
        self.end(attempt, _END_REASONS[ended.reason])

    def _send_tokens(self, tokens: list[TokenOutput]) -> None:
        messages: dict[Link, wire.StepTokens] = {}
        for token in tokens:
            attempt = self._attempts.get(token.request_id)
            if attempt is None:
                continue
            attempt.num_tokens = token.index + 1
            attempt.tokens.append(token.token_id)
            if token.logprobs is not None:
                attempt.logprobs.append(token.logprobs)
            if attempt.orphaned:
                attempt.role.on_token(attempt, token)
                continue
            message = messages.get(attempt.link)
            if message is None:
                message = messages[attempt.link] = wire.StepTokens()
            if token.logprobs is not None:
                message.logprobs.append(step_logprob(token.logprobs, len(message.handles)))
            message.handles.append(attempt.handle)
            message.indices.append(token.index)
            message.token_ids.append(token.token_id)
            attempt.role.on_token(attempt, token)
        for link, message in messages.items():
            link.send(wire.WorkerMessage(tokens=message))
