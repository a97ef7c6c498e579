"""What happened in the last minute, from looks at figures that only go up. It has a past only while somebody looks."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

WINDOW_S = 60.0
RATE_S = 5.0
"""Of rates: shorter would jump with each heartbeat, longer would hide a stall."""

Life = tuple[str, str]
"""Of a worker, its id and incarnation: one that is started anew counts from 0."""


class _Look(NamedTuple):
    at_s: float
    figures: Mapping[str, float]


class _Roll(NamedTuple):
    at_s: float
    workers: Mapping[Life, Sequence[float]]


class Recent:
    """Pure: times are those of the looks. Each worker has a value for each of `names`, whose sums are figures, too."""

    def __init__(self, names: Sequence[str]) -> None:
        self._sums = dict.fromkeys(names, 0.0)
        """Of what was seen to happen: not what a worker had counted before it came, nor what it took along."""
        self._looks: deque[_Look] = deque()
        self._rolls: deque[_Roll] = deque()
        """Kept for RATE_S only: of many workers they are large."""

    def look(self, at_s: float, figures: Mapping[str, float], workers: Mapping[Life, Sequence[float]]) -> None:
        before = self._rolls[-1].workers if self._rolls else {}
        for life, values in workers.items():
            for name, now, then in zip(self._sums, values, before.get(life, values), strict=True):
                if now > then:
                    self._sums[name] += now - then
        self._looks.append(_Look(at_s, {**figures, **self._sums}))
        self._rolls.append(_Roll(at_s, workers))
        while at_s - self._looks[0].at_s > WINDOW_S:
            self._looks.popleft()
        while at_s - self._rolls[0].at_s > RATE_S:
            self._rolls.popleft()

    @property
    def window_s(self) -> float:
        """How long ago the oldest look was."""
        return self._looks[-1].at_s - self._looks[0].at_s

    def gains(self) -> dict[str, float]:
        """Of every figure that went up in the window."""
        first, last = self._looks[0].figures, self._looks[-1].figures
        gains = {name: value - first.get(name, 0.0) for name, value in last.items()}
        return {name: gain for name, gain in gains.items() if gain > 0}

    def rate(self, name: str) -> float | None:
        """Of one figure of the cluster, per second, over the last RATE_S; None where there was one look only."""
        last = self._looks[-1]
        for look in self._looks:
            if 0 < (seconds := last.at_s - look.at_s) <= RATE_S:
                return (last.figures[name] - look.figures.get(name, 0.0)) / seconds
        return None

    def rates(self, life: Life, number: int) -> list[float]:
        """Of a worker's first figures, per second, over the last RATE_S; [] where it has been seen only once."""
        last = self._rolls[-1]
        for roll in self._rolls:
            if (seconds := last.at_s - roll.at_s) > 0 and life in roll.workers:
                pairs = zip(last.workers[life][:number], roll.workers[life], strict=False)
                return [max(0.0, now - then) / seconds for now, then in pairs]
        return []
