"""Decides what each step computes. Pure: requests and results go in, a StepPlan and events come out.

1. `add` checks a request and puts it in the waiting line, which is kept in the order of arrival.
2. `plan` gives running requests that need one token their token, oldest first, then continues prompts in chunks, then
   admits from the head of the line: blocks for all its tokens at once, those in the prefix cache first.
3. When a running request needs a block and none is left, the latest arrival gives back all of its blocks and returns
   to the line, to be computed again. The oldest is never interrupted by a younger one, so something always ends.
4. A TAKE request waits, with its blocks, until `receive` says what arrived; then it is one of the running.
5. `apply` turns the runner's result into tokens and endings. A GIVE request ends with its first token. Once it has
   announced blocks, they all pass to the lease of the same id when it ends, however it ends.
6. `abort` ends a request wherever it stands. Blocks that somebody outside may still write are quarantined.

A GIVE request is never preempted: others read what it announced, and it can always finish with what it has.
"""

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from baton.errors import BatonError, ConfigurationError, InvalidRequestError
from engine.block_tables import BlockTables, Copies
from engine.blocks import BlockAccountingError, BlockAllocator, Owner, OwnerKind
from engine.plan import PlannedSequence, StepPlan, StepResult
from engine.requests import (
    Computed,
    Ended,
    EndReason,
    EngineLoad,
    EngineRequest,
    Reserved,
    Started,
    StepOutput,
    TokenLogprobs,
    TokenOutput,
)
from engine.sequence import Phase, Sequence, most_positions


class EngineFull(BatonError):
    """The waiting line is at its bound. Try another worker, or later."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    page_size: int
    max_batch_tokens: int
    """Tokens computed in one step."""
    max_running: int
    """Requests that hold blocks side by side, those that wait for KV from outside included."""
    max_model_tokens: int
    """Prompt plus output."""
    max_waiting: int = 1024


class _Draft:
    """A plan in the making."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.singles: list[PlannedSequence] = []
        self.chunks: list[PlannedSequence] = []
        self.copies: Copies = []

    def schedule(self, sequence: Sequence) -> None:
        num_tokens = min(sequence.num_uncomputed, self.budget)
        self.budget -= num_tokens
        (self.singles if num_tokens == 1 else self.chunks).append(sequence.planned(num_tokens))


class Scheduler:
    """One thread: `plan`, run it, `apply`; everything else only between two such rounds.

    `counters` has the scheduler's share of `baton.metrics.WORKER_COUNTERS`.
    """

    def __init__(
        self, allocator: BlockAllocator, limits: SchedulerLimits, shareable_tokens: Callable[[int], int]
    ) -> None:
        if limits.max_batch_tokens < limits.max_running:
            raise ConfigurationError(
                f"--max-batch-tokens is {limits.max_batch_tokens}; it must be at least --max-running "
                f"({limits.max_running}), or some requests would never get a token"
            )
        self.tables = BlockTables(allocator, limits.page_size, shareable_tokens)
        self.counters: dict[str, float] = dict.fromkeys(
            (
                "prompt_tokens_computed", "prompt_tokens_cached", "prompt_tokens_received", "generated_tokens",
                "preemptions", "blocks_copied_on_write",
            ), 0.0,
        )  # fmt: skip
        self._allocator = allocator
        self._limits = limits
        self._num_added = 0
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._num_receiving = 0
        self._stuck = False
        """Nothing runs and the head of the line does not fit: blocks must come back from outside first."""
        self._events = StepOutput()

    # -- Requests ------------------------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """Put a request in the waiting line.

        Raises InvalidRequestError when it could never be served here, EngineFull when the line is at its bound.
        """
        self._check_servable(request)
        if len(self._waiting) >= self._limits.max_waiting:
            raise EngineFull(f"{len(self._waiting)} requests are waiting already")
        names = self.tables.names(request.cache_root, request.num_prompt_tokens)
        sequence = Sequence(request, self._num_added, names, self._limits.max_model_tokens)
        self._num_added += 1
        self._sequences[request.id] = sequence
        self._waiting.append(sequence)

    def receive(self, request_id: str, num_tokens: int, first_token: int | None) -> bool:
        """The first `num_tokens` positions of a TAKE request hold verified KV, and nobody outside writes any more.

        What is missing is computed here. `first_token` is the output token that the giver sampled; it comes out as
        a TokenOutput once more. False, and nothing happens, unless the request waits for its KV: late and repeated
        calls are harmless. Raises ValueError when `num_tokens` is beyond the request's tokens.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.phase is not Phase.RECEIVING:
            return False
        if not 0 <= num_tokens <= len(sequence.token_ids):
            raise ValueError(f"{num_tokens} positions received, the request has {len(sequence.token_ids)}")
        num_cached = sequence.num_computed
        num_valid = max(num_tokens, num_cached)
        self._num_receiving -= 1
        sequence.awaits_kv = False
        sequence.phase = Phase.RUNNING
        insort(self._running, sequence, key=_arrival)
        self._count("prompt_tokens_received", num_cached, num_valid, sequence)
        reason = None if first_token is None else self._emit_token(sequence, first_token, None)
        # The last token's KV is computed again when its logits are needed: its block must not be published before.
        sequence.num_computed = min(num_valid, len(sequence.token_ids) - 1)
        self.tables.publish(sequence)
        if reason is not None:
            self._end(sequence, reason)
        return True

    def abort(self, request_id: str) -> bool:
        """End a request, in whatever state. False when it is not here (any more): aborting twice is harmless."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._end(sequence, EndReason.ABORTED)
        return True

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

    def plan(self, prompt_tokens: int | None = None) -> StepPlan:
        """What to compute now; no sequences when there is nothing to compute. Run it, then `apply`.

        Beside single tokens at most `prompt_tokens` of prompts are computed; None leaves them what the batch has room
        for.
        """
        draft = _Draft(self._limits.max_batch_tokens)
        self._plan_singles(draft)
        if draft.singles and prompt_tokens is not None:
            draft.budget = min(draft.budget, prompt_tokens)
        for sequence in self._running:
            if draft.budget and sequence.num_uncomputed > 1:
                draft.schedule(sequence)
        self._admit(draft)
        self.counters["blocks_copied_on_write"] += len(draft.copies)
        sequences = draft.singles + draft.chunks
        self._stuck = bool(self._waiting) and not sequences
        return StepPlan(sequences, draft.copies)

    def apply(self, plan: StepPlan, result: StepResult) -> StepOutput:
        """Account for a plan that has run. Returns everything that changed since the last output."""
        self.tables.copies_made()
        for planned in plan.sequences:
            sequence = self._sequences[planned.request_id]
            end = planned.start + len(planned.token_ids)
            self._count("prompt_tokens_computed", planned.start, end, sequence)
            sequence.num_computed = end
            self.tables.publish(sequence)
            if planned.sample is not None:
                (sampled,) = result.sampled[planned.request_id]
                self.counters["generated_tokens"] += 1
                self._accept_sample(sequence, sampled.token_id, sampled.logprobs)
            elif sequence.gives:
                self._announce(sequence, last=False)
        return self.take_events()

    def take_events(self) -> StepOutput:
        """Everything that changed since the last output."""
        events, self._events = self._events, StepOutput()
        return events

    def has_work(self) -> bool:
        """Whether a step would compute or report something. False while only others can make it go on."""
        reportable = self._events.tokens or self._events.ended
        return bool(self._running or reportable or (self._waiting and not self._stuck))

    # -- Watching ------------------------------------------------------------------------------------------------

    def load(self) -> EngineLoad:
        to_compute = [sequence for sequence in (*self._waiting, *self._running) if not sequence.awaits_kv]
        return EngineLoad(
            blocks=self._allocator.counts(),
            running=len(self._running) + self._num_receiving,
            waiting=len(self._waiting),
            waiting_prefill_tokens=sum(s.num_uncomputed for s in to_compute if s.num_uncomputed > 1),
        )

    def is_empty(self) -> bool:
        return not self._sequences

    def check(self) -> None:
        """Recount blocks, names and owners. Raises BlockAccountingError."""
        self.tables.check()
        holders = {owner.id for owner in self._allocator.owners() if owner.kind is OwnerKind.REQUEST}
        expected = {sequence.id for sequence in self._sequences.values() if sequence.block_ids}
        if holders != expected:
            raise BlockAccountingError(f"{len(holders)} requests own blocks, {len(expected)} should")
        for sequence in self._sequences.values():
            if sorted(sequence.block_ids) != sorted(self._allocator.blocks_of(sequence.owner)):
                raise BlockAccountingError("a request's block table differs from the blocks it owns")

    # -- Inside --------------------------------------------------------------------------------------------------

    def _check_servable(self, request: EngineRequest) -> None:
        num_tokens, limit = len(request.token_ids), self._limits.max_model_tokens
        if not 1 <= request.num_prompt_tokens <= num_tokens:
            raise InvalidRequestError("the prompt is empty", "prompt")
        if num_tokens >= limit:
            raise InvalidRequestError(
                f"{num_tokens} tokens leave no room for output; this model takes {limit} in all", "prompt"
            )
        if request.sampling.max_tokens <= num_tokens - request.num_prompt_tokens:
            raise InvalidRequestError("max_tokens leaves no token to generate", "max_tokens")
        num_blocks = self.tables.num_blocks_for(most_positions(request, limit))
        if num_blocks > self._allocator.num_blocks:
            raise InvalidRequestError(
                f"prompt and max_tokens need {num_blocks} KV blocks, this worker has {self._allocator.num_blocks}; "
                "shorten one of them",
                "max_tokens",
            )
        outside = (Owner(OwnerKind.LEASE, request.id), Owner(OwnerKind.QUARANTINE, request.id))
        if request.id in self._sequences or any(self._allocator.owns_any(owner) for owner in outside):
            raise InvalidRequestError("this request id is in use")

    def _plan_singles(self, draft: _Draft) -> None:
        """Schedule every running request that needs one token, preempting others, or itself, for blocks."""
        for sequence in list(self._running):
            if sequence.phase is not Phase.RUNNING or sequence.num_uncomputed != 1:
                continue
            while not self.tables.make_writable(sequence, draft.copies):
                # Never one already in this plan: those all arrived before `sequence`, the victim did not.
                victim = next(s for s in reversed(self._running) if not s.gives)
                assert victim.arrival >= sequence.arrival, "a GIVE request has had all its blocks since its start"
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                draft.schedule(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self.tables.release(sequence)
        sequence.phase = Phase.WAITING
        insort(self._waiting, sequence, key=_arrival)
        self.counters["preemptions"] += 1

    def _admit(self, draft: _Draft) -> None:
        """Start requests from the head of the line, in order: one that does not fit lets nobody pass."""
        while self._waiting and len(self._running) + self._num_receiving < self._limits.max_running:
            sequence = self._waiting[0]
            if not sequence.awaits_kv and not draft.budget:
                return
            if not self.tables.admit(sequence, draft.copies):
                return
            del self._waiting[0]
            self._count("prompt_tokens_cached", 0, sequence.num_computed, sequence)
            if not sequence.started:
                sequence.started = True
                self._events.started.append(Started(sequence.id, sequence.num_computed))
            if sequence.awaits_kv:
                sequence.phase = Phase.RECEIVING
                self._num_receiving += 1
                self._events.reserved.append(
                    Reserved(sequence.id, tuple(sequence.block_ids), sequence.num_final_blocks)
                )
            else:
                sequence.phase = Phase.RUNNING
                insort(self._running, sequence, key=_arrival)
                draft.schedule(sequence)

    def _accept_sample(self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None) -> None:
        reason = self._emit_token(sequence, token_id, logprobs)
        if reason is not None:
            self._end(sequence, reason)
        elif sequence.gives:
            self._announce(sequence, last=True)
            self._end(sequence, EndReason.HANDED_OVER)

    def _emit_token(self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None) -> EndReason | None:
        self._events.tokens.append(TokenOutput(sequence.id, len(sequence.output_token_ids), token_id, logprobs))
        return sequence.append(token_id)

    def _announce(self, sequence: Sequence, last: bool) -> None:
        """Tell which further blocks of a GIVE request are final, the partial one only at the end."""
        first = sequence.num_announced_blocks
        num_tokens = sequence.num_computed
        final = len(sequence.block_ids) if last else num_tokens // self._limits.page_size
        if final == first and not last:
            return
        blocks = sequence.block_ids[first:final]
        generations = tuple(self._allocator.generations[blocks].tolist())
        covered = num_tokens if last else final * self._limits.page_size
        self._events.computed.append(Computed(sequence.id, first, tuple(blocks), generations, covered, last))
        sequence.num_announced_blocks = final

    def _end(self, sequence: Sequence, reason: EndReason) -> None:
        """The one place where a request ends: its blocks find their next owner, its client its reason."""
        if sequence.phase is Phase.WAITING:
            self._waiting.remove(sequence)
        elif sequence.phase is Phase.RECEIVING:
            self._num_receiving -= 1
            self.tables.quarantine(sequence)
        else:
            self._running.remove(sequence)
            if sequence.num_announced_blocks:  # however it ended, a reader may be at what was announced
                self.tables.lease(sequence)
            else:
                self.tables.release(sequence)
        sequence.phase = Phase.ENDED
        del self._sequences[sequence.id]
        self._events.ended.append(Ended(sequence.id, reason, len(sequence.output_token_ids)))

    def _count(self, counter: str, start: int, end: int, sequence: Sequence) -> None:
        """Add the positions from `start` to `end` that belong to the prompt."""
        self.counters[counter] += max(0, min(end, sequence.request.num_prompt_tokens) - start)


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
