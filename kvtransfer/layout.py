"""What the bytes of a block look like, and which field keeps the blocks of two workers apart.

    float32, float16, bfloat16   head: | numbers [2, tokens, head_dim] |
    float8_e4m3fn                head: | numbers [2, tokens, head_dim] |            scales: with the weights
    int8                         head: | numbers [2, tokens, head_dim] | scales [2, tokens] float32 |

A head of a layer is one run in every dtype, and so are a (block, group of layers) and a (block, layer, range of heads).

- float8_e4m3fn is what `kernels/gpu/quantise.py` reads and writes: a number is stored as number / scale of its (layer,
  head, key or value), and what is then beyond 448 as 448. Those scales are fixed before serving. They are no part of a
  block, which stays exchangeable; the layout states them.
- int8 finds a scale for each token of a (layer, head, key or value): its largest magnitude / 127, as the per-token-head
  cache of vLLM does. Nothing has to be known beforehand. It stands behind the head's numbers.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from baton.errors import PeerError
from baton.v1 import handover_pb2 as pb

FLOAT8 = "float8_e4m3fn"
INT8 = "int8"
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, FLOAT8: 1, INT8: 1}
"""Bytes of a number, by torch's names of dtypes; those whose values can be told."""


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """A block is [num_layers, num_kv_heads, 2, page_size_tokens, head_dim] of `dtype`; 2 for keys and values.

    `model_fingerprint` names configuration, weights and dtype, and of a deterministic worker all that its bits depend
    on: equal fingerprints compute equal KV. `weights_fingerprint` leaves the dtype out, and is empty where KV of
    another dtype is never good enough. Rank `tp_rank` of `tp_size` holds heads tp_rank * num_kv_heads and on, so the
    model has num_kv_heads * tp_size. `kv_scales`: of float8, float32 [num_layers, num_kv_heads, 2] in that order, what
    a reader multiplies by; empty: 1. The fields are those of the wire's BlockLayout.
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
    kv_scales: tuple[float, ...] = dataclasses.field(default=(), repr=False)

    def __post_init__(self) -> None:
        # As float32 holds them: what the wire does to a number must not make a layout another one.
        object.__setattr__(self, "kv_scales", tuple(np.asarray(self.kv_scales, np.float32).tolist()))

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, self.num_kv_heads, 2, self.page_size_tokens, self.head_dim)

    @property
    def head_bytes(self) -> int:
        """Of one head of one layer. Raises KeyError for a dtype that only raw copies can move."""
        token = self.head_dim * DTYPE_BYTES[self.dtype] + (4 if self.dtype == INT8 else 0)
        return 2 * self.page_size_tokens * token

    @property
    def block_bytes(self) -> int:
        """Raises KeyError for a dtype that only raw copies can move."""
        return self.num_layers * self.num_kv_heads * self.head_bytes

    @property
    def heads(self) -> range:
        """Which of the model's KV heads this rank holds."""
        return range(self.tp_rank * self.num_kv_heads, (self.tp_rank + 1) * self.num_kv_heads)

    def scales(self, heads: range) -> npt.NDArray[np.float32]:
        """[num_layers, len(heads), 2] for some of the heads here."""
        count = (self.num_layers, self.num_kv_heads, 2)
        scales = np.array(self.kv_scales, np.float32).reshape(count) if self.kv_scales else np.ones(count, np.float32)
        return scales[:, heads.start - self.heads.start : heads.stop - self.heads.start]

    def to_proto(self) -> pb.BlockLayout:
        return pb.BlockLayout(**dataclasses.asdict(self))

    @classmethod
    def from_proto(cls, message: pb.BlockLayout) -> "BlockLayout":
        return cls(**{field.name: getattr(message, field.name) for field in dataclasses.fields(cls)})


def heads_in_common(one: BlockLayout, other: BlockLayout) -> range:
    """Empty when there are none."""
    return range(max(one.heads.start, other.heads.start), min(one.heads.stop, other.heads.stop))


def ranks_in_common(layout: BlockLayout, tp_size: int) -> dict[int, range]:
    """Ranks of a group of `tp_size` with heads that `layout` has, too, and which these are: each head once, in order.

    Raises PeerError when the model's heads cannot be split so.
    """
    num_heads = layout.num_kv_heads * layout.tp_size
    if tp_size < 1 or num_heads % tp_size:
        raise PeerError(f"{num_heads} KV heads cannot be split over {tp_size} ranks")
    group = [dataclasses.replace(layout, num_kv_heads=num_heads // tp_size, tp_size=tp_size, tp_rank=rank, kv_scales=())
             for rank in range(tp_size)]  # fmt: skip
    return {rank: heads for rank, other in enumerate(group) if (heads := heads_in_common(layout, other))}


def difference(puller: BlockLayout, offerer: BlockLayout) -> str | None:
    """The first field in which two layouts differ, in words for a log; None when blocks can be copied as they are.

    The weights' fingerprint is no part of what bytes look like: the model's says more.
    """
    # The scales before the last, the fingerprint last: any other field says more.
    for name in (*reversed(_BYTES), "kv_scales", "model_fingerprint"):
        if getattr(puller, name) != getattr(offerer, name):
            return _differs(name, puller, offerer)
    return None


_BYTES = ("dtype", "num_layers", "num_kv_heads", "head_dim", "page_size_tokens", "tp_rank", "tp_size")


def obstacle(puller: BlockLayout, offerer: BlockLayout, other_dtypes: bool) -> str | None:
    """What keeps the puller from making its own blocks out of the offerer's; None when nothing does.

    Same bits in another place (page size, heads of a rank) need the same model fingerprint, and float8 the same scales.
    Another dtype needs `other_dtypes`, which somebody must have allowed, and the same weights: such KV is not what the
    puller computes.
    """
    if difference(puller, offerer) is None:
        return None
    for name in ("num_layers", "head_dim"):
        if getattr(puller, name) != getattr(offerer, name):
            return _differs(name, puller, offerer)
    for layout, side in ((puller, "puller"), (offerer, "offerer")):
        if layout.dtype not in DTYPE_BYTES:
            return f"dtype {layout.dtype} of the {side} cannot be converted"
        if not _is_possible(layout):
            return f"the {side} states an impossible layout: {layout}"
    if puller.num_kv_heads * puller.tp_size != offerer.num_kv_heads * offerer.tp_size:
        return _differs("num_kv_heads", puller, offerer) + f", on {puller.tp_size} and {offerer.tp_size} ranks"
    if puller.dtype == offerer.dtype:
        heads = heads_in_common(puller, offerer)
        if heads and not np.array_equal(puller.scales(heads), offerer.scales(heads)):
            return _differs("kv_scales", puller, offerer)
        same = puller.model_fingerprint == offerer.model_fingerprint
        return None if same else _differs("model_fingerprint", puller, offerer)
    if not (other_dtypes and puller.weights_fingerprint and offerer.weights_fingerprint):
        return _differs("dtype", puller, offerer)
    if puller.weights_fingerprint != offerer.weights_fingerprint:
        return _differs("weights_fingerprint", puller, offerer)
    return None


def _is_possible(layout: BlockLayout) -> bool:
    if min(layout.shape) < 1 or not 0 <= layout.tp_rank < layout.tp_size:
        return False
    scales = layout.kv_scales
    if scales and (layout.dtype != FLOAT8 or len(scales) != layout.num_layers * layout.num_kv_heads * 2):
        return False
    return all(0 < scale < float("inf") for scale in scales)


def _differs(name: str, puller: BlockLayout, offerer: BlockLayout) -> str:
    if name == "kv_scales":
        return "kv_scales differ: the KV of the two is quantised in different ways"
    return f"{name} differs: {getattr(puller, name)} at the puller, {getattr(offerer, name)} at the offerer"
