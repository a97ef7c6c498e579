"""Blocks of any layout become blocks of any other: compared with laying the same dense KV out directly."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from baton.errors import PeerError, TransferError
from kvtransfer.conversion import Row, plan, plan_ranks
from kvtransfer.layout import BlockLayout
from tests.kvtransfer.dense import TORCH, lay_out, read_back

LAYERS, HEADS, HEAD_DIM = 2, 8, 2
DEGREES = (1, 2, 4, 8)
PAGES = (8, 16, 32, 64)
DTYPES = tuple(TORCH)
GARBAGE = 0x3C
"""As any of the dtypes a number that every other can hold."""
UNWRITTEN = 0x77
SPARE = 3
"""Blocks of a pool that belong to nobody here."""


def ranks(degree: int, page: int, dtype: str) -> list[BlockLayout]:
    layout = BlockLayout(dtype, dtype, LAYERS, HEADS // degree, HEAD_DIM, page, 0, degree, "weights")
    return [replace(layout, tp_rank=rank) for rank in range(degree)]


def dense_kv(num_tokens: int, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(LAYERS, HEADS, 2, num_tokens, HEAD_DIM, generator=generator)


def check(peers: list[BlockLayout], here: BlockLayout, num_tokens: int, first_block: int, batch: int, number: int):
    """Hand a row over in batches, from every rank that is needed, and look at every byte of the pool."""
    dense = dense_kv(num_tokens, number)
    expected = lay_out(dense.to(TORCH[peers[0].dtype]).float(), here)
    draw = np.random.default_rng(number)
    first_block = min(first_block, len(expected))
    block_ids = draw.permutation(len(expected) + SPARE)[: len(expected)].tolist()
    pool = np.full((len(expected) + SPARE, here.block_bytes), UNWRITTEN, np.uint8)
    row = Row(block_ids, first_block)
    for conversion in plan_ranks(here, peers, other_dtypes=True):
        source = lay_out(dense, conversion.peer, GARBAGE)
        assert conversion.num_needed(len(expected)) >= len(source)
        assert conversion.num_touched(len(source)) >= len(expected)
        for first in range(conversion.first_needed(first_block), len(source), batch):
            part = source[first : first + batch]
            places = draw.permutation(len(part) + 1)[: len(part)]
            staged = np.zeros((len(part) + 1, conversion.peer.block_bytes), np.uint8)
            staged[places] = part
            conversion.convert(staged, places.tolist(), first, pool, row)
    spare = np.setdiff1d(np.arange(len(pool)), block_ids[first_block:])
    assert (pool[spare] == UNWRITTEN).all(), "written what is not of this row, or shared with others"
    written = pool[block_ids]
    assert torch.equal(
        read_back(written, here, num_tokens)[:, :, :, first_block * here.page_size_tokens :],
        read_back(expected, here, num_tokens)[:, :, :, first_block * here.page_size_tokens :],
    )
    covered = -(-num_tokens // peers[0].page_size_tokens) * peers[0].page_size_tokens
    if first_block < len(expected):
        everything = read_back(written, here, len(expected) * here.page_size_tokens)
        assert not everything[:, :, :, covered:].any(), "nobody covered this tail"


@pytest.mark.parametrize("page_there", PAGES)
@pytest.mark.parametrize("page_here", PAGES)
def test_every_pair_of_pages_ranks_and_dtypes(page_there, page_here):
    pairs = itertools.product(DEGREES, DEGREES, DTYPES, DTYPES)
    for number, (degree_there, degree_here, dtype_there, dtype_here) in enumerate(pairs):
        peers = ranks(degree_there, page_there, dtype_there)
        here = ranks(degree_here, page_here, dtype_here)[number % degree_here]
        check(peers, here, 1 + number * 7 % 100, number % 2, 1 + number % 3, number)


@seed(1)
@settings(max_examples=300, deadline=None, database=None)
@given(
    st.tuples(st.sampled_from(DEGREES), st.sampled_from(PAGES), st.sampled_from(DTYPES)),
    st.tuples(st.sampled_from(DEGREES), st.sampled_from((*PAGES, 12)), st.sampled_from(DTYPES)),
    st.integers(1, 200),
    st.integers(0, 3),
    st.integers(1, 9),
    st.data(),
)
def test_any_row_in_any_batches(there, here, num_tokens, first_block, batch, data):
    rank = data.draw(st.integers(0, here[0] - 1))
    check(ranks(*there), ranks(*here)[rank], num_tokens, first_block, batch, data.draw(st.integers(0, 99)))


def test_equal_layouts_need_no_conversion():
    (layout,) = ranks(1, 16, "float32")
    assert plan(layout, layout) is None
    assert plan(layout, replace(layout, weights_fingerprint="")) is None, "an older peer states none"


def test_one_rank_is_enough_where_it_has_all_the_heads():
    there, here = ranks(2, 16, "bfloat16"), ranks(8, 16, "bfloat16")
    conversion = plan(here[5], there[1])
    assert conversion is not None
    assert (conversion.heads, conversion.same_bits) == (range(5, 6), True)
    assert str(conversion) == "ranks 2 to 8"
    with pytest.raises(PeerError, match="rank 5 of 8 needs heads 5 to 5, each once, and has rank 0 of 2"):
        plan(here[5], there[0])
    with pytest.raises(PeerError, match="tp_rank does not fit"):
        plan(there[0], here[0])


def test_heads_from_two_peers_are_refused_as_heads_from_none():
    there, (here,) = ranks(2, 16, "float32"), ranks(1, 16, "float32")
    with pytest.raises(PeerError, match="each once"):
        plan_ranks(here, [*there, there[0]])
    with pytest.raises(PeerError, match="each once"):
        plan_ranks(here, there[:1])


def cast(values: np.ndarray, dtype_there: str, dtype_here: str) -> torch.Tensor:
    """Numbers given as the bytes of a dtype, through a conversion between two pages of that many tokens."""
    numbers = values.nbytes // {"float32": 4}.get(dtype_there, 2)
    here, there = (
        BlockLayout(dtype, dtype, 1, 1, 1, numbers // 2, weights_fingerprint="w") for dtype in (dtype_here, dtype_there)
    )
    conversion = plan(here, there, other_dtypes=True)
    assert conversion is not None
    pool = np.zeros((1, here.block_bytes), np.uint8)
    conversion.convert(values.view(np.uint8).reshape(1, -1), [0], 0, pool, Row([0]))
    return torch.from_numpy(pool).view(TORCH[dtype_here]).flatten()


@pytest.mark.parametrize("dtype_there", DTYPES)
@pytest.mark.parametrize("dtype_here", DTYPES)
def test_numbers_are_cast_as_torch_does_it(dtype_there, dtype_here):
    if dtype_there == dtype_here:
        return
    if dtype_there == "float32":
        values = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, np.uint32)
        ties = np.arange(0x3F80_0000, 0x3F82_0000, dtype=np.uint32)  # every way to round between two neighbours
        values[: len(ties)] = ties
    else:
        values = np.arange(1 << 16, dtype=np.uint16)
    numbers = torch.from_numpy(values.view(np.uint8)).view(TORCH[dtype_there])
    grown = numbers.to(TORCH[dtype_here]).isinf() & ~numbers.isinf()
    kept = values[~grown.numpy()]
    kept = kept[: len(kept) // 2 * 2].copy()
    numbers = torch.from_numpy(kept.view(np.uint8)).view(TORCH[dtype_there])
    torch.testing.assert_close(
        cast(kept, dtype_there, dtype_here), numbers.to(TORCH[dtype_here]), rtol=0, atol=0, equal_nan=True
    )
    for value in values[grown.numpy()][:50]:
        with pytest.raises(TransferError, match="too large"):
            cast(np.array([0, value], values.dtype), dtype_there, dtype_here)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_move_changes_no_bit_whatever_the_numbers(dtype):
    here, there = (BlockLayout("m", dtype, 2, 2, 8, page) for page in (32, 16))
    conversion = plan(here, there)
    assert conversion is not None
    assert conversion.same_bits
    source = np.random.default_rng(0).integers(0, 256, (4, there.block_bytes), np.uint8)
    pool = np.zeros((2, here.block_bytes), np.uint8)
    conversion.convert(source, range(4), 0, pool, Row([0, 1]))
    item = here.block_bytes // (2 * 2 * 2 * 32 * 8)
    for block, layer, head, kv in itertools.product(range(4), range(2), range(2), range(2)):
        theirs = source[block].reshape(2, 2, 2, 16, 8 * item)[layer, head, kv]
        ours = pool[block // 2].reshape(2, 2, 2, 32, 8 * item)[layer, head, kv]
        assert (ours[block % 2 * 16 :][:16] == theirs).all()
