"""What a cache has come to hold and what it has lost, by the names of its blocks, for those who want to know.

Each cache (the pool's, a tier) keeps one account of its own changes, in whatever thread makes them. It is net: a name
that came and went since the account was last taken is not in it. So it is no longer than what the cache held then and
what it holds now together, however late somebody takes it.
"""

import time
from collections.abc import Callable
from typing import NamedTuple


class Changed(NamedTuple):
    """Net changes since the ones before."""

    names: dict[bytes, bool]
    """Whether the cache holds the name now; it did not before, or the other way round."""
    since: float
    """When the first of them came about, in `time.monotonic()` seconds."""


class Held(NamedTuple):
    """A cache at one moment."""

    names: list[bytes]
    before: Changed | None
    """What had changed until then and nobody had taken: for those who know an older moment."""


class NameChanges:
    """Until somebody watches, a change costs one look and nothing is kept. One thread at a time is in here."""

    def __init__(self) -> None:
        self._names: dict[bytes, bool] | None = None
        self._since = 0.0
        self._on_first: Callable[[], None] | None = None

    def __len__(self) -> int:
        """Names to take."""
        return len(self._names or ())

    def watch(self, on_first: Callable[[], None] | None = None) -> None:
        """From now on, or go on. `on_first` is told, by whoever makes the change, when there comes to be something to
        take; it must not wait. Nothing that was not taken is lost."""
        self._on_first = on_first
        if self._names is None:
            self._names = {}

    def unwatch(self) -> None:
        self._names = self._on_first = None

    def note(self, name: bytes, is_held: bool) -> None:
        """The cache holds a name that it did not hold, or no longer holds one that it did."""
        names = self._names
        if names is None:
            return
        if not names:
            self._since = time.monotonic()
            if self._on_first is not None:
                self._on_first()
        if names.get(name) is (not is_held):
            del names[name]
        else:
            names[name] = is_held

    def add(self, changed: Changed) -> None:
        """Changes taken elsewhere, which come behind these."""
        since = self._since if self._names else changed.since
        for name, is_held in changed.names.items():
            self.note(name, is_held)
        self._since = since

    def take(self) -> Changed | None:
        """What has changed since this was last called; None: nothing."""
        if not self._names:
            return None
        changed = Changed(self._names, self._since)
        self._names = {}
        return changed
