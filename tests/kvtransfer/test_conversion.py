"""Blocks of any layout become blocks of any other: compared with laying the same dense KV out directly."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from baton.errors import PeerError, TransferError
from kernels.gpu.quantise import dequantise_kv_in_torch, quantise_kv_in_torch
from kvtransfer.conversion import Row, plan
from kvtransfer.layout import BlockLayout, ranks_in_common
from tests.kvtransfer.dense import TORCH, lay_out, read_back

LAYERS, HEADS, HEAD_DIM = 2, 8, 4
DEGREES = (1, 2, 4, 8)
PAGES = (8, 16, 32, 64)
DTYPES = tuple(TORCH)
FLOATS = ("float32", "bfloat16", "float16")
FLOAT8 = "float8_e4m3fn"
SCALES = tuple(
    (0.002 + torch.rand(LAYERS, HEADS, 2, generator=torch.Generator().manual_seed(5)) / 50).flatten().tolist()
)
GARBAGE = 0x3C
"""As any of the dtypes a number that every other can hold."""
UNWRITTEN = 0x77
SPARE = 3
"""Blocks of a pool that belong to nobody here."""


def ranks(degree: int, page: int, dtype: str) -> list[BlockLayout]:
    layout = BlockLayout(dtype, dtype, LAYERS, HEADS // degree, HEAD_DIM, page, 0, degree, "weights")
    group = [replace(layout, tp_rank=rank) for rank in range(degree)]
    if dtype != FLOAT8:
        return group
    scales = torch.tensor(SCALES).view(LAYERS, HEADS, 2)
    return [replace(rank, kv_scales=scales[:, rank.heads.start : rank.heads.stop].flatten().tolist()) for rank in group]


def dense_kv(num_tokens: int, number: int) -> torch.Tensor:
    """Some float8 numbers saturate."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(LAYERS, HEADS, 2, num_tokens, HEAD_DIM, generator=generator)


def check(peers: list[BlockLayout], here: BlockLayout, num_tokens: int, first_block: int, batch: int, number: int):
    """Hand a row over in batches, from every rank that is needed, and look at every byte of the pool."""
    dense = dense_kv(num_tokens, number)
    theirs = torch.cat([read_back(lay_out(dense, peer), peer, num_tokens) for peer in peers], 1)
    expected = lay_out(dense if peers[0].dtype == here.dtype else theirs, here)
    draw = np.random.default_rng(number)
    first_block = min(first_block, len(expected))
    block_ids = draw.permutation(len(expected) + SPARE)[: len(expected)].tolist()
    pool = np.full((len(expected) + SPARE, here.block_bytes), UNWRITTEN, np.uint8)
    row = Row(block_ids, first_block)
    for rank, heads in ranks_in_common(here, len(peers)).items():
        conversion = plan(here, peers[rank], other_dtypes=True)
        if conversion is None:
            assert peers[rank] == here
            return
        assert conversion.heads == heads
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
    """Of three at once one in six, another one in each test."""
    combinations = itertools.product(DTYPES, DTYPES, DEGREES, DEGREES)
    first = (PAGES.index(page_there) * len(PAGES) + PAGES.index(page_here)) % 6
    for number, combination in itertools.islice(enumerate(combinations), first, None, 6):
        dtype_there, dtype_here, degree_there, degree_here = combination
        peers = ranks(degree_there, page_there, dtype_there)
        here = ranks(degree_here, page_here, dtype_here)[number // 6 % degree_here]
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


def test_a_peer_with_some_of_the_heads_gives_these_and_one_with_none_is_refused():
    there, here = ranks(2, 16, "bfloat16"), ranks(8, 16, "bfloat16")
    conversion = plan(here[5], there[1])
    assert conversion is not None
    assert (conversion.heads, conversion.same_bits) == (range(5, 6), True)
    assert str(conversion) == "ranks 2 to 8"
    with pytest.raises(PeerError, match="rank 5 of 8 has no heads in common with rank 0 of 2"):
        plan(here[5], there[0])
    some = plan(there[1], here[5])
    assert some is not None
    assert some.heads == range(5, 6)


def cast(values: np.ndarray, dtype_there: str, dtype_here: str, scale: float = 1.0) -> torch.Tensor:
    """Numbers given as the bytes of a dtype, through a conversion between two pages of that many tokens."""
    numbers = values.nbytes // {"float32": 4, FLOAT8: 1}.get(dtype_there, 2)
    here, there = (
        BlockLayout(dtype, dtype, 1, 1, 1, numbers // 2, 0, 1, "w", (scale, scale) if dtype == FLOAT8 else ())
        for dtype in (dtype_here, dtype_there)
    )
    conversion = plan(here, there, other_dtypes=True)
    assert conversion is not None
    pool = np.zeros((1, here.block_bytes), np.uint8)
    conversion.convert(values.view(np.uint8).reshape(1, -1), [0], 0, pool, Row([0]))
    return torch.from_numpy(pool).view(TORCH[dtype_here]).flatten()


def all_values(dtype: str) -> np.ndarray:
    """Every pattern of a dtype; of 32 bits many, and every way to round between two neighbours."""
    if dtype != "float32":
        return np.arange(1 << 16, dtype=np.uint16) if dtype != FLOAT8 else np.arange(1 << 8, dtype=np.uint8)
    values = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, np.uint32)
    ties = np.arange(0x3F80_0000, 0x3F82_0000, dtype=np.uint32)
    values[: len(ties)] = ties
    return values


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype_there", FLOATS)
@pytest.mark.parametrize("dtype_here", FLOATS)
def test_numbers_are_cast_as_torch_does_it(dtype_there, dtype_here):
    if dtype_there == dtype_here:
        return
    values = all_values(dtype_there)
    numbers = torch.from_numpy(values.view(np.uint8)).view(TORCH[dtype_there])
    grown = numbers.to(TORCH[dtype_here]).isinf() & ~numbers.isinf()
    kept = values[~grown.numpy()]
    kept = kept[: len(kept) // 2 * 2].copy()
    numbers = torch.from_numpy(kept.view(np.uint8)).view(TORCH[dtype_there])
    same(cast(kept, dtype_there, dtype_here), numbers.to(TORCH[dtype_here]))
    for value in values[grown.numpy()][:50]:
        with pytest.raises(TransferError, match="too large"):
            cast(np.array([0, value], values.dtype), dtype_there, dtype_here)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1.0, 0.0371])
def test_every_number_becomes_the_float8_that_kernels_would_have_stored_and_the_reverse(dtype, scale):
    values = all_values(dtype)
    numbers = torch.from_numpy(values.view(np.uint8)).view(TORCH[dtype])
    scales = torch.full((1, 1, 2), scale)
    ours = cast(values, dtype, FLOAT8, scale)
    theirs = quantise_kv_in_torch(numbers.view(1, 1, 1, 2, -1, 1), scales).flatten()
    same(ours, theirs)
    not_nan = ~numbers.isnan()
    assert torch.equal(ours.view(torch.uint8)[not_nan], theirs.view(torch.uint8)[not_nan]), "the sign of a zero, too"
    float8 = all_values(FLOAT8)
    blocks = torch.from_numpy(float8).view(torch.float8_e4m3fn).view(1, 1, 1, 2, -1, 1)
    same(cast(float8, FLOAT8, dtype, scale), dequantise_kv_in_torch(blocks, scales, TORCH[dtype]).flatten())


def test_a_float8_block_is_that_of_the_kernels():
    (there,), (here,) = ranks(1, 16, "bfloat16"), ranks(1, 16, FLOAT8)
    blocks = dense_kv(16, 1).to(torch.bfloat16)[None]
    conversion = plan(here, there, other_dtypes=True)
    assert conversion is not None
    pool = np.zeros((1, here.block_bytes), np.uint8)
    conversion.convert(blocks.view(torch.uint8).reshape(1, -1).numpy(), [0], 0, pool, Row([0]))
    theirs = quantise_kv_in_torch(blocks, torch.tensor(SCALES).view(LAYERS, HEADS, 2))
    assert (pool == theirs.view(torch.uint8).reshape(1, -1).numpy()).all()


@pytest.mark.parametrize("scale", [1.0, 3.3e-3])
def test_every_float_between_and_on_the_middles_of_two_float8_numbers_rounds_as_torch_does_it(scale):
    float8 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (float8[1:] + float8[:-1]) / 2
    near = torch.cat([float8, middles, middles.nextafter(torch.tensor(1e9)), middles.nextafter(torch.tensor(-1e9))])
    near = torch.cat([near, -near, torch.tensor([448.1, 1e30, float("inf"), -float("inf")])]) * scale
    ours = cast(near.numpy(), "float32", FLOAT8, scale)
    theirs = (near / torch.tensor(scale)).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("dtype", [FLOAT8, "int8"])
def test_quantised_numbers_too_large_for_the_dtype_here_are_refused(dtype):
    scale = 1000.0
    if dtype == FLOAT8:
        with pytest.raises(TransferError, match="too large"):
            cast(np.array([0x38, 0x7E], np.uint8), FLOAT8, "float16", scale)
        assert cast(np.array([0x38, 0x7E], np.uint8), FLOAT8, "float32", scale).tolist() == [1000.0, 448_000.0]
        return
    there, here = quantised_pair("int8", "float16", 1, 2)
    block = lay_out(torch.full((1, 1, 2, 1, 2), 1e5), there)
    conversion = plan(here, there, other_dtypes=True)
    assert conversion is not None
    with pytest.raises(TransferError, match="too large"):
        conversion.convert(block, [0], 0, np.zeros((1, here.block_bytes), np.uint8), Row([0]))


def quantised_pair(dtype_there: str, dtype_here: str, page: int, head_dim: int) -> list[BlockLayout]:
    return [
        BlockLayout(dtype, dtype, 1, 1, head_dim, page, 0, 1, "w", (0.02, 0.03) if dtype == FLOAT8 else ())
        for dtype in (dtype_there, dtype_here)
    ]


@seed(2)
@settings(max_examples=200, deadline=None, database=None)
@given(
    st.sampled_from(FLOATS),
    st.lists(st.lists(st.floats(-3e4, 3e4, width=16), min_size=4, max_size=4), min_size=2, max_size=10),
)
def test_what_int8_loses_is_half_a_step_of_its_token_at_most(dtype, rows):
    """There and back; the float on the way back rounds once more."""
    rows = rows[: len(rows) // 2 * 2]
    floats, quantised = quantised_pair(dtype, "int8", len(rows) // 2, 4)
    dense = torch.tensor(rows).view(1, 1, 2, -1, 4).to(TORCH[dtype]).float()
    back = there_and_back(dense, floats, quantised)
    steps = dense.abs().amax(-1, keepdim=True) / 127
    rounding = torch.finfo(TORCH[dtype]).eps * dense.abs().amax(-1, keepdim=True) + torch.finfo(TORCH[dtype]).tiny
    assert ((back - dense).abs() <= steps * 0.5001 + rounding).all()


@seed(3)
@settings(max_examples=200, deadline=None, database=None)
@given(st.sampled_from(FLOATS), st.lists(st.floats(-20, 20, width=16), min_size=2, max_size=40))
def test_what_float8_loses_is_a_sixteenth_at_most_unless_it_saturates(dtype, numbers):
    numbers = numbers[: len(numbers) // 2 * 2]
    floats, quantised = quantised_pair(dtype, FLOAT8, len(numbers) // 2, 1)
    dense = torch.tensor(numbers).view(1, 1, 2, -1, 1).to(TORCH[dtype]).float()
    back = there_and_back(dense, floats, quantised)
    scales = torch.tensor([0.02, 0.03]).view(1, 1, 2, 1, 1)
    kept = dense.clamp(-448 * scales, 448 * scales)
    slack = torch.finfo(TORCH[dtype]).eps
    assert ((back - kept).abs() <= kept.abs() * (1 / 16 + 2 * slack) + scales * 2**-10 * (1 + slack)).all()


def there_and_back(dense: torch.Tensor, floats: BlockLayout, quantised: BlockLayout) -> torch.Tensor:
    blocks = lay_out(dense, floats)
    for here, there in ((quantised, floats), (floats, quantised)):
        conversion = plan(here, there, other_dtypes=True)
        assert conversion is not None
        pool = np.zeros((1, here.block_bytes), np.uint8)
        conversion.convert(blocks, [0], 0, pool, Row([0]))
        blocks = pool
    return read_back(blocks, floats, dense.shape[3]).float()


def test_a_token_of_int8_with_no_number_in_it_is_none_as_a_whole_and_harms_no_other():
    there, here = quantised_pair("float32", "int8", 4, 2)
    numbers = np.ones((2, 4, 2), np.float32)
    numbers[0, 1, 0], numbers[1, 2, 1], numbers[1, 3] = np.nan, np.inf, 1e-40
    conversion = plan(here, there, other_dtypes=True)
    assert conversion is not None
    pool = np.zeros((1, here.block_bytes), np.uint8)
    conversion.convert(numbers.view(np.uint8).reshape(1, -1), [0], 0, pool, Row([0]))
    back = read_back(pool, here, 4)[0, 0]
    expected = torch.ones(2, 4, 2)
    expected[0, 1], expected[1, 2], expected[1, 3] = float("nan"), float("nan"), 0.0
    torch.testing.assert_close(back, expected, rtol=1e-6, atol=0, equal_nan=True)


def test_int8_of_quantised_zero_is_zero_bytes_as_a_tail_that_nobody_covers():
    there, here = quantised_pair("float32", "int8", 4, 2)
    conversion = plan(here, there, other_dtypes=True)
    assert conversion is not None
    pool = np.full((1, here.block_bytes), UNWRITTEN, np.uint8)
    conversion.convert(np.zeros((1, there.block_bytes), np.uint8), [0], 0, pool, Row([0]))
    assert not pool.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_move_changes_no_bit_whatever_the_numbers(dtype):
    here, there = (BlockLayout("m", dtype, 2, 2, 8, page) for page in (32, 16))
    conversion = plan(here, there)
    assert conversion is not None
    assert conversion.same_bits
    source = np.random.default_rng(0).integers(0, 256, (4, there.block_bytes), np.uint8)
    pool = np.zeros((2, here.block_bytes), np.uint8)
    conversion.convert(source, range(4), 0, pool, Row([0, 1]))
    token = 8 * {"float32": 4, FLOAT8: 1, "int8": 1}.get(dtype, 2)
    for theirs, ours in zip(regions(source, there, token), regions(pool, here, token), strict=True):
        for block, kv in itertools.product(range(4), range(2)):
            assert (ours[block // 2, :, :, kv, block % 2 * 16 :][:, :, :16] == theirs[block, :, :, kv]).all()


def test_scales_of_tokens_that_nobody_covers_are_zero_as_their_numbers():
    here, there = (BlockLayout("m", "int8", 2, 2, 8, page) for page in (32, 16))
    conversion = plan(here, there)
    assert conversion is not None
    pool = np.full((1, here.block_bytes), UNWRITTEN, np.uint8)
    conversion.convert(np.full((1, there.block_bytes), GARBAGE, np.uint8), [0], 0, pool, Row([0]))
    for part in regions(pool, here, 8):
        assert (part[:, :, :, :, :16] == GARBAGE).all()
        assert not part[:, :, :, :, 16:].any()


def regions(blocks: np.ndarray, layout: BlockLayout, token: int) -> list[np.ndarray]:
    """Bytes [n, layers, heads, 2, tokens, .]: the numbers of `token` bytes each, and of int8 the scales."""
    page = layout.page_size_tokens
    heads = blocks.reshape(len(blocks), 2, 2, -1)
    numbers, scales = heads[..., : 2 * page * token], heads[..., 2 * page * token :]
    return [part.reshape(len(blocks), 2, 2, 2, page, -1) for part in (numbers, scales) if part.size]
