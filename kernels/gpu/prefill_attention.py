"""Causal attention of many queries a sequence over paged KV, for chunks of prompts of any lengths in one launch.

FlashAttention-2 (Dao, 2023): a program keeps a tile of queries and walks the tiles of keys up to the diagonal. The rows
of a tile of queries are (position, query head) pairs of one kv head, so that each key is read once for all of them:

    rows of a tile, 3 query heads a kv head:   | p0 h0 | p0 h1 | p0 h2 | p1 h0 | p1 h1 | ...
    its keys:   | before the window: partly masked | seen by all rows: no mask | around the diagonal: partly masked |

A row's bits depend on its own query and on the keys it sees, never on the rest of the batch or on how its prompt was
cut into chunks: tiles of keys begin at multiples of the tile from position 0 on, a masked key adds an exact 0, and the
sizes of tiles depend on nothing but the model. The deterministic mode rests on this, and sends single queries here too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.attention_parts import LOG2_E, attend_tile, check, score_factors
from kernels.gpu.interpreting import INTERPRETED
from kernels.paged_attention import SequenceSpan


@dataclass(frozen=True, slots=True)
class PrefillTuning:
    rows: int
    """(position, query head) pairs a program attends."""
    tile: int
    """Keys attended at a time."""
    num_warps: int
    num_stages: int


# By (padded head_dim, bytes of an element of the cache). 8 warps are two warpgroups of 64 rows each, one of which can
# compute exponentials while the other has the tensor cores. A product of 64 rows with N keys reads 16 * (64 + N)
# numbers of shared memory for 16 * 64 * N multiplications: with 64 keys that is all that shared memory delivers, with
# 128 keys three quarters. 128 rows x 128 keys fill the registers at head dim 128 but hardly spill, and two stages of
# keys and values beside the queries take 160 of 228 KB; a stage lasts about 1 us, longer than a load. At head dim 256
# both are full with 64 keys. Each byte of the cache serves 128 rows, which keeps the L2 cache below 5 TB/s at
# 600 TFLOP/s. Float32 is there for tests: no tensor cores.
TUNING = {
    (64, 1): PrefillTuning(rows=128, tile=128, num_warps=8, num_stages=3),
    (128, 1): PrefillTuning(rows=128, tile=128, num_warps=8, num_stages=2),
    (256, 1): PrefillTuning(rows=128, tile=64, num_warps=8, num_stages=2),
    (64, 2): PrefillTuning(rows=128, tile=128, num_warps=8, num_stages=3),
    (128, 2): PrefillTuning(rows=128, tile=128, num_warps=8, num_stages=2),
    (256, 2): PrefillTuning(rows=128, tile=64, num_warps=8, num_stages=2),
    (64, 4): PrefillTuning(rows=32, tile=32, num_warps=4, num_stages=1),
    (128, 4): PrefillTuning(rows=32, tile=32, num_warps=4, num_stages=1),
    (256, 4): PrefillTuning(rows=16, tile=32, num_warps=4, num_stages=1),
}


class SpanSizes(NamedTuple):
    spans: int
    blocks: int
    """Width of the block tables."""
    tiles: int


@dataclass(frozen=True, slots=True)
class PrefillSpans:
    """What one step attends, on the device: S spans in T tiles of query rows. All tensors are views of `buffer`."""

    buffer: Tensor
    """int32, flat."""
    first_rows: Tensor
    """int32 [S]: row of the batch where a span begins."""
    counts: Tensor
    """int32 [S]: queries; 0 for spans that pad."""
    starts: Tensor
    """int32 [S]: position of the first query."""
    block_tables: Tensor
    """int32 [S, blocks]."""
    tile_spans: Tensor
    """int32 [T]: the span a tile belongs to."""
    tile_numbers: Tensor
    """int32 [T]: which of its span's tiles it is."""
    rows: int
    """Rows of a tile, as `prefill_spans` cut them."""


NO_PADDING = SpanSizes(1, 1, 1)


def prefill_spans(
    spans: Sequence[SequenceSpan], slabs: Tensor, num_heads: int, *, at_least: SpanSizes = NO_PADDING,
    into: Tensor | None = None,
) -> PrefillSpans:  # fmt: skip
    """Brings spans to the device of `slabs` in one copy, which on a GPU nobody waits for.

    `at_least` pads to fixed sizes, as a CUDA graph needs them; padding computes nothing. `into`: the buffer of an
    earlier result of exactly the same sizes to overwrite, for a captured graph. Raises ValueError if it differs.
    """
    group = num_heads // slabs.shape[2]
    rows = TUNING[triton.next_power_of_2(slabs.shape[5]), slabs.itemsize].rows
    counts = np.array([span.count for span in spans], dtype=np.int64)
    tiles = -(-counts * group // rows)
    sizes = SpanSizes(
        max(at_least.spans, len(spans)),
        max(at_least.blocks, max((len(span.block_ids) for span in spans), default=0)),
        max(at_least.tiles, int(tiles.sum())),
    )
    parts = [sizes.spans] * 3 + [sizes.tiles] * 2 + [sizes.spans * sizes.blocks]
    begins = [0, *np.cumsum([-(-part // 4) * 4 for part in parts]).tolist()]  # 16 bytes: kernels compile for alignment
    pinned = slabs.device.type == "cuda"
    host = torch.empty(begins[-1], dtype=torch.int32, pin_memory=pinned)
    _fill(host.numpy(), begins, sizes, spans, tiles, rows // group)
    if into is not None and into.shape != host.shape:
        raise ValueError(f"the spans take {host.numel()} numbers, the buffer to overwrite has {into.numel()}")
    buffer = host.to(slabs.device, non_blocking=True) if into is None else into.copy_(host, non_blocking=True)
    first_rows, span_counts, starts, tile_spans, tile_numbers, tables = (
        buffer[begin : begin + part] for begin, part in zip(begins, parts, strict=False)
    )
    tables = tables.view(sizes.spans, sizes.blocks)
    return PrefillSpans(buffer, first_rows, span_counts, starts, tables, tile_spans, tile_numbers, rows)


def _fill(
    numbers: "np.ndarray[tuple[int], np.dtype[np.int32]]", begins: list[int], sizes: SpanSizes,
    spans: Sequence[SequenceSpan], tiles: "np.ndarray[tuple[int], np.dtype[np.int64]]", positions_of_tile: int,
) -> None:  # fmt: skip
    """Writes what `PrefillSpans.buffer` holds."""
    numbers.fill(0)
    for index, span in enumerate(spans):
        numbers[begins[0] + index] = span.first_row
        numbers[begins[1] + index] = span.count
        numbers[begins[2] + index] = span.start
        table = begins[5] + index * sizes.blocks
        numbers[table : table + len(span.block_ids)] = span.block_ids
    tile_spans = np.repeat(np.arange(len(spans)), tiles)
    tile_numbers = np.arange(len(tile_spans)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    starts = np.array([span.start for span in spans], dtype=np.int64)
    # Tiles with the most keys first: a long one that begins last would run on alone.
    order = np.argsort(-(starts[tile_spans] + tile_numbers * positions_of_tile), kind="stable")
    numbers[begins[3] : begins[3] + len(order)] = tile_spans[order]
    numbers[begins[4] : begins[4] + sizes.tiles] = np.iinfo(np.int32).max  # padding: beyond any span's tiles
    numbers[begins[4] : begins[4] + len(order)] = tile_numbers[order]


def prefill_attention(
    query: Tensor, slabs: Tensor, layer: int, spans: PrefillSpans, *, window: int | None = None,
    soft_cap: float | None = None, scales: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[tokens, heads, head_dim] -> same shape and dtype: causal, over what `slabs` holds, new keys included.

    Arguments as for `decode_attention`. Rows of no span keep what `out` held, or are undefined.
    Raises ValueError for tensors that do not fit each other.
    """
    shape = check(query, slabs, scales, out)
    tuning = TUNING[shape.padded_dim, slabs.itemsize]
    if spans.rows != tuning.rows:
        raise ValueError("the spans were made for other slabs")
    if out is None:
        out = query.new_empty(query.shape)
    _attend_tile_of_queries[shape.kv_heads, len(spans.tile_spans)](
        query, slabs, scales, out, spans.first_rows, spans.counts, spans.starts, spans.block_tables, spans.tile_spans,
        spans.tile_numbers, layer, query.stride(0), out.stride(0), slabs.stride(0), spans.block_tables.stride(0),
        LOG2_E / math.sqrt(shape.head_dim),
        KV_HEADS=shape.kv_heads, GROUP=shape.group, ROWS=tuning.rows, HEAD_DIM=shape.head_dim, DIMS=shape.padded_dim,
        PAGE=shape.page_size, TILE=tuning.tile, WINDOW=window or 0, SOFT_CAP=soft_cap or 0.0, INTERPRETED=INTERPRETED,
        num_warps=tuning.num_warps, num_stages=tuning.num_stages,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["layer", "table_stride"])
def _attend_tile_of_queries(
    query, slabs, scales, out, first_rows, counts, starts, block_tables, tile_spans, tile_numbers,
    layer, query_stride, out_stride, block_stride, table_stride, head_dim_factor,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    span = tl.load(tile_spans + tl.program_id(1)).to(tl.int64)
    number = tl.load(tile_numbers + tl.program_id(1))
    num_rows = tl.load(counts + span) * GROUP
    if number >= tl.cdiv(num_rows, ROWS):
        return
    start = tl.load(starts + span)
    rows = number * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    batch_rows = (tl.load(first_rows + span) + rows // GROUP).to(tl.int64)
    heads = (kv_head * GROUP + rows % GROUP)[:, None] * HEAD_DIM + dims[None, :]
    wanted = (rows < num_rows)[:, None] & (dims < HEAD_DIM)[None, :]
    queries = tl.load(query + batch_rows[:, None] * query_stride + heads, mask=wanted, other=0.0)
    compute_type = tl.float32 if INTERPRETED else queries.dtype
    queries = queries.to(compute_type)
    head_index = layer * KV_HEADS + kv_head
    inner, outer, value_scale = score_factors(scales, head_index, head_dim_factor, SOFT_CAP)
    head_slabs = slabs + head_index * (2 * PAGE * HEAD_DIM)
    table = block_tables + span * table_stride

    positions = start + rows // GROUP
    first = start + number * ROWS // GROUP
    end = start + (tl.minimum(number * ROWS + ROWS, num_rows) - 1) // GROUP + 1
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, DIMS], tl.float32)
    diagonal = (first + 1) // TILE * TILE
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(first - WINDOW + 1, 0) // TILE * TILE
        seen_by_all = tl.cdiv(tl.maximum(end - WINDOW, 0), TILE) * TILE
        edge = tl.minimum(seen_by_all, diagonal)
        highest, total, result = _attend_keys(
            begin, edge, end, positions, queries, head_slabs, table, block_stride, highest, total, result, inner, outer,
            HEAD_DIM, DIMS, PAGE, TILE, WINDOW, SOFT_CAP, True, compute_type,
        )  # fmt: skip
        begin = edge
    highest, total, result = _attend_keys(
        begin, diagonal, end, positions, queries, head_slabs, table, block_stride, highest, total, result, inner, outer,
        HEAD_DIM, DIMS, PAGE, TILE, WINDOW, SOFT_CAP, False, compute_type,
    )  # fmt: skip
    highest, total, result = _attend_keys(
        diagonal, end, end, positions, queries, head_slabs, table, block_stride, highest, total, result, inner, outer,
        HEAD_DIM, DIMS, PAGE, TILE, WINDOW, SOFT_CAP, True, compute_type,
    )  # fmt: skip
    result = result * (value_scale / total)[:, None]
    tl.store(out + batch_rows[:, None] * out_stride + heads, result.to(out.dtype.element_ty), mask=wanted)


@triton.jit
def _attend_keys(
    begin, stop, end, positions, queries, head_slabs, table, block_stride, highest, total, result, inner, outer,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, MASKED: tl.constexpr, COMPUTE_TYPE: tl.constexpr,
):  # fmt: skip
    """Keys begin … stop, of which those from `end` on do not exist."""
    slots = tl.arange(0, TILE)
    dims = tl.arange(0, DIMS)
    # Block ids are read one tile ahead: keys and values then wait for no other load of their own step.
    blocks = tl.load(table + (begin + slots) // PAGE, mask=begin + slots < tl.minimum(stop, end), other=0)
    for tile in range(begin, stop, TILE):
        keys = tile + slots
        readable = (dims < HEAD_DIM)[None, :]
        visible = keys[None, :] <= positions[:, None]
        if MASKED:
            readable = readable & (keys < end)[:, None]
            if WINDOW > 0:
                visible = visible & (keys[None, :] > positions[:, None] - WINDOW)
        places = (blocks.to(tl.int64) * block_stride + (keys % PAGE) * HEAD_DIM)[:, None] + dims[None, :]
        key = tl.load(head_slabs + places, mask=readable, other=0.0).to(COMPUTE_TYPE)
        value = tl.load(head_slabs + PAGE * HEAD_DIM + places, mask=readable, other=0.0).to(COMPUTE_TYPE)
        highest, total, result = attend_tile(
            queries, key, value, visible, highest, total, result, inner, outer, SOFT_CAP, MASKED
        )
        blocks = tl.load(table + (keys + TILE) // PAGE, mask=keys + TILE < tl.minimum(stop, end), other=0)
    return highest, total, result
