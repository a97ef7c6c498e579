"""Whether a new block is worth more than the one it would replace, so that prompts seen once do not flush hot ones.

TinyLFU (Einziger, Friedman, Manes, "TinyLFU: A Highly Efficient Cache Admission Policy", ACM ToS 2017): a sketch
estimates how often every name was asked for lately, held or not, and a name comes in unless its victim is asked for
more often. Ties are let in, unlike in the paper: most blocks of a conversation are used for the second time in its
next turn, and would never have come in.

It is off unless asked for. By `benchmarks/retention.py` it finds more where a tier is far too small for its traffic
(LRU at 1 and 3 M tokens), but what it lets stay goes stale: at 10 M tokens it costs 2 to 33 % of what is found. S3-FIFO
without it withstands prompts seen once better than LRU with it, at every size.
"""

import struct
from typing import Final

import numpy as np

_ROWS: Final = 4
_MAX_COUNT: Final = 15
_WORDS: Final = struct.Struct(f"<{_ROWS}I")


class FrequencySketch:
    """A count-min sketch with conservative update; every count is halved after each `10 * capacity` additions.

    16 to 32 bytes an entry, so that the ten names an entry that it has seen seldom meet. It never says less than a
    name's count since the last halvings. Names are hashes already, so their words serve as the rows' hash functions.
    """

    def __init__(self, capacity: int) -> None:
        """`capacity` in entries of the cache that it guards."""
        self._mask = (1 << (4 * capacity - 1).bit_length()) - 1
        self._rows = [bytearray(self._mask + 1) for _ in range(_ROWS)]
        self._period = 10 * capacity
        self._additions = 0

    def add(self, name: bytes) -> None:
        cells = [(row, word & self._mask) for row, word in zip(self._rows, _WORDS.unpack(name), strict=True)]
        least = min(row[cell] for row, cell in cells)
        if least < _MAX_COUNT:
            for row, cell in cells:
                row[cell] = max(row[cell], least + 1)
        self._additions += 1
        if self._additions >= self._period:
            self._halve()

    def count(self, name: bytes) -> int:
        words: tuple[int, ...] = _WORDS.unpack(name)
        return min(row[word & self._mask] for row, word in zip(self._rows, words, strict=True))

    def _halve(self) -> None:
        self._additions //= 2
        for row in self._rows:
            view = np.frombuffer(row, np.uint8)
            view >>= 1


class Admission:
    """The filter of one tier. `record` every name asked for, once a request, then ask `admits`."""

    def __init__(self, capacity: int) -> None:
        self._sketch = FrequencySketch(capacity)

    def record(self, name: bytes) -> None:
        self._sketch.add(name)

    def admits(self, name: bytes, victim: bytes) -> bool:
        return self._sketch.count(name) >= self._sketch.count(victim)
