"""Chooses the next token of each sequence.

Every sequence is handled by itself, so that what it gets cannot depend on who shares the step; those that are plainly
greedy share one argmax.

Order: repetition, presence and frequency penalties, logit bias, min_tokens, temperature, top_k, top_p, min_p, draw.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from engine.plan import Sampled, SampleSpec
from engine.requests import SamplingParams, TokenLogprobs

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow."""
TOP_P_CANDIDATES = 1024
"""Likeliest tokens looked at before all are sorted for top_p."""
_MASK = 2**64 - 1


def argmax(logits: Tensor) -> Tensor:
    """int64 [rows] of [rows, vocab_size]."""
    # That of bfloat16 is not vectorised: widening first is five times faster.
    return logits.float().argmax(-1)


def sample(logits: Tensor, specs: list[SampleSpec], argmax: Callable[[Tensor], Tensor] = argmax) -> list[Sampled]:
    """One token for each row of logits [len(specs), vocab_size], of any float dtype."""
    greedy = [_plain_greedy(spec) for spec in specs]
    best: list[int] = argmax(logits).tolist() if any(greedy) else []
    return [Sampled(best[row]) if greedy[row] else _sample_one(logits[row], spec) for row, spec in enumerate(specs)]


def verify(
    logits: Tensor, spec: SampleSpec, drafts: list[int], argmax: Callable[[Tensor], Tensor] = argmax
) -> list[Sampled]:
    """The tokens of one sequence from logits [len(drafts) + 1, vocab_size]: right guesses, and one token more.

    Each is chosen as without guesses, with the random number that belongs to its index. So guesses change how many
    tokens a step gives and never which: a stream is the same as without them, and as that of another attempt.
    (Leviathan et al., 2023, accept by a draw of their own and keep the distribution alone.)
    """
    if _plain_greedy(spec):
        best: list[int] = argmax(logits).tolist()
        num_right = next((at for at, draft in enumerate(drafts) if draft != best[at]), len(drafts))
        return [Sampled(token_id) for token_id in best[: num_right + 1]]
    tokens: list[Sampled] = []
    outputs = spec.output_token_ids
    for row, draft in zip(logits, [*drafts, None], strict=True):
        (token,) = sample(row[None], [replace(spec, output_token_ids=[*outputs, *(each.token_id for each in tokens)])])
        tokens.append(token)
        if token.token_id != draft:
            break
    return tokens


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


def _plain_greedy(spec: SampleSpec) -> bool:
    params = spec.params
    return params.temperature < GREEDY_BELOW and params.logprobs is None and not _adjusts(spec)


def _adjusts(spec: SampleSpec) -> bool:
    return spec.adjusts(len(spec.output_token_ids))


def _sample_one(logits: Tensor, spec: SampleSpec) -> Sampled:
    params = spec.params
    logits = logits.float()
    scores = _adjust(logits.clone(), spec) if _adjusts(spec) else logits
    if params.temperature < GREEDY_BELOW:
        token_id = int(scores.argmax())
    else:
        token_id = _draw(scores / params.temperature, params, uniform(params.seed, len(spec.output_token_ids)))
    if params.logprobs is None:
        return Sampled(token_id)
    return Sampled(token_id, _logprobs(logits, token_id, params.logprobs))


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


def _draw(scores: Tensor, params: SamplingParams, number: float) -> int:
    """Inverse of the cumulative distribution, in order of token ids, at `number`."""
    kept = (scores >= _threshold(scores, params)).nonzero().squeeze(1)
    cumulative = scores[kept].double().softmax(-1).cumsum(-1)
    place = torch.searchsorted(cumulative, number * cumulative[-1], right=True)
    return int(kept[place])


def _threshold(scores: Tensor, params: SamplingParams) -> float:
    """The lowest score that top_k, top_p and min_p, applied in that order, leave. Equal scores stay together."""
    threshold = -math.inf
    if 0 < params.top_k < len(scores):
        threshold = float(scores.topk(params.top_k).values[-1])
    if params.top_p < 1.0:
        threshold = max(threshold, _top_p_threshold(scores[scores >= threshold], params.top_p))
    if params.min_p > 0.0:
        threshold = max(threshold, float(scores.max()) + math.log(params.min_p))
    return threshold


def _top_p_threshold(scores: Tensor, top_p: float) -> float:
    """Score of the last token of the smallest set of likeliest tokens whose probabilities reach top_p together."""
    total = scores.logsumexp(-1)
    for count in (TOP_P_CANDIDATES, len(scores)):
        likeliest = scores.topk(min(count, len(scores))).values
        reached = ((likeliest - total).exp().cumsum(-1, dtype=torch.float64) >= top_p).nonzero()
        if len(reached):
            return float(likeliest[reached[0, 0]])
    return -math.inf


def _logprobs(logits: Tensor, token_id: int, num_alternatives: int) -> TokenLogprobs:
    logprobs = logits.log_softmax(-1)
    likeliest = logprobs.topk(min(num_alternatives, len(logprobs)))
    return TokenLogprobs(float(logprobs[token_id]), tuple(likeliest.indices.tolist()), tuple(likeliest.values.tolist()))
