"""Attention of one query a sequence over paged KV, for the decode step.

Each sequence's context is cut into splits that are attended by programs of their own, and a second kernel joins them by
their log-sum-exp: Flash-Decoding (Dao et al., 2023), over pages as in PagedAttention (Kwon et al., SOSP 2023). The work
is to read the cache once, so all query heads of a kv head are handled by one program:

    program (kv head, split, sequence):   16 rows   [query heads of the kv head, padded]
                                          x  splits  | tile | tile | tile |      <- block table -> pages of slabs
    program (head, sequence):             joins the splits

How many splits there are is fixed for a launch, so that CUDA graphs can hold it. How long they are depends on the
sequence, on the device, so that a graph captured for long contexts keeps the whole GPU busy on short ones.
"""

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.attention_parts import LOG2_E, Shape, attend_tile, check, score_factors
from kernels.gpu.interpreting import INTERPRETED

ROWS = 16
"""Least rows of a matrix product on tensor cores."""
LONG_SPLIT = 1024
"""Positions from which on the start of a program and its share of the joining are lost in the noise."""
SHORT_SPLIT = 128
"""Positions below which a program only waits."""
MOST_SPLITS_OF_FULL_GPU = 4
"""Splits of a sequence where sequences alone fill the GPU; they even out sequences of unequal length."""
PROGRAMS_OF_A_WAVE = 2
"""Programs a multiprocessor is given where splits are cut to fill the GPU once."""
H100_MULTIPROCESSORS = 132
JOINED_TOGETHER = 16
"""Splits that the joining kernel reads at a time."""


@dataclass(frozen=True, slots=True)
class DecodeTuning:
    tile: int
    """Positions attended at a time."""
    num_warps: int
    num_stages: int


# By (padded head_dim, bytes of an element of the cache). An H100 reads 3.35 TB/s at a latency of about 0.7 us, so each
# of its 132 multiprocessors must have 18 KB on the way at any moment, and more where loads come in bursts. A tile of
# keys and its values are 32 KB; with 3 stages one or two tiles are on the way while another is attended, in 70 of
# 228 KB of shared memory, so that two programs, or three, share a multiprocessor and one loads while the other starts
# or ends. 4 warps: the product of 16 rows is far too small for more. Float32 is there for tests: no tensor cores.
TUNING = {
    (64, 1): DecodeTuning(tile=128, num_warps=4, num_stages=4),
    (128, 1): DecodeTuning(tile=128, num_warps=4, num_stages=3),
    (256, 1): DecodeTuning(tile=64, num_warps=4, num_stages=3),
    (64, 2): DecodeTuning(tile=128, num_warps=4, num_stages=3),
    (128, 2): DecodeTuning(tile=64, num_warps=4, num_stages=3),
    (256, 2): DecodeTuning(tile=32, num_warps=4, num_stages=3),
    (64, 4): DecodeTuning(tile=64, num_warps=4, num_stages=2),
    (128, 4): DecodeTuning(tile=32, num_warps=4, num_stages=2),
    (256, 4): DecodeTuning(tile=16, num_warps=4, num_stages=2),
}


@dataclass(frozen=True, slots=True)
class Splits:
    """`count` splits a sequence, of which short sequences use fewer: none but the last is shorter than `shortest`."""

    count: int
    shortest: int


def choose_splits(positions: int, pairs: int, multiprocessors: int, tile: int) -> Splits:
    """`positions`: the longest context; `pairs`: sequences * kv heads.

    One full wave of programs where pairs are few, a few splits where they fill the GPU by themselves.
    """
    wave = multiprocessors * PROGRAMS_OF_A_WAVE
    shortest = min(LONG_SPLIT, max(SHORT_SPLIT, LONG_SPLIT * pairs // wave // tile * tile))
    count = max(wave // pairs, MOST_SPLITS_OF_FULL_GPU)
    return Splits(max(1, min(count, -(-positions // shortest))), shortest)


def workspace_size(query: Tensor, slabs: Tensor, *, window: int | None = None, max_length: int) -> int:
    """float32 elements that `decode_attention` needs as `workspace`; never more for smaller batches or lengths."""
    shape = check(query, slabs)
    splits = _splits(shape, len(query), slabs, window, max_length)
    return 0 if splits.count == 1 else query.shape[0] * query.shape[1] * splits.count * (shape.head_dim + 1)


def decode_attention(
    query: Tensor, slabs: Tensor, layer: int, block_tables: Tensor, lengths: Tensor, *, window: int | None = None,
    soft_cap: float | None = None, scales: Tensor | None = None, max_length: int, out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[B, heads, head_dim] -> same shape and dtype: attention of each sequence's newest position.

    slabs [num_blocks, num_layers, kv_heads, 2, page_size, head_dim], of the dtype of `query` or float8_e4m3fn;
    query head h reads kv head h // (heads / kv_heads). block_tables int32 [B, max_blocks]. lengths int32 [B]: positions
    to see, the newest included, at most `max_length`; 0 gives zeros and reads nothing, for rows that pad a batch. What
    lies beyond a length, or before a window, is never used, whatever it holds. `window`: only that many latest
    positions are seen. `soft_cap`: scaled scores s become cap * tanh(s / cap). `scales` float32
    [num_layers, kv_heads, 2]: what K and V are multiplied by. `workspace`: float32, `workspace_size` elements.
    Raises ValueError for tensors that do not fit each other.
    """
    shape = check(query, slabs, scales, out)
    batch, heads, _ = query.shape
    if block_tables.dtype != torch.int32 or lengths.dtype != torch.int32 or block_tables.stride(1) != 1:
        raise ValueError("block tables and lengths must be int32")
    tuning = TUNING[shape.padded_dim, slabs.itemsize]
    splits = _splits(shape, batch, slabs, window, max_length)
    if out is None:
        out = query.new_empty(query.shape)
    direct = splits.count == 1
    partials = peaks = out
    if not direct:
        num_peaks = batch * heads * splits.count
        if workspace is None:
            workspace = torch.empty(num_peaks * (shape.head_dim + 1), dtype=torch.float32, device=query.device)
        if workspace.dtype != torch.float32 or workspace.numel() < num_peaks * (shape.head_dim + 1):
            raise ValueError(f"the workspace must have {num_peaks * (shape.head_dim + 1)} float32 elements")
        partials, peaks = workspace[: num_peaks * shape.head_dim], workspace[num_peaks * shape.head_dim :]
    _attend_split[shape.kv_heads, splits.count, batch](
        query, slabs, block_tables, lengths, scales, out, partials, peaks,
        layer, query.stride(0), out.stride(0), slabs.stride(0), block_tables.stride(0), splits.count, splits.shortest,
        LOG2_E / math.sqrt(shape.head_dim),
        KV_HEADS=shape.kv_heads, GROUP=shape.group, ROWS=max(ROWS, triton.next_power_of_2(shape.group)),
        HEAD_DIM=shape.head_dim, DIMS=shape.padded_dim, PAGE=shape.page_size, TILE=tuning.tile, WINDOW=window or 0,
        SOFT_CAP=soft_cap or 0.0, DIRECT=direct, INTERPRETED=INTERPRETED,
        num_warps=tuning.num_warps, num_stages=tuning.num_stages,
    )  # fmt: skip
    if not direct:
        _join_splits[heads, batch](
            partials, peaks, lengths, out, out.stride(0), splits.count, splits.shortest,
            HEAD_DIM=shape.head_dim, DIMS=shape.padded_dim, SPLITS=triton.next_power_of_2(splits.count),
            CHUNK=JOINED_TOGETHER, TILE=tuning.tile, WINDOW=window or 0, num_warps=4,
        )  # fmt: skip
    return out


def _splits(shape: Shape, batch: int, slabs: Tensor, window: int | None, max_length: int) -> Splits:
    tuning = TUNING[shape.padded_dim, slabs.itemsize]
    positions = max_length if window is None else min(max_length, window + tuning.tile)
    return choose_splits(positions, batch * shape.kv_heads, _multiprocessors(slabs.device), tuning.tile)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return H100_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _cut(length, num_splits, shortest, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """(first position to see, rounded down to a tile; positions of a split, whole tiles)."""
    start = length * 0
    if WINDOW > 0:
        start = tl.maximum(length - WINDOW, 0) // TILE * TILE
    size = tl.cdiv(tl.cdiv(length - start, num_splits), TILE) * TILE
    return start, tl.maximum(size, shortest)


@triton.jit(do_not_specialize=["layer", "table_stride", "num_splits", "shortest"])
def _attend_split(
    query, slabs, block_tables, lengths, scales, out, partials, peaks,
    layer, query_stride, out_stride, block_stride, table_stride, num_splits, shortest, head_dim_factor,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, DIRECT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + sequence)
    start, size = _cut(length, num_splits, shortest, TILE, WINDOW)
    first = start + split * size
    end = tl.minimum(first + size, length)
    if not DIRECT and first >= end:
        return
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    heads = kv_head * GROUP + rows
    wanted = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    offsets = heads[:, None] * HEAD_DIM + dims[None, :]
    queries = tl.load(query + sequence * query_stride + offsets, mask=wanted, other=0.0)
    compute_type = tl.float32 if INTERPRETED else queries.dtype
    queries = queries.to(compute_type)
    head_index = layer * KV_HEADS + kv_head
    inner, outer, value_scale = score_factors(scales, head_index, head_dim_factor, SOFT_CAP)

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, DIMS], tl.float32)
    head_slabs = slabs + head_index * (2 * PAGE * HEAD_DIM)
    table = block_tables + sequence * table_stride
    slots = tl.arange(0, TILE)
    # Block ids are read one tile ahead: keys and values then wait for no other load of their own step.
    blocks = tl.load(table + (first + slots) // PAGE, mask=first + slots < end, other=0)
    for tile in range(first, end, TILE):
        positions = tile + slots
        visible = positions < end
        if WINDOW > 0:
            visible = visible & (positions >= length - WINDOW)
        # What is not visible reads as 0: a weight of 0 does not silence NaN.
        readable = visible[:, None] & (dims < HEAD_DIM)[None, :]
        places = (blocks.to(tl.int64) * block_stride + (positions % PAGE) * HEAD_DIM)[:, None] + dims[None, :]
        key = tl.load(head_slabs + places, mask=readable, other=0.0).to(compute_type)
        value = tl.load(head_slabs + PAGE * HEAD_DIM + places, mask=readable, other=0.0).to(compute_type)
        highest, total, result = attend_tile(
            queries, key, value, visible[None, :], highest, total, result, inner, outer, SOFT_CAP, True
        )
        blocks = tl.load(table + (positions + TILE) // PAGE, mask=positions + TILE < end, other=0)

    result = result * (value_scale / tl.where(total > 0, total, 1.0))[:, None]  # a length of 0 gives 0
    if DIRECT:
        tl.store(out + sequence * out_stride + offsets, result.to(out.dtype.element_ty), mask=wanted)
    else:
        places = (sequence * (KV_HEADS * GROUP) + heads) * num_splits + split
        tl.store(partials + places[:, None] * HEAD_DIM + dims[None, :], result, mask=wanted)
        tl.store(peaks + places, highest + tl.log2(total), mask=rows < GROUP)


@triton.jit(do_not_specialize=["num_splits", "shortest"])
def _join_splits(
    partials, peaks, lengths, out, out_stride, num_splits, shortest,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + sequence)
    start, size = _cut(length, num_splits, shortest, TILE, WINDOW)
    used = tl.cdiv(length - start, size)
    place = (sequence * tl.num_programs(0) + head) * num_splits
    splits = tl.arange(0, SPLITS)
    logs = tl.load(peaks + place + splits, mask=splits < used, other=float("-inf"))
    highest = tl.max(logs, 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp2(logs - highest), 0)

    dims = tl.arange(0, DIMS)
    chunk = tl.arange(0, CHUNK)
    result = tl.zeros([DIMS], tl.float32)
    for first in range(0, used, CHUNK):
        rows = first + chunk
        weights = tl.exp2(tl.load(peaks + place + rows, mask=rows < used, other=float("-inf")) - highest)
        readable = (rows < used)[:, None] & (dims < HEAD_DIM)[None, :]
        parts = tl.load(partials + (place + rows)[:, None] * HEAD_DIM + dims[None, :], mask=readable, other=0.0)
        result += tl.sum(parts * weights[:, None], 0)
    result = result / tl.where(total > 0, total, 1.0)
    places = sequence * out_stride + head * HEAD_DIM + dims
    tl.store(out + places, result.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
