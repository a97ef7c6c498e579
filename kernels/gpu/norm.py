"""RMS norm of rows, and of the sum with a residual stream, in one pass over memory (Zhang and Sennrich, 2019)."""

from typing import overload

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS_OF_WARP = 512
"""16 numbers a thread: two 16-byte loads of bfloat16 under way in each, which hides memory latency at one program a row
(a row of 4096 takes 8 warps) and leaves room for 4-8 programs on a multiprocessor."""
MOST_WARPS = 16


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """rms_norm of [tokens, n], or (rms_norm(x + residual), x + residual): all of x's dtype, weight [n].

    Rounds where `kernels.elementwise.rms_norm` rounds: the sum, and the normalised value before the weight. The bits of
    a row depend on that row alone. Rows of `x` and `residual` may lie apart, their numbers may not.
    """
    rows, columns = x.shape
    out = x.new_empty(x.shape)
    total = None if residual is None else x.new_empty(x.shape)
    block = triton.next_power_of_2(columns)
    _rms_norm[(rows,)](
        x, x.stride(0), residual, 0 if residual is None else residual.stride(0), weight, out, total, columns, eps,
        BLOCK=block, num_warps=max(1, min(MOST_WARPS, block // ELEMENTS_OF_WARP)),
    )  # fmt: skip
    return out if total is None else (out, total)


@triton.jit
def _rms_norm(x, x_stride, residual, residual_stride, weight, out, total, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    dtype = out.dtype.element_ty
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        added = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        narrow = (wide + added).to(dtype)
        tl.store(total + row * columns + column, narrow, mask=inside)
        wide = narrow.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / columns + eps)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    normed = (wide * scale).to(dtype).to(tl.float32) * factor
    tl.store(out + row * columns + column, normed.to(dtype), mask=inside)


def rms_norm_with_residual(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    """What the fused kernel computes, in torch."""
    total = x + residual
    wide = total.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight, total
