"""What is checked of every kernel but attention: the interpreter tests and the check on a real GPU share this list.

Expected values are computed on the CPU. Slots that a kernel must not touch hold what no kernel writes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels import elementwise
from kernels.gpu.activation import silu_and_mul
from kernels.gpu.blocks import gather_blocks, gather_blocks_in_torch, scatter_blocks
from kernels.gpu.linear import ROWS, linear
from kernels.gpu.norm import rms_norm, rms_norm_with_residual
from kernels.gpu.quantise import (
    FLOAT8,
    dequantise_kv,
    dequantise_kv_in_torch,
    kv_scales,
    quantise_kv,
    quantise_kv_in_torch,
)
from kernels.gpu.rotary import rotate_and_store
from kernels.ops import HeadNorms

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2, FLOAT8: 0.13}
"""Relative and, of values around 1, absolute: two units in the last place. The interpreter truncates to bfloat16."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Pair:
    result: Tensor
    expected: Tensor
    exact: bool = False
    """Bit for bit, NaN included."""

    def check(self) -> None:
        """Raises AssertionError when the two differ by more than they may."""
        result, tolerance = self.result.cpu(), 0.0 if self.exact else TOLERANCE[self.expected.dtype]
        if result.dtype != self.expected.dtype:
            raise AssertionError(f"{result.dtype}, not {self.expected.dtype}")
        torch.testing.assert_close(
            result.float(), self.expected.float(), atol=tolerance, rtol=tolerance, equal_nan=True
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    run: Callable[[torch.device], list[Pair]]


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for columns in (1, 80, 896, 4096, 5120):
            yield Case(f"rms_norm {name} {columns}", partial(_norm, dtype, columns))
        for columns in (5, 2048, 2816):
            yield Case(f"silu_and_mul {name} {columns}", partial(_activation, dtype, columns))
        for head_dim in (64, 80, 96, 128, 256) if dtype == torch.bfloat16 else (80, 128):
            for normed, slab_dtype in ((False, dtype), (True, dtype), (True, FLOAT8)):
                what = f"{head_dim} {'normed ' if normed else ''}into {str(slab_dtype).removeprefix('torch.')}"
                yield Case(f"rotary {name} {what}", partial(_rotary, dtype, slab_dtype, head_dim, normed))
        for rows, depth, columns in ((1, 256, 96), (70, 100, 33), (3, 300, 130)):
            yield Case(f"linear {name} {rows}x{depth}x{columns}", partial(_linear, dtype, rows, depth, columns))
        yield Case(f"bits of a linear row {name}", partial(_bits_of_a_row, dtype))
        yield Case(f"quantise {name}", partial(_quantise, dtype))
    for dtype in (torch.bfloat16, FLOAT8):
        yield Case(f"blocks {str(dtype).removeprefix('torch.')}", partial(_blocks, dtype))


def _random(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _norm(dtype: torch.dtype, columns: int, device: torch.device) -> list[Pair]:
    x, residual = _random(3, columns, dtype=dtype), _random(3, columns, dtype=dtype, seed=1)
    weight = _random(columns, dtype=dtype, seed=2)
    plain = rms_norm(x.to(device), weight.to(device), 1e-5)
    fused, total = rms_norm(x.to(device), weight.to(device), 1e-5, residual.to(device))
    expected, expected_total = rms_norm_with_residual(x, weight, 1e-5, residual)
    return [
        Pair(plain, elementwise.rms_norm(x, weight, 1e-5)), Pair(fused, expected), Pair(total, expected_total)
    ]  # fmt: skip


def _activation(dtype: torch.dtype, columns: int, device: torch.device) -> list[Pair]:
    gate_up = _random(3, 2 * columns, dtype=dtype)
    gate_up[0, 0] = -200.0  # exp overflows
    return [Pair(silu_and_mul(gate_up.to(device)), elementwise.silu_and_mul(gate_up))]


def _rotary(
    dtype: torch.dtype, slab_dtype: torch.dtype, head_dim: int, normed: bool, device: torch.device
) -> list[Pair]:  # fmt: skip
    """9 query heads, more than one program's; 3 kv heads, which fill none; token 2 pads the batch."""
    heads, kv_heads, layers, layer, page_size = 9, 3, 2, 1, 16
    qkv = _random(4, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angles = _random(4, 1, head_dim // 2, seed=1)
    norms = HeadNorms(_random(head_dim, dtype=dtype, seed=2), _random(head_dim, dtype=dtype, seed=3))
    blocks, slots = torch.tensor([4, 0, -1, 4]), torch.tensor([15, 0, 3, 2])
    scales = torch.rand(layers, kv_heads, 2, generator=torch.Generator().manual_seed(4)) + 0.01
    slabs = torch.full((5, layers, kv_heads, 2, page_size, head_dim), float("nan")).to(slab_dtype)
    on_device = slabs.clone().to(device)
    result = rotate_and_store(
        qkv.to(device), on_device, layer, angles.cos().to(device), angles.sin().to(device),
        HeadNorms(norms.query.to(device), norms.key.to(device)) if normed else None, 1e-6,
        blocks.int().to(device), slots.to(device), scales.to(device) if slab_dtype == FLOAT8 else None,
    )  # fmt: skip
    query, key, value = torch.split(qkv.view(4, -1, head_dim), [heads, kv_heads, kv_heads], dim=1)
    if normed:
        query = elementwise.rms_norm(query, norms.query, 1e-6)
        key = elementwise.rms_norm(key, norms.key, 1e-6)
    key = elementwise.rotate(key, angles.cos(), angles.sin())
    stored = torch.stack((key, value), dim=2)[..., None, :]  # [tokens, kv_heads, 2, 1, head_dim]
    stored = quantise_kv_in_torch(stored[:, None], scales[layer:][:1])[:, 0] if slab_dtype == FLOAT8 else stored
    for token in (0, 1, 3):
        slabs[blocks[token], layer, :, :, slots[token]] = stored[token, :, :, 0]
    return [Pair(result, elementwise.rotate(query, angles.cos(), angles.sin())), Pair(on_device, slabs)]


def _linear(dtype: torch.dtype, rows: int, depth: int, columns: int, device: torch.device) -> list[Pair]:
    x, weight = _random(rows, depth, dtype=dtype), _random(columns, depth, dtype=dtype, seed=1) / depth**0.5
    bias, residual = _random(columns, dtype=dtype, seed=2), _random(rows, columns, dtype=dtype, seed=3)
    plain = linear(x.to(device), weight.to(device))
    full = linear(x.to(device), weight.to(device), bias.to(device), residual.to(device))
    product = x.double() @ weight.double().t()
    return [Pair(plain, product.to(dtype)), Pair(full, (product + bias.double()).to(dtype) + residual)]


def _bits_of_a_row(dtype: torch.dtype, device: torch.device) -> list[Pair]:
    """Alone, among 2, 33, 70 rows, at the start, in the middle and at the end of a tile: one result."""
    depth, columns = 192, 80
    weight = _random(columns, depth, dtype=dtype).to(device)
    row = _random(1, depth, dtype=dtype, seed=1)
    alone = linear(row.to(device), weight).cpu()
    pairs = []
    for rows, place in ((2, 1), (33, 0), (33, 17), (70, ROWS - 1), (70, 69)):
        x = _random(rows, depth, dtype=dtype, seed=rows)
        x[place] = row
        pairs.append(Pair(linear(x.to(device), weight)[place : place + 1], alone, exact=True))
    return pairs


def _quantise(dtype: torch.dtype, device: torch.device) -> list[Pair]:
    """Every float8 from subnormal to the largest occurs, and what lies between and beyond them."""
    blocks = _random(3, 2, 3, 2, 16, 40, dtype=dtype) * torch.logspace(-4, 2, 40).to(dtype)
    scales = kv_scales(blocks[:2])
    blocks[2] *= 4  # beyond the scales
    quantised = quantise_kv(blocks.to(device), scales.to(device))
    expected = quantise_kv_in_torch(blocks, scales)
    restored = dequantise_kv(expected.to(device), scales.to(device), dtype)
    return [
        Pair(quantised, expected, exact=True), Pair(restored, dequantise_kv_in_torch(expected, scales, dtype))
    ]  # fmt: skip


def _blocks(dtype: torch.dtype, device: torch.device) -> list[Pair]:
    """Runs longer than a program's share; one id pads."""
    slabs = _random(7, 3, 3, 2, 16, 88).to(dtype)
    ids = torch.tensor([5, 0, -1, 6])
    real = torch.tensor([0, 1, 3])
    pairs = []
    for first, layers in ((0, 3), (1, 1), (1, 2)):
        staged = torch.zeros(4, layers, *slabs.shape[2:]).to(dtype)
        on_device = staged.clone().to(device)
        gather_blocks(slabs.to(device), ids.to(device), on_device, first)
        gathered = staged[real]
        gather_blocks_in_torch(slabs, ids[real], gathered, first)
        staged[real] = gathered
        pairs.append(Pair(on_device, staged, exact=True))
        target, expected = torch.zeros_like(slabs).to(device), torch.zeros_like(slabs)
        scatter_blocks(on_device, target, ids.int().to(device), first)
        expected[ids[real], first : first + layers] = gathered
        pairs.append(Pair(target, expected, exact=True))
    return pairs
