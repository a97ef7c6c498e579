"""A matrix product whose rows do not depend on each other, for the deterministic mode.

Libraries choose tiles, and how to split the sum over K, by the number of rows, so a request's logits change in their
last bits with its neighbours. "Defeating Nondeterminism in LLM Inference" (He and Thinking Machines Lab, 2025) calls
what is missing batch invariance: the same tile and the same order of summation however many rows there are. Here both
depend on the weight's shape alone.

    program (rows m, columns n):  sum over K, left to right, BLOCK_K at a time, in float32
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.interpreting import INTERPRETED

ROWS = 64
"""Rows of a tile: the least that an H100's warp-group products have. Padding to it costs a decode step nothing, which
waits for weights."""
COLUMNS = (128, 64, 32)
"""Columns of a tile: the most that still gives a wave of programs to a decode step, where all rows are one tile."""
WAVE = 128
"""Programs that keep an H100's 132 multiprocessors busy. A constant, so that bits are the same on its smaller kin."""
DEPTH_BYTES = 128
"""Bytes of K taken at a time: one row of a tile fills a 128-byte line."""


@dataclass(frozen=True, slots=True)
class Tile:
    columns: int
    depth: int


def tile_of(out_features: int, itemsize: int) -> Tile:
    """The tile of all products with a weight of so many rows."""
    columns = next((each for each in COLUMNS if out_features // each >= WAVE), COLUMNS[-1])
    return Tile(columns, DEPTH_BYTES // itemsize)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x [tokens, in_features] @ weight [out_features, in_features]^T (+ bias [out_features]), summed in float32,
    rounded to x's dtype; then + residual [tokens, out_features], rounded again. All of one dtype, contiguous.

    The bits of a row depend on that row, `weight`, `bias` and its row of `residual`: not on the other rows, nor on
    their number, nor on its place among them. Raises ValueError when shapes or dtypes do not fit.
    """
    (rows, depth), columns = x.shape, weight.shape[0]
    others = [each for each in (bias, residual) if each is not None]
    if weight.shape[1] != depth or any(each.shape[-1] != columns for each in others):
        raise ValueError(f"{tuple(x.shape)} does not fit weight {tuple(weight.shape)}")
    if not all(each.is_contiguous() and each.dtype == x.dtype for each in (x, weight, *others)):
        raise ValueError("linear needs contiguous tensors of one dtype")
    out = x.new_empty(rows, columns)
    tile = tile_of(columns, x.itemsize)
    _linear[(triton.cdiv(rows, ROWS), triton.cdiv(columns, tile.columns))](
        x, weight, bias, residual, out, rows, columns, depth, ROWS=ROWS, COLUMNS=tile.columns, DEPTH=tile.depth,
        WHOLE=depth % tile.depth == 0, INTERPRETED=INTERPRETED, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows"])
def _linear(
    x, weight, bias, residual, out, rows, columns, depth, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, WHOLE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    # Tiles of rows come first, so that programs which run together share a tile of the weight.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    along = tl.arange(0, DEPTH)
    # Rows and columns beyond the end read the last one: a load without a mask, whose result is not stored.
    in_x = x + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * depth + along[None, :]
    in_weight = weight + tl.minimum(column, columns - 1).to(tl.int64)[None, :] * depth + along[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, depth, DEPTH):
        if WHOLE:
            left = tl.load(in_x)
            right = tl.load(in_weight)
        else:
            left = tl.load(in_x, mask=(start + along < depth)[None, :], other=0.0)
            right = tl.load(in_weight, mask=(start + along < depth)[:, None], other=0.0)
        if INTERPRETED:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision="ieee")
        in_x += DEPTH
        in_weight += DEPTH
    dtype = out.dtype.element_ty
    if bias is not None:
        total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    result = total.to(dtype)
    if residual is not None:
        added = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        result = (result.to(tl.float32) + added).to(dtype)
    tl.store(out + place, result, mask=inside)
