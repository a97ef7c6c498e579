"""The engine as its owner sees it: requests in, one step at a time, outputs out. Confined to one thread."""

import time
from collections.abc import Callable, Sequence

from engine.blocks import BlockAllocator, Generations
from engine.pace import Pace
from engine.plan import Runner
from engine.requests import EngineLoad, EngineRequest, StepOutput
from engine.scheduler import Scheduler, SchedulerLimits


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
    ) -> None:
        """`shareable_tokens` maps a prompt's length to the number of leading tokens whose KV other requests may share.

        `step_stretch`: see `engine.pace.Pace`. `generations`, uint64 `[num_blocks]`, is written in place and may lie in
        shared memory. Raises ConfigurationError when the limits contradict each other.
        """
        limits = SchedulerLimits(page_size, max_batch_tokens, max_running, max_model_tokens, max_waiting)
        self._runner = runner
        self._pace = Pace(step_stretch)
        self._scheduler = Scheduler(BlockAllocator(num_blocks, generations), limits, shareable_tokens)
        self.counters = self._scheduler.counters
        """The engine's share of `baton.metrics.WORKER_COUNTERS`."""
        self.counters.update(engine_steps=0.0, engine_step_seconds=0.0)

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises InvalidRequestError when it can never be served here, EngineFull when the line is."""
        self._scheduler.add(request)

    def receive(self, request_id: str, num_tokens: int, first_token: int | None) -> bool:
        """The first `num_tokens` positions of a TAKE request are verified KV; see `Scheduler.receive`.

        False, and nothing happens, unless the request waits for its KV.
        """
        return self._scheduler.receive(request_id, num_tokens, first_token)

    def abort(self, request_id: str) -> bool:
        """End a request in whatever state; its end is in the next step's output. False when it is not here.

        Blocks that a TAKE request was waiting for stay quarantined until `resolve`.
        """
        return self._scheduler.abort(request_id)

    def release_lease(self, request_id: str) -> bool:
        """The reader of a handed-over request is done. False when there is no such lease."""
        return self._scheduler.release_lease(request_id)

    def quarantine_lease(self, request_id: str) -> bool:
        """The lease ended, but its reader may still read: keep the blocks until `resolve`. False: no such lease."""
        return self._scheduler.quarantine_lease(request_id)

    def resolve(self, request_id: str) -> bool:
        """Nobody outside touches the quarantined blocks of this id any more. False when there are none."""
        return self._scheduler.resolve(request_id)

    def step(self) -> StepOutput:
        """Plan, compute, account. Without anything to compute it returns what else happened, at once.

        What the runner raises passes through and leaves the engine unusable: the KV of that step's requests is
        undefined. The process must end where everybody sees it, so that others take the requests over.
        """
        plan = self._scheduler.plan(self._pace.prompt_tokens())
        if not plan.sequences:
            return self._scheduler.take_events()
        start = time.perf_counter()
        result = self._runner.run(plan)
        seconds = time.perf_counter() - start
        self._pace.observe(plan, seconds)
        self.counters["engine_steps"] += 1
        self.counters["engine_step_seconds"] += seconds
        return self._scheduler.apply(plan, result)

    def has_work(self) -> bool:
        """Whether `step` would compute or report something. False also while every request waits for somebody else."""
        return self._scheduler.has_work()

    def load(self) -> EngineLoad:
        return self._scheduler.load()

    def num_cached_tokens(self, token_ids: Sequence[int], cache_root: bytes, num_prompt_tokens: int) -> int:
        """Leading tokens that the prefix cache holds now. Changes nothing and promises nothing."""
        return self._scheduler.tables.num_cached_tokens(token_ids, cache_root, num_prompt_tokens)

    def check_idle(self) -> None:
        """Recount all books, at any time between steps. Raises BlockAccountingError: stop the worker.

        Without requests this means that free + cached + leased + quarantined blocks are the whole pool.
        """
        self._scheduler.check()
