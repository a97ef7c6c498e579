"""Attention over paged KV in torch, for CPUs.

Keys and values lie in slabs [num_blocks, num_layers, kv_heads, 2, page_size, head_dim]. Seen as a matrix with one row
for each (block, layer, kv head, K or V), a row is page_size * head_dim adjacent numbers, and index_select of rows
brings the context of a sequence together at the speed of a copy. What remains is two batched matrix products a kv head,
whose query heads are stacked so that each key is read once. On CPUs this is several times faster than
scaled_dot_product_attention, both for one query a sequence and, in bfloat16, for a whole prompt.

Which rows to gather is the same for all layers but for a constant, so `plan_attention` runs once a step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

QUERY_TILE = 64
"""Queries of one sequence scored at a time: a tile's scores should stay in the cache."""
MAX_TILE_SCORES = 2**24
"""Scores held at a time, all heads together; very long contexts get shorter tiles."""
MAX_GROUP_KEYS = 2**21
"""Numbers in the gathered keys of sequences decoded together: they, and as many values, should stay in the cache."""


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """Queries of one sequence: rows first_row … first_row + count of the batch, at positions start … start + count."""

    first_row: int
    count: int
    start: int
    block_ids: Sequence[int]
    """Blocks of positions 0 … start + count."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences of similar length with one query each: B sequences, S = gathered positions of the longest."""

    rows: Tensor
    """int64 [B]: rows of the batch."""
    key_rows: Tensor
    """int64 [B * kv_heads * S / page_size]: rows of layer 0; the values are one row further."""
    hidden: Tensor
    """bool [B, 1, 1, S]: gathered positions that are not to be seen."""
    unused_values: Tensor
    """int64: rows of the gathered values [B * kv_heads * S, head_dim] that are not to be seen.

    They are zeroed: whatever an unwritten slot holds (NaN, say) would survive multiplication by a probability of 0.
    """


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """Several queries of one sequence, with the context gathered from position `gathered_from` on."""

    first_row: int
    count: int
    start: int
    gathered_from: int
    key_rows: Tensor
    """int64 [kv_heads * blocks]."""


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What one step of one kind of layer (same window) reads."""

    window: int | None
    decodes: list[DecodeGroup]
    prefills: list[PrefillSpan]


@dataclass(frozen=True, slots=True)
class WritePlan:
    """Where new keys and values go: rows of slabs.view(-1, head_dim) in layer 0, int64 [tokens * kv_heads]."""

    key_rows: Tensor
    value_rows: Tensor


def plan_write(slabs: Tensor, blocks: Tensor, slots: Tensor) -> WritePlan:
    """`blocks`, `slots`: int64 [tokens], where each token goes; no place twice."""
    _, num_layers, kv_heads, _, page_size, _ = slabs.shape
    heads = torch.arange(kv_heads) * (2 * page_size)
    key_rows = ((blocks * (num_layers * kv_heads * 2 * page_size) + slots)[:, None] + heads).flatten()
    return WritePlan(key_rows, key_rows + page_size)


def write_kv(slabs: Tensor, layer: int, plan: WritePlan, key: Tensor, value: Tensor) -> None:
    """Stores [tokens, kv_heads, head_dim]."""
    _, _, kv_heads, _, page_size, head_dim = slabs.shape
    rows = slabs.view(-1, head_dim)
    offset = layer * kv_heads * 2 * page_size
    rows.index_copy_(0, plan.key_rows + offset, key.reshape(-1, head_dim))
    rows.index_copy_(0, plan.value_rows + offset, value.reshape(-1, head_dim))


def plan_attention(slabs: Tensor, spans: Sequence[SequenceSpan], window: int | None) -> AttentionPlan:
    """`window`: each query sees that many latest positions, its own included; None sees all."""
    prefills = [_plan_prefill(slabs, span, window) for span in spans if span.count > 1]
    singles = [span for span in spans if span.count == 1]
    _, _, kv_heads, _, page_size, head_dim = slabs.shape
    max_blocks = MAX_GROUP_KEYS // (kv_heads * page_size * head_dim)
    decodes: list[DecodeGroup] = []
    group: list[SequenceSpan] = []
    for span in sorted(singles, key=lambda single: _num_blocks(slabs, single, window)):
        if group and not _fits(slabs, window, group, span, max_blocks):
            decodes.append(_plan_decodes(slabs, group, window))
            group = []
        group.append(span)
    if group:
        decodes.append(_plan_decodes(slabs, group, window))
    return AttentionPlan(window, decodes, prefills)


def paged_attention(query: Tensor, slabs: Tensor, layer: int, plan: AttentionPlan) -> Tensor:
    """[tokens, heads, head_dim] -> same shape: causal attention over what `slabs` holds, new keys included.

    Query head h reads kv head h // (heads / kv_heads).
    """
    output = torch.empty_like(query)
    for group in plan.decodes:
        output.index_copy_(0, group.rows, _decode(query.index_select(0, group.rows), slabs, layer, group))
    for span in plan.prefills:
        rows = slice(span.first_row, span.first_row + span.count)
        _prefill(query[rows], slabs, layer, span, plan.window, output[rows])
    return output


def _block_range(slabs: Tensor, span: SequenceSpan, window: int | None) -> range:
    """Indices into span.block_ids that its queries see."""
    page_size = slabs.shape[4]
    first = 0 if window is None else max(0, span.start - window + 1) // page_size
    return range(first, -(-(span.start + span.count) // page_size))


def _num_blocks(slabs: Tensor, span: SequenceSpan, window: int | None) -> int:
    return len(_block_range(slabs, span, window))


def _fits(slabs: Tensor, window: int | None, group: list[SequenceSpan], span: SequenceSpan, max_blocks: int) -> bool:
    """Whether span, at least as long as the group, may join it: padding and memory stay bounded."""
    shortest, longest = _num_blocks(slabs, group[0], window), _num_blocks(slabs, span, window)
    return longest <= shortest * 1.5 + 8 and longest * (len(group) + 1) <= max_blocks


def _rows(slabs: Tensor, blocks: Tensor) -> Tensor:
    """[sequences, n] block ids -> [sequences * kv_heads * n]: rows of the keys in layer 0."""
    _, num_layers, kv_heads, _, _, _ = slabs.shape
    heads = torch.arange(kv_heads)[:, None] * 2
    return (blocks[:, None, :] * (num_layers * kv_heads * 2) + heads).flatten()


def _plan_decodes(slabs: Tensor, spans: list[SequenceSpan], window: int | None) -> DecodeGroup:
    kv_heads, page_size = slabs.shape[2], slabs.shape[4]
    ranges = [_block_range(slabs, span, window) for span in spans]
    blocks = np.empty((len(spans), max(map(len, ranges))), dtype=np.int64)
    for row, (span, needed) in enumerate(zip(spans, ranges, strict=True)):
        blocks[row] = span.block_ids[needed.start]  # padding: a block this sequence may read
        blocks[row, : len(needed)] = span.block_ids[needed.start : needed.stop]
    last = torch.tensor([span.start - needed.start * page_size for span, needed in zip(spans, ranges, strict=True)])
    positions = torch.arange(blocks.shape[1] * page_size)
    hidden = positions > last[:, None]
    if window is not None:
        hidden |= positions <= last[:, None] - window
    unused = hidden[:, None, :].expand(-1, kv_heads, -1).reshape(-1).nonzero().squeeze(1)
    rows = torch.tensor([span.first_row for span in spans])
    return DecodeGroup(rows, _rows(slabs, torch.from_numpy(blocks)), hidden[:, None, None], unused)


def _decode(query: Tensor, slabs: Tensor, layer: int, group: DecodeGroup) -> Tensor:
    """[B, heads, head_dim] -> same shape."""
    kv_heads, head_dim = slabs.shape[2], slabs.shape[5]
    num_sequences, num_heads, _ = query.shape
    keys, values = _gather(slabs, layer, group.key_rows)
    values.index_fill_(0, group.unused_values, 0)
    stacked = query.reshape(num_sequences * kv_heads, num_heads // kv_heads, head_dim)
    keys = keys.view(num_sequences * kv_heads, -1, head_dim)
    scores = _scores(stacked, keys)
    scores.view(num_sequences, kv_heads, -1, keys.shape[1]).masked_fill_(group.hidden, -math.inf)
    return torch.bmm(scores.softmax(-1), values.view_as(keys)).view_as(query)


def _gather(slabs: Tensor, layer: int, key_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [rows * page_size, head_dim] of one layer."""
    _, _, kv_heads, _, page_size, head_dim = slabs.shape
    matrix = slabs.view(-1, page_size * head_dim)
    rows = key_rows + layer * kv_heads * 2
    return matrix.index_select(0, rows).view(-1, head_dim), matrix.index_select(0, rows + 1).view(-1, head_dim)


def _scores(query: Tensor, keys: Tensor) -> Tensor:
    """[n, q, head_dim] and [n, s, head_dim] -> scaled scores [n, q, s]."""
    scale = 1 / math.sqrt(query.shape[-1])
    return torch.baddbmm(query.new_empty(1, 1, 1), query, keys.transpose(1, 2), beta=0, alpha=scale)


def _plan_prefill(slabs: Tensor, span: SequenceSpan, window: int | None) -> PrefillSpan:
    needed = _block_range(slabs, span, window)
    blocks = torch.tensor(span.block_ids[needed.start : needed.stop])
    gathered_from = needed.start * slabs.shape[4]
    return PrefillSpan(span.first_row, span.count, span.start, gathered_from, _rows(slabs, blocks[None]))


def _prefill(query: Tensor, slabs: Tensor, layer: int, span: PrefillSpan, window: int | None, output: Tensor) -> None:
    """[count, heads, head_dim] into output of the same shape.

    A tile of queries sees the keys from the window of its first query up to its own last position; among those only
    its own positions, and the edge of the window, need a mask:

        keys: | earlier context ........ | the tile: masked above the diagonal | later keys stay out of the product
    """
    kv_heads, head_dim = slabs.shape[2], slabs.shape[5]
    group = query.shape[1] // kv_heads
    keys, values = (each.view(kv_heads, -1, head_dim) for each in _gather(slabs, layer, span.key_rows))
    stacked = query.view(-1, kv_heads, group, head_dim).permute(1, 2, 0, 3)
    end = span.start + span.count
    tile = max(1, min(QUERY_TILE, MAX_TILE_SCORES // (query.shape[1] * end)))
    for first in range(span.start, end, tile):
        last = min(first + tile, end)
        oldest = 0 if window is None else max(0, first - window + 1)
        seen = slice(oldest - span.gathered_from, last - span.gathered_from)
        rows = slice(first - span.start, last - span.start)
        scores = _scores(stacked[:, :, rows].flatten(1, 2), keys[:, seen])
        _hide(scores.view(kv_heads, group, last - first, -1), oldest, first, last, window)
        result = torch.bmm(scores.softmax(-1), values[:, seen])
        output[rows] = result.view(kv_heads, group, -1, head_dim).permute(2, 0, 1, 3).flatten(1, 2)


def _hide(scores: Tensor, oldest: int, first: int, last: int, window: int | None) -> None:
    """Sets to -inf what queries first … last must not see among keys oldest … last; scores [..., queries, keys]."""
    queries = torch.arange(first, last)[:, None]
    scores[..., first - oldest :].masked_fill_(torch.arange(first, last) > queries, -math.inf)
    if window is not None and oldest <= last - 1 - window:
        scores.masked_fill_(torch.arange(oldest, last) <= queries - window, -math.inf)
