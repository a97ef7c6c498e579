"""What the bytes of a block look like, and which field keeps the blocks of two workers apart."""

import dataclasses
from dataclasses import dataclass

from baton.v1 import handover_pb2 as pb

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Dtypes whose values can be told from their bytes alone. Quantised KV needs scales, which no layout carries yet."""


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """A block is [num_layers, num_kv_heads, 2, page_size_tokens, head_dim] of `dtype`; 2 for keys and values.

    `model_fingerprint` names configuration, weights and dtype, and of a deterministic worker all that its bits depend
    on: equal fingerprints compute equal KV. `weights_fingerprint` leaves the dtype out, and is empty where KV of
    another dtype is never good enough. Rank `tp_rank` of `tp_size` holds heads tp_rank * num_kv_heads and on, so the
    model has num_kv_heads * tp_size. The fields are those of the wire's BlockLayout.
    """

    model_fingerprint: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size_tokens: int
    tp_rank: int = 0
    tp_size: int = 1
    weights_fingerprint: str = ""

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, self.num_kv_heads, 2, self.page_size_tokens, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Raises KeyError for a dtype that only raw copies can move."""
        numbers = self.num_layers * self.num_kv_heads * 2 * self.page_size_tokens * self.head_dim
        return numbers * DTYPE_BYTES[self.dtype]

    @property
    def heads(self) -> range:
        """Which of the model's KV heads this rank holds."""
        return range(self.tp_rank * self.num_kv_heads, (self.tp_rank + 1) * self.num_kv_heads)

    def to_proto(self) -> pb.BlockLayout:
        return pb.BlockLayout(**dataclasses.asdict(self))

    @classmethod
    def from_proto(cls, message: pb.BlockLayout) -> "BlockLayout":
        return cls(**{field.name: getattr(message, field.name) for field in dataclasses.fields(cls)})


def difference(puller: BlockLayout, offerer: BlockLayout) -> str | None:
    """The first field in which two layouts differ, in words for a log; None when blocks can be copied as they are.

    The weights' fingerprint is no part of what bytes look like: the model's says more.
    """
    names = [field.name for field in dataclasses.fields(BlockLayout) if field.name != "weights_fingerprint"]
    for name in reversed(names):  # the fingerprint last: any other field says more
        if getattr(puller, name) != getattr(offerer, name):
            return _differs(name, puller, offerer)
    return None


def obstacle(puller: BlockLayout, offerer: BlockLayout, other_dtypes: bool) -> str | None:
    """What keeps the puller from making its own blocks out of the offerer's; None when nothing does.

    Same bits in another place (page size, heads of a rank) need the same model fingerprint. Another dtype needs
    `other_dtypes`, which somebody must have allowed, and the same weights: such KV is not what the puller computes.
    """
    if difference(puller, offerer) is None:
        return None
    for name in ("num_layers", "head_dim"):
        if getattr(puller, name) != getattr(offerer, name):
            return _differs(name, puller, offerer)
    for layout, side in ((puller, "puller"), (offerer, "offerer")):
        if layout.dtype not in DTYPE_BYTES:
            return f"dtype {layout.dtype} of the {side} cannot be converted"
        if min(layout.shape) < 1 or not 0 <= layout.tp_rank < layout.tp_size:
            return f"the {side} states an impossible layout: {layout}"
    if puller.num_kv_heads * puller.tp_size != offerer.num_kv_heads * offerer.tp_size:
        return _differs("num_kv_heads", puller, offerer) + f", on {puller.tp_size} and {offerer.tp_size} ranks"
    if puller.dtype == offerer.dtype:
        same = puller.model_fingerprint == offerer.model_fingerprint
        return None if same else _differs("model_fingerprint", puller, offerer)
    if not (other_dtypes and puller.weights_fingerprint and offerer.weights_fingerprint):
        return _differs("dtype", puller, offerer)
    if puller.weights_fingerprint != offerer.weights_fingerprint:
        return _differs("weights_fingerprint", puller, offerer)
    return None


def _differs(name: str, puller: BlockLayout, offerer: BlockLayout) -> str:
    return f"{name} differs: {getattr(puller, name)} at the puller, {getattr(offerer, name)} at the offerer"
