"""From the fused projection to what attention reads: head norms, rotary embedding, keys and values into their slabs.

One program handles one token and a few heads, in two halves of a head's dimensions that rotate with each other:

    qkv row:  | q head 0 | q head 1 … | k head 0 … | v head 0 … |
    program:  (token, group of query heads)  -> query
              (token, group of kv heads)     -> slabs[block, layer, heads, K and V, slot]
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.interpreting import INTERPRETED
from kernels.gpu.quantise import to_float8
from kernels.ops import HeadNorms

HEADS = 8
"""Heads of a program: half of 8 x 128 bfloat16 is 1 KB, one 16-byte load for each thread of two warps. A decode step of
one token still spreads over several multiprocessors."""


def rotate_and_store(
    qkv: Tensor, slabs: Tensor, layer: int, cos: Tensor, sin: Tensor, norms: HeadNorms | None, eps: float,
    block_ids: Tensor, slots: Tensor, scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Queries [tokens, heads, head_dim]; key and value of each token are stored in (block_ids, slots) of `slabs`.

    qkv [tokens, (heads + 2 * kv_heads) * head_dim], its rows adjacent numbers; slabs [num_blocks, num_layers, kv_heads,
    2, page_size, head_dim], of qkv's dtype, or float8_e4m3fn with `scales` float32 [num_layers, kv_heads, 2], what a
    reader multiplies by. cos, sin: float32 [tokens, 1, head_dim / 2] or [tokens, head_dim / 2], contiguous. block_ids,
    slots: int32 or int64 [tokens]; a row whose block is negative stores nothing. Rounds where `kernels.elementwise`
    rounds. Raises ValueError when slabs are float8 and scales are missing, or the reverse.
    """
    _, _, kv_heads, _, _, head_dim = slabs.shape
    if (scales is None) != (slabs.dtype == qkv.dtype) or (scales is not None and not scales.is_contiguous()):
        raise ValueError(f"{slabs.dtype} slabs for {qkv.dtype} heads need {'no' if scales is None else 'other'} scales")
    tokens = len(qkv)
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    query = qkv.new_empty(tokens, heads, head_dim)
    query_groups, kv_groups = triton.cdiv(heads, HEADS), triton.cdiv(kv_heads, HEADS)
    _rotate_and_store[(tokens, query_groups + kv_groups)](
        qkv, qkv.stride(0), query, slabs, *slabs.stride()[:5], layer, cos, sin,
        None if norms is None else norms.query, None if norms is None else norms.key, eps, block_ids, slots, scales,
        HEADS=min(HEADS, triton.next_power_of_2(max(heads, kv_heads))), NUM_HEADS=heads, KV_HEADS=kv_heads,
        HEAD_DIM=head_dim, HALF=triton.next_power_of_2(head_dim // 2), INTERPRETED=INTERPRETED, num_warps=2,
    )  # fmt: skip
    return query


@triton.jit(do_not_specialize=["layer"])
def _rotate_and_store(
    qkv, qkv_stride, query, slabs, block_stride, layer_stride, head_stride, value_stride, slot_stride, layer, cos, sin,
    query_norm, key_norm, eps, block_ids, slots, scales, HEADS: tl.constexpr, NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    query_groups: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    dim = tl.arange(0, HALF)
    cosine = tl.load(cos + token * (HEAD_DIM // 2) + dim, mask=dim < HEAD_DIM // 2, other=0.0)[None, :]
    sine = tl.load(sin + token * (HEAD_DIM // 2) + dim, mask=dim < HEAD_DIM // 2, other=0.0)[None, :]
    row = qkv + token * qkv_stride
    # Each branch is a function: names of different types on two sides of an `if` do not compile.
    if group < query_groups:
        head = group * HEADS + tl.arange(0, HEADS)
        target = query + token * (NUM_HEADS * HEAD_DIM)
        _queries(row, target, head, dim, cosine, sine, query_norm, eps, NUM_HEADS, HEAD_DIM)
    else:
        block = tl.load(block_ids + token).to(tl.int64)
        if block >= 0:
            _keys_and_values(
                row + NUM_HEADS * HEAD_DIM,
                slabs + block * block_stride + tl.load(slots + token).to(tl.int64) * slot_stride + layer * layer_stride,
                head_stride, value_stride, (group - query_groups) * HEADS + tl.arange(0, HEADS), layer, dim, cosine,
                sine, key_norm, eps, scales, KV_HEADS, HEAD_DIM, INTERPRETED,
            )  # fmt: skip


@triton.jit
def _queries(
    row, target, head, dim, cosine, sine, norm, eps, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    half: tl.constexpr = HEAD_DIM // 2
    inside = (head < NUM_HEADS)[:, None] & (dim < half)[None, :]
    place = head[:, None] * HEAD_DIM + dim[None, :]
    first, second = _rotated(row + place, inside, cosine, sine, norm, dim, eps, half)
    _store(target + place, first, second, None, inside, half, False)


@triton.jit
def _keys_and_values(
    row, target, head_stride, value_stride, head, layer, dim, cosine, sine, norm, eps, scales, KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = HEAD_DIM // 2
    inside = (head < KV_HEADS)[:, None] & (dim < half)[None, :]
    keys = row + head[:, None] * HEAD_DIM + dim[None, :]
    values = keys + KV_HEADS * HEAD_DIM
    target += head[:, None] * head_stride + dim[None, :]
    key_scale = None
    value_scale = None
    if scales is not None:
        scales += (layer * KV_HEADS + head) * 2
        key_scale = tl.load(scales, mask=head < KV_HEADS, other=1.0)[:, None]
        value_scale = tl.load(scales + 1, mask=head < KV_HEADS, other=1.0)[:, None]
    first, second = _rotated(keys, inside, cosine, sine, norm, dim, eps, half)
    _store(target, first, second, key_scale, inside, half, INTERPRETED)
    first = tl.load(values, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(values + half, mask=inside, other=0.0).to(tl.float32)
    _store(target + value_stride, first, second, value_scale, inside, half, INTERPRETED)


@triton.jit
def _rotated(heads, inside, cosine, sine, norm, dim, eps, half: tl.constexpr):
    """Both halves of [HEADS, HALF] heads, normed where there is a norm, and rotated: float32 of the heads' dtype."""
    dtype = heads.dtype.element_ty
    first = tl.load(heads, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(heads + half, mask=inside, other=0.0).to(tl.float32)
    if norm is not None:
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * half) + eps)[:, None]
        first_weight = tl.load(norm + dim, mask=dim < half, other=0.0).to(tl.float32)[None, :]
        second_weight = tl.load(norm + half + dim, mask=dim < half, other=0.0).to(tl.float32)[None, :]
        first = ((first * scale).to(dtype).to(tl.float32) * first_weight).to(dtype).to(tl.float32)
        second = ((second * scale).to(dtype).to(tl.float32) * second_weight).to(dtype).to(tl.float32)
    rotated_first = (first * cosine - second * sine).to(dtype).to(tl.float32)
    rotated_second = (second * cosine + first * sine).to(dtype).to(tl.float32)
    return rotated_first, rotated_second


@triton.jit
def _store(target, first, second, scale, inside, half: tl.constexpr, INTERPRETED: tl.constexpr):
    """Both halves, divided by `scale` [HEADS, 1] where there is one."""
    if scale is not None:
        tl.store(target, to_float8(first, scale, INTERPRETED), mask=inside)
        tl.store(target + half, to_float8(second, scale, INTERPRETED), mask=inside)
    else:
        tl.store(target, first.to(target.dtype.element_ty), mask=inside)
        tl.store(target + half, second.to(target.dtype.element_ty), mask=inside)
