"""A prompt's KV as one dense tensor, and what the blocks of any worker must hold of it. Shares no code with conversion.

dense: float32 [num_layers, heads of the model, 2, tokens, head_dim].
"""

import numpy as np
import torch

from kvtransfer.layout import BlockLayout

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def lay_out(dense: torch.Tensor, layout: BlockLayout, garbage: int | None = None) -> np.ndarray:
    """uint8 [num_blocks, block_bytes]: a row's blocks on this rank. The last block's tail is 0, or `garbage` bytes."""
    num_tokens, page = dense.shape[3], layout.page_size_tokens
    heads = dense[:, layout.heads.start : layout.heads.stop].to(TORCH[layout.dtype])
    num_blocks = -(-num_tokens // page)
    blocks = torch.zeros(num_blocks, *layout.shape, dtype=heads.dtype)
    if garbage is not None:
        blocks.view(torch.uint8).fill_(garbage)
    for token in range(num_tokens):
        blocks[token // page, :, :, :, token % page] = heads[:, :, :, token]
    return blocks.view(torch.uint8).reshape(num_blocks, layout.block_bytes).numpy()


def read_back(blocks: np.ndarray, layout: BlockLayout, num_tokens: int) -> torch.Tensor:
    """[num_layers, heads of this rank, 2, num_tokens, head_dim] in the layout's dtype: `lay_out` back."""
    numbers = torch.from_numpy(np.ascontiguousarray(blocks)).view(TORCH[layout.dtype]).view(len(blocks), *layout.shape)
    page = layout.page_size_tokens
    return torch.stack([numbers[token // page, :, :, :, token % page] for token in range(num_tokens)], 3)
