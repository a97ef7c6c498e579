"""What decode and prefill attention share: one step of softmax(Q K^T) V over a tile of keys.

The softmax is online (Milakov and Gimelshein, 2018) and works in powers of two, as FlashAttention-2 (Dao, 2023) does:
`exp2` is one instruction. Multiply-adds are written as `fma`, so that a compiler contracts the masked and the unmasked
form of the step alike: a row's bits then do not depend on which of the two it went through.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a launch needs to know of the tensors, checked."""

    kv_heads: int
    group: int
    """Query heads that read the same kv head."""
    page_size: int
    head_dim: int
    padded_dim: int
    """head_dim rounded up to a power of two, which tiles must be."""


def check(query: Tensor, slabs: Tensor, scales: Tensor | None = None, out: Tensor | None = None) -> Shape:
    """Raises ValueError for shapes and dtypes that the kernels would misread."""
    _, num_layers, kv_heads, two, page_size, head_dim = slabs.shape
    _, heads, query_dim = query.shape
    if two != 2 or not slabs.is_contiguous():
        raise ValueError(f"slabs must be contiguous [blocks, layers, kv_heads, 2, page, dim], not {tuple(slabs.shape)}")
    if query_dim != head_dim or heads % kv_heads or head_dim % 16:
        raise ValueError(f"queries {tuple(query.shape)} do not fit slabs {tuple(slabs.shape)}")
    if slabs.dtype != query.dtype and (slabs.dtype != torch.float8_e4m3fn or query.itemsize != 2 or scales is None):
        raise ValueError(f"{query.dtype} queries do not fit {slabs.dtype} slabs; float8_e4m3fn ones need scales")
    if scales is not None and (scales.shape != (num_layers, kv_heads, 2) or not scales.is_contiguous()):
        raise ValueError(f"scales must be contiguous {(num_layers, kv_heads, 2)}, not {tuple(scales.shape)}")
    if query.stride()[1:] != (head_dim, 1):
        raise ValueError("the heads of a query must be adjacent")
    if out is not None and (out.shape != query.shape or out.stride()[1:] != (head_dim, 1)):
        raise ValueError(f"the output must be {tuple(query.shape)}, its heads adjacent")
    return Shape(kv_heads, heads // kv_heads, page_size, head_dim, triton.next_power_of_2(head_dim))


@triton.jit
def score_factors(scales, head_index, head_dim_factor, SOFT_CAP: tl.constexpr):
    """(inner, outer, value): scores are outer * tanh(inner * q.k) with a soft cap, else outer * q.k, in powers of two.

    `head_dim_factor` is log2(e) / sqrt(head_dim), `head_index` counts over layers and kv heads. Scales of keys cost
    nothing this way; that of the values, `value`, multiplies the end result.
    """
    outer = head_dim_factor
    value = 1.0
    if scales is not None:
        outer = outer * tl.load(scales + head_index * 2)
        value = tl.load(scales + head_index * 2 + 1)
    inner = 1.0
    if SOFT_CAP > 0:
        inner = outer * (2.0 / SOFT_CAP)
        outer = SOFT_CAP * 1.4426950408889634
    return inner, outer, value


@triton.jit
def attend_tile(
    query, key, value, visible, highest, total, result, inner, outer, SOFT_CAP: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """One tile of keys [N, D] and values [N, D] into the running (highest [M], total [M], result [M, D]) of M rows.

    `visible` [M, N] or [1, N] counts where MASKED. Rows that have seen nothing yet have highest = -inf.
    """
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    if SOFT_CAP > 0:
        scores = 1.0 - 2.0 / (tl.exp2(scores * inner) + 1.0)  # tanh
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1) * outer)
    shift = new_highest
    if MASKED:
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # -inf - -inf would be NaN
    fade = tl.exp2(highest - shift)
    weights = tl.exp2(tl.fma(scores, outer, -shift[:, None]))
    total = tl.fma(total, fade, tl.sum(weights, 1))
    result = tl.dot(weights.to(value.dtype), value, result * fade[:, None], input_precision="ieee")
    return new_highest, total, result
