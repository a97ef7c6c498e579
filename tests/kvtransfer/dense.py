"""A prompt's KV as one dense tensor, and what the blocks of any worker must hold of it. Shares no code with conversion.

dense: float32 [num_layers, heads of the model, 2, tokens, head_dim].
"""

import numpy as np
import torch

from kvtransfer.layout import BlockLayout

TORCH = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "int8": torch.int8,
}


def lay_out(dense: torch.Tensor, layout: BlockLayout, garbage: int | None = None) -> np.ndarray:
    """uint8 [num_blocks, block_bytes]: a row's blocks on this rank. The last block's tail is 0, or `garbage` bytes."""
    num_tokens, page = dense.shape[3], layout.page_size_tokens
    heads = dense[:, layout.heads.start : layout.heads.stop].float()
    num_blocks = -(-num_tokens // page)
    blocks = torch.zeros(num_blocks, layout.block_bytes, dtype=torch.uint8)
    if garbage is not None:
        blocks.fill_(garbage)
    numbers, scales = _views(blocks, layout)
    if layout.dtype == "int8":
        row_scales = heads.abs().amax(-1) / 127
        stored = (heads / row_scales[..., None].where(row_scales[..., None] > 0, 1)).round()
    elif layout.dtype == "float8_e4m3fn":
        stored = (heads / fixed_scales(layout)).clamp(-448, 448)
    else:
        stored = heads
    stored = stored.to(TORCH[layout.dtype])
    for token in range(num_tokens):
        numbers[token // page, :, :, :, token % page] = stored[:, :, :, token]
        if scales is not None:
            scales[token // page, :, :, :, token % page] = row_scales[:, :, :, token]
    return blocks.numpy()


def read_back(blocks: np.ndarray, layout: BlockLayout, num_tokens: int) -> torch.Tensor:
    """[num_layers, heads of this rank, 2, num_tokens, head_dim]: `lay_out` back, of quantised KV as float32."""
    numbers, scales = _views(torch.from_numpy(np.ascontiguousarray(blocks)), layout)
    if layout.dtype == "float8_e4m3fn":
        numbers = numbers.float() * fixed_scales(layout)
    elif scales is not None:
        numbers = numbers.float() * scales[..., None]
    page = layout.page_size_tokens
    return torch.stack([numbers[token // page, :, :, :, token % page] for token in range(num_tokens)], 3)


def fixed_scales(layout: BlockLayout) -> torch.Tensor:
    """float32 [num_layers, num_kv_heads, 2, 1, 1]."""
    return torch.tensor(layout.kv_scales).view(layout.num_layers, layout.num_kv_heads, 2, 1, 1)


def _views(blocks: torch.Tensor, layout: BlockLayout) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Numbers [num_blocks, *layout.shape] of uint8 [num_blocks, block_bytes], and scales without the last dimension."""
    if layout.dtype != "int8":
        return blocks.view(TORCH[layout.dtype]).view(len(blocks), *layout.shape), None
    layers, heads, _, page, head_dim = layout.shape
    head = blocks.view(len(blocks), layers, heads, 2 * page * (head_dim + 4))
    numbers, scales = head.split([2 * page * head_dim, 2 * page * 4], -1)
    return (
        numbers.view(torch.int8).unflatten(-1, (2, page, head_dim)),
        scales.view(torch.float32).unflatten(-1, (2, page)),
    )
