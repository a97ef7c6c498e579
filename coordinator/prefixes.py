"""What workers should hold of the beginnings of prompts: a guess, from what was sent to them lately.

For clusters whose workers do not tell (`coordinator.kv_index`), by choice only: `--kv-routing approximate`. Tokens are
named in strides, chained as blocks are (`baton.block_names`), whatever page size a worker has. What a worker has
evicted since is not known here: it is asked, and says so.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from baton.block_names import packed_block_name
from baton.token_ids import TOKEN_BYTES

STRIDE_TOKENS = 64
STRIDE_BYTES = STRIDE_TOKENS * TOKEN_BYTES
MAX_STRIDES = 32768
"""Remembered at one time: the beginnings of 2 M tokens, in about 10 MiB."""
MAX_WORKERS = 4
"""Remembered of one stride, the latest."""


class Life(NamedTuple):
    """One life of one worker."""

    worker_id: str
    incarnation: int


class Held(NamedTuple):
    life: Life
    num_tokens: int
    """Leading tokens that it should hold."""


def strides(root: bytes, packed: bytes) -> list[bytes]:
    """Names of the full strides of `packed` (`baton.token_ids`) below `root`, a tenant's own."""
    names: list[bytes] = []
    for start in range(0, len(packed) - STRIDE_BYTES + 1, STRIDE_BYTES):
        parent = names[-1] if names else root
        names.append(packed_block_name(parent, packed[start : start + STRIDE_BYTES]))
    return names


class PrefixMemory:
    """Bounded; what was recorded longest ago is forgotten first, and of that the ends before the beginnings."""

    def __init__(self, max_strides: int = MAX_STRIDES) -> None:
        self._max_strides = max_strides
        self._lives: OrderedDict[bytes, tuple[Life, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._lives)

    def record(self, names: Sequence[bytes], life: Life) -> None:
        """That worker has computed or received these strides. An older life of it is forgotten."""
        for name in reversed(names):
            others = (each for each in self._lives.get(name, ()) if each.worker_id != life.worker_id)
            self._lives[name] = (life, *others)[:MAX_WORKERS]
            self._lives.move_to_end(name)
        while len(self._lives) > self._max_strides:
            self._lives.popitem(last=False)

    def holders(self, names: Sequence[bytes]) -> list[Held]:
        """Who should hold the beginning of these strides, the longest first, the latest of equals first."""
        depths: dict[Life, int] = {}
        for depth, name in enumerate(names, 1):
            lives = self._lives.get(name)
            if lives is None:
                break
            for life in reversed(lives):
                depths.pop(life, None)
                depths[life] = depth
        return [Held(life, depth * STRIDE_TOKENS) for life, depth in reversed(depths.items())]
