"""Whether a request is taken now: by the times to its first token and between tokens that are predicted for it.

A request is refused at once rather than served late, because late work delays what comes behind it. The rules, in
their order (docs/admission.md has the reasons):

1. Never refused: what was admitted before (the next attempt, a resumed, adopted or repeated request); whoever comes
   while there are fewer streams than workers; one request of a class that was shut out for as long as its target, if
   none of it waits.
2. The predicted wait and the request's own computation must keep to the target of its class; one that computes for
   longer than that by itself may wait for as long as the target. While requests of a class with a shorter target come,
   others wait at most for a quarter of that target: what they leave is kept for those (trunk reservation, as telephone
   exchanges have it).
3. The predicted time between tokens must leave the class's, or half as much again as the best that was seen here.
4. A deadline of the request itself must be met by the prediction.

Refusals begin at REFUSE of a target and end at READMIT, so that admission does not flap. `Retry-After` is when the wait
will be short enough if those who were refused before come back first; it is spread at random.

Predictions come from the route, where the policy makes any, and from the backlog seen here (`coordinator.forecast`).
Both are corrected by what was measured, for each class, and the longer wait is believed: each sees what the other does
not. Which of them was right lately is no guide: admission holds waits near one value, so that a prediction which knows
nothing of the queue looks best of all.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from baton.config import ServiceClass
from baton.errors import InvalidRequestError
from coordinator.delivery import Choice, Request, Urgency
from coordinator.failures import FailureKind, RequestFailed
from coordinator.forecast import STREAM_WORK, Backlog, Calibration
from coordinator.metrics import Metrics
from coordinator.routing import Route

REFUSE, READMIT = 0.9, 0.7
USUAL_ERRORS, MAX_ERROR = 2.0, 1.0
"""Added to a prediction: of those who are taken at the very target half would miss it, and one in twenty so."""
OTHERS_SHARE = 0.25
"""Of a target, how long requests of classes with longer ones may wait."""
IN_USE_S = 60.0
"""So long after its last request a class counts as in use."""
SLOWEST_ITL = 1.5
"""Times the best time between tokens that was seen: nobody is refused for being slower than that."""
MIN_RETRY_S, MAX_RETRY_S = 0.5, 30.0
ITL_SAMPLE_S, ITL_SAMPLE_TOKENS = 0.5, 16
LENGTH_MEMORY = 0.95
BACKLOG_MIN_RATIO = 0.8
"""While a queue grows, those whose first tokens are measured already are those that had to wait least."""
PRESSED = 0.5
"""Of a target: from there on what is nobody's concern has to wait."""


@dataclass(slots=True)
class _Class:
    """One service class and what is known of it here."""

    target: ServiceClass
    by_policy: Calibration
    by_backlog: Calibration
    refusing: bool = False
    num_waiting: int = 0
    """Requests that were admitted and have no first token."""
    seen_s: float = -math.inf
    admitted_s: float = -math.inf

    @property
    def ttft_s(self) -> float:
        """The target; endless where there is none."""
        return self.target.ttft_s or math.inf


class _Guess(msgspec.Struct, frozen=True):
    """Not corrected. 0: nothing is known."""

    ttft_s: float
    wait_s: float
    """Of that, what others cause."""


class _Forecast(msgspec.Struct, frozen=True):
    """Made when the request came."""

    of: _Class
    by_policy: _Guess
    by_backlog: _Guess
    own_s: float
    """What the request's own prompt takes."""
    ttft_s: float
    """What is believed, corrected; so is the rest."""
    wait_s: float
    """What others cause, and what predictions err by."""
    itl_s: float


class Admission:
    """In the event loop's thread. `itl` gives the sum of all times between tokens so far, and their number; `clock` is
    in seconds that never go back; `chance` gives numbers from 0 to 1."""

    def __init__(
        self,
        classes: Sequence[ServiceClass],
        metrics: Metrics,
        itl: Callable[[], tuple[float, int]],
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._classes = {each.name: _Class(each, Calibration(), Calibration(BACKLOG_MIN_RATIO)) for each in classes}
        self._default = classes[0].name
        self._metrics = metrics
        self._itl_total = itl
        self._clock = clock
        self._chance = chance
        self._backlog = Backlog()
        self._forecasts: dict[Request, _Forecast] = {}
        """Of admitted requests without a first token."""
        self._refused_work = 0.0
        """Of those who may come back, less what could have been served since."""
        self._refused_at_s = clock()
        self._itl_s = 0.0
        self._best_itl_s = math.inf
        self._itl_at = (clock(), 0.0, 0)
        self._answer_tokens = 0.0
        """Mean length of answers lately."""
        for name in self._classes:
            metrics.admission_pressure.labels(name).set_function(partial(self.pressure, name))
            for in_time in ("yes", "no"):
                metrics.class_first_tokens.labels(name, in_time)

    def __len__(self) -> int:
        """Streams that wait for their first token."""
        return len(self._backlog)

    def check(self, urgency: Urgency) -> None:
        """Raise InvalidRequestError for what cannot be asked for."""
        if urgency.service_class and urgency.service_class not in self._classes:
            raise InvalidRequestError(f"service_class must be one of {', '.join(self._classes)}", "service_class")
        for name, seconds in (("max_ttft_s", urgency.max_ttft_s), ("deadline_s", urgency.deadline_s)):
            if seconds is not None and not 0 < seconds < math.inf:
                raise InvalidRequestError(f"{name} must be a number of seconds above 0, such as 2.5", name)

    def admit(self, request: Request, route: Route | None, num_streams: int, num_workers: int) -> None:
        """Enter a request whose first attempt would take `route`. Raises RequestFailed if it is not to be taken.

        `num_streams` are admitted and have not ended; `num_workers` could be idle.
        """
        now = self._clock()
        this = self._classes[request.urgency.service_class or self._default]
        this.seen_s = now
        forecast = self._forecast(this, request, route, now)
        if not request.asked_again:
            self._judge(forecast, request, num_streams, num_workers, now)
        this.admitted_s = now
        for choice in request.choices:
            self._backlog.add(choice, _work(choice), now)
        self._forecasts[request] = forecast
        this.num_waiting += 1

    def hear(self, now_s: float) -> None:
        """A worker says something: so far everything that started is known."""
        self._backlog.hear(now_s)

    def first_token(self, choice: Choice, now_s: float) -> None:
        """Idempotent; a choice that was not admitted here does not matter."""
        self._backlog.started(choice, now_s)
        request = choice.request
        forecast = self._forget(request)
        if forecast is None:
            return
        measured_s, this = now_s - request.started_s, forecast.of
        in_time = measured_s <= max(this.ttft_s, forecast.own_s + min(forecast.own_s, this.ttft_s))
        self._metrics.class_first_tokens.labels(this.target.name, "yes" if in_time else "no").inc()
        if choice.stream.attempt > 1:
            return  # what a failure cost says nothing about the queue
        if forecast.ttft_s:
            self._metrics.ttft_ratio.observe(measured_s / forecast.ttft_s)
        if forecast.by_policy.ttft_s:
            this.by_policy.learn(forecast.by_policy.ttft_s, measured_s, now_s)
        if forecast.by_backlog.ttft_s:
            this.by_backlog.learn(forecast.by_backlog.ttft_s, measured_s, now_s)

    def ended(self, request: Request) -> None:
        """Idempotent."""
        now = self._clock()
        self._forget(request)
        for choice in request.choices:
            self._backlog.remove(choice, now)
            if choice.finish_reason is not None and (num_tokens := len(choice.stream.tokens)):
                mean = self._answer_tokens or num_tokens
                self._answer_tokens = LENGTH_MEMORY * mean + (1.0 - LENGTH_MEMORY) * num_tokens

    def _forget(self, request: Request) -> _Forecast | None:
        if (forecast := self._forecasts.pop(request, None)) is not None:
            forecast.of.num_waiting -= 1
        return forecast

    def pressure(self, name: str) -> float:
        """The wait of a request that came now, as a share of its class's target."""
        this, rate = self._classes[name], self._backlog.rate
        return this.by_backlog.ratio * self._backlog.work / rate / this.ttft_s if rate else 0.0

    @property
    def pressed(self) -> bool:
        """Some class in use waits for a good part of its target, or is refused."""
        now = self._clock()
        return any(
            now - each.seen_s < IN_USE_S and (each.refusing or self.pressure(name) > PRESSED)
            for name, each in self._classes.items()
        )

    # Predictions

    def _forecast(self, this: _Class, request: Request, route: Route | None, now: float) -> _Forecast:
        work, rate = sum(map(_work, request.choices)), self._backlog.rate
        behind_s, alone_s = (self._backlog.work / rate, work / rate) if rate else (0.0, 0.0)
        by_policy, by_backlog = _Guess(0.0, 0.0), _Guess(behind_s + alone_s, behind_s)
        self._sample_itl(now)
        own_s, itl_s = alone_s, self._itl_s
        if route is not None:
            own_s, itl_s = min(route.own_s or alone_s, route.ttft_s or math.inf), route.itl_s or itl_s
            policy_s = route.ttft_s + route.turns * self._answer_tokens * itl_s
            by_policy = _Guess(policy_s, max(0.0, policy_s - own_s))
        wait_s, ttft_s = max(_corrected(this.by_policy, by_policy), _corrected(this.by_backlog, by_backlog))
        return _Forecast(this, by_policy, by_backlog, own_s, ttft_s, wait_s, itl_s)

    def _sample_itl(self, now: float) -> None:
        at_s, sum_s, count = self._itl_at
        if now - at_s < ITL_SAMPLE_S:
            return
        new_sum_s, new_count = self._itl_total()
        if new_count - count >= ITL_SAMPLE_TOKENS:
            self._itl_s = (new_sum_s - sum_s) / (new_count - count)
            self._best_itl_s = min(self._best_itl_s, self._itl_s)
            self._itl_at = now, new_sum_s, new_count

    # Decisions

    def _judge(self, forecast: _Forecast, request: Request, num_streams: int, num_workers: int, now: float) -> None:
        """Raises RequestFailed."""
        this = forecast.of
        if not this.num_waiting and now - this.admitted_s > min(this.target.ttft_s or MAX_RETRY_S, MAX_RETRY_S):
            return
        if num_streams < num_workers:
            return
        part = READMIT if this.refusing else REFUSE
        this.refusing = True
        if forecast.wait_s > self._room_s(forecast, part, now):
            predicted = f"a first token in {forecast.ttft_s:.1f} s"
            self._refuse(request, "ttft", predicted, forecast.wait_s - self._room_s(forecast, READMIT, now), now)
        if forecast.itl_s > self._itl_room_s(this, part):
            self._refuse(request, "itl", f"{forecast.itl_s:.3f} s from token to token", MIN_RETRY_S, now)
        this.refusing = False
        self._judge_deadlines(forecast, request, now)

    def _judge_deadlines(self, forecast: _Forecast, request: Request, now: float) -> None:
        max_ttft_s, deadline_s = request.urgency.max_ttft_s or math.inf, request.urgency.deadline_s or math.inf
        ttft_s = now - request.started_s + forecast.ttft_s
        if ttft_s > max_ttft_s:
            self._refuse(request, "max_ttft", f"a first token in {ttft_s:.1f} s", ttft_s - max_ttft_s, now)
        longest = max(choice.stream.max_tokens for choice in request.choices)
        total_s = ttft_s + min(longest, self._answer_tokens) * forecast.itl_s
        if total_s > deadline_s:
            self._refuse(request, "deadline", f"an answer in {total_s:.1f} s", total_s - deadline_s, now)

    def _room_s(self, forecast: _Forecast, part: float, now: float) -> float:
        """How long the request may wait, where refusals are at this part of targets."""
        own_s, target_s = forecast.own_s, forecast.of.ttft_s
        shorter = [
            each.ttft_s for each in self._classes.values() if each.ttft_s < target_s and now - each.seen_s < IN_USE_S
        ]
        room_s = max(part * target_s - own_s, min(own_s, part * target_s))
        return min(room_s, OTHERS_SHARE * part * min(shorter, default=math.inf))

    def _itl_room_s(self, this: _Class, part: float) -> float:
        return max(part * (this.target.itl_s or math.inf), SLOWEST_ITL * self._best_itl_s)

    def _refuse(self, request: Request, cause: str, predicted: str, excess_s: float, now: float) -> None:
        name = request.urgency.service_class or self._default
        self._metrics.admission_refused.labels(name, cause).inc()
        retry_after_s = self._retry_after_s(sum(map(_work, request.choices)), excess_s, now)
        message = (
            f"too much is waiting: {predicted} is predicted, too late for class {name} or this request's own limit; "
            f"try again in {retry_after_s:.1f} s, or with a service_class that may wait longer"
        )
        raise RequestFailed(FailureKind.OVERLOADED, message, retry_after_s)

    def _retry_after_s(self, work: float, excess_s: float, now: float) -> float:
        rate = self._backlog.rate
        elapsed_s, self._refused_at_s = now - self._refused_at_s, now
        self._refused_work = min(max(0.0, self._refused_work - rate * elapsed_s) + work, rate * MAX_RETRY_S)
        line_s = self._refused_work / rate if rate else 0.0
        spread = 0.75 + 0.5 * self._chance()
        return min(MAX_RETRY_S, max(MIN_RETRY_S, (max(0.0, excess_s) + line_s) * spread))


def _work(choice: Choice) -> float:
    """In tokens. Choices of one prompt share its KV."""
    first = choice.number % choice.request.form.choices_per_prompt == 0
    return STREAM_WORK + (choice.num_prompt_tokens if first else 0)


def _corrected(by: Calibration, guess: _Guess) -> tuple[float, float]:
    """The wait, with what predictions err by added to it, and the time to the first token."""
    return by.ratio * guess.wait_s * (1.0 + min(USUAL_ERRORS * by.error, MAX_ERROR)), by.ratio * guess.ttft_s
