"""Which request kills workers. Pure bookkeeping.

A worker's death takes all its requests with it, and at most one of them caused it. The rule:

1. A death charges every request that had a leg there, or one aborted there just before: 2 points if the worker was
   computing it, 1 if it waited for another worker's blocks. Points of an earlier death go once the request gets
   PROGRESS_TOKENS further.
2. At ISOLATE_POINTS points or ISOLATE_DEATHS deaths a request is isolated: it runs alone on a worker
   (`coordinator.quarantine`), until it has gone PROGRESS_TOKENS further there. That acquits it, once.
3. A request ends as poison when for the second time its worker died although it was alone there and before it got
   further, or for the third time whether it did or not.

So no request ends because of another's: nobody else was there. And whoever else kills workers must hit one twice while
it is alone, after two deaths before that; three deaths end nobody. A stream that kills what computes it at one place
kills four workers. Whatever it does it kills at most eight: before rule 2 three in company, a fourth where prefill and
decode die of one attempt, one after its acquittal, three alone. A request of several streams may kill one more for each
stream that was elsewhere when it was isolated.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from coordinator.delivery import Choice, Request
from coordinator.workers import Leg

PROGRESS_TOKENS = 16
"""More than a step in flight, speculation included, can lose when its worker dies."""
ISOLATE_POINTS = 4
ISOLATE_DEATHS = 3
STUCK, FURTHER, CONVICT = 3, 2, 6
"""What a death alone weighs, if the request got no further and if it did; and what makes it poison."""
MAX_PROMPTS = 256
PROMPT_MEMORY_S = 600.0


@dataclass(slots=True)
class Record:
    deaths: int = 0
    points: int = 0
    guilt: int = 0
    """Of deaths that nobody else can have caused."""
    acquitted: bool = False
    """Since its last death."""
    acquittals: int = 0

    @property
    def isolated(self) -> bool:
        return not self.acquitted and (self.points >= ISOLATE_POINTS or self.deaths >= ISOLATE_DEATHS)

    def charge(self, points: int, further: bool, alone: bool) -> bool:
        """A death. Whether it is poison."""
        self.deaths += 1
        self.points = points if further else self.points + points
        self.acquitted = False
        if alone:
            self.guilt += FURTHER if further else STUCK
        return self.guilt >= CONVICT

    def acquit(self) -> bool:
        """It has gone further alone. False if it had its chance."""
        if self.acquittals:
            return False
        self.acquittals, self.acquitted = 1, True
        return True


class Suspects:
    """Records of the requests that run, and of prompts that were poison lately: sent again, they begin isolated."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._records: dict[Request, Record] = {}
        self._prompts: OrderedDict[bytes, float] = OrderedDict()
        """Digest of a prompt, until when it is remembered."""

    def __len__(self) -> int:
        """Requests that were there when a worker died."""
        return len(self._records)

    def begin(self, request: Request) -> None:
        """A request is admitted."""
        if self._prompts and any(self._known(choice) for choice in request.choices):
            self._records[request] = Record(points=ISOLATE_POINTS, guilt=CONVICT - STUCK)

    def forget(self, request: Request) -> None:
        self._records.pop(request, None)

    def suspected(self, request: Request) -> bool:
        return request in self._records

    def isolated(self, request: Request) -> bool:
        record = self._records.get(request)
        return record is not None and record.isolated

    def acquit(self, request: Request) -> bool:
        """It went PROGRESS_TOKENS further alone. Whether it may have company again."""
        return self._records[request].acquit()

    def died(self, legs: Iterable[Leg], alone: bool) -> list[Request]:
        """A worker died with these legs; `alone` if they are one request's and nothing else was there. The poison."""
        by_request: dict[Request, list[Leg]] = {}
        for leg in legs:
            by_request.setdefault(leg.choice.request, []).append(leg)
        poison = []
        for request, its in by_request.items():
            record = self._records.setdefault(request, Record())
            points = 2 if any(_computing(leg) for leg in its) else 1
            if record.charge(points, any(progressed(leg) for leg in its), alone):
                poison.append(request)
                self._remember(its)
        return poison

    def _remember(self, legs: Iterable[Leg]) -> None:
        for leg in legs:
            self._prompts[_digest(leg.choice)] = self._clock() + PROMPT_MEMORY_S
        while len(self._prompts) > MAX_PROMPTS:
            self._prompts.popitem(last=False)

    def _known(self, choice: Choice) -> bool:
        until_s = self._prompts.get(_digest(choice))
        return until_s is not None and self._clock() < until_s


def progressed(leg: Leg) -> bool:
    """The attempt is well past the place where it began, and so past what made the one before it fail."""
    return len(leg.choice.stream.tokens) - leg.first_index >= PROGRESS_TOKENS


def _computing(leg: Leg) -> bool:
    """Whether the worker had to compute, as far as can be known here. Of a pair, prefill computes the first token."""
    begun = len(leg.choice.stream.tokens) > leg.first_index
    return not leg.paired or begun is leg.decode


def _digest(choice: Choice) -> bytes:
    return hashlib.blake2b(choice.packed_prompt + choice.request.cache_salt.encode(), digest_size=16).digest()
