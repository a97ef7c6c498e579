"""Chooses the next token of every row on the device: temperature, top_k, top_p, min_p and the draw, without a sort.

What is kept of a row is all scores from a threshold up. The threshold of top_k and top_p is found by halving the range
of float32 numbers, seen as integers of the same order, twice a pass over the row (FlashInfer, Ye et al., 2025, avoids
the sort by rejection instead, which takes random numbers that recovery could not replay). A search ends as soon as one
score is left between its bounds: some 8-10 passes where scores differ, never more than 16, none for rows without these
filters. The steps, each a kernel:

    scale      grid (rows, parts)   scores = logits / temperature, maximum of each part
    threshold  grid (rows)          searches; one program a row, whose scores stay in the L2 cache
    weigh      grid (rows, parts)   sum of exp(score - maximum) of what is kept in each part
    pick       grid (rows)          the part, then the token in it, in which the cumulative sum passes number * sum

Greedy rows go through the same steps: their threshold is the maximum, their number 0, so the lowest id wins.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling import GREEDY_BELOW

PART = 4096
"""Scores of a program of `scale` and `weigh`: with 8 warps 16 a thread. 32 programs a row of 128 k scores."""
LANES, UNROLLED = 2048, 4
"""A search adds up in LANES places and reads UNROLLED times as many scores at once: with 16 warps 4 places and 16
scores a thread, which just fit its 128 registers. 32 KB are under way then; a multiprocessor that takes 64 bytes a
cycle from an L2 cache some 270 cycles away needs 17."""


def sample(
    logits: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor, numbers: Tensor,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """int64 [rows], or `out` of any integer type: a token of each row of logits [rows, vocab_size], of any float type.

    All other arguments are [rows]: top_ks int32 or int64, the rest float32 or float64. Temperature below 1e-5 is greedy
    (the lowest of the likeliest ids); top_k 0 or beyond the vocabulary, top_p 1 and min_p 0 keep all. The filters apply
    in this order, each to what the last one left; scores equal to the last one kept stay. The token is the inverse of
    the cumulative distribution, in order of ids, at `numbers` in [0, 1).

    As `kernels.sampling`: the set kept by top_k and min_p is the same; that of top_p, and the token drawn, may differ
    where top_p or the number comes within about 1e-6 of a sum of probabilities. They are float32 here and summed in
    float64; there all is float64. Numbers and top_ps in float32 are moved by up to 6e-8 themselves:
    pass float64 for equal streams.
    Logits that are NaN or all -inf give some id of the vocabulary.
    """
    scores, maxima = _scale(logits, temperatures)
    found = _thresholds(scores, maxima, logits.shape[1], temperatures, top_ks, top_ps, min_ps)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device) if out is None else out
    _draw(scores, found, temperatures, numbers, tokens)
    return tokens


def thresholds(logits: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor) -> Tensor:
    """float32 [rows]: tokens with logit / temperature >= this are kept. -inf keeps all. For checks of `sample`."""
    scores, maxima = _scale(logits, temperatures)
    return _thresholds(scores, maxima, logits.shape[1], temperatures, top_ks, top_ps, min_ps)[:, 0]


def _scale(logits: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
    """float32 scores [rows, parts * PART], -inf beyond the vocabulary, and the maximum of each part [rows, parts]."""
    rows, vocab_size = logits.shape
    parts = triton.cdiv(vocab_size, PART)
    scores = torch.empty(rows, parts * PART, dtype=torch.float32, device=logits.device)
    maxima = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    _scale_part[(rows, parts)](
        logits, logits.stride(0), temperatures, scores, maxima, vocab_size, GREEDY_BELOW=GREEDY_BELOW, PART=PART,
        num_warps=8,
    )  # fmt: skip
    return scores, maxima


def _thresholds(
    scores: Tensor, maxima: Tensor, vocab_size: int, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor,
    min_ps: Tensor,
) -> Tensor:  # fmt: skip
    """float32 [rows, 2]: threshold and maximum of each row."""
    rows, parts = maxima.shape
    found = torch.empty(rows, 2, dtype=torch.float32, device=scores.device)
    _find_threshold[(rows,)](
        scores, maxima, temperatures, top_ks, top_ps, min_ps.double().log(), found, vocab_size, parts, PART=PART,
        GREEDY_BELOW=GREEDY_BELOW, PARTS=_padded(parts), LANES=LANES, UNROLLED=UNROLLED, num_warps=16,
    )  # fmt: skip
    return found


def _draw(scores: Tensor, found: Tensor, temperatures: Tensor, numbers: Tensor, tokens: Tensor) -> None:
    rows, parts = len(scores), scores.shape[1] // PART
    masses = torch.empty(rows, parts, dtype=torch.float64, device=scores.device)
    _weigh_part[(rows, parts)](scores, found, masses, PART=PART, num_warps=8)
    _pick[(rows,)](
        scores, found, masses, temperatures, numbers, tokens, parts, GREEDY_BELOW=GREEDY_BELOW, PARTS=_padded(parts),
        PART=PART, num_warps=8,
    )  # fmt: skip


def _padded(parts: int) -> int:
    """Tiles have a power of two elements, and a cumulative sum of one is none."""
    return max(2, int(triton.next_power_of_2(parts)))


@triton.jit
def _scale_part(
    logits, stride, temperatures, scores, maxima, vocab_size, GREEDY_BELOW: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    token = part * PART + tl.arange(0, PART)
    score = tl.load(logits + row * stride + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperatures + row).to(tl.float32)
    score = tl.div_rn(score, tl.where(temperature < GREEDY_BELOW, 1.0, temperature))  # the quotient that torch gets
    place = row * tl.num_programs(1) + part
    tl.store(scores + place * PART + tl.arange(0, PART), score)
    tl.store(maxima + place, tl.max(score, 0))


@triton.jit
def _find_threshold(
    scores, maxima, temperatures, top_ks, top_ps, log_min_ps, found, vocab_size, parts, PART: tl.constexpr,
    GREEDY_BELOW: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr, UNROLLED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    maximum = tl.max(tl.load(maxima + row * parts + part, mask=part < parts, other=float("-inf")), 0)
    size = parts * PART
    in_row = scores + row * size
    top_k = tl.load(top_ks + row).to(tl.int32)
    top_p = tl.load(top_ps + row).to(tl.float64)
    greedy = tl.load(temperatures + row).to(tl.float32) < GREEDY_BELOW
    threshold = tl.where(greedy, maximum, float("-inf"))
    if (top_k > 0) & (top_k < vocab_size) & (threshold < maximum):
        threshold = _search(in_row, size, maximum, threshold, top_k.to(tl.float64), False, LANES, UNROLLED)
    if (top_p < 1.0) & (threshold < maximum):
        total = _mass(in_row, size, maximum, threshold, LANES, UNROLLED)
        threshold = _search(in_row, size, maximum, threshold, top_p * total, True, LANES, UNROLLED)
    threshold = tl.maximum(threshold, (maximum.to(tl.float64) + tl.load(log_min_ps + row)).to(tl.float32))
    tl.store(found + row * 2, threshold)
    tl.store(found + row * 2 + 1, maximum)


@triton.jit
def _search(
    scores, size, maximum, floor, target, WEIGHED: tl.constexpr, LANES: tl.constexpr, UNROLLED: tl.constexpr
):  # fmt: skip
    """The highest threshold, from `floor` to `maximum`, whose scores reach `target`: in number, or WEIGHED in mass.

    `low` reaches it, whatever is above `high` does not. `extra` counts scores between the two.
    """
    low = _place(floor)
    high = _place(maximum)
    low_count = size
    high_count = size * 0
    low_sum = target + 1.0
    # With one score between the bounds, or when `low` reaches the target exactly, `low` keeps what the answer keeps.
    while (low < high) & (low_count - high_count > 1) & (low_sum > target):
        width = high - low
        first, second, third = low + (width + 3) // 4, low + (width + 1) // 2, low + (3 * width + 3) // 4
        count_1, sum_1, count_2, sum_2, count_3, sum_3 = _tails(
            scores, size, maximum, _number(first), _number(second), _number(third), WEIGHED, LANES, UNROLLED
        )
        reached_1, reached_2, reached_3 = sum_1 >= target, sum_2 >= target, sum_3 >= target
        high = tl.where(reached_3, high, tl.where(reached_2, third - 1, tl.where(reached_1, second - 1, first - 1)))
        high_count = tl.where(
            reached_3, high_count, tl.where(reached_2, count_3, tl.where(reached_1, count_2, count_1))
        )  # fmt: skip
        low = tl.where(reached_3, third, tl.where(reached_2, second, tl.where(reached_1, first, low)))
        low_count = tl.where(
            reached_3, count_3, tl.where(reached_2, count_2, tl.where(reached_1, count_1, low_count))
        )  # fmt: skip
        low_sum = tl.where(reached_3, sum_3, tl.where(reached_2, sum_2, tl.where(reached_1, sum_1, low_sum)))
    return _number(low)


@triton.jit
def _tails(
    scores, size, maximum, first, second, third, WEIGHED: tl.constexpr, LANES: tl.constexpr,
    UNROLLED: tl.constexpr,
):  # fmt: skip
    """(count, sum) of the scores from each of three thresholds up. The sum is the count, or WEIGHED the mass."""
    place = tl.arange(0, UNROLLED)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    count_1 = tl.zeros([LANES], tl.int32)
    count_2 = tl.zeros([LANES], tl.int32)
    count_3 = tl.zeros([LANES], tl.int32)
    mass_1 = tl.zeros([LANES], tl.float64)
    mass_2 = tl.zeros([LANES], tl.float64)
    mass_3 = tl.zeros([LANES], tl.float64)
    for start in range(0, size, UNROLLED * LANES):
        score = tl.load(scores + start + place, mask=start + place < size, other=float("-inf"))
        count_1 += tl.sum((score >= first).to(tl.int32), 0)
        count_2 += tl.sum((score >= second).to(tl.int32), 0)
        count_3 += tl.sum((score >= third).to(tl.int32), 0)
        if WEIGHED:
            weight = tl.exp(score - maximum)
            mass_1 += tl.sum(tl.where(score >= first, weight, 0.0), 0).to(tl.float64)
            mass_2 += tl.sum(tl.where(score >= second, weight, 0.0), 0).to(tl.float64)
            mass_3 += tl.sum(tl.where(score >= third, weight, 0.0), 0).to(tl.float64)
    all_1, all_2, all_3 = tl.sum(count_1, 0), tl.sum(count_2, 0), tl.sum(count_3, 0)
    if WEIGHED:
        return all_1, tl.sum(mass_1, 0), all_2, tl.sum(mass_2, 0), all_3, tl.sum(mass_3, 0)
    return all_1, all_1.to(tl.float64), all_2, all_2.to(tl.float64), all_3, all_3.to(tl.float64)


@triton.jit
def _mass(scores, size, maximum, floor, LANES: tl.constexpr, UNROLLED: tl.constexpr):
    """Sum of exp(score - maximum) of the scores from `floor` up, added as `_tails` adds."""
    sums = _tails(scores, size, maximum, floor, floor, floor, True, LANES, UNROLLED)
    return sums[1]


@triton.jit
def _place(number):
    """int64 that orders as float32 does: negative numbers count down from -1."""
    bits = number.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _number(place):
    bits = place.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weights(scores, found, row, place, PART: tl.constexpr):
    """exp(score - maximum) of what is kept in the part of the row that starts at `place`, 0 elsewhere."""
    score = tl.load(scores + place + tl.arange(0, PART))
    weight = tl.exp(score - tl.load(found + row * 2 + 1))
    return tl.where(score >= tl.load(found + row * 2), weight, 0.0).to(tl.float64)


@triton.jit
def _weigh_part(scores, found, masses, PART: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(masses + part, tl.sum(_weights(scores, found, row, part * PART, PART), 0))


@triton.jit
def _pick(
    scores, found, masses, temperatures, numbers, tokens, parts, GREEDY_BELOW: tl.constexpr, PARTS: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    mass = tl.load(masses + row * parts + part, mask=part < parts, other=0.0)
    greedy = tl.load(temperatures + row).to(tl.float32) < GREEDY_BELOW
    number = tl.where(greedy, 0.0, tl.load(numbers + row).to(tl.float64))
    target = number * tl.sum(mass, 0)
    chosen, before = _passing(mass, target, PARTS)
    weights = _weights(scores, found, row, (row * parts + chosen) * PART, PART)
    token, _ = _passing(weights, target - before, PART)
    tl.store(tokens + row, (chosen * PART + token).to(tokens.dtype.element_ty))


@triton.jit
def _passing(weights, target, SIZE: tl.constexpr):
    """Where the cumulative sum first exceeds `target`, and the sum before. Rounding apart there is such a place; else
    it is the last one with a weight, or 0."""
    place = tl.arange(0, SIZE)
    cumulative = tl.cumsum(weights, 0)
    first = tl.min(tl.where((cumulative > target) & (weights > 0.0), place, SIZE), 0)
    last = tl.max(tl.where(weights > 0.0, place, 0), 0)
    passing = tl.where(first < SIZE, first, last)
    return passing, tl.sum(tl.where(place < passing, weights, 0.0), 0)
