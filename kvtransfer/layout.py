"""What the bytes of a block look like. Two pools exchange blocks only when nothing here differs."""

import dataclasses
from dataclasses import dataclass

from baton.v1 import handover_pb2 as pb


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """A block is [num_layers, num_kv_heads, 2, page_size_tokens, head_dim] of `dtype`; 2 for keys and values.

    `model_fingerprint` names configuration, weights and dtype: equal fingerprints compute equal KV. The fields are
    those of the wire's BlockLayout.
    """

    model_fingerprint: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size_tokens: int
    tp_rank: int = 0
    tp_size: int = 1

    def to_proto(self) -> pb.BlockLayout:
        return pb.BlockLayout(**dataclasses.asdict(self))

    @classmethod
    def from_proto(cls, message: pb.BlockLayout) -> "BlockLayout":
        return cls(**{field.name: getattr(message, field.name) for field in dataclasses.fields(cls)})


def mismatch(here: BlockLayout, peer: BlockLayout) -> str | None:
    """Which field keeps two layouts apart, in words for a log; None when blocks can be copied as they are."""
    for field in reversed(dataclasses.fields(BlockLayout)):  # the fingerprint last: any other field says more
        mine, theirs = getattr(here, field.name), getattr(peer, field.name)
        if mine != theirs:
            return f"{field.name} differs: {mine} here, {theirs} at the peer"
    return None
