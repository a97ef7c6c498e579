"""Cases that attention kernels are checked on: small ones in the interpreter, the same up to 128 k positions on a GPU.

Everything that no query may see holds NaN, and unused entries of block tables name a block of NaN.
"""

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from kernels.gpu.decode_attention import decode_attention
from kernels.gpu.prefill_attention import prefill_attention, prefill_spans
from kernels.paged_attention import SequenceSpan

HEAD_DIMS = (64, 80, 96, 128, 256)
GROUPS = (1, 2, 4, 8, 16)
PAGE_SIZES = (16, 32, 64)
LAYER, NUM_LAYERS = 1, 2
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Of the output vector of any head, relative to its norm, by the type of the queries."""


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """Sequences whose last `count` positions of `length` are queries; decode where all counts are 1."""

    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    head_dim: int = 128
    group: int = 4
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    fp8_cache: bool = False
    window: int | None = None
    soft_cap: float | None = None
    kv_heads: int = 2
    spare_blocks: int = 0
    """Unused blocks before the first used one: with enough of them offsets leave 32 bits."""

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.dtype]

    @property
    def is_decode(self) -> bool:
        return all(count <= 1 for count in self.counts)


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    query: Tensor
    """[sum of counts, heads, head_dim]; one row for each sequence where the case is decode."""
    slabs: Tensor
    scales: Tensor | None
    spans: list[SequenceSpan]
    block_tables: Tensor
    dense: list[Tensor]
    """float32 [length, kv_heads, 2, head_dim] of each sequence: K and V as the cache has them, scaled."""


def decode_cases(longest: int, *, full: bool = False) -> list[AttentionCase]:
    """Contexts of up to `longest` positions. `full`: every head dim with every group and page size, else some."""
    cases = []
    for index, features in _features(full):
        lengths = (longest, 0, 1, features.page_size, features.page_size + 1, max(1, longest // 2 - index))
        cases.append(_with(features, lengths, (1,) * len(lengths)))
    return cases


def prefill_cases(longest: int, *, full: bool = False) -> list[AttentionCase]:
    """As `decode_cases`: whole prompts, chunks that end at `longest` or elsewhere, and single queries."""
    cases = []
    for index, features in _features(full):
        count = min(longest, 20 + index)
        lengths = (longest, count, 1, features.page_size + 1, max(1, longest // 2 - index))
        cases.append(_with(features, lengths, (count, count, 1, 2, 1)))
    return cases


def far_cases() -> list[AttentionCase]:
    """Blocks beyond 2^31 elements, in 4 GiB of cache."""
    return [
        AttentionCase((300, 1000), counts, page_size=64, head_dim=128, spare_blocks=33_000)
        for counts in ((1, 1), (100, 50))
    ]


def _with(features: AttentionCase, lengths: tuple[int, ...], counts: tuple[int, ...]) -> AttentionCase:
    return AttentionCase(
        lengths, counts, features.head_dim, features.group, features.page_size, features.dtype, features.fp8_cache,
        features.window, features.soft_cap, kv_heads=2 if features.group < 8 else 1,
    )  # fmt: skip


def _features(full: bool) -> list[tuple[int, AttentionCase]]:
    """Each head dim, group and page size at least twice; dtypes, windows and soft caps in turns of unequal lengths."""
    shapes = list(product(range(5), range(5), range(3)))
    if not full:
        shapes = [(dim, group, (dim + group) % 3) for dim in range(5) for group in (dim, (dim + 2) % 5)]
    features = []
    for index, (dim, group, page) in enumerate(shapes):
        dtype = (torch.bfloat16, torch.float32, torch.float16)[index % 3]
        features.append((index, AttentionCase(
            (), (), HEAD_DIMS[dim], GROUPS[group], PAGE_SIZES[page], dtype,
            fp8_cache=dtype != torch.float32 and index % 4 >= 2,
            window=(None, 100, None, 17, None)[index % 5], soft_cap=(None, None, 2.0, None)[index % 4],
        )))  # fmt: skip
    return features


def inputs(case: AttentionCase, device: torch.device | str, seed: int = 0) -> AttentionInputs:
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    blocks = [-(-length // case.page_size) for length in case.lengths]
    first = 1 + case.spare_blocks  # block 0 is never written
    cache_dtype = torch.float8_e4m3fn if case.fp8_cache else case.dtype
    sizes = (first + sum(blocks), NUM_LAYERS, case.kv_heads, 2, case.page_size, case.head_dim)
    slabs = torch.empty(sizes, dtype=cache_dtype, device=device)
    raw = slabs.view(torch.uint8) if case.fp8_cache else slabs
    raw.fill_(0x7F if case.fp8_cache else math.nan)
    scales = 0.5 + random(NUM_LAYERS, case.kv_heads, 2).abs() if case.fp8_cache else None
    free = (first + torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(seed))).tolist()
    tables = torch.zeros(len(blocks), max(1, *blocks), dtype=torch.int32)
    spans, dense, row = [], [], 0
    for index, (length, count) in enumerate(zip(case.lengths, case.counts, strict=True)):
        ids = [free.pop() for _ in range(blocks[index])]
        tables[index, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        values = random(length, case.kv_heads, 2, case.head_dim).to(cache_dtype)
        positions = torch.arange(length, device=device)
        owners = torch.tensor(ids, dtype=torch.int64, device=device)[positions // case.page_size]
        stored = values.view(torch.uint8) if case.fp8_cache else values
        raw[owners, LAYER, :, :, positions % case.page_size] = stored
        factors = 1.0 if scales is None else scales[LAYER, :, :, None]
        dense.append(values.float() * factors)
        spans.append(SequenceSpan(row, count, length - count, ids))
        row += count
    query = random(row, case.kv_heads * case.group, case.head_dim).to(case.dtype)
    return AttentionInputs(query, slabs, scales, spans, tables.to(device), dense)


def run(case: AttentionCase, given: AttentionInputs) -> Tensor:
    """What the kernel for the case computes, shaped as the queries."""
    if not case.is_decode:
        spans = prefill_spans(given.spans, given.slabs, case.kv_heads * case.group)
        return prefill_attention(
            given.query, given.slabs, LAYER, spans, window=case.window, soft_cap=case.soft_cap, scales=given.scales
        )
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=given.query.device)
    return decode_attention(
        given.query, given.slabs, LAYER, given.block_tables, lengths, window=case.window, soft_cap=case.soft_cap,
        scales=given.scales, max_length=max(case.lengths),
    )  # fmt: skip


def expected(case: AttentionCase, given: AttentionInputs) -> Tensor:
    """The same in torch and float32, from the dense keys and values; 0 for sequences of length 0."""
    result = torch.zeros(given.query.shape, device=given.query.device)
    for span, dense in zip(given.spans, given.dense, strict=True):
        length = len(dense)
        queries = torch.arange(length - span.count, length, device=dense.device)[:, None]
        keys = torch.arange(length, device=dense.device)
        hidden = keys > queries
        if case.window is not None:
            hidden |= keys <= queries - case.window
        for head in range(case.kv_heads if length else 0):
            rows = slice(span.first_row, span.first_row + span.count)
            heads = slice(head * case.group, (head + 1) * case.group)
            query = given.query[rows, heads].float().transpose(0, 1)  # [group, count, head_dim]
            scores = query @ dense[:, head, 0].T / math.sqrt(case.head_dim)
            if case.soft_cap is not None:
                scores = case.soft_cap * torch.tanh(scores / case.soft_cap)
            weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
            result[rows, heads] = (weights @ dense[:, head, 1]).transpose(0, 1)
    return result


def worst_error(case: AttentionCase, device: torch.device | str, seed: int = 0) -> float:
    """Largest |kernel - expected| / |expected| of any head's output; NaN where the kernel let NaN through."""
    given = inputs(case, device, seed)
    result, wanted = run(case, given).float(), expected(case, given)
    distance = (result - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-6)
    return float(distance.max())
