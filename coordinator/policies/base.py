"""What every routing policy gets and gives. A policy is a cost of workers; what is allowed at all says
`coordinator.routing`.

Rows are those of a `WorkerTable`, and there is at least one that decodes. They are equally good by every rule that is
no matter of policy.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from enum import Enum
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from coordinator.estimates import Vector
from coordinator.worker_table import Rows, WorkerTable


class Cached:
    """Leading tokens of a prompt in each worker's pool, in pool or host tier, in any tier; never the last token of the
    prompt, which is computed in any case."""

    __slots__ = ("most", "tokens")

    def __init__(self, tokens: npt.NDArray[np.float64]) -> None:
        self.tokens = tokens
        """[3, rows], or [1, rows] where no worker's slower tiers hold anything; without columns nothing is known."""
        self.most = int(tokens[0, tokens[0].argmax()]) if tokens.shape[1] else 0
        """In some pool, where others can fetch them."""

    @property
    def has_tiers(self) -> bool:
        return len(self.tokens) > 1

    def at(self, row: int) -> list[int]:
        """Three of them."""
        if not self.tokens.shape[1]:
            return [0, 0, 0]
        its = [int(each) for each in self.tokens[:, row].tolist()]
        return its if self.has_tiers else its * 3

    def anywhere(self, rows: Rows) -> Vector:
        """[len(rows)]: in any tier."""
        return self.tokens[-1].take(rows) if self.tokens.shape[1] else np.zeros(len(rows))


NOTHING_CACHED = Cached(np.zeros((1, 0)))

_NOBODY: Mapping[str, int] = MappingProxyType({})


class Work(Struct, frozen=True):
    num_tokens: int
    """To be in the KV cache before the next token: the prompt and what earlier attempts delivered."""
    total_tokens: int
    """The prompt and the longest answer."""
    cached: Cached = NOTHING_CACHED
    session: int = 0
    """64 bits, the same for requests that belong together."""
    avoid: Set[str] = frozenset()
    """Workers that failed this request; taken only if there is no other."""
    trouble: Mapping[str, int] = _NOBODY
    """How bad the workers are that fail everybody lately; those left out are good."""
    crowd: Mapping[str, int] = _NOBODY
    """What this work should keep away from: how much of it each worker has."""

    def uncached_at(self, row: int) -> int:
        """Tokens that no cache of this worker holds."""
        return self.num_tokens - self.cached.at(row)[2]


class PrefillChoice(Enum):
    """Who computes the prompt, and why: label of the metric."""

    REMOTE = "remote"
    LOCAL_MIXED = "local_mixed_worker"
    LOCAL_SHORT = "local_short_prompt"
    LOCAL_SOONER = "local_sooner"
    LOCAL_NO_WORKER = "local_no_prefill_worker"
    STAND_IN = "local_no_decode_worker"


class Placement(Struct, frozen=True):
    decode: int
    """Row."""
    prefill: int | None
    """Row; None: the decode worker prefills by itself."""
    choice: PrefillChoice


class RoutingPolicy(ABC):
    """Costs are compared one after the other; the least wins, equals take turns."""

    name: ClassVar[str]
    reads_session: ClassVar[bool] = False
    """Else it is not computed."""

    def __init__(self, table: WorkerTable, local_prefill_tokens: int) -> None:
        self._table = table
        self._local_prefill_tokens = local_prefill_tokens
        self._turn = 0

    @abstractmethod
    def decode_costs(self, work: Work, rows: Rows) -> Sequence[Vector]:
        """Of each of these workers that may decode."""

    @abstractmethod
    def prefill_costs(self, work: Work, rows: Rows) -> Sequence[Vector]:
        """Of each of these that may compute the prompt for the decode worker."""

    def place(self, work: Work, decoders: Rows, prefillers: Rows) -> Placement:
        """The decode worker first, then who computes its prompt: a short one is not worth a hand-over."""
        self._turn += 1
        decode = self._pick(decoders, self.decode_costs(work, decoders))
        if self._table.prefills[decode]:
            return Placement(decode, None, PrefillChoice.LOCAL_MIXED)
        if work.uncached_at(decode) <= self._local_prefill_tokens:
            return Placement(decode, None, PrefillChoice.LOCAL_SHORT)
        if not len(prefillers):
            return Placement(decode, None, PrefillChoice.LOCAL_NO_WORKER)
        prefill = self._pick(prefillers, self.prefill_costs(work, prefillers))
        return Placement(decode, prefill, PrefillChoice.REMOTE)

    def stand_in(self, work: Work, rows: Rows) -> Placement:
        """Of workers that decode only because no decode worker does."""
        self._turn += 1
        return Placement(self._pick(rows, self.decode_costs(work, rows)), None, PrefillChoice.STAND_IN)

    def _pick(self, rows: Rows, costs: Sequence[Vector]) -> int:
        if len(rows) == 1:
            return int(rows[0])
        best = np.arange(len(rows))
        for cost in costs:
            if len(best) == 1:
                break
            its = cost[best]
            best = best[its == its.min()]
        return int(rows[best[self._turn % len(best)]])
