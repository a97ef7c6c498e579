"""The engine as its owner sees it: requests in, one step at a time, outputs out. Confined to one thread."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from baton.errors import ConfigurationError
from baton.name_changes import Held
from engine.blocks import BlockAllocator, Generations
from engine.limits import SchedulerLimits
from engine.pace import Pace
from engine.plan import Drafter, Launched, LaunchingRunner, OnLayer, Runner, StepPlan, StepResult
from engine.requests import EngineLoad, EngineRates, EngineRequest, LeasedBlocks, StepOutput, TokenLogprobs
from engine.scheduler import Scheduler
from engine.store import BlockStore


@dataclass(frozen=True, slots=True)
class _Done:
    """The launch of a step by a runner that waits for it."""

    step_result: StepResult

    def layers(self) -> Iterator[int]:
        return iter(())  # said while it ran

    def result(self) -> StepResult:
        return self.step_result


@dataclass(frozen=True, slots=True)
class _Flight:
    plan: StepPlan
    launched: Launched
    start: float


OnOutput = Callable[[StepOutput], None]


class Mirror(Protocol):
    """Keeps blocks of the runner and those that peers read and write the same; the engine says when."""

    def publish(self, block_ids: Sequence[int], layers: range | None = None) -> None:
        """Computed, about to be announced: what peers read must be this when it returns. None: all layers."""

    def fetch(self, block_ids: Sequence[int]) -> None:
        """Written by a peer: every step launched from now on must find it."""


class Engine:
    """Scheduler, block books and runner under one roof. Every method must be called from the same thread."""

    def __init__(
        self,
        runner: Runner,
        *,
        num_blocks: int,
        page_size: int,
        max_batch_tokens: int,
        max_running: int,
        max_model_tokens: int,
        shareable_tokens: Callable[[int], int],
        max_waiting: int = 1024,
        step_stretch: float = 0.0,
        generations: Generations | None = None,
        drafter: Drafter | None = None,
        look_ahead: bool = False,
        mirror: Mirror | None = None,
        store: BlockStore | None = None,
        save_at_eviction: bool = False,
        layer_groups: Sequence[int] = (),
    ) -> None:
        """`shareable_tokens` maps a prompt's length to the number of leading tokens whose KV other requests may share.

        `step_stretch`: see `engine.pace.Pace`. `generations`, uint64 `[num_blocks]`, is written in place and may lie in
        shared memory. `drafter` makes the guesses of speculative decoding. `look_ahead`: plan and launch a step while
        the one before runs, on a runner that can. `mirror`: where the runner's blocks are not those that peers read and
        write. `store`: where blocks live on that the pool has no room for; `save_at_eviction`: see `Scheduler`.
        `layer_groups`: after how many layers blocks of GIVE requests are announced while a step runs; the last of these
        is all layers. Raises ConfigurationError when these contradict each other.
        """
        limits = SchedulerLimits(page_size, max_batch_tokens, max_running, max_model_tokens, max_waiting)
        if look_ahead and not isinstance(runner, LaunchingRunner):
            raise ConfigurationError(f"a {type(runner).__name__} cannot launch a step without waiting for it")
        self._runner = runner
        self._drafter = drafter
        self._look_ahead = look_ahead
        self._mirror = mirror
        self._layer_groups = tuple(layer_groups)
        self._flight: _Flight | None = None
        self._landed_at = 0.0
        self._goes_on = False
        """The step that landed last left running requests, which wait for the next one."""
        self._pace = Pace(step_stretch)
        allocator = BlockAllocator(num_blocks, generations)
        self._scheduler = Scheduler(allocator, limits, shareable_tokens, store, save_at_eviction)
        self._page_size = page_size
        self.counters = self._scheduler.counters
        """The engine's share of `baton.metrics.WORKER_COUNTERS`."""
        self.counters.update(engine_steps=0.0, engine_step_seconds=0.0)

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises InvalidRequestError when it can never be served here, EngineFull when the line is."""
        self._scheduler.add(request)

    def names(self, request: EngineRequest) -> list[bytes]:
        """Of the blocks that the request's tokens fill and others may share. May be called from any thread."""
        return self._scheduler.tables.names(request.cache_root, request.num_prompt_tokens).extend(request.token_ids)

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
        """The first `num_tokens` positions of a request are verified KV; see `Scheduler.receive`.

        False, and nothing happens, unless the request waits for its KV.
        """
        if self._mirror is not None and (blocks := self._scheduler.blocks_from_outside(request_id, num_tokens)):
            self._mirror.fetch(blocks)
        return self._scheduler.receive(
            request_id, num_tokens, first_token, num_loaded, same_bits, fenced, first_logprobs
        )

    def abort(self, request_id: str) -> bool:
        """End a request in whatever state; its end is in the next step's output. False when it is not here.

        Blocks that a request was waiting for stay quarantined until `resolve`.
        """
        return self._scheduler.abort(request_id)

    def num_held(self, names: Sequence[bytes]) -> int:
        """How many of these leading blocks the prefix cache seems to hold. May be called from any thread."""
        return len(self._scheduler.tables.cache.lookup(names))

    def lease(self, lease_id: str, names: Sequence[bytes]) -> LeasedBlocks:
        """Those of these leading blocks that the prefix cache holds, kept for a reader until `release_lease`."""
        leased = self._scheduler.lease(lease_id, names)
        if self._mirror is not None and leased.block_ids:
            self._mirror.publish(leased.block_ids)
        return leased

    def release_lease(self, request_id: str) -> bool:
        """The reader of a handed-over request is done. False when there is no such lease."""
        return self._scheduler.release_lease(request_id)

    def quarantine_lease(self, request_id: str) -> bool:
        """The lease ended, but its reader may still read: keep the blocks until `resolve`. False: no such lease."""
        return self._scheduler.quarantine_lease(request_id)

    def resolve(self, request_id: str) -> bool:
        """Nobody outside touches the quarantined blocks of this id any more. False when there are none."""
        return self._scheduler.resolve(request_id)

    def step(self, on_output: OnOutput | None = None) -> StepOutput:
        """Plan, compute, account. Without anything to compute it returns what else happened, at once.

        `on_output` is told, in this thread, what is known while the step still runs: who was admitted, and which blocks
        of GIVE requests have become final, group of layers by group of layers. What is returned is the rest.

        With look-ahead: plan and launch the next step, then wait for the one in flight and account for that.

        What the runner raises passes through and leaves the engine unusable: the KV of that step's requests is
        undefined. The process must end where everybody sees it, so that others take the requests over.
        """
        flight = self._flight or self._launch(self._propose(), on_output)
        if flight is None:
            output = self._scheduler.take_events()
        else:
            self._flight = self._launch({}, on_output) if self._can_look_ahead(flight.plan) else None
            output = self._land(flight, on_output)
        output = self._checked_out(output)
        changed = self._scheduler.tables.cache.changes.take()
        return output if changed is None else replace(output, cached=changed)

    def watch_cache(self) -> Held:
        """What the prefix cache holds. From then on `StepOutput.cached` tells what changes, until `unwatch_cache`."""
        cache = self._scheduler.tables.cache
        cache.changes.watch()
        return cache.held()

    def unwatch_cache(self) -> None:
        """Nobody wants to know any more."""
        self._scheduler.tables.cache.changes.unwatch()

    def save_cached(self, names: Sequence[bytes], tenant: bytes) -> None:
        """Have the store keep those of these leading blocks that the pool holds."""
        self._scheduler.save_cached(names, tenant)

    def has_work(self) -> bool:
        """Whether `step` would compute or report something. False also while every request waits for somebody else."""
        return self._scheduler.has_work()

    def load(self) -> EngineLoad:
        return self._scheduler.load()

    def rates(self) -> EngineRates:
        """May be called from any thread."""
        return EngineRates(self._pace.prompts.per_s, self._pace.token_s or 0.0)

    def num_cached_tokens(self, token_ids: Sequence[int], cache_root: bytes, num_prompt_tokens: int) -> int:
        """Leading tokens that the prefix cache holds now. Changes nothing and promises nothing."""
        return self._scheduler.tables.num_cached_tokens(token_ids, cache_root, num_prompt_tokens)

    def check_idle(self) -> None:
        """Recount all books, at any time between steps. Raises BlockAccountingError: stop the worker.

        Without requests this means that free + cached + leased + quarantined blocks are the whole pool.
        """
        self._scheduler.check()

    def _propose(self) -> dict[str, list[int]]:
        """Guesses for the step to be planned; no step is in flight."""
        if self._drafter is None:
            return {}
        requests = self._scheduler.draftable()
        return self._drafter.propose(requests) if requests and self._drafter.wants_drafts(len(requests)) else {}

    def _can_look_ahead(self, plan: StepPlan) -> bool:
        """Whether the step after `plan`, which is in flight, can be planned now."""
        if not self._look_ahead or not self._scheduler.can_look_ahead():
            return False
        num_singles = sum(sequence.sample is not None for sequence in plan.sequences)
        return self._drafter is None or not num_singles or not self._drafter.wants_drafts(num_singles)

    def _checked_out(self, output: StepOutput) -> StepOutput:
        """The same; what it says holds for everybody from here on."""
        if self._mirror is not None:
            final = {block for each in output.computed for block in each.block_ids}
            final.update(each.block_id for each in output.named)
            if final:
                self._mirror.publish(sorted(final))
        if self._drafter is not None:
            for ended in output.ended:
                self._drafter.forget(ended.request_id)
        return output

    def _launch(self, drafts: dict[str, list[int]], on_output: OnOutput | None = None) -> _Flight | None:
        plan = self._scheduler.plan(self._pace.prompt_tokens(), drafts)
        if not plan.sequences:
            return None
        if on_output is not None and (early := self._scheduler.take_events()) != StepOutput():
            on_output(self._checked_out(early))
        start = time.perf_counter()
        if self._look_ahead and isinstance(self._runner, LaunchingRunner):
            return _Flight(plan, self._runner.launch(plan, self._layer_groups), start)
        on_layer = self._announcer(on_output) if on_output is not None else None
        return _Flight(plan, _Done(self._runner.run(plan, on_layer)), start)

    def _announcer(self, on_output: OnOutput) -> OnLayer | None:
        """Announces what the earliest plan in flight makes final; None when that is nothing."""
        groups = self._layer_groups
        finishing = self._scheduler.finishing() if groups else []
        if not finishing:
            return None

        blocks = [block for each in finishing for block in each.block_ids]
        num_published = 0

        def on_layer(num_layers: int) -> None:
            nonlocal num_published
            if num_layers not in groups:
                return
            if self._mirror is not None:
                self._mirror.publish(blocks, range(num_published, num_layers))
                num_published = num_layers
            self._scheduler.announcing(finishing, whole=num_layers == groups[-1])
            if num_layers == groups[-1]:
                on_output(StepOutput(computed=finishing))
            else:
                on_output(StepOutput(computed=[replace(each, num_layers=num_layers) for each in finishing]))

        return on_layer

    def _observe_prompts(self, plan: StepPlan, seconds: float) -> None:
        """What a block of a prompt costs, from steps that computed at least one."""
        if plan.num_tokens >= len(plan.sequences) - 1 + self._page_size:
            block_s = seconds / plan.num_tokens * self._page_size
            sources = self._scheduler.sources
            known = sources.block_compute_s
            sources.block_compute_s = block_s if known is None else known + 0.2 * (block_s - known)

    def _land(self, flight: _Flight, on_output: OnOutput | None) -> StepOutput:
        if on_output is not None and (on_layer := self._announcer(on_output)) is not None:
            for num_layers in flight.launched.layers():
                on_layer(num_layers)
        result = flight.launched.result()
        now = time.perf_counter()
        seconds = now - max(flight.start, self._landed_at)  # before that the device had the step before
        since_last_s = now - self._landed_at if self._goes_on else seconds
        self._landed_at = now
        self._pace.observe(flight.plan, seconds)
        self._pace.observe_streams(flight.plan, result, since_last_s)
        self._observe_prompts(flight.plan, seconds)
        if self._drafter is not None:
            self._drafter.observe(flight.plan, result, seconds)
        self.counters["engine_steps"] += 1
        self.counters["engine_step_seconds"] += seconds
        output = self._scheduler.apply(flight.plan, result)
        self._goes_on = self._scheduler.is_running()
        return output
