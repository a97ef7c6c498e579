"""Decides what each step computes. Pure: requests and results go in, a StepPlan and events come out.

1. `add` checks a request and puts it in the waiting line.
2. `plan` gives running requests that need one token their token. What is left of the batch goes to tenants in their
   turns (`engine.fair_queue`): each continues its prompts in chunks, oldest first, then starts the first that waits:
   blocks for all its tokens at once, those in the prefix cache first. One that does not fit lets nobody pass.
3. When a running request needs a block and none is left, the one with the least claim to its blocks gives all of them
   back and returns to the line, to be computed again, or loaded where a store has kept them. Somebody gets a token for
   it, so something always ends. The next in line gets blocks in the same way, from requests of a lesser priority and
   from tenants beyond their share of the blocks.
4. A TAKE request waits, with its blocks, until `receive` says what arrived; then it is one of the running. So does
   any request with blocks in the store, or in another worker, that come sooner than they are computed.
5. `apply` turns the runner's result into tokens and endings. A GIVE request ends with its first token. Once it has
   announced blocks, they all pass to the lease of the same id when it ends, however it ends.
   Guesses that proved right give several tokens at once.
   With a placement it is computed into blocks of another worker's pool, and owns none here.
6. `abort` ends a request wherever it stands. Blocks that somebody outside may still write are quarantined.

A GIVE request is never preempted: others read what it announced, and it can always finish with what it has.

Guesses (speculative decoding) come last in a plan: they get what tokens, prompts and admissions have left of the batch
and, for blocks, nothing that somebody waits for or needs for its next token.

A step may be planned while the one before it is in flight, when `can_look_ahead`: its sequences are then planned as if
that step had come back, with PENDING for the token it samples. One that has ended when it comes back was planned in
vain: what the step says about it is dropped, and the step keeps the blocks that it writes (`engine.in_flight`).
"""

from bisect import insort
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many

from baton.errors import BatonError, InvalidRequestError
from engine.announcing import Announcer
from engine.block_tables import BlockTables, fence_id
from engine.blocks import BlockAccountingError, BlockAllocator, Owner, OwnerKind
from engine.fair_queue import Account, FairQueue, KvHoldings, Turns
from engine.limits import SchedulerLimits, check_servable
from engine.outside import Outside, Sources
from engine.plan import DraftRequest, PlannedSequence, Sampled, StepPlan, StepResult
from engine.prefix_cache import NameChain
from engine.requests import (
    Computed,
    Ended,
    EndReason,
    EngineLoad,
    EngineRequest,
    Handover,
    LeasedBlocks,
    Reserved,
    Started,
    StepOutput,
    TokenLogprobs,
    TokenOutput,
)
from engine.saving import Saver
from engine.sequence import Phase, Sequence
from engine.steps import Step
from engine.store import BlockStore


class EngineFull(BatonError):
    """The waiting line is at its bound. Try another worker, or later."""


class Scheduler:
    """One thread: `plan`, run it, `apply`, in the order of the plans; other calls between them at any time.

    `counters` has the scheduler's share of `baton.metrics.WORKER_COUNTERS`.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        limits: SchedulerLimits,
        shareable_tokens: Callable[[int], int],
        store: BlockStore | None = None,
        save_at_eviction: bool = False,
    ) -> None:
        """`save_at_eviction`: have the store keep blocks when they come near to eviction, not when they get a name."""
        self.tables = BlockTables(allocator, limits.page_size, shareable_tokens)
        self.sources = Sources(self.tables, store)
        self.counters: dict[str, float] = dict.fromkeys(
            (
                "prompt_tokens_computed", "prompt_tokens_cached", "prompt_tokens_received",
                "prompt_tokens_loaded", "prompt_tokens_fetched", "generated_tokens",
                "preemptions", "blocks_copied_on_write", "draft_tokens", "draft_tokens_accepted",
                "kv_saves_too_late",
            ), 0.0,
        )  # fmt: skip
        self._allocator = allocator
        self._limits = limits
        self._saver = Saver(self.tables, limits, store is not None, save_at_eviction)
        self._announcer = Announcer(allocator, limits.page_size)
        self._num_added = 0
        self._sequences: dict[str, Sequence] = {}
        self._queue = FairQueue()
        self._running: list[Sequence] = []
        """In the order of arrival."""
        self._receiving: dict[str, Sequence] = {}
        self._num_planned = 0
        self._in_flight: deque[Step] = deque()
        self._stuck = False
        """Nothing runs and the head of the line does not fit: blocks must come back from outside first."""
        self._must_land = False
        """Who waits could have blocks of requests in flight, which are to be taken back first."""
        self._events = StepOutput()

    # -- Requests ------------------------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """Put a request in the waiting line.

        Raises InvalidRequestError when it could never be served here, EngineFull when the line is at its bound.
        """
        check_servable(request, self._limits, self._allocator.num_blocks)
        if self._is_in_use(request.id):
            raise InvalidRequestError("this request id is in use")
        if len(self._queue) >= self._limits.max_waiting:
            raise EngineFull(f"{len(self._queue)} requests are waiting already")
        names = self.tables.names(request.cache_root, request.num_prompt_tokens)
        sequence = Sequence(request, self._num_added, names, self._limits.max_model_tokens)
        self._num_added += 1
        self._sequences[request.id] = sequence
        self._queue.add(sequence)

    def receive(
        self,
        request_id: str,
        num_tokens: int,
        first_token: int | None,
        num_loaded: int = 0,
        same_bits: bool = True,
        fenced: bool = False,
        first_logprobs: TokenLogprobs | None = None,
    ) -> bool:
        """The first `num_tokens` positions of a request hold verified KV, and nobody outside writes any more.

        Of those after the cached ones the first `num_loaded` came from the store. What is missing is computed here.
        `first_token` is the output token that the giver sampled; it comes out as a TokenOutput once more, with its
        `first_logprobs`, because the coordinator shows what it hears first. False, and nothing happens, unless the
        request waits for its KV: late and repeated calls are harmless. `same_bits` False:
        the KV was cast and is not what would have been computed here, so that no block of this request gets a name,
        which would promise just that to others. `fenced`: somebody may still write behind those positions. The request
        then parts with these blocks, which stay in quarantine until `resolve(fence_id(request_id))`, and waits in the
        line for others; it shares what it got that has a name. Raises ValueError when `num_tokens` is beyond the
        request's tokens.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.phase is not Phase.RECEIVING:
            return False
        if not 0 <= num_tokens <= len(sequence.token_ids):
            raise ValueError(f"{num_tokens} positions received, the request has {len(sequence.token_ids)}")
        num_cached = sequence.num_computed
        num_valid = max(num_tokens, num_cached)
        del self._receiving[request_id]
        sequence.awaits_kv = False
        if not same_bits:
            sequence.names = NameChain(b"", self._limits.page_size, max_tokens=0)
        if fenced:
            sequence.phase = Phase.WAITING
            self._queue.wait(sequence)
        else:
            self._run(sequence)
        self._count("prompt_tokens_loaded", num_cached, min(num_cached + num_loaded, num_valid), sequence)
        takes = sequence.request.handover is Handover.TAKE
        source = "prompt_tokens_received" if takes else "prompt_tokens_fetched"
        self._count(source, min(num_cached + num_loaded, num_valid), num_valid, sequence)
        reason = None if first_token is None else self._emit_token(sequence, Sampled(first_token, first_logprobs))
        # The last token's KV is computed again when its logits are needed: its block must not be published before.
        sequence.settle(min(num_valid, len(sequence.token_ids) - 1))
        self._events.named.extend(self._saver.publish(sequence))
        if fenced:
            self.tables.quarantine(sequence, fence_id(sequence.id))
        if reason is not None:
            self._end(sequence, reason)
        return True

    def blocks_from_outside(self, request_id: str, num_tokens: int) -> list[int]:
        """Those that others wrote the first `num_tokens` positions of a request into; none after `receive`."""
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.phase is not Phase.RECEIVING:
            return []
        return sequence.block_ids[sequence.num_final_blocks : self.tables.num_blocks_for(num_tokens)]

    def abort(self, request_id: str) -> bool:
        """End a request, in whatever state. False when it is not here (any more): aborting twice is harmless."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._end(sequence, EndReason.ABORTED)
        return True

    def lease(self, lease_id: str, names: Many[bytes]) -> LeasedBlocks:
        """Keep the leading ones of these blocks that are cached; readers get half of the pool at most."""
        room = self._allocator.num_blocks // 2 - self._allocator.counts().leased
        blocks = [] if self._is_in_use(lease_id) else self.tables.lease_cached(lease_id, names[: max(0, room)])
        return LeasedBlocks(tuple(blocks), tuple(self._allocator.generations[blocks].tolist()))

    def save_cached(self, names: Many[bytes], tenant: bytes) -> None:
        """Have the store keep those of these leading blocks that the pool holds."""
        blocks = self.tables.cache.lookup(names)
        self._events.named.extend(self._saver.named(zip(names, blocks, strict=False), tenant))

    def release_lease(self, request_id: str) -> bool:
        """The reader is done. False when there is no such lease (any more)."""
        self._stuck = False
        return self.tables.release_lease(request_id)

    def quarantine_lease(self, request_id: str) -> bool:
        """The lease expired, but its reader may still read: keep the blocks until `resolve`."""
        self._stuck = False
        return self.tables.quarantine_lease(request_id)

    def resolve(self, request_id: str) -> bool:
        """Whatever touched the quarantined blocks of this id has ended. False when there are none (any more)."""
        self._stuck = False
        return self.tables.resolve(request_id)

    # -- Steps ---------------------------------------------------------------------------------------------------

    def draftable(self) -> list[DraftRequest]:
        """Running requests that need one token and can have more; not while a step is in flight."""
        return [s.draft_request() for s in self._running if s.num_uncomputed == 1 and s.max_drafts > 0]

    def can_look_ahead(self) -> bool:
        """Whether `plan` may be called while the latest plan is in flight: nothing that it needs is still unknown.

        And nobody has to be preempted for the next token of another, so that a step in flight keeps its requests.
        """
        has_room = self._allocator.num_available >= len(self._running) and not self._must_land
        return has_room and self._in_flight[-1].samples_on_device()

    def plan(self, prompt_tokens: int | None = None, drafts: Mapping[str, Many[int]] | None = None) -> StepPlan:
        """What to compute now; no sequences when there is nothing to compute. Run it, then `apply`.

        Beside single tokens at most `prompt_tokens` of prompts are computed; None leaves them what the batch has room
        for. `drafts`, by request id, are guesses of what follows those of `draftable`; what is no use is left out.
        """
        step = Step(self._allocator, self._num_planned, self._limits.max_batch_tokens)
        self._make_way()
        self._plan_singles(step)
        if step.singles and prompt_tokens is not None:
            step.prompt_budget = min(step.budget, prompt_tokens)
        self._plan_prompts(step)
        if drafts:
            self._plan_drafts(step, drafts)
        plan = step.plan()
        self._stuck = bool(self._queue) and not plan.sequences and not self._in_flight
        if plan.sequences:
            self._num_planned += 1
            self._in_flight.append(step)
            self.counters["blocks_copied_on_write"] += len(plan.copies)
        return plan

    def finishing(self) -> list[Computed]:
        """What the earliest plan in flight makes final for GIVE requests, in their own blocks."""
        return self._announcer.finishing(self._in_flight[0])

    def announcing(self, computed: Many[Computed], whole: bool) -> None:
        """Readers are being told of what `finishing` stated: that layers of it are final, or `whole` blocks."""
        for each in computed:
            self._announcer.told(self._sequences[each.request_id], each, whole)

    def apply(self, plan: StepPlan, result: StepResult) -> StepOutput:
        """Account for the earliest plan in flight. Returns everything that changed since the last output."""
        step = self._in_flight.popleft()
        step.blocks.let_go()
        for sequence, planned in zip(step.sequences, plan.sequences, strict=True):
            if sequence.phase is not Phase.ENDED:
                sampled = result.sampled[sequence.id] if planned.sample is not None else []
                self._apply(sequence, planned, sampled)
        self._events.named.extend(self._saver.at_risk())
        self.counters["kv_saves_too_late"] = self._saver.num_too_late
        return self.take_events()

    def take_events(self) -> StepOutput:
        """Everything that changed since the last output."""
        events, self._events = self._events, StepOutput()
        return events

    def has_work(self) -> bool:
        """Whether a step would compute or report something. False while only others can make it go on."""
        reportable = self._events.tokens or self._events.ended or self._events.named or self.tables.cache.changes
        return bool(self._running or self._in_flight or reportable or (self._queue and not self._stuck))

    # -- Watching ------------------------------------------------------------------------------------------------

    def load(self) -> EngineLoad:
        to_compute = [sequence for sequence in (*self._queue, *self._running) if not sequence.awaits_kv]
        return EngineLoad(
            blocks=self._allocator.counts(),
            running=len(self._running) + len(self._receiving),
            waiting=len(self._queue),
            waiting_prefill_tokens=sum(s.num_uncomputed for s in to_compute if s.num_uncomputed > 1),
        )

    def is_running(self) -> bool:
        """Whether a request will be in the next step, if nothing happens before."""
        return bool(self._running)

    def is_empty(self) -> bool:
        return not self._sequences

    def check(self) -> None:
        """Recount blocks, names and owners. Raises BlockAccountingError."""
        self.tables.check()
        holders = {owner.id for owner in self._allocator.owners() if owner.kind is OwnerKind.REQUEST}
        owning = [sequence for sequence in self._sequences.values() if sequence.request.placement is None]
        expected = {sequence.id for sequence in owning if sequence.block_ids}
        if holders != expected:
            raise BlockAccountingError(f"{len(holders)} requests own blocks, {len(expected)} should")
        for sequence in owning:
            if sorted(sequence.block_ids) != sorted(self._allocator.blocks_of(sequence.owner)):
                raise BlockAccountingError("a request's block table differs from the blocks it owns")

    # -- Inside --------------------------------------------------------------------------------------------------

    def _is_in_use(self, request_id: str) -> bool:
        quarantines = [Owner(OwnerKind.QUARANTINE, each) for each in (request_id, fence_id(request_id))]
        outside = (Owner(OwnerKind.LEASE, request_id), *quarantines)
        return request_id in self._sequences or any(self._allocator.owns_any(owner) for owner in outside)

    def _make_way(self) -> None:
        """Preempt for the next in line those who yield to it, where that is what it takes for it to start."""
        self._must_land = False
        if not self._queue.somebody_yields():
            return
        holdings = self._holdings()
        head = next((each for each in self._queue.heads() if not self._is_kept_back(each, holdings)), None)
        if head is None or self._can_start(head):
            return
        victims = self._queue.yielding(self._running, head, holdings)
        if sum(len(each.block_ids) for each in victims) < self.tables.shortfall(head):
            return
        self._must_land = any(victim.in_flight for victim in victims)
        while victims and not self._must_land and not self._can_start(head):
            self._preempt(victims.pop())

    def _plan_singles(self, step: Step) -> None:
        """Schedule every running request that needs one token, preempting others, or itself, for blocks."""
        is_scarce = self._allocator.num_available < len(self._running)
        order = self._queue.by_claim(self._running) if is_scarce else list(self._running)
        for sequence in order:
            if sequence.phase is not Phase.RUNNING or sequence.num_uncomputed != 1:
                continue
            while not self.tables.make_writable(sequence, step.blocks):
                # Never one already in this plan: those all come before `sequence`, the victim does not.
                victim = next(each for each in reversed(order) if each.phase is Phase.RUNNING and not each.gives)
                assert not sequence.gives, "a GIVE request has had all its blocks since its start"
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                step.schedule(sequence)
        self._queue.serve_singles(step.singles)

    def _plan_drafts(self, step: Step, drafts: Mapping[str, Many[int]]) -> None:
        """Let singles verify guesses, oldest first. Blocks taken for them stay with the sequence, which grows."""
        for sequence in step.singles:
            guesses = drafts.get(sequence.id, ())[: max(0, min(sequence.max_drafts, step.budget))]
            if guesses and sequence.num_uncomputed == 1:
                # Each of the others may need one for its next token.
                spare = 0 if self._can_admit() else self._allocator.num_available - (len(self._running) - 1)
                room = self.tables.make_room(sequence, 1 + len(guesses), spare) - 1
                step.add_drafts(sequence, list(guesses[:room]))

    def _preempt(self, sequence: Sequence) -> None:
        assert not sequence.in_flight, "see can_look_ahead"
        self._running.remove(sequence)
        self._events.named.extend(self._saver.named(self.tables.final_blocks(sequence), sequence.request.tenant))
        self.tables.release(sequence)
        sequence.phase = Phase.WAITING
        self._queue.wait(sequence)
        self.counters["preemptions"] += 1

    def _has_place(self) -> bool:
        return len(self._running) + len(self._receiving) < self._limits.max_running

    def _can_admit(self) -> bool:
        """Whether somebody waits for nothing but blocks and room in the batch."""
        return bool(self._queue) and self._has_place()

    def _can_start(self, sequence: Sequence) -> bool:
        return self._has_place() and self.tables.shortfall(sequence) <= 0

    def _holdings(self) -> KvHoldings:
        return self._queue.holdings((*self._running, *self._receiving.values()), self._allocator.num_blocks)

    def _is_kept_back(self, sequence: Sequence, holdings: KvHoldings) -> bool:
        """Whether its tenant's share of the blocks does not allow for it while others wait."""
        needed = self.tables.num_blocks_for(sequence.num_positions_at_start)
        return holdings.is_used_up(sequence.request.standing, needed)

    def _plan_prompts(self, step: Step) -> None:
        """Prompts go on and requests start. More than its share of the blocks a tenant gets where nobody else waits."""
        prompts = [each for each in self._running if each.num_uncomputed > 1]
        if not prompts and self._queue.wants_nothing():
            return
        kept_back = self._take_turns(step, self._queue.turns(prompts), self._holdings())
        if kept_back and len(self._queue) == sum(len(account.line) for account in kept_back):
            self._take_turns(step, Turns(self._queue, kept_back), None)

    def _take_turns(self, step: Step, turns: Turns, holdings: KvHoldings | None) -> list[Account]:
        """Until the batch is full or one that waits does not fit. Returns whom `holdings` kept from starting one."""
        kept_back, may_start = [], self._can_admit()
        while (may_start or step.prompt_budget) and (account := turns.account()) is not None:
            prompt = account.prompt()
            if prompt is not None and step.prompt_budget:
                turns.serve(prompt, step.schedule(prompt))
            elif not may_start or not account.line:
                turns.skip()
            elif holdings is not None and self._is_kept_back(account.line[0], holdings):
                kept_back.append(account)
                turns.skip()
            else:
                sequence = account.line[0]
                outside = self.sources.worth_waiting_for(sequence)
                from_peer, from_outside = sequence.awaits_kv, bool(outside.stored or outside.elsewhere)
                if not (from_peer or from_outside or step.prompt_budget):
                    turns.skip()  # others may have to wait for nothing but blocks
                    continue
                sequence.awaits_kv = from_peer or from_outside
                if self.tables.admit(sequence, step.blocks):
                    turns.serve(sequence, self._start(sequence, outside, from_peer, step))
                    may_start = self._can_admit()
                    if holdings is not None:
                        holdings.add(sequence)
                else:
                    sequence.awaits_kv, may_start = from_peer, False
        return kept_back

    def _start(self, sequence: Sequence, outside: Outside, from_peer: bool, step: Step) -> int:
        """It has its blocks. Returns how many tokens of it the step computes."""
        self._queue.leave(sequence)
        self._count("prompt_tokens_cached", 0, sequence.num_computed, sequence)
        if not sequence.started:
            sequence.started = True
            self._events.started.append(Started(sequence.id, sequence.num_computed))
        if sequence.awaits_kv:
            sequence.phase = Phase.RECEIVING
            self._receiving[sequence.id] = sequence
            self._events.reserved.append(
                Reserved(
                    sequence.id,
                    tuple(sequence.block_ids),
                    sequence.num_final_blocks,
                    tuple(outside.stored),
                    sequence.request.tenant,
                    from_peer,
                    tuple(outside.elsewhere),
                    outside.compute_s,
                )
            )
            return 0
        self._run(sequence)
        num_tokens = step.schedule(sequence)
        if sequence.gives and sequence.request.placement is None:
            self._events.computed.extend(self._announcer.computed(sequence, last=False))
        return num_tokens

    def _run(self, sequence: Sequence) -> None:
        sequence.phase = Phase.RUNNING
        insort(self._running, sequence, key=_arrival)

    def _apply(self, sequence: Sequence, planned: PlannedSequence, sampled: list[Sampled]) -> None:
        reason, num_tokens = None, 0
        for num_tokens, token in enumerate(sampled, 1):  # noqa: B007 - how many came before the stream ended
            reason = self._emit_token(sequence, token)
            if reason is not None:
                break
        sequence.land(planned, max(0, num_tokens - 1))
        self._count("prompt_tokens_computed", planned.start, sequence.num_computed, sequence)
        self.counters["generated_tokens"] += num_tokens
        if planned.num_drafts:
            self.counters["draft_tokens"] += planned.num_drafts
            self.counters["draft_tokens_accepted"] += min(num_tokens, len(sampled) - 1)
        self._events.named.extend(self._saver.publish(sequence))
        if reason is not None:
            self._end(sequence, reason)
        elif sequence.gives:
            self._events.computed.extend(self._announcer.computed(sequence, last=bool(sampled)))
            if sampled:
                self._end(sequence, EndReason.HANDED_OVER)

    def _emit_token(self, sequence: Sequence, token: Sampled) -> EndReason | None:
        index = len(sequence.output_token_ids)
        self._events.tokens.append(TokenOutput(sequence.id, index, token.token_id, token.logprobs))
        return sequence.append(token.token_id)

    def _end(self, sequence: Sequence, reason: EndReason) -> None:
        """The one place where a request ends: its blocks find their next owner, its client its reason."""
        if sequence.phase is Phase.WAITING:
            self._queue.leave(sequence)
        elif sequence.phase is Phase.RECEIVING:
            del self._receiving[sequence.id]
            self.tables.quarantine(sequence, sequence.id)
        else:
            self._running.remove(sequence)
            self.tables.hold_for_step(sequence)
            if sequence.is_exposed:  # however it ended, a reader may be at what was announced
                self.tables.lease(sequence)
            else:
                self.tables.release(sequence)
        sequence.phase = Phase.ENDED
        self._queue.forget(sequence)
        del self._sequences[sequence.id]
        self._events.ended.append(Ended(sequence.id, reason, len(sequence.output_token_ids)))

    def _count(self, counter: str, start: int, end: int, sequence: Sequence) -> None:
        """Add the positions from `start` to `end` that belong to the prompt."""
        self.counters[counter] += max(0, min(end, sequence.request.num_prompt_tokens) - start)


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
