"""Which workers serve an attempt. Pure: a description of the work and of each worker in, their ids out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """A worker that accepts new work, what it told in its last heartbeat, and what it was assigned since."""

    id: str
    prefills: bool
    decodes: bool
    stands_in: bool
    """Decodes while no decode worker accepts work, or all of them failed the request."""
    requests: int
    """Running or waiting."""
    waiting_prefill_tokens: int
    free_blocks: int
    """Free, or cached and evictable, less those that assignments since the last heartbeat will take."""
    context_tokens: int
    """Longest prompt plus output that it can hold."""
    page_size_tokens: int


@dataclass(frozen=True, slots=True)
class Work:
    num_tokens: int
    """To be in the KV cache before the next token: the prompt and what earlier attempts delivered."""
    total_tokens: int
    """The prompt and the longest answer."""
    uncached_tokens: int
    """An estimate of how many of them no cache of the decode worker holds."""
    avoid: Collection[str] = ()
    """Workers that failed this request; taken only if there is no other."""
    trouble: Mapping[str, int] = field(default_factory=dict)
    """How bad the workers are that fail everybody lately; those left out are good."""
    crowd: Mapping[str, int] = field(default_factory=dict)
    """What this work should keep away from: how much of it each worker has."""


class PrefillChoice(Enum):
    """Who computes the prompt, and why: label of the metric."""

    REMOTE = "remote"
    LOCAL_MIXED = "local_mixed_worker"
    LOCAL_SHORT = "local_short_prompt"
    LOCAL_NO_WORKER = "local_no_prefill_worker"
    STAND_IN = "local_no_decode_worker"


@dataclass(frozen=True, slots=True)
class Route:
    decode: str
    prefill: str | None
    """None: the decode worker prefills by itself."""
    choice: PrefillChoice
    ttft_s: float = 0.0
    """Predicted for this request there, from now to its first token; 0 where nothing is known."""
    itl_s: float = 0.0
    """Predicted from one of its tokens to the next; 0 where nothing is known."""
    own_s: float = 0.0
    """Of `ttft_s`, what it would also take with nothing else there; 0 where nothing is known."""


class RoutingPolicy(ABC):
    @abstractmethod
    def choose(self, work: Work, workers: Sequence[WorkerLoad]) -> Route | None:
        """None if no worker can decode this."""


class LeastLoaded(RoutingPolicy):
    """Decode: enough free blocks first, then fewest requests, then most free blocks. Prefill: shortest queue of tokens.

    Equals take turns. A prompt of which at most `local_prefill_tokens` are uncached is not worth a hand-over.
    """

    def __init__(self, local_prefill_tokens: int) -> None:
        self._local_prefill_tokens = local_prefill_tokens
        self._turn = 0

    def choose(self, work: Work, workers: Sequence[WorkerLoad]) -> Route | None:
        self._turn += 1
        if not any(worker.decodes and worker.id not in work.avoid for worker in workers):
            route = self._stand_in(work, workers)
            if route is not None:
                return route
        able = [worker for worker in workers if worker.decodes and work.total_tokens <= worker.context_tokens]
        decode = self._pick(work, able, _decode_cost)
        if decode is None:
            return None
        if decode.prefills:
            return Route(decode.id, None, PrefillChoice.LOCAL_MIXED)
        if work.uncached_tokens <= self._local_prefill_tokens:
            return Route(decode.id, None, PrefillChoice.LOCAL_SHORT)
        fit = [worker for worker in workers if worker.prefills and work.num_tokens < worker.context_tokens]
        prefill = self._pick(work, fit, _prefill_cost)
        if prefill is None:
            return Route(decode.id, None, PrefillChoice.LOCAL_NO_WORKER)
        return Route(decode.id, prefill.id, PrefillChoice.REMOTE)

    def _stand_in(self, work: Work, workers: Sequence[WorkerLoad]) -> Route | None:
        able = [
            worker
            for worker in workers
            if worker.stands_in and worker.id not in work.avoid and work.total_tokens <= worker.context_tokens
        ]
        decode = self._pick(work, able, _decode_cost)
        return None if decode is None else Route(decode.id, None, PrefillChoice.STAND_IN)

    def _pick(
        self, work: Work, workers: list[WorkerLoad], cost: Callable[[Work, WorkerLoad], tuple[int, ...]]
    ) -> WorkerLoad | None:
        if not workers:
            return None
        costs = [
            (worker.id in work.avoid, work.trouble.get(worker.id, 0), work.crowd.get(worker.id, 0), *cost(work, worker))
            for worker in workers
        ]
        best = min(costs)
        equals = sorted((worker for worker, its in zip(workers, costs, strict=True) if its == best), key=_id)
        return equals[self._turn % len(equals)]


def _id(worker: WorkerLoad) -> str:
    return worker.id


def _blocks(work: Work, worker: WorkerLoad) -> int:
    """Blocks for the known tokens and the next one."""
    return work.num_tokens // worker.page_size_tokens + 1


def _decode_cost(work: Work, worker: WorkerLoad) -> tuple[int, ...]:
    crowded = _blocks(work, worker) > worker.free_blocks
    return (crowded, worker.requests, -worker.free_blocks)


def _prefill_cost(work: Work, worker: WorkerLoad) -> tuple[int, ...]:
    return (worker.waiting_prefill_tokens, worker.requests)
