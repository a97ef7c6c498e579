"""How long a new stream will wait for its first token, from what this coordinator sees itself. Pure: times are given.

Little's law: whoever waits behind `work` that is served at `rate` waits work / rate. It holds for the part of a queue
that one coordinator sees, whatever others put into it.
"""

from collections import deque
from collections.abc import Hashable

from msgspec import Struct

STREAM_WORK = 64.0
"""What a stream costs beside the tokens of its prompt, in tokens."""
STARTS = (8, 64)
"""That a rate is taken from. After a change the fewer are right again soon; what they err by chance the more do not.
The lower rate is believed: who is refused too early leaves a queue that is served all the same."""
NUM_SAMPLES, SAMPLE_MEMORY_S = 16, 30.0
PRIOR_S = 0.5
MIN_RATIO, MAX_RATIO = 0.125, 4.0
"""A prediction that is off by more is about something else than what makes streams wait."""


class _Start(Struct, frozen=True):
    """A first token while several waited."""

    busy_s: float
    """How long several had waited by then, ever."""
    served: float
    """The work that was served meanwhile."""


class _Sample(Struct, frozen=True):
    at_s: float
    predicted_s: float
    measured_s: float
    error_s: float
    """Of the prediction as it was corrected then."""


class Backlog:
    """Streams that wait for their first token, and the rate at which such streams are served while several wait.

    While one or none waits a fleet is not at its limit, so that time says nothing about it; nor does time in which
    nobody listened to it: an event loop that takes up a thousand requests at once finds all their first tokens
    afterwards. A number of starts counts, not those of some seconds: free slots fill a thousand times as fast as slots
    become free.
    """

    def __init__(self) -> None:
        self.work = 0.0
        self._waiting: dict[Hashable, float] = {}
        self._starts = deque([_Start(0.0, 0.0)], maxlen=max(STARTS) + 1)
        """The last ones; before any, when counting began."""
        self._busy_s = self._at_s = 0.0
        """How long several had waited when the fleet was heard the last time, and when that was."""

    def __len__(self) -> int:
        return len(self._waiting)

    def hear(self, now_s: float) -> None:
        """Some worker says something."""
        if len(self._waiting) > 1:
            self._busy_s += max(0.0, now_s - self._at_s)
        self._at_s = now_s

    def add(self, key: Hashable, work: float, now_s: float) -> None:
        if len(self._waiting) <= 1:
            self._at_s = now_s
        self._waiting[key] = work
        self.work += work

    def started(self, key: Hashable, now_s: float) -> None:
        """The first token is here. Idempotent."""
        if key not in self._waiting:
            return
        self.hear(now_s)
        if len(self._waiting) > 1:
            self._starts.append(_Start(self._busy_s, self._starts[-1].served + self._waiting[key]))
        self.remove(key, now_s)

    def remove(self, key: Hashable, now_s: float) -> None:
        """It ended. Idempotent."""
        if key in self._waiting:
            if len(self._waiting) == 2:
                self.hear(now_s)
            work = self._waiting.pop(key)
            self.work = self.work - work if self._waiting else 0.0

    @property
    def rate(self) -> float:
        """Work a second; 0 while nothing is known."""
        return min(self._rate(min(number, len(self._starts) - 1)) for number in STARTS)

    def _rate(self, number: int) -> float:
        """Over the last so many starts, and the time since."""
        since = self._starts[-1 - number]
        elapsed_s = self._busy_s - since.busy_s
        return (self._starts[-1].served - since.served) / elapsed_s if elapsed_s else 0.0


class Calibration:
    """How right somebody's predictions were lately: the ratio to correct them by, and the error that is left.

    Of sums, so that a prediction counts by its length: nobody cares how wrong a millisecond was.
    """

    def __init__(self, min_ratio: float = MIN_RATIO) -> None:
        self._min_ratio = min_ratio
        self._samples: deque[_Sample] = deque()
        self._predicted_s = self._measured_s = PRIOR_S
        self._error_s = 0.0

    def learn(self, predicted_s: float, measured_s: float, now_s: float) -> None:
        samples = self._samples
        while samples and (len(samples) >= NUM_SAMPLES or now_s - samples[0].at_s > SAMPLE_MEMORY_S):
            self._count(samples.popleft(), -1)
        samples.append(_Sample(now_s, predicted_s, measured_s, abs(measured_s - self.ratio * predicted_s)))
        self._count(samples[-1], 1)

    def _count(self, sample: _Sample, sign: int) -> None:
        self._predicted_s += sign * sample.predicted_s
        self._measured_s += sign * sample.measured_s
        self._error_s += sign * sample.error_s

    @property
    def ratio(self) -> float:
        """Of measured to predicted times."""
        return min(MAX_RATIO, max(self._min_ratio, self._measured_s / self._predicted_s))

    @property
    def error(self) -> float:
        """Of corrected predictions, as a share of what was measured; 0 while nothing is known."""
        return self._error_s / self._measured_s
