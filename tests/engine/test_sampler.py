"""Sampling means what it means in transformers, and never depends on neighbours or attempts."""

import math
from collections import Counter

import pytest
import torch
from transformers.generation import logits_process as hf

from engine.plan import PlannedSequence, SampleSpec
from engine.requests import SamplingParams
from engine.sampler import choose, uniform
from kernels.ops import TorchOps

VOCAB = 4000
OPS = TorchOps()
PROMPT, OUTPUT = [5, 9, 9, 70], [70, 3, 3, 3]


def logits_of(rows=1, seed=0, vocab=VOCAB):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def spec(output=(), prompt=(), **params):
    return SampleSpec(SamplingParams(**params), list(prompt), list(output))


def sample(logits, specs, ops=OPS):
    """The one token of each row."""
    sequences = [PlannedSequence(f"s{row}", [0], 0, [0], 1, each, 0, len(each.output_token_ids))
                 for row, each in enumerate(specs)]  # fmt: skip
    chosen = choose(logits, sequences, ops)
    return [token for sequence in sequences for token in chosen[sequence.request_id]]


def sample_behind(drafts, logits, spec, ops=OPS):
    """The tokens of one sequence, with guesses."""
    sequence = PlannedSequence("s", [0, *drafts], 0, [0], 1, spec, len(drafts), len(spec.output_token_ids))
    return choose(logits, [sequence], ops)["s"]


def one(logits, **params):
    return sample(logits[None] if logits.dim() == 1 else logits, [spec(**params)])[0]


def support(logits, **params):
    """Tokens that can come out, found by asking for many outputs."""
    specs = [spec(temperature=1.0, seed=seed, **params) for seed in range(3000)]
    return {sampled.token_id for sampled in sample(logits.expand(len(specs), -1), specs)}


def kept_by(*processors, logits):
    scores = logits
    for processor in processors:
        scores = processor(torch.tensor([PROMPT]), scores)
    return set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())


def test_greedy_takes_the_likeliest():
    logits = logits_of(3)
    assert [s.token_id for s in sample(logits, [spec()] * 3)] == logits.argmax(-1).tolist()
    assert sample(logits, [spec()] * 3)[0].logprobs is None


@pytest.mark.parametrize(
    ("params", "processors"),
    [
        ({"top_k": 5}, [hf.TopKLogitsWarper(5)]),
        ({"top_p": 0.6}, [hf.TopPLogitsWarper(0.6)]),
        ({"min_p": 0.2}, [hf.MinPLogitsWarper(0.2)]),
        ({"top_k": 12, "top_p": 0.7}, [hf.TopKLogitsWarper(12), hf.TopPLogitsWarper(0.7)]),
        (
            {"top_k": 12, "top_p": 0.9, "min_p": 0.1},
            [hf.TopKLogitsWarper(12), hf.TopPLogitsWarper(0.9), hf.MinPLogitsWarper(0.1)],
        ),
        ({"top_k": 1}, [hf.TopKLogitsWarper(1)]),
        ({"top_p": 0.0}, [hf.TopKLogitsWarper(1)]),
        ({"min_p": 1.0}, [hf.TopKLogitsWarper(1)]),
    ],
)
def test_filters_keep_what_transformers_keeps(params, processors):
    logits = logits_of(vocab=40)
    assert support(logits, **params) == kept_by(*processors, logits=logits)


def test_top_p_is_exact_when_the_mass_is_spread_over_thousands_of_tokens():
    flat = torch.linspace(0, 0.1, VOCAB)[None]
    kept = kept_by(hf.TopPLogitsWarper(0.9), logits=flat.double())
    drawn = {one(flat, temperature=1.0, top_p=0.9, seed=seed).token_id for seed in range(100)}
    assert len(kept) > 3000
    assert drawn <= kept
    assert min(drawn) < min(kept) + 400


def test_temperature_top_k_and_draw_follow_the_distribution():
    logits = torch.tensor([0.5, 2.0, 1.0, -1.0, 1.5])
    probabilities = (torch.where(logits >= 1.0, logits, -math.inf) / 0.7).softmax(-1).tolist()
    count = 4000
    specs = [spec(temperature=0.7, top_k=3, seed=seed) for seed in range(count)]
    drawn = Counter(s.token_id for s in sample(logits.expand(count, -1), specs))
    for token, probability in enumerate(probabilities):
        assert abs(drawn[token] / count - probability) < 4 * math.sqrt(0.25 / count)
    assert set(drawn) == {1, 2, 4}


def test_the_smallest_temperatures_are_greedy():
    logits = logits_of()
    assert one(logits, temperature=1e-40, seed=3).token_id == int(logits.argmax())


def test_repetition_penalty_is_that_of_transformers():
    logits = logits_of(vocab=80)
    expected = hf.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([PROMPT + OUTPUT]), logits)
    params = {"repetition_penalty": 1.7, "prompt": PROMPT, "output": OUTPUT}
    for bias_to in (3, 5, 9, 70, 11):
        # With the others far below, the biased token wins exactly when its penalised score beats the rival's.
        rival = float(expected[0, bias_to])
        for offset, winner in ((-0.01, bias_to), (0.01, 12)):
            rivals = logits.clone()
            keep = rivals[0, bias_to].clone()
            rivals[:] = -100.0
            rivals[0, bias_to] = keep
            rivals[0, 12] = rival + offset
            assert one(rivals, **params).token_id == winner


def test_presence_and_frequency_penalties_count_the_output_only():
    logits = torch.zeros(1, 80)
    logits[0, 3], logits[0, 70], logits[0, 5] = 1.0, 0.9, 0.35
    assert one(logits, prompt=PROMPT, output=OUTPUT).token_id == 3
    assert one(logits, prompt=PROMPT, output=OUTPUT, frequency_penalty=0.1).token_id == 70  # 1 - 3 * 0.1 < 0.9 - 0.1
    assert one(logits, prompt=PROMPT, output=OUTPUT, presence_penalty=0.6).token_id == 3  # 0.4 > 0.35 > 0.3
    assert one(logits, prompt=PROMPT, output=OUTPUT, presence_penalty=0.7).token_id == 5


def test_logit_bias_lifts_and_bans_tokens():
    logits = logits_of()
    best = int(logits.argmax())
    assert one(logits, logit_bias=((17, 100.0),)).token_id == 17
    assert one(logits, logit_bias=((best, -100.0),)).token_id == int(logits[0].topk(2).indices[1])


def test_min_tokens_holds_back_the_end_of_sequence():
    logits = logits_of()
    best = int(logits.argmax())
    params = {"min_tokens": 2, "stop_token_ids": (best,)}
    assert one(logits, output=[1], **params).token_id == int(logits[0].topk(2).indices[1])
    assert one(logits, output=[1, 1], **params).token_id == best


def test_logprobs_are_those_of_the_raw_logits():
    logits = logits_of()
    sampled = one(logits, temperature=2.0, logit_bias=((17, 100.0),), logprobs=3)
    expected = logits[0].log_softmax(-1)
    assert sampled.token_id == 17
    assert sampled.logprobs.chosen == pytest.approx(float(expected[17]))
    assert sampled.logprobs.alternative_ids == tuple(expected.topk(3).indices.tolist())
    assert sampled.logprobs.alternative_logprobs == pytest.approx(expected.topk(3).values.tolist())
    assert one(logits, logprobs=0).logprobs.alternative_ids == ()


def test_a_request_gets_the_same_token_whoever_shares_its_step():
    logits = logits_of(6).bfloat16()
    specs = [
        spec(),
        spec(temperature=0.8, seed=1, top_p=0.9),
        spec(temperature=1.2, seed=2, top_k=40),
        spec(output=OUTPUT, prompt=PROMPT, frequency_penalty=0.5, logprobs=2),
        spec(temperature=1.0, seed=3, min_p=0.05, logprobs=1),
        spec(logit_bias=((3, 4.0),)),
    ]
    together = sample(logits, specs)
    for row, each in enumerate(specs):
        assert sample(logits[row : row + 1], [each]) == [together[row]]


def test_random_numbers_are_a_function_of_seed_and_index_alone():
    assert uniform(1, 0) == uniform(1, 0)
    numbers = {uniform(seed, index) for seed in (0, 1, 2**63, -1) for index in range(500)}
    assert len(numbers) == 2000
    assert all(0 <= number < 1 for number in numbers)
    assert sum(numbers) / 2000 == pytest.approx(0.5, abs=0.03)


def test_a_second_attempt_that_knows_the_output_so_far_draws_the_same():
    logits = logits_of()
    first = [one(logits, temperature=1.0, seed=7, output=[0] * index).token_id for index in range(20)]
    assert first[12:] == [one(logits, temperature=1.0, seed=7, output=[0] * index).token_id for index in range(12, 20)]
    assert len(set(first)) > 5


VERIFIED = [
    {},
    {"temperature": 0.9, "seed": 5, "top_p": 0.9},
    {"logprobs": 2},
    {"frequency_penalty": 0.8},
    {"min_tokens": 3, "stop_token_ids": (0, 1, 2)},
]


@pytest.mark.parametrize("params", VERIFIED)
@pytest.mark.parametrize("num_right", range(5))
def test_verifying_guesses_gives_what_steps_without_them_give(params, num_right):
    logits = logits_of(5, seed=1, vocab=30).bfloat16()
    expected = []
    for row in logits:
        expected += sample(row[None], [spec(output=[token.token_id for token in expected], **params)])
    drafts = [token.token_id for token in expected[:4]]
    if num_right < 4:
        drafts[num_right] = (drafts[num_right] + 1) % 30
    given = spec(**params)
    assert sample_behind(drafts, logits, given) == expected[: num_right + 1]
    assert given.output_token_ids == []


def test_guesses_of_neighbours_do_not_matter():
    logits = logits_of(9, seed=3, vocab=30).bfloat16()
    specs = [spec(**params) for params in VERIFIED[:4]]
    alone = [sample(logits[row : row + 1], [each])[0] for row, each in zip((0, 2, 5, 8), specs, strict=True)]
    sequences = []
    for name, (each, num_drafts) in enumerate(zip(specs, (1, 2, 2, 0), strict=True)):
        drafts = [alone[name].token_id, 5][:num_drafts]
        sequences.append(PlannedSequence(str(name), [0, *drafts], 0, [0], 1, each, num_drafts))
    together = choose(logits, sequences, OPS)
    row = 0
    for name, sequence in enumerate(sequences):
        rows = slice(row, row + sequence.num_drafts + 1)
        expected = sample_behind(sequence.token_ids[1:], logits[rows], specs[name])
        assert together[str(name)] == expected
        assert together[str(name)][0] == alone[name]
        row = rows.stop
