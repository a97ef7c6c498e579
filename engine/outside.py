"""Which blocks of a request come sooner from outside this engine than they are computed. Bookkeeping only."""

from collections.abc import Sequence as Many
from typing import NamedTuple

from engine.block_tables import BlockTables
from engine.sequence import Sequence
from engine.store import BlockStore


class Outside(NamedTuple):
    """Names of a request's next blocks that others have, and what computing those elsewhere would take."""

    stored: Many[bytes] = ()
    elsewhere: Many[bytes] = ()
    compute_s: float = 0.0


NOTHING = Outside()


class Sources:
    """The store, if there is one, and the worker that a request names."""

    def __init__(self, tables: BlockTables, store: BlockStore | None) -> None:
        self.block_compute_s: float | None = None
        """Seconds that computing a block of a prompt takes, as measured; None while unknown."""
        self._tables = tables
        self._store = store

    def worth_waiting_for(self, sequence: Sequence) -> Outside:
        """The blocks, after those in the pool, that come sooner than they are computed."""
        elsewhere = None if sequence.started or sequence.awaits_kv else sequence.request.elsewhere
        if sequence.request.placement is not None or (self._store is None and elsewhere is None):
            return NOTHING
        names = self._tables.names_behind_cached(sequence)
        if not names or len(names) > self._tables.allocator.num_available:  # no room: the store is not asked each step
            return NOTHING
        num_stored = self._store.worth_loading(names, self.block_compute_s) if self._store is not None else 0
        stored, rest = names[:num_stored], names[num_stored:]
        if elsewhere is None:
            return Outside(stored)
        expected = elsewhere.num_tokens // self._tables.page_size - (len(sequence.names.names) - len(rest))
        compute_s = expected * (self.block_compute_s or 0.0)
        is_known = self.block_compute_s is not None
        if expected <= 0 or (is_known and compute_s <= elsewhere.wait_s + expected * elsewhere.block_s):
            return Outside(stored)
        return Outside(stored, rest, compute_s)
