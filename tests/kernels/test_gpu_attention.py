"""The attention kernels for GPUs, in Triton's interpreter."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from kernels import reference
from kernels.gpu import cases
from kernels.gpu.cases import LAYER, AttentionCase, AttentionInputs
from kernels.gpu.decode_attention import Splits, choose_splits, decode_attention, workspace_size
from kernels.gpu.prefill_attention import SpanSizes, prefill_attention, prefill_spans
from kernels.paged_attention import SequenceSpan

SMALL = AttentionCase((70, 0, 16), (1, 1, 1), head_dim=64, group=2, dtype=torch.float32)
CHUNKS = AttentionCase((75, 33, 9), (40, 33, 1), head_dim=64, group=3, dtype=torch.float32, kv_heads=1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def name(case: AttentionCase) -> str:
    cache = "fp8" if case.fp8_cache else str(case.dtype)[6:]
    return f"{case.head_dim}-{case.group}-{case.page_size}-{cache}-window {case.window}-cap {case.soft_cap}"


def lengths_of(case: AttentionCase) -> Tensor:
    return torch.tensor(case.lengths, dtype=torch.int32)


@pytest.mark.parametrize("case", cases.decode_cases(270), ids=name)
def test_decode_attention_sees_exactly_its_context(case: AttentionCase) -> None:
    assert cases.worst_error(case, "cpu") < case.tolerance


@pytest.mark.parametrize("case", cases.prefill_cases(90), ids=name)
def test_prefill_attention_sees_exactly_what_is_causal(case: AttentionCase) -> None:
    assert cases.worst_error(case, "cpu") < case.tolerance


@pytest.mark.parametrize("group", [3, 7, 32])
@pytest.mark.parametrize("counts", [(1, 1), (9, 1)])
def test_any_number_of_query_heads_can_share_a_kv_head(group: int, counts: tuple[int, ...]) -> None:
    case = AttentionCase((40, 3), counts, head_dim=64, group=group, dtype=torch.float32, kv_heads=1)
    assert cases.worst_error(case, "cpu") < case.tolerance


def test_long_contexts_are_read_in_many_splits() -> None:
    case = AttentionCase((3000, 129), (1, 1), head_dim=64, page_size=64, dtype=torch.float32, kv_heads=1, group=2)
    assert workspace_size(*heads_and_slabs(case), max_length=3000) == 2 * 2 * 24 * 65
    assert cases.worst_error(case, "cpu") < case.tolerance


def heads_and_slabs(case: AttentionCase) -> tuple[Tensor, Tensor]:
    given = cases.inputs(case, "cpu")
    return given.query, given.slabs


def test_the_cases_expect_what_the_reference_computes() -> None:
    case = replace(CHUNKS, window=12)
    given = cases.inputs(case, "cpu")
    wanted = cases.expected(case, given)
    for span in given.spans:
        rows = slice(span.first_row, span.first_row + span.count)
        alone = reference.paged_attention(given.query[rows], given.slabs, LAYER, list(span.block_ids), span.start, 12)
        torch.testing.assert_close(wanted[rows], alone)


@pytest.mark.parametrize("window", [None, 20])
def test_a_launch_captured_for_long_contexts_serves_short_ones(window: int | None) -> None:
    case = replace(SMALL, window=window)
    given = cases.inputs(case, "cpu")
    result = decode(given, case, max_length=100_000)
    torch.testing.assert_close(result, cases.expected(case, given), rtol=1e-5, atol=1e-5)


def decode(given: AttentionInputs, case: AttentionCase, **options: Any) -> Tensor:
    options = {"max_length": max(case.lengths), "window": case.window} | options
    return decode_attention(given.query, given.slabs, LAYER, given.block_tables, lengths_of(case), **options)


@pytest.mark.parametrize("max_length", [16, 1000])
def test_padding_rows_of_a_batch_are_zero_and_follow_no_block_table(max_length: int) -> None:
    case = AttentionCase((0, 16, 0), (1, 1, 1), head_dim=64, dtype=torch.float32)
    given = cases.inputs(case, "cpu")
    given.block_tables[0] = given.block_tables[2] = 2**31 - 1  # reading there would end the process
    given.query[0] = torch.nan
    result = decode(given, case, max_length=max_length)
    assert not result[0].any()
    assert not result[2].any()
    torch.testing.assert_close(result[1], cases.expected(case, given)[1])


def test_decode_attention_writes_where_it_is_told() -> None:
    given = cases.inputs(SMALL, "cpu")
    wide = torch.full((3, 2, *given.query.shape[1:]), torch.nan)
    wide[:, 0] = given.query
    need = workspace_size(given.query, given.slabs, max_length=1000)
    result = decode_attention(
        wide[:, 0], given.slabs, LAYER, given.block_tables, lengths_of(SMALL), max_length=1000, out=wide[:, 1],
        workspace=torch.full((need,), torch.nan),
    )  # fmt: skip
    assert result.data_ptr() == wide[:, 1].data_ptr()
    assert torch.equal(wide[:, 0], given.query)
    torch.testing.assert_close(result, cases.expected(SMALL, given), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="workspace must have"):
        decode(given, SMALL, max_length=1000, workspace=torch.empty(need - 1))


def test_tensors_that_do_not_fit_are_refused() -> None:
    given = cases.inputs(SMALL, "cpu")
    with pytest.raises(ValueError, match="slabs"):
        decode(replace(given, slabs=given.slabs.half()), SMALL)
    with pytest.raises(ValueError, match="need scales"):
        decode(replace(given, query=given.query.half(), slabs=given.slabs.to(torch.float8_e4m3fn)), SMALL)
    with pytest.raises(ValueError, match="contiguous"):
        decode(replace(given, slabs=given.slabs.transpose(4, 5).contiguous().transpose(4, 5)), SMALL)
    with pytest.raises(ValueError, match="int32"):
        decode(replace(given, block_tables=given.block_tables.long()), SMALL)


def test_splits_fill_the_gpu_and_are_not_too_short() -> None:
    for pairs in (1, 8, 40, 64, 256, 2048):
        for positions in (1, 128, 1000, 8192, 131_072):
            splits = choose_splits(positions, pairs, 132, 64)
            assert splits.shortest % 64 == 0
            assert 128 <= splits.shortest <= 1024
            assert 1 <= splits.count <= -(-positions // splits.shortest)
            assert pairs * splits.count <= max(264, 4 * pairs)
    assert choose_splits(8192, 8, 132, 64) == Splits(33, 128)  # one wave of a batch of 1
    assert choose_splits(8192, 256, 132, 64) == Splits(4, 960)  # a batch of 32 fills the GPU by itself
    assert choose_splits(131_072, 2048, 132, 64) == Splits(4, 1024)


@pytest.fixture
def row_by_row_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products whose rows do not depend on their place, as on tensor cores; numpy's BLAS treats edges differently."""

    def create_dot(self: object, a: Any, b: Any, d: Any, *_: Any) -> TensorHandle:
        result = d.data.copy()
        for k in range(a.data.shape[1]):
            result += a.data[:, k, None] * b.data[k]
        return TensorHandle(result, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.usefixtures("row_by_row_products")
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (20, None), (None, 2.0)])
def test_bits_of_a_row_depend_neither_on_neighbours_nor_on_chunks(window: int | None, soft_cap: float | None) -> None:
    case = replace(CHUNKS, window=window, soft_cap=soft_cap)
    given = cases.inputs(case, "cpu")
    together = cases.run(case, given)
    for span in given.spans:
        for size in (1, 7, 33):
            for first in range(0, span.count, size if size > 1 else 9):
                chunk = SequenceSpan(0, min(size, span.count - first), span.start + first, span.block_ids)
                rows = slice(span.first_row + first, span.first_row + first + chunk.count)
                spans = prefill_spans([chunk], given.slabs, given.query.shape[1])
                alone = prefill_attention(
                    given.query[rows], given.slabs, LAYER, spans, window=window, soft_cap=soft_cap
                )
                assert torch.equal(alone, together[rows])


def test_padded_spans_compute_nothing_and_can_be_overwritten_in_place() -> None:
    given = cases.inputs(CHUNKS, "cpu")
    heads = given.query.shape[1]
    nobody = SequenceSpan(0, 0, 0, [])
    sizes = SpanSizes(spans=4, blocks=8, tiles=12)
    captured = prefill_spans([given.spans[1], nobody], given.slabs, heads, at_least=sizes)
    rows = slice(given.spans[1].first_row, given.spans[1].first_row + 33)
    out = torch.full_like(given.query, 7.0)
    prefill_attention(given.query, given.slabs, LAYER, captured, out=out)
    wanted = cases.expected(CHUNKS, given)
    torch.testing.assert_close(out[rows], wanted[rows], rtol=1e-5, atol=1e-5)
    assert (out[: rows.start] == 7).all()
    assert (out[rows.stop :] == 7).all()

    prefill_spans(given.spans, given.slabs, heads, at_least=sizes, into=captured.buffer)
    prefill_attention(given.query, given.slabs, LAYER, captured, out=out)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="buffer to overwrite"):
        prefill_spans(given.spans * 3, given.slabs, heads, at_least=sizes, into=captured.buffer)


def test_tiles_with_the_most_keys_begin_first() -> None:
    slabs = torch.empty(1, 1, 1, 2, 16, 64)
    spans = prefill_spans([SequenceSpan(0, 1, 50, [0]), SequenceSpan(1, 70, 0, [0])], slabs, 1)
    assert list(zip(spans.tile_spans.tolist(), spans.tile_numbers.tolist(), strict=True)) == [
        (1, 2), (0, 0), (1, 1), (1, 0),
    ]  # fmt: skip


@pytest.mark.slow
def test_kernels_compile_for_a_hopper_gpu(tmp_path: Path) -> None:
    """In a process where triton compiles; the interpreter forgives what a compiler does not."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.kernels.hopper"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    launches = [line.split() for line in done.stdout.splitlines()]
    assert len(launches) == 8
    for kernel, shared_bytes, *instructions in launches:
        assert int(shared_bytes) <= 227 * 1024
        if kernel == "_attend_split":
            assert instructions == ["mma.sync", "cp.async.cg"]
        if kernel == "_attend_tile_of_queries":
            assert instructions == ["wgmma", "cp.async.cg"]
