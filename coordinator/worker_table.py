"""What routing knows of each worker: one row a worker, one column a figure, so that a decision is vector arithmetic.

What changes with a request (an assignment, a first token, an end) is written when the next decision asks for
candidates, once for however many changes; figures are as of then.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from coordinator.estimates import Vector, saves_s

Rows = npt.NDArray[np.intp]


class Group(NamedTuple):
    """Workers that name the same block alike."""

    version: str
    model_fingerprint: str
    page_size_tokens: int


class Fixed(NamedTuple):
    """What a worker said of itself when it registered. Flags are 0 or 1."""

    prefills: float
    decodes: float
    stands_in: float
    """Decodes while no decode worker accepts work, or all of them failed the request."""
    context_tokens: float
    """Longest prompt plus output that it can hold."""
    kv_bytes_per_token: float
    max_running: float
    """Requests that it computes side by side; endless where it did not say."""


class Load(NamedTuple):
    """What it told in its last heartbeat, and what it was assigned since. Rates that are not known yet are 0."""

    accepts: float
    """1: it takes new work."""
    free_tokens: float
    """Room in blocks that are free, or cached and evictable, less what was assigned since the last heartbeat."""
    requests: float
    """Running or waiting."""
    waiting_prefill_tokens: float
    stream_s: float
    """What each stream adds to a step; see `coordinator.estimates`."""
    prefill_s: float
    """For each token of a prompt."""
    handover_s: float
    """For the KV of each token that it takes from others."""


IDLE = Load(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


class Candidates(NamedTuple):
    """Workers of one model version that accept new work. Rows; a mixed worker is in two of them."""

    decoders: Rows
    prefillers: Rows
    stand_ins: Rows
    context_tokens: float
    """What each of them can hold."""


class WorkerTable:
    """Columns are arrays over rows: those of `Fixed` and `Load`, by name. Rows of workers that are gone come again."""

    prefills: Vector
    decodes: Vector
    stands_in: Vector
    context_tokens: Vector
    kv_bytes_per_token: Vector
    max_running: Vector
    accepts: Vector
    free_tokens: Vector
    requests: Vector
    waiting_prefill_tokens: Vector
    stream_s: Vector
    prefill_s: Vector
    handover_s: Vector

    def __init__(self) -> None:
        self.ids: list[str] = []
        """By row; empty for a free one."""
        self.groups: list[Group | None] = []
        self.saves_s = np.zeros(0)
        """For each token of a prompt, where another worker's pool has it: by taking it instead of computing it."""
        self.seeds = np.zeros(0, np.uint64)
        """A random number of each worker, the same in all coordinators."""
        self._rows: dict[str, int] = {}
        self._candidates: dict[str, Candidates] = {}
        """By version, until a worker comes, goes, or accepts work no more."""
        self._of_version: dict[str, set[Group]] = {}
        self._ready: list[str] | None = None
        self._stale: dict[int, Callable[[], Load]] = {}
        """Rows whose load has changed, and who knows it now."""
        self._mixed: set[int] = set()
        self._free: list[int] = []
        self._capacity = 0
        self._fixed = np.zeros((len(Fixed._fields), 0))
        self._load = np.zeros((len(Load._fields), 0))
        self._grow(16)

    def __len__(self) -> int:
        """Rows, free ones included."""
        return len(self.ids)

    def _grow(self, capacity: int) -> None:
        fixed, load = np.zeros((len(Fixed._fields), capacity)), np.zeros((len(Load._fields), capacity))
        saves_s, seeds = np.zeros(capacity), np.zeros(capacity, np.uint64)
        old = self._capacity
        fixed[:, :old], load[:, :old], saves_s[:old], seeds[:old] = self._fixed, self._load, self.saves_s, self.seeds
        self._fixed, self._load, self.saves_s, self.seeds = fixed, load, saves_s, seeds
        for names, columns in ((Fixed._fields, fixed), (Load._fields, load)):
            for name, column in zip(names, columns, strict=True):
                setattr(self, name, column)
        self._capacity = capacity

    @property
    def has_mixed(self) -> bool:
        """Some worker has both roles."""
        return bool(self._mixed)

    def add(self, id: str, group: Group, fixed: Fixed) -> int:
        """The row of a worker that has just registered; its load is `put` later. One of its name gives up its id."""
        if self._free:
            row = self._free.pop()
        else:
            if len(self.ids) == self._capacity:
                self._grow(2 * self._capacity)
            row = len(self.ids)
            self.ids.append("")
            self.groups.append(None)
        self.ids[row], self.groups[row], self._rows[id] = id, group, row
        self._fixed[:, row] = fixed
        if fixed.prefills and fixed.decodes:
            self._mixed.add(row)
        self._load[:, row], self.saves_s[row] = IDLE, 0.0
        self.seeds[row] = int.from_bytes(blake2b(id.encode(), digest_size=8).digest(), "little")
        self._forget()
        return row

    def put(self, row: int, load: Load) -> None:
        if load.accepts != self.accepts[row]:
            self._forget()
        self._load[:, row] = load
        self.saves_s[row] = saves_s(load.prefill_s, load.handover_s)

    def changed(self, row: int, load: Callable[[], Load]) -> None:
        """The row is to be `put` before it counts again."""
        self._stale[row] = load

    def _settle(self) -> None:
        if self._stale:
            for row, load in self._stale.items():
                self.put(row, load())
            self._stale.clear()

    def remove(self, row: int) -> None:
        """The worker is gone."""
        self._stale.pop(row, None)
        if self._rows.get(self.ids[row]) == row:
            del self._rows[self.ids[row]]
        self.ids[row], self.groups[row] = "", None
        self._mixed.discard(row)
        self._load[:, row] = 0
        self._free.append(row)
        self._forget()

    def _forget(self) -> None:
        """What was derived from who is there."""
        self._candidates.clear()
        self._of_version.clear()
        self._ready = None

    def candidates(self, version: str) -> Candidates:
        self._settle()
        if (found := self._candidates.get(version)) is None:
            rows = [row for row, group in enumerate(self.groups) if group and group.version == version]
            found = self._candidates[version] = self.among(row for row in rows if self.accepts[row])
        return found

    def ready_versions(self) -> list[str]:
        """Those of which a worker that decodes, or stands in for those that do, accepts work."""
        self._settle()
        if self._ready is None:
            able = np.flatnonzero((self.accepts > 0) & ((self.decodes > 0) | (self.stands_in > 0))).tolist()
            self._ready = list(dict.fromkeys(group.version for row in able if (group := self.groups[row])))
        return self._ready

    def among(self, rows: Iterable[int]) -> Candidates:
        self._settle()
        all_ = np.fromiter(rows, np.intp)
        decoders, prefillers, stand_ins = (
            all_[role[all_] > 0] for role in (self.decodes, self.prefills, self.stands_in)
        )
        return Candidates(decoders, prefillers, stand_ins, float(self.context_tokens[all_].min(initial=np.inf)))

    def without(self, candidates: Candidates, ids: Collection[str]) -> Candidates:
        """Those that have none of these ids."""
        rows = np.unique(np.concatenate(candidates[:3]))
        return self.among(row for row in rows.tolist() if self.ids[row] not in ids)

    def groups_of(self, version: str) -> Collection[Group]:
        if (found := self._of_version.get(version)) is None:
            found = self._of_version[version] = {group for group in self.groups if group and group.version == version}
        return found

    def load(self, row: int) -> Load:
        return Load(*self._load[:, row].tolist())

    def loads(self, rows: Rows) -> npt.NDArray[np.float64]:
        """[fields of Load from `requests` on, rows]"""
        return self._load[2:].take(rows, axis=1)

    def spread(self, by_id: Mapping[str, Any]) -> Vector:
        """A column of what a few workers have, and 0 for the others."""
        column = np.zeros(self._capacity)
        for id, value in by_id.items():
            if (row := self._rows.get(id)) is not None:
                column[row] = value
        return column
