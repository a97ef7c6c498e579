"""KV in 8 bits: float8 e4m3 numbers, and one scale for each (layer, kv head, key or value).

Scales are fixed before serving, from data that is like what will be served. They belong to the weights rather than to a
block, so blocks stay exchangeable between requests and workers.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.interpreting import INTERPRETED

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest float8 e4m3 number. Greater ones are clamped: a cast would make them NaN."""
SMALLEST_SCALE = 2.0**-100
"""For heads that were zero in all the data: zero divided by it is zero, and no scale makes NaN."""
BLOCK = 2048
"""Numbers of a program: 16 positions of 128 dimensions, 4 KB; with 4 warps 16 a thread."""


def kv_scales(blocks: Tensor) -> Tensor:
    """float32 [num_layers, kv_heads, 2] so that no number of `blocks` is clamped.

    `blocks` [n, num_layers, kv_heads, 2, page_size, head_dim]: slots in use only, what others hold counts too.
    """
    return (blocks.abs().amax(dim=(0, 4, 5)).float() / LARGEST).clamp_(min=SMALLEST_SCALE)


def quantise_kv(blocks: Tensor, scales: Tensor) -> Tensor:
    """float8_e4m3fn of the shape of contiguous `blocks` [n, num_layers, kv_heads, 2, page_size, head_dim].

    Number / scale, clamped to what float8 holds, to nearest even.
    """
    out = torch.empty(blocks.shape, dtype=FLOAT8, device=blocks.device)
    _launch(_quantise, blocks, scales, out, INTERPRETED=INTERPRETED)
    return out


def dequantise_kv(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The reverse, rounded to `dtype`: blocks * scales."""
    out = torch.empty(blocks.shape, dtype=dtype, device=blocks.device)
    _launch(_dequantise, blocks, scales, out)
    return out


def quantise_kv_in_torch(blocks: Tensor, scales: Tensor) -> Tensor:
    """The reference of `quantise_kv`."""
    return (blocks.float() / scales[..., None, None]).clamp(-LARGEST, LARGEST).to(FLOAT8)


def dequantise_kv_in_torch(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The reference of `dequantise_kv`."""
    return (blocks.float() * scales[..., None, None]).to(dtype)


def _launch(kernel: Any, blocks: Tensor, scales: Tensor, out: Tensor, **options: bool) -> None:
    if not blocks.is_contiguous() or not scales.is_contiguous() or scales.shape != blocks.shape[1:4]:
        raise ValueError(f"blocks {tuple(blocks.shape)} and scales {tuple(scales.shape)} must fit and be contiguous")
    run = blocks.shape[4] * blocks.shape[5]
    block = min(BLOCK, triton.next_power_of_2(run))
    kernel[(blocks.shape[:4].numel(), triton.cdiv(run, block))](
        blocks, scales, out, run, scales.numel(), BLOCK=block, num_warps=4, **options
    )


@triton.jit
def _quantise(blocks, scales, out, run, num_scales, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    which = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offset = which.to(tl.int64) * run + place
    wide = tl.load(blocks + offset, mask=place < run, other=0.0).to(tl.float32)
    narrow = to_float8(wide, tl.load(scales + which % num_scales), INTERPRETED)
    tl.store(out + offset, narrow, mask=place < run)


@triton.jit
def _dequantise(blocks, scales, out, run, num_scales, BLOCK: tl.constexpr):
    which = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offset = which.to(tl.int64) * run + place
    wide = tl.load(blocks + offset, mask=place < run).to(tl.float32) * tl.load(scales + which % num_scales)
    tl.store(out + offset, wide.to(out.dtype.element_ty), mask=place < run)


@triton.jit
def to_float8(wide, scale, INTERPRETED: tl.constexpr):
    """wide / scale as float8 e4m3, clamped; NaN stays NaN. Division is exact, so that torch gets the same bits."""
    scaled = tl.div_rn(wide, scale)
    scaled = tl.where(scaled > 448.0, 448.0, scaled)
    scaled = tl.where(scaled < -448.0, -448.0, scaled)
    if INTERPRETED:
        scaled = _round_to_float8(scaled)
    return scaled.to(tl.float8e4nv)


@triton.jit
def _round_to_float8(wide):
    """To nearest even, in float32. The interpreter's cast loses the carry where rounding up ends an exponent."""
    bits = wide.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    subnormal = wide + 24576.0 - 24576.0  # 1.5 * 2^14: float32 there has steps of 2^-9, as float8 below 2^-6
    return tl.where(tl.abs(wide) < 0.015625, subnormal, normal)
