"""Making this worker's blocks out of those of a peer that lays KV out differently: page size, dtype, rank.

    row of the peer, pages of 4     | 0 1 2 3 | 4 5 6 7 | 8 9 . . |
    row here, pages of 8            | 0 1 2 3   4 5 6 7 | 8 9 . . 0 0 0 0 |
                                                                  uncovered: zero

A block is a box of numbers on both sides, [layer, head, key or value, token, number]. Of every block of the peer, the
tokens that fall into one block here are one piece; a piece is copied, or cast, for all layers and for the heads that
both sides hold. Pure functions over arrays: nothing here waits, and nothing knows where bytes come from.

vLLM's NIXL connector does the same after the transfer for pages and ranks (its issues tell what goes wrong: tails that
nobody zeroed, slices of the wrong rank); casts are ours.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from baton.errors import PeerError, TransferError
from kvtransfer.layout import BlockLayout, difference, obstacle

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[Any]
Cast = Callable[[Numbers, Numbers], None]
"""(source, target): writes the numbers of one box into another of the same shape."""

_CHUNK_NUMBERS = 1 << 16
"""Cast at once, so that what lies between two steps of a cast stays in the core's cache."""


@dataclass(frozen=True, slots=True)
class Row:
    """The blocks of one hand-over here, by position. Those before `first_block` are never written: others read them."""

    block_ids: Sequence[int]
    first_block: int = 0


class Piece(NamedTuple):
    """Tokens that lie in one block on both sides."""

    source: int
    """Index of the peer's block, among those that are converted together."""
    position: int
    """Of the block here, in its row."""
    first_there: int
    first_here: int
    num_tokens: int


class Conversion:
    """From blocks of one peer to blocks here, for the heads that both hold. Made once for a link."""

    def __init__(self, here: BlockLayout, peer: BlockLayout) -> None:
        """The layouts must be free of obstacles and have heads in common; see `plan` and `plan_ranks`."""
        first, end = max(here.heads.start, peer.heads.start), min(here.heads.stop, peer.heads.stop)
        self.here = here
        self.peer = peer
        self.heads = range(first, end)
        """Of the model."""
        self.same_bits = here.dtype == peer.dtype
        """False: what arrives is not what this worker would compute, and must not be passed off as that."""
        self._heads_here = slice(first - here.heads.start, end - here.heads.start)
        self._heads_there = slice(first - peer.heads.start, end - peer.heads.start)
        self._cast = _copy if self.same_bits else _CASTS[peer.dtype, here.dtype]

    def __str__(self) -> str:
        there, here = self.peer, self.here
        changes = [
            f"{name} {getattr(there, field)} to {getattr(here, field)}"
            for name, field in (("page size", "page_size_tokens"), ("dtype", "dtype"), ("ranks", "tp_size"))
            if getattr(there, field) != getattr(here, field)
        ]
        return ", ".join(changes) or f"heads {self.heads.start} to {self.heads.stop - 1}"

    def first_needed(self, first_block: int) -> int:
        """The peer's first block with tokens that the `first_block` leading blocks here do not hold."""
        return first_block * self.here.page_size_tokens // self.peer.page_size_tokens

    def num_needed(self, num_blocks: int) -> int:
        """How many leading blocks of the peer have tokens in a row of `num_blocks` here."""
        return -(-num_blocks * self.here.page_size_tokens // self.peer.page_size_tokens)

    def num_filled(self, num_peer_blocks: int) -> int:
        """How many blocks here are full once that many leading blocks of the peer are converted."""
        return num_peer_blocks * self.peer.page_size_tokens // self.here.page_size_tokens

    def num_touched(self, num_peer_blocks: int) -> int:
        """How many blocks here have any token of so many leading blocks of the peer."""
        return -(-num_peer_blocks * self.peer.page_size_tokens // self.here.page_size_tokens)

    def convert(self, source: Bytes, places: Sequence[int], first: int, pool: Bytes, row: Row) -> None:
        """Write what the peer's blocks at positions `first` and on hold into the blocks of a row here.

        source: uint8 [., peer.block_bytes], the blocks at `places` of it. pool: uint8 [., here.block_bytes]. Tokens
        beyond the row are left out. What the last block written has beyond these tokens is set to zero, for later
        calls to fill. Raises TransferError when a number is too large for the dtype here.
        """
        theirs = _numbers(source, self.peer)[:, :, self._heads_there]
        ours = _numbers(pool, self.here)[:, :, self._heads_here]
        end, target = 0, ours[0]
        for piece in self.pieces(len(places), first, row):
            there = slice(piece.first_there, piece.first_there + piece.num_tokens)
            end = piece.first_here + piece.num_tokens
            target = ours[row.block_ids[piece.position]]
            self._cast(theirs[places[piece.source], :, :, :, there], target[:, :, :, piece.first_here : end])
        if end:
            target[:, :, :, end:] = 0

    def pieces(self, num_peer_blocks: int, first: int, row: Row) -> Iterator[Piece]:
        """In the order of tokens, each token once."""
        there, here = self.peer.page_size_tokens, self.here.page_size_tokens
        token = max(first * there, row.first_block * here)
        end = min((first + num_peer_blocks) * there, len(row.block_ids) * here)
        while token < end:
            (peer_block, first_there), (position, first_here) = divmod(token, there), divmod(token, here)
            num_tokens = min(there - first_there, here - first_here, end - token)
            yield Piece(peer_block - first, position, first_there, first_here, num_tokens)
            token += num_tokens


def plan(here: BlockLayout, peer: BlockLayout, other_dtypes: bool = False) -> Conversion | None:
    """How blocks of one peer become blocks here; None when they can be copied as they are.

    Raises PeerError, which names the field, when the peer's blocks are of no use.
    """
    if difference(here, peer) is None:
        return None
    return plan_ranks(here, [peer], other_dtypes)[0]


def plan_ranks(here: BlockLayout, peers: Sequence[BlockLayout], other_dtypes: bool = False) -> list[Conversion]:
    """How blocks of several ranks of a peer become blocks here: one conversion a rank that is needed.

    Raises PeerError, which names the field, when one does not fit, or some head is at none of them or at two.
    """
    for peer in peers:
        if reason := obstacle(here, peer, other_dtypes):
            raise PeerError(reason)
    conversions = [Conversion(here, peer) for peer in peers]
    needed = sorted((each for each in conversions if each.heads), key=lambda each: each.heads.start)
    if [head for each in needed for head in each.heads] != list(here.heads):
        offered = ", ".join(f"{peer.tp_rank} of {peer.tp_size}" for peer in peers)
        raise PeerError(
            f"tp_rank does not fit: rank {here.tp_rank} of {here.tp_size} needs heads {here.heads.start} to "
            f"{here.heads.stop - 1}, each once, and has rank {offered} to take them from"
        )
    return needed


_STORED: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}
"""numpy has no bfloat16: its bits are the upper half of a float32."""


def _numbers(blocks: Bytes, layout: BlockLayout) -> Numbers:
    """[n, num_layers, num_kv_heads, 2, page_size_tokens, head_dim], no copy."""
    numbers: Numbers = blocks.view(_STORED[layout.dtype])
    return numbers.reshape(len(blocks), *layout.shape)


def _copy(source: Numbers, target: Numbers) -> None:
    bits = np.dtype(f"u{source.itemsize}")  # of a float, a copy through the processor could change a signalling NaN
    target.view(bits)[...] = source.view(bits)


def _chunked(cast: Cast) -> Cast:
    """The cast, for as many layers at once as fit into the cache."""

    def cast_chunks(source: Numbers, target: Numbers) -> None:
        step = max(1, _CHUNK_NUMBERS // source[0].size)
        for first in range(0, len(source), step):
            cast(source[first : first + step], target[first : first + step])

    return cast_chunks


def _widen_bfloat16(source: Numbers, target: Numbers) -> None:
    np.left_shift(source, 16, out=target.view(np.uint32), dtype=np.uint32)


def _narrow_to_float16(source: Numbers, target: Numbers) -> None:
    try:
        with np.errstate(over="raise", invalid="ignore"):
            target[...] = source
    except FloatingPointError as error:
        raise TransferError(_TOO_LARGE) from error


def _narrow_to_bfloat16(source: Numbers, target: Numbers) -> None:
    """Round to nearest, ties to even, on the bits: add half of the last place, less one where that place is even."""
    bits = source.view(np.uint32)
    rounded = np.right_shift(bits, 16)
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    if (bits & 0x7FFF_FFFF).max() >= _ROUNDS_TO_INFINITY:
        rounded[np.isnan(source)] = 0x7FC0  # the sum may have carried out of a NaN
        if (np.isfinite(source) & (rounded & 0x7FFF == 0x7F80)).any():
            raise TransferError(_TOO_LARGE)
    target[...] = rounded


def _look_up(dtype_there: str, dtype_here: str) -> Cast:
    """Of 16 bits there are few enough to cast each pattern once and look the rest up: 3 times faster than numpy."""

    def cast(source: Numbers, target: Numbers) -> None:
        table = _table(dtype_there, dtype_here)
        patterns = source.view(np.uint16)
        sizes = patterns & 0x7FFF
        least, infinity = table.least_too_large, table.infinity
        if sizes.max() >= least and ((sizes >= least) & (sizes < infinity)).any():
            raise TransferError(_TOO_LARGE)
        target[...] = table.numbers.take(patterns, mode="wrap")

    return cast


class _Table(NamedTuple):
    """What each 16-bit pattern of one dtype is in another. The patterns of larger numbers are larger, but for sign."""

    numbers: Numbers
    least_too_large: int
    """Pattern of the least number that would become infinite."""
    infinity: int
    """Pattern of infinity; beyond it nothing is a number."""


@functools.cache
def _table(dtype_there: str, dtype_here: str) -> _Table:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    wide = np.empty(1 << 16, np.float32)
    if dtype_there == "bfloat16":
        _widen_bfloat16(patterns, wide)
    else:
        wide[:] = patterns.view(np.float16)
    infinity = int(np.isinf(wide).argmax())
    if dtype_here == "float16":
        with np.errstate(over="ignore", invalid="ignore"):
            half = wide.astype(np.float16)
        return _Table(half, int(np.isinf(half).argmax()), infinity)
    if dtype_here == "float32":
        return _Table(wide, infinity, infinity)
    narrow = np.empty(1 << 16, np.uint16)  # a bfloat16 has room for every float16
    _narrow_to_bfloat16(wide, narrow)
    return _Table(narrow, infinity, infinity)


_TOO_LARGE = "the peer's KV has numbers that are too large for the dtype here; they would become infinite"
_ROUNDS_TO_INFINITY = 0x7F7F_8000
"""Bits of the least float32 that is infinite as a bfloat16."""

_CASTS: dict[tuple[str, str], Cast] = {
    ("bfloat16", "float32"): _chunked(_widen_bfloat16),
    ("float16", "float32"): _chunked(_look_up("float16", "float32")),
    ("float32", "float16"): _chunked(_narrow_to_float16),
    ("bfloat16", "float16"): _chunked(_look_up("bfloat16", "float16")),
    ("float32", "bfloat16"): _chunked(_narrow_to_bfloat16),
    ("float16", "bfloat16"): _chunked(_look_up("float16", "bfloat16")),
}
