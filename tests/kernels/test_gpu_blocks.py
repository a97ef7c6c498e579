"""Blocks between pool and staging buffer, in Triton's interpreter; larger ones are among the cases of other kernels."""

import pytest
import torch

from kernels.gpu.blocks import gather_blocks, scatter_blocks
from kernels.gpu.quantise import FLOAT8

SIZES = (2, 2, 4, 8)
"""kv heads, K and V, page size, head_dim."""


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.bfloat16, 8), (torch.float32, 5), (FLOAT8, 3), (torch.uint8, 64)], ids=str
)
def test_blocks_come_back_as_they_went_whatever_their_bytes_mean(dtype, head_dim):
    """NaN of every kind included; runs that are no multiple of 8 bytes too."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (6, 3, 2, 2, 1, head_dim * dtype.itemsize), dtype=torch.uint8, generator=generator)
    slabs = raw.view(dtype)
    ids = torch.tensor([4, 1, 5], dtype=torch.int32)
    staged = torch.empty(3, 3, 2, 2, 1, head_dim).to(dtype)
    gather_blocks(slabs, ids, staged)
    assert torch.equal(staged.view(torch.uint8), raw[ids.long()])
    target = torch.zeros_like(raw).view(dtype)
    scatter_blocks(staged, target, ids)
    assert torch.equal(target.view(torch.uint8)[ids.long()], raw[ids.long()])
    assert not target.view(torch.uint8)[[0, 2, 3]].any()


def test_layers_outside_the_range_and_blocks_of_padding_are_not_touched():
    staged = torch.randn(3, 1, *SIZES, generator=torch.Generator().manual_seed(0))
    slabs = torch.full((4, 3, *SIZES), 7.0)
    scatter_blocks(staged, slabs, torch.tensor([2, -1, 0]), first_layer=1)
    assert torch.equal(slabs[[2, 0], 1:2], staged[[0, 2]])
    slabs[[2, 0], 1] = 7.0
    assert bool((slabs == 7.0).all())
    before = staged.clone()
    gather_blocks(slabs, torch.tensor([-1, 1, -1]), staged)
    assert bool((staged[1] == 7.0).all())
    assert torch.equal(staged[[0, 2]], before[[0, 2]])


def test_no_blocks_is_no_work():
    slabs = torch.zeros(2, 3, *SIZES)
    gather_blocks(slabs, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3, *SIZES))


@pytest.mark.parametrize(
    ("layers", "first_layer", "ids", "dtype"),
    [(2, 2, 2, torch.float32), (1, -1, 2, torch.float32), (3, 0, 1, torch.float32), (3, 0, 2, torch.float16)],
    ids=["past the last layer", "before the first layer", "too few ids", "another dtype"],
)
def test_what_would_copy_beyond_a_block_is_refused(layers, first_layer, ids, dtype):
    slabs, staged = torch.zeros(4, 3, *SIZES), torch.zeros(2, layers, *SIZES, dtype=dtype)
    with pytest.raises(ValueError, match="slabs"):
        gather_blocks(slabs, torch.zeros(ids, dtype=torch.int64), staged, first_layer)
