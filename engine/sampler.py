"""Chooses the next tokens of each sequence, so that what it gets cannot depend on who shares the step.

Order: repetition, presence and frequency penalties, logit bias, min_tokens, temperature, top_k, top_p, min_p, draw.
Penalties, bias and min_tokens are applied here; the rest is the kernels' (`Ops.sample`), for all rows in one call.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.plan import PlannedSequence, Sampled, SampleSpec
from engine.requests import TokenLogprobs
from kernels.ops import Ops
from kernels.sampling import GREEDY_BELOW

_MASK = 2**64 - 1


def choose(logits: Tensor, sequences: Sequence[PlannedSequence], ops: Ops[Any]) -> dict[str, list[Sampled]]:
    """Tokens by request id: the guesses that proved right, and one more.

    `logits` [rows, vocab_size], of any float dtype: of each sequence a row for each of its guesses, and one more.
    """
    chosen: dict[str, list[Sampled]] = {}
    rows: list[int] = []
    specs: list[SampleSpec] = []
    indices: list[int] = []
    together: list[tuple[PlannedSequence, int]] = []
    first = 0
    for sequence in sequences:
        spec, count = sequence.sample, sequence.num_drafts + 1
        assert spec is not None, "only sequences that sample come here"
        own = range(first, first := first + count)
        if spec.adjusts(sequence.sample_index):
            chosen[sequence.request_id] = verify(logits[own.start : own.stop], spec, drafts_of(sequence), ops)
        else:
            rows += own
            specs += [spec] * count
            indices += range(sequence.sample_index, sequence.sample_index + count)
            together.append((sequence, len(rows) - count))
    tokens = _sample(logits if len(rows) == len(logits) else logits[rows], specs, indices, ops)
    for sequence, at in together:
        own_tokens = tokens[at : at + sequence.num_drafts + 1]
        count = num_right(own_tokens, drafts_of(sequence)) + 1
        chosen[sequence.request_id] = [
            Sampled(token, _logprobs(logits[rows[row]].float(), token, specs[row].params.logprobs))
            for row, token in enumerate(own_tokens[:count], at)
        ]
    return chosen


def verify(logits: Tensor, spec: SampleSpec, drafts: list[int], ops: Ops[Any]) -> list[Sampled]:
    """`choose` for one sequence whose scores depend on the tokens before: one row after the other.

    Each token is chosen as without guesses, with the random number that belongs to its index. So guesses change how
    many tokens a step gives and never which: a stream is the same as without them, and as that of another attempt.
    (Leviathan et al., 2023, accept by a draw of their own and keep the distribution alone.)
    """
    sampled: list[Sampled] = []
    for row, draft in zip(logits.float(), [*drafts, None], strict=True):
        spec_now = replace(spec, output_token_ids=[*spec.output_token_ids, *(each.token_id for each in sampled)])
        index = len(spec_now.output_token_ids)
        scores = _adjust(row.clone(), spec_now) if spec.adjusts(index) else row
        (token,) = _sample(scores[None], [spec], [index], ops)
        sampled.append(Sampled(token, _logprobs(row, token, spec.params.logprobs)))
        if token != draft:
            break
    return sampled


def drafts_of(sequence: PlannedSequence) -> list[int]:
    return sequence.token_ids[len(sequence.token_ids) - sequence.num_drafts :]


def num_right(tokens: list[int], drafts: list[int]) -> int:
    """How many guesses came true; what was chosen behind a wrong one had another past."""
    return next((at for at, draft in enumerate(drafts) if draft != tokens[at]), len(drafts))


def choices_of(specs: list[SampleSpec], indices: list[int]) -> "list[tuple[float, ...]]":
    """For `Ops.sample`, by row: the choice of the output token of each index."""
    return [
        (each.temperature, each.top_k, each.top_p, each.min_p, uniform(each.seed, index))
        for each, index in zip((spec.params for spec in specs), indices, strict=True)
    ]


def _sample(logits: Tensor, specs: list[SampleSpec], indices: list[int], ops: Ops[Any]) -> list[int]:
    if all(spec.params.temperature < GREEDY_BELOW for spec in specs):
        tokens = ops.argmax(logits)
    else:
        choices = torch.tensor(choices_of(specs, indices), dtype=torch.float64)
        tokens = ops.sample(logits, choices.T.contiguous())
    result: list[int] = tokens.tolist()
    return result


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on nothing else: two rounds of splitmix64 (Steele, Lea, Flood, 2014).

    52 bits, so that its product with a float64 sum stays below that sum.
    """
    return (_splitmix(_splitmix(seed & _MASK) ^ index) >> 12) / 2**52


def _splitmix(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
    return state ^ (state >> 31)


def _adjust(scores: Tensor, spec: SampleSpec) -> Tensor:
    """Penalties, bias and min_tokens, in place."""
    params = spec.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(list({*spec.prompt_token_ids, *spec.output_token_ids}))
        old = scores[seen]
        scores[seen] = torch.where(old < 0, old * params.repetition_penalty, old / params.repetition_penalty)
    if spec.output_token_ids and (params.presence_penalty != 0.0 or params.frequency_penalty != 0.0):
        counts = Counter(spec.output_token_ids)
        penalties = params.presence_penalty + params.frequency_penalty * torch.tensor(list(counts.values()))
        scores[list(counts)] -= penalties
    for token_id, bias in params.logit_bias:
        scores[token_id] += bias
    if len(spec.output_token_ids) < params.min_tokens and params.stop_token_ids:
        scores[list(params.stop_token_ids)] = -math.inf
    return scores


def _logprobs(logits: Tensor, token_id: int, num_alternatives: int | None) -> TokenLogprobs | None:
    """Those of the model, before anything was adjusted."""
    if num_alternatives is None:
        return None
    logprobs = logits.log_softmax(-1)
    likeliest = logprobs.topk(min(num_alternatives, len(logprobs)))
    return TokenLogprobs(float(logprobs[token_id]), tuple(likeliest.indices.tolist()), tuple(likeliest.values.tolist()))
