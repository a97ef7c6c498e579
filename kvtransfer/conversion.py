"""Making this worker's blocks out of those of a peer that lays KV out differently: page size, dtype, rank.

    row of the peer, pages of 4     | 0 1 2 3 | 4 5 6 7 | 8 9 . . |
    row here, pages of 8            | 0 1 2 3   4 5 6 7 | 8 9 . . 0 0 0 0 |
                                                                  uncovered: zero

A block is a box of numbers on both sides, [layer, head, key or value, token, number]. Of every block of the peer, the
tokens that fall into one block here are one piece; a piece is copied, or cast (`casts`), for all layers and for the
heads that both sides hold. Pure functions over arrays: nothing here waits, and nothing knows where bytes come from.

vLLM's NIXL connector does the same after the transfer for pages and ranks (its issues tell what goes wrong: tails that
nobody zeroed, slices of the wrong rank); casts are ours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from baton.errors import PeerError
from kvtransfer.casts import Bytes, Parts, cast_between, parts_of
from kvtransfer.layout import BlockLayout, difference, heads_in_common, obstacle


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
        """The layouts must be free of obstacles and have heads in common; see `plan`."""
        self.here = here
        self.peer = peer
        self.heads = heads_in_common(here, peer)
        """Of the model. What a row here has of other heads, this leaves alone."""
        self.same_bits = here.dtype == peer.dtype
        """False: what arrives is not what this worker would compute, and must not be passed off as that."""
        self._heads_here = _slice(self.heads, here)
        self._heads_there = _slice(self.heads, peer)
        self._cast = cast_between(peer, here, self.heads)

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
        theirs = parts_of(source, self.peer)
        ours = parts_of(pool, self.here)
        end, target = 0, ours
        for piece in self.pieces(len(places), first, row):
            there = slice(piece.first_there, piece.first_there + piece.num_tokens)
            end = piece.first_here + piece.num_tokens
            target = _of_block(ours, row.block_ids[piece.position], self._heads_here)
            box = _tokens(_of_block(theirs, places[piece.source], self._heads_there), there)
            self._cast(box, _tokens(target, slice(piece.first_here, end)))
        if end:
            for part in target:
                part[:, :, :, end:] = 0

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
    """How blocks of one peer, or the heads in common, become blocks here; None when they can be copied as they are.

    Raises PeerError, which names the field, when the peer's blocks are of no use.
    """
    if difference(here, peer) is None:
        return None
    if reason := obstacle(here, peer, other_dtypes):
        raise PeerError(reason)
    if not heads_in_common(here, peer):
        raise PeerError(
            f"tp_rank does not fit: rank {here.tp_rank} of {here.tp_size} has no heads in common with rank "
            f"{peer.tp_rank} of {peer.tp_size}"
        )
    return Conversion(here, peer)


def _slice(heads: range, layout: BlockLayout) -> slice:
    return slice(heads.start - layout.heads.start, heads.stop - layout.heads.start)


def _of_block(parts: Parts, block: int, heads: slice) -> Parts:
    return tuple(part[block, :, heads] for part in parts)


def _tokens(parts: Parts, tokens: slice) -> Parts:
    return tuple(part[:, :, :, tokens] for part in parts)
