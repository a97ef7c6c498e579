"""Keys of a prompt's blocks, by which the index knows them: of each name (`baton.block_names`) eight bytes."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from baton.block_names import packed_block_name
from baton.token_ids import TOKEN_BYTES

KEY_BYTES = 8
RUN = 16
"""Blocks that are remembered together."""
MAX_RUNS = 4096
"""With pages of 16 tokens: the beginnings of 1 M tokens, in about 8 MiB."""


@dataclass(slots=True)
class Run:
    keys: list[int]
    """As far as somebody has read them."""
    last: bytes
    """Name of the block of the last of them; before there is one, of the block before the run."""


class KeyMemo:
    """What many prompts begin with is hashed once. Bounded; what was not used for longest goes first."""

    def __init__(self) -> None:
        self._runs: OrderedDict[tuple[bytes, bytes, int], Run] = OrderedDict()

    def run(self, parent: bytes, packed: bytes, block_bytes: int) -> Run:
        """Of these tokens, so many bytes of them a block, behind the block of this name."""
        place = parent, packed, block_bytes
        if (run := self._runs.get(place)) is None:
            run = self._runs[place] = Run([], parent)
            if len(self._runs) > MAX_RUNS:
                self._runs.popitem(last=False)
        else:
            self._runs.move_to_end(place)
        return run


class BlockKeys:
    """Those of the full blocks of `packed` (`baton.token_ids`) below `root`, computed only as far as they are read."""

    def __init__(self, root: bytes, page_size: int, packed: bytes, memo: KeyMemo | None = None) -> None:
        self._block_bytes = TOKEN_BYTES * page_size
        self._packed = packed
        self._memo = memo or KeyMemo()
        self._parts: list[list[int]] = []
        self._run = Run([], root)
        self._its = b""
        """Tokens of the run."""
        self.num_computed = 0

    def __iter__(self) -> Iterator[list[int]]:
        """In parts, one after the other: what is remembered of a run, or a single block."""
        at = 0
        while at < len(self._parts) or self._compute():
            yield self._parts[at]
            at += 1

    def _compute(self) -> bool:
        """One more part. False at the end."""
        size, at = self._block_bytes, self.num_computed % RUN
        if at == 0:
            start = self.num_computed * size
            self._its = self._packed[start : start + RUN * size]
            if len(self._its) >= size:
                self._run = self._memo.run(self._run.last, self._its, size)
        run = self._run
        if len(self._its) < size * (at + 1):
            return False
        if len(run.keys) == at:
            run.last = packed_block_name(run.last, self._its[size * at : size * (at + 1)])
            run.keys.append(int.from_bytes(run.last[:KEY_BYTES], "little"))
        part = run.keys[at:]
        self._parts.append(part)
        self.num_computed += len(part)
        return True
