"""A route for a choice's next attempt: what is to be routed, what is known of it, and the decision."""

import time

from coordinator.breakers import Breakers
from coordinator.delivery import Choice
from coordinator.knowledge import CacheKnowledge, Prompt
from coordinator.metrics import Metrics
from coordinator.policies.base import Work
from coordinator.routing import Route, Router
from coordinator.sessions import session_of
from coordinator.suspects import Suspects
from coordinator.worker_table import Candidates
from coordinator.workers import WorkerRegistry


class Placer:
    def __init__(
        self, router: Router, knowledge: CacheKnowledge, registry: WorkerRegistry, suspects: Suspects,
        breakers: Breakers, metrics: Metrics,
    ) -> None:  # fmt: skip
        self._router = router
        self._knowledge = knowledge
        self._registry = registry
        self._suspects = suspects
        self._breakers = breakers
        self._metrics = metrics

    def route(self, choice: Choice, candidates: Candidates) -> Route | None:
        """To some of these workers, which are of the request's version; None if none of them can decode this."""
        begun_s = time.perf_counter()
        work = self._work(choice)
        matched_s = time.perf_counter()
        route = self._router.choose(work, candidates)
        self._metrics.match_s(matched_s - begun_s)
        self._metrics.choose_s(time.perf_counter() - matched_s)
        return route

    def _work(self, choice: Choice) -> Work:
        request, session = choice.request, 0
        if self._router.policy.reads_session:
            session = session_of(request.user, request.cache_salt, choice.packed_prompt)
        return Work(
            num_tokens=choice.num_prompt_tokens + len(choice.stream.tokens),
            total_tokens=choice.num_prompt_tokens + choice.stream.max_tokens,
            cached=self._knowledge.match(Prompt(choice.packed(), request.cache_salt, request.version)),
            session=session,
            avoid=choice.avoid,
            trouble=self._breakers.trouble(),
            crowd=self._crowd() if self._suspects.suspected(request) else {},
        )

    def _crowd(self) -> dict[str, int]:
        """How many suspects each worker has."""
        return {
            worker.id: sum(self._suspects.suspected(leg.choice.request) for leg in worker.legs.values())
            for worker in self._registry.workers.values()
        }
