"""What every kernel must compute, written for reading: loops, float32 (or wider), no memory layout tricks.

Tests compare each fast kernel with this. Slots of `slabs` that no query may see can hold anything, NaN included.
"""

import math

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def silu_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """heads [tokens, heads, head_dim]; cos, sin [tokens, 1, head_dim / 2]."""
    half = heads.shape[-1] // 2
    rotated = torch.complex(heads[..., :half], heads[..., half:]) * torch.complex(cos, sin)
    return torch.cat((rotated.real, rotated.imag), dim=-1)


def write_kv(slabs: Tensor, layer: int, block_ids: list[int], start: int, key: Tensor, value: Tensor) -> None:
    """Stores [tokens, kv_heads, head_dim] at positions start, start + 1, … of the sequence that owns block_ids."""
    page_size = slabs.shape[4]
    for offset in range(len(key)):
        position = start + offset
        block, slot = block_ids[position // page_size], position % page_size
        slabs[block, layer, :, 0, slot] = key[offset]
        slabs[block, layer, :, 1, slot] = value[offset]


def paged_attention(
    query: Tensor, slabs: Tensor, layer: int, block_ids: list[int], start: int, window: int | None
) -> Tensor:
    """Causal attention of one sequence's queries [tokens, heads, head_dim] at positions start, start + 1, …

    A query sees the latest `window` positions up to its own, or all. Query head h reads kv head
    h // (heads / kv_heads). slabs [num_blocks, num_layers, kv_heads, 2, page_size, head_dim].
    """
    group = query.shape[1] // slabs.shape[2]
    page_size = slabs.shape[4]
    output = torch.empty_like(query)
    for offset in range(len(query)):
        last = start + offset
        first = 0 if window is None else max(0, last - window + 1)
        seen = [(block_ids[position // page_size], position % page_size) for position in range(first, last + 1)]
        for head in range(query.shape[1]):
            keys = torch.stack([slabs[block, layer, head // group, 0, slot] for block, slot in seen]).float()
            values = torch.stack([slabs[block, layer, head // group, 1, slot] for block, slot in seen]).float()
            scores = keys @ query[offset, head].float() / math.sqrt(query.shape[2])
            output[offset, head] = (scores.softmax(0) @ values).to(query.dtype)
    return output
