"""A fleet in virtual time behind the real admission: first come, first served, on a number of slots.

A stream waits for a slot, then for the prefill of those before it, and keeps its slot until its answer is complete.
"""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from baton.config import ServiceClass
from baton.v1 import worker_link_pb2 as wire
from coordinator.admission import Admission
from coordinator.delivery import LENGTH, Choice, Request, Urgency
from coordinator.detokenizer import TextStream, WindowDetokenizer
from coordinator.failures import RequestFailed
from coordinator.metrics import Metrics
from coordinator.policies.base import PrefillChoice, Work
from coordinator.routing import Route

STANDARD = ServiceClass("standard", 1.0, 0.0)
NO_MATTER = Urgency()
ANSWER_TOKENS = 64


def request(
    prompt_tokens: int = 100, max_tokens: int = ANSWER_TOKENS, urgency: Urgency = NO_MATTER, n: int = 1
) -> Request:
    made = Request("r")
    made.urgency = urgency
    for _ in range(n):
        text = TextStream(WindowDetokenizer(lambda ids: ""))
        Choice(made, 0, [7] * prompt_tokens, wire.EngineSampling(max_tokens=max_tokens), text, False)
    return made


@dataclass
class Outcome:
    """Of one arrival."""

    at_s: float
    service_class: str
    ttft_s: float | None = None
    """None: refused, or not over."""
    retry_after_s: float | None = None


@dataclass
class Fleet:
    num_workers: int = 1
    slots: int = 4
    prefill_tokens_per_s: float = 10_000.0
    answer_s: float = 0.5
    classes: tuple[ServiceClass, ...] = (STANDARD,)
    policy: Callable[["Fleet", int], Route] | None = None
    """What a routing policy predicts for a prompt of so many tokens."""
    now: float = 0.0
    waiting: deque[tuple[Request, Outcome]] = field(default_factory=deque)
    running: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    chance: random.Random = field(default_factory=lambda: random.Random(5))

    def __post_init__(self) -> None:
        self.metrics = Metrics()
        self.itl_sum, self.itl_count = 0.0, 0
        self.admission = Admission(
            self.classes, self.metrics, lambda: (self.itl_sum, self.itl_count), lambda: self.now, self.chance.random
        )
        self.prefill_free_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    @property
    def capacity(self) -> float:
        """Answers a second that the slots can give."""
        return self.slots / self.answer_s

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), do))

    def run(self, until_s: float) -> None:
        while self._events and self._events[0][0] <= until_s:
            self.now, _, do = heapq.heappop(self._events)
            self.admission.hear(self.now)  # workers say something all the time
            do()
        self.now = until_s

    def offer(self, rate: float, seconds: float, name: str = "standard", prompt_tokens: int = 100) -> list[Outcome]:
        """Poisson arrivals, from now on; what becomes of them is known when the fleet has run."""
        arrived: list[Outcome] = []

        def arrive(until_s: float) -> None:
            if self.now < until_s:
                arrived.append(self.ask(Urgency(name), prompt_tokens))
                self.after(self.chance.expovariate(rate), lambda: arrive(until_s))

        until_s = self.now + seconds
        self.after(self.chance.expovariate(rate), lambda: arrive(until_s))
        return arrived

    def ask(self, urgency: Urgency = NO_MATTER, prompt_tokens: int = 100) -> Outcome:
        asked = request(prompt_tokens, urgency=urgency)
        asked.started_s = self.now
        outcome = Outcome(self.now, urgency.service_class or self.classes[0].name)
        self.outcomes.append(outcome)
        route = (
            self.policy(self, prompt_tokens) if self.policy else Route("w", None, PrefillChoice.LOCAL_MIXED, Work(1, 1))
        )
        try:
            self.admission.admit(asked, route, self.running + len(self.waiting), self.num_workers)
        except RequestFailed as failure:
            outcome.retry_after_s = failure.retry_after_s
            return outcome
        self.waiting.append((asked, outcome))
        self._fill()
        return outcome

    def _fill(self) -> None:
        while self.waiting and self.running < self.slots:
            self.running += 1
            asked, outcome = self.waiting.popleft()
            begun_s = max(self.now, self.prefill_free_s)
            self.prefill_free_s = begun_s + len(asked.choices[0].prompt) / self.prefill_tokens_per_s
            self.after(self.prefill_free_s - self.now, lambda asked=asked, outcome=outcome: self._first(asked, outcome))

    def _first(self, asked: Request, outcome: Outcome) -> None:
        outcome.ttft_s = self.now - outcome.at_s
        self.admission.first_token(asked.choices[0], self.now)
        self.after(self.answer_s * (0.5 + self.chance.random()), lambda: self._end(asked))

    def _end(self, asked: Request) -> None:
        asked.choices[0].stream.tokens.extend([7] * ANSWER_TOKENS)
        asked.choices[0].end(LENGTH)
        self.admission.ended(asked)
        self.running -= 1
        self._fill()


def goodput(outcomes: list[Outcome], seconds: float, target_s: float = STANDARD.ttft_s) -> float:
    """Requests a second whose first token came in time."""
    return sum(each.ttft_s is not None and each.ttft_s <= target_s for each in outcomes) / seconds
