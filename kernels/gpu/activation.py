"""SiLU of the gate times the up projection (SwiGLU, Shazeer, 2020)."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Outputs of a program: with 4 warps 16 a thread, four 16-byte loads of bfloat16 under way in each."""


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """[tokens, 2 * n], gate before up -> [tokens, n], rounded where `kernels.elementwise.silu_and_mul` rounds."""
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, columns)
    block = min(BLOCK, triton.next_power_of_2(columns))
    _silu_and_mul[(rows, triton.cdiv(columns, block))](
        gate_up, gate_up.stride(0), out, columns, BLOCK=block, num_warps=4
    )
    return out


@triton.jit
def _silu_and_mul(gate_up, stride, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    dtype = out.dtype.element_ty
    gate = tl.load(gate_up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + columns + column, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + row * columns + column, (silu * up).to(dtype), mask=inside)
