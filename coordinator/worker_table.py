"""What routing knows of each worker: one row a worker, one column a figure, so that a decision is vector arithmetic.

A row is written when something changes (a registration, a heartbeat, an assignment, an end), not when a request comes.
"""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.intp]
Vector = npt.NDArray[np.float64]


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
    page_size_tokens: float
    kv_bytes_per_token: float


class Load(NamedTuple):
    """What it told in its last heartbeat, and what it was assigned since. Rates that are not known yet are 0."""

    accepts: float
    """1: it takes new work."""
    requests: float
    """Running or waiting."""
    waiting_prefill_tokens: float
    free_blocks: float
    """Free, or cached and evictable, less those that assignments since the last heartbeat will take."""
    stream_s: float
    """What each stream adds to a step; see `coordinator.estimates`."""
    prefill_s: float
    """For each token of a prompt."""
    handover_s: float
    """For each byte of blocks that it takes from others."""


IDLE = Load(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


class WorkerTable:
    """Columns are arrays over rows: those of `Fixed` and `Load`, by name. Rows of workers that are gone come again."""

    prefills: Vector
    decodes: Vector
    stands_in: Vector
    context_tokens: Vector
    page_size_tokens: Vector
    kv_bytes_per_token: Vector
    accepts: Vector
    requests: Vector
    waiting_prefill_tokens: Vector
    free_blocks: Vector
    stream_s: Vector
    prefill_s: Vector
    handover_s: Vector

    def __init__(self) -> None:
        self.ids: list[str] = []
        """By row; empty for a free one."""
        self.groups: list[Group | None] = []
        self.seeds = np.zeros(0, np.uint64)
        """A random number of each worker, the same in all coordinators."""
        self._rows: dict[str, int] = {}
        self._of_version: dict[str, Rows] = {}
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
        seeds = np.zeros(capacity, np.uint64)
        old = self._capacity
        fixed[:, :old], load[:, :old], seeds[:old] = self._fixed, self._load, self.seeds
        self._fixed, self._load, self.seeds = fixed, load, seeds
        for names, columns in ((Fixed._fields, fixed), (Load._fields, load)):
            for name, column in zip(names, columns, strict=True):
                setattr(self, name, column)
        self._capacity = capacity

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
        self._load[:, row] = IDLE
        self.seeds[row] = int.from_bytes(blake2b(id.encode(), digest_size=8).digest(), "little")
        self._of_version.clear()
        return row

    def put(self, row: int, load: Load) -> None:
        self._load[:, row] = load

    def remove(self, row: int) -> None:
        """The worker is gone."""
        if self._rows.get(self.ids[row]) == row:
            del self._rows[self.ids[row]]
        self.ids[row], self.groups[row] = "", None
        self._load[:, row] = 0
        self._free.append(row)
        self._of_version.clear()

    def candidates(self, version: str) -> Rows:
        """Rows of the workers of one model version that accept new work."""
        rows = self._version_rows(version)
        return rows[self.accepts[rows] > 0]

    def _version_rows(self, version: str) -> Rows:
        if (rows := self._of_version.get(version)) is None:
            of_version = [row for row, group in enumerate(self.groups) if group and group.version == version]
            rows = self._of_version[version] = np.array(of_version, np.intp)
        return rows

    def groups_of(self, version: str) -> set[Group]:
        return {group for group in map(self.groups.__getitem__, self._version_rows(version).tolist()) if group}

    def spread(self, by_id: Mapping[str, Any]) -> Vector:
        """A column of what a few workers have, and 0 for the others."""
        column = np.zeros(self._capacity)
        for id, value in by_id.items():
            if (row := self._rows.get(id)) is not None:
                column[row] = value
        return column
