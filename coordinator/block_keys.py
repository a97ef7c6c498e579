"""Keys of a prompt's blocks, by which the index knows them: of each name (`baton.block_names`) eight bytes."""

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from baton.block_names import block_name, packed_block_name

KEY_BYTES = 8
RUN = 16
"""Blocks that are remembered together."""
MAX_RUNS = 4096
"""With pages of 16 tokens: the beginnings of 1 M tokens, in about 8 MiB."""


class Place(NamedTuple):
    parent: bytes
    """Name of the block before the run."""
    tokens: bytes
    """Of the run, four bytes each."""


class Run(NamedTuple):
    keys: list[int]
    last: bytes
    """Name of the last block."""


class KeyMemo:
    """What many prompts begin with is hashed once. Bounded; what was not used for longest goes first."""

    def __init__(self) -> None:
        self._runs: OrderedDict[Place, Run] = OrderedDict()

    def get(self, place: Place) -> Run | None:
        if (run := self._runs.get(place)) is not None:
            self._runs.move_to_end(place)
        return run

    def put(self, place: Place, run: Run) -> None:
        self._runs[place] = run
        if len(self._runs) > MAX_RUNS:
            self._runs.popitem(last=False)


class BlockKeys:
    """Those of the full blocks of `tokens` below `root`, computed only as far as somebody reads them."""

    def __init__(self, root: bytes, page_size: int, tokens: Sequence[int], memo: KeyMemo | None = None) -> None:
        self._page_size = page_size
        self._tokens = tokens
        self._memo = memo or KeyMemo()
        self._last = root
        self._place: Place | None = None
        """Of the run that is being computed."""
        self._keys: list[int] = []

    @property
    def num_computed(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[int]:
        at = 0
        while at < len(self._keys) or self._compute():
            known = self._keys[at:]
            yield from known
            at += len(known)

    def _compute(self) -> bool:
        """One more, or a run that is remembered. False at the end."""
        keys, page_size, tokens = self._keys, self._page_size, self._tokens
        start = len(keys) * page_size
        if len(keys) % RUN == 0:
            its = tokens[start : start + RUN * page_size]
            self._place = Place(self._last, array("I", its).tobytes()) if len(its) == RUN * page_size else None
            if self._place and (run := self._memo.get(self._place)):
                keys.extend(run.keys)
                self._last = run.last
                return True
        if start + page_size > len(tokens):
            return False
        if self._place is not None:
            at = 4 * page_size * (len(keys) % RUN)
            self._last = packed_block_name(self._last, self._place.tokens[at : at + 4 * page_size])
        else:
            self._last = block_name(self._last, tokens[start : start + page_size])
        keys.append(int.from_bytes(self._last[:KEY_BYTES], "little"))
        if self._place and len(keys) % RUN == 0:
            self._memo.put(self._place, Run(keys[-RUN:], self._last))
        return True
