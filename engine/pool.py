"""The memory that holds keys and values.

    block 0                                                     block 1 ...
    | layer 0                                  | layer 1 ...    |
    | kv head 0          | kv head 1 ...       |
    | K: page_size x head_dim | V: page_size x head_dim |

A block, one layer of a block, and a range of heads within that, are each one contiguous run: one piece to send, to
store, or to give to another tensor-parallel rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Dimensions of one block."""

    num_layers: int
    kv_heads: int
    page_size: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: ModelConfig, page_size: int, dtype: torch.dtype) -> "BlockShape":
        return cls(config.num_layers, config.num_kv_heads, page_size, config.head_dim, dtype)

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.num_layers, self.kv_heads, 2, self.page_size, self.head_dim)

    @property
    def block_bytes(self) -> int:
        elements = self.num_layers * self.kv_heads * 2 * self.page_size * self.head_dim
        return elements * self.dtype.itemsize


class KVPool:
    """All blocks of one worker, in memory given by the caller (shared with other processes) or its own."""

    def __init__(
        self,
        shape: BlockShape,
        num_blocks: int,
        buffer: Any = None,
        device: torch.device | None = None,
        num_peer_blocks: int = 0,
    ) -> None:
        """`buffer`: writable, contiguous host memory, at least num_blocks * block_bytes; it must outlive the pool.

        Without one the pool takes memory of its own, on `device`. Raises ValueError when the buffer is too small.
        `num_peer_blocks`: the buffer goes on with places where blocks of other pools may be mapped.
        """
        self.shape = shape
        self.num_blocks = num_blocks
        num_slabs = num_blocks + num_peer_blocks
        num_bytes = num_slabs * shape.block_bytes
        if buffer is None:
            flat = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        else:
            flat = torch.frombuffer(buffer, dtype=torch.uint8)
            if flat.numel() < num_bytes:
                raise ValueError(f"{num_blocks} blocks take {num_bytes} bytes; the buffer has {flat.numel()}")
        self.slabs: Tensor = flat[:num_bytes].view(shape.dtype).view(num_slabs, *shape.sizes)
        """[num_blocks + num_peer_blocks, num_layers, kv_heads, 2, page_size, head_dim]."""

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copies whole blocks, in order; pairs are (source, target)."""
        for source, target in pairs:
            self.slabs[target].copy_(self.slabs[source])
