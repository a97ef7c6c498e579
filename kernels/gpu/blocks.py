"""Blocks between the pool and a contiguous staging buffer, whole or some layers of them.

One layer, or several adjacent ones, of a block are one contiguous run of the pool. Copy engines take one command a run;
a thousand blocks of one layer cost more in commands than in bytes. One kernel copies them all, as words of 8 bytes
whatever the dtype.

    pool     block 0 |layer 0|layer 1|layer 2|  block 1 |layer 0|layer 1|layer 2|  …
    staging          |layer 1|layer 2|                  |layer 1|layer 2|            for layers 1 to 2
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS = 2048
"""Words of a program, 16 KB: with 8 warps each thread has four 16-byte loads under way. Two or three programs on each
of 132 multiprocessors then cover the 18 KB that memory of 3.35 TB/s and 0.7 us wants under way on each."""


def gather_blocks(slabs: Tensor, block_ids: Tensor, staged: Tensor, first_layer: int = 0) -> None:
    """staged[i] = slabs[block_ids[i], first_layer : first_layer + layers].

    slabs [num_blocks, num_layers, kv_heads, 2, page_size, head_dim] and staged [n, layers, kv_heads, 2, page_size,
    head_dim]: contiguous, one dtype. block_ids: int32 or int64 [n]; rows of negative ones stay as they are. Raises
    ValueError when the two do not fit.
    """
    _copy(slabs, block_ids, staged, first_layer, gather=True)


def scatter_blocks(staged: Tensor, slabs: Tensor, block_ids: Tensor, first_layer: int = 0) -> None:
    """slabs[block_ids[i], first_layer : first_layer + layers] = staged[i]; no block twice. As `gather_blocks`."""
    _copy(slabs, block_ids, staged, first_layer, gather=False)


def gather_blocks_in_torch(slabs: Tensor, block_ids: Tensor, staged: Tensor, first_layer: int = 0) -> None:
    """The reference of `gather_blocks`, for ids that are all positive."""
    staged.copy_(slabs[block_ids.long(), first_layer : first_layer + staged.shape[1]])


def _copy(slabs: Tensor, block_ids: Tensor, staged: Tensor, first_layer: int, *, gather: bool) -> None:
    count, layers = staged.shape[:2]
    if not slabs.is_contiguous() or not staged.is_contiguous() or slabs.dtype != staged.dtype:
        raise ValueError("slabs and staging buffer must be contiguous and of one dtype")
    within = 0 <= first_layer <= slabs.shape[1] - layers
    if not within or slabs.shape[2:] != staged.shape[2:] or len(block_ids) != count:
        raise ValueError(f"{count} blocks, layers {first_layer} + {layers}: not within slabs {tuple(slabs.shape)}")
    word = _word(slabs[0, 0].numel() * slabs.itemsize)
    pool, buffer = slabs.flatten(1).view(word), staged.flatten(1).view(word)
    run, block_words = buffer.shape[1], pool.shape[1]
    _copy_runs[(count, triton.cdiv(run, WORDS))](
        pool, block_ids, buffer, run, block_words, first_layer * (block_words // slabs.shape[1]),
        GATHER=gather, WORDS=WORDS, num_warps=8,
    )  # fmt: skip


def _word(num_bytes: int) -> torch.dtype:
    """The widest integer that divides runs of so many bytes."""
    return next(word for word in (torch.int64, torch.int32, torch.int16, torch.int8) if num_bytes % word.itemsize == 0)


@triton.jit
def _copy_runs(
    pool, block_ids, buffer, run, block_words, first_word, GATHER: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    block = tl.load(block_ids + row).to(tl.int64)
    if block >= 0:
        place = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
        in_pool = pool + block * block_words + first_word + place
        in_buffer = buffer + row.to(tl.int64) * run + place
        if GATHER:
            tl.store(in_buffer, tl.load(in_pool, mask=place < run), mask=place < run)
        else:
            tl.store(in_pool, tl.load(in_buffer, mask=place < run), mask=place < run)
