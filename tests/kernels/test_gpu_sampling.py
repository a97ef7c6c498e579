"""Sampling on the device, in Triton's interpreter, against the reference."""

import math

import pytest
import torch

from engine.requests import SamplingParams
from engine.sampler import uniform
from kernels import sampling as reference
from kernels.gpu import sampling

VOCAB = 5000
FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": VOCAB - 1},
    {"top_k": VOCAB + 1},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"top_p": 0.9999},
    {"min_p": 0.1},
    {"top_k": 50, "top_p": 0.95},
    {"top_k": 7, "top_p": 0.5, "min_p": 0.3},
    {"top_p": 0.8, "min_p": 0.01},
    *({"top_k": top_k} for top_k in (2, 3, 5, 9, 17, 33, 100, 1000)),
]


def device_rows(params: list[SamplingParams]) -> list[torch.Tensor]:
    """Temperatures, top_ks, top_ps and min_ps."""
    top_ks = torch.tensor([each.top_k for each in params], dtype=torch.int32)
    temperatures, top_ps, min_ps = (
        torch.tensor([getattr(each, name) for each in params], dtype=torch.float64)
        for name in ("temperature", "top_p", "min_p")
    )
    return [temperatures, top_ks, top_ps, min_ps]


def random_logits(rows: int, vocab_size: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def drawn_by_reference(scores: torch.Tensor, params: SamplingParams, number: float) -> int:
    return reference.draw(scores, reference.threshold(scores, params.top_k, params.top_p, params.min_p), number)


def kept_by_reference(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    kept = []
    for row, each in zip(logits, params, strict=True):
        scores = row.float() / each.temperature
        kept.append(scores >= reference.threshold(scores, each.top_k, each.top_p, each.min_p))
    return torch.stack(kept)


def kept_by_kernel(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    temperatures = torch.tensor([[each.temperature] for each in params])
    return logits.float() / temperatures >= sampling.thresholds(logits, *device_rows(params))[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_the_tokens_that_the_reference_keeps_are_kept(dtype):
    """bfloat16 logits have many equal scores: those at a threshold stay together."""
    params = [SamplingParams(temperature=0.4 + 0.3 * (index % 4), **each) for index, each in enumerate(FILTERS)]
    logits = random_logits(len(params)).to(dtype)
    assert torch.equal(kept_by_kernel(logits, params), kept_by_reference(logits, params))


def test_ties_infinities_and_signed_zeros_are_kept_or_dropped_as_by_the_reference():
    logits = torch.tensor(
        [
            [1.0, 2.0, 2.0, 2.0, 0.5],
            [0.0, -0.0, -1.0, -0.0, 0.0],
            [-math.inf, -5.0, -math.inf, -5.0, -6.0],
            [3e38, 1e-38, -3e38, 1e-45, -1e-45],
            [-1.0, -1.0, -1.0, -1.0, -1.0],
            [0.0] * 5,
            [0.0] * 5,
        ]
    )
    # Neighbours: no float32 lies between them
    logits[-2:].view(torch.int32)[:] = torch.tensor([0x3F800002, 0xBF800002 - 2**32])[:, None] + torch.arange(5)
    for filters in (
        {"top_k": 1},
        {"top_k": 2},
        {"top_k": 4},
        {"top_p": 0.5},
        {"top_p": 0.999999},
        {"top_k": 3, "min_p": 0.9},
    ):
        params = [SamplingParams(temperature=1.0, **filters)] * len(logits)
        assert torch.equal(kept_by_kernel(logits, params), kept_by_reference(logits, params)), filters


def test_draws_are_those_of_the_reference():
    """Rounding may move a draw that falls within 1e-6 of the edge between two tokens: here none does."""
    params = [SamplingParams(temperature=0.7 + 0.2 * (index % 3), **each) for index, each in enumerate(FILTERS)] * 2
    logits = random_logits(len(params), seed=1)
    numbers = torch.tensor([uniform(3, index) for index in range(len(params))], dtype=torch.float64)
    numbers[:2] = torch.tensor([0.0, 1 - 2**-52], dtype=torch.float64)
    drawn = sampling.sample(logits, *device_rows(params), numbers)
    expected = [
        drawn_by_reference(row / each.temperature, each, float(number))
        for row, each, number in zip(logits, params, numbers, strict=True)
    ]
    assert drawn.tolist() == expected


def test_a_number_on_the_edge_between_two_tokens_draws_the_later_one():
    params = [SamplingParams(temperature=1.0, top_k=4)] * 5
    numbers = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.75 - 2**-52], dtype=torch.float64)
    logits = torch.tensor([1.0, -3.0, 1.0, 1.0, -4.0, 1.0]).expand(5, -1)
    assert sampling.sample(logits, *device_rows(params), numbers).tolist() == [0, 2, 3, 5, 3]


def test_greedy_rows_take_the_lowest_of_the_likeliest_ids_whatever_else_they_ask_for():
    logits = random_logits(3, 9000).to(torch.bfloat16)
    logits[:, [8999, 4321, 7]] = 50.0
    logits[1, 7] = 49.0
    params = [
        SamplingParams(),
        SamplingParams(temperature=9e-6, top_k=2, top_p=0.5),
        SamplingParams(temperature=1.0, top_k=1),
    ]
    out = torch.zeros(3, dtype=torch.int32)
    numbers = torch.tensor([0.99, 0.99, 0.0], dtype=torch.float64)
    assert sampling.sample(logits, *device_rows(params), numbers, out) is out
    assert out.tolist() == [7, 4321, 7]


def test_draws_follow_the_distribution():
    """Chi-square over the six kept tokens, of two parts of the vocabulary, at a chance of 1e-4 to fail by luck."""
    rows, vocab_size = 300, 5000
    likely = {3: 0.0, 4: 0.5, 4095: 1.0, 4096: -0.5, 4097: 0.2, 4999: 0.7}
    logits = torch.full((vocab_size,), -30.0)
    logits[list(likely)] = torch.tensor(list(likely.values()))
    params = [SamplingParams(temperature=0.8, min_p=1e-6)] * rows
    numbers = torch.tensor([uniform(11, index) for index in range(rows)], dtype=torch.float64)
    drawn = sampling.sample(logits.expand(rows, -1), *device_rows(params), numbers)
    expected = rows * (torch.tensor(list(likely.values())) / 0.8).softmax(0)
    counts = torch.tensor([int((drawn == token).sum()) for token in likely])
    assert int(counts.sum()) == rows
    assert float(((counts - expected) ** 2 / expected).sum()) < 25.7  # 5 degrees of freedom


def test_rows_without_any_likely_token_give_an_id_of_the_vocabulary():
    logits = torch.stack((torch.full((100,), -math.inf), torch.full((100,), math.nan)))
    params = [SamplingParams(temperature=1.0, top_p=0.9)] * 2
    with pytest.warns(RuntimeWarning):
        drawn = sampling.sample(logits, *device_rows(params), torch.tensor([0.5, 0.5]))
    assert bool(((drawn >= 0) & (drawn < 100)).all())


def test_single_precision_settings_serve_too():
    params = [SamplingParams(temperature=0.8, top_k=20, top_p=0.9)] * 2
    temperatures, top_ks, top_ps, min_ps = device_rows(params)
    logits = random_logits(2)
    numbers = torch.tensor([0.25, 1.0])  # 1: what 1 - 2^-52 rounds to
    drawn = sampling.sample(logits, temperatures.float(), top_ks, top_ps.float(), min_ps.float(), numbers)
    kept = kept_by_kernel(logits, params)
    assert int(drawn[1]) == int(kept[1].nonzero().max())
    assert drawn[0] == drawn_by_reference(logits[0] / 0.8, params[0], 0.25)
