"""Chooses a token of each row of logits, one row after the other: what other kernels must do, and the fallback.

Order: temperature, top_k, top_p, min_p, each applied to what the last one left, then the draw.
"""

import math

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow."""
TOP_P_CANDIDATES = 1024
"""Likeliest tokens looked at before all are sorted for top_p."""


def sample(logits: Tensor, choices: Tensor) -> Tensor:
    """See `kernels.ops.Ops.sample`."""
    tokens = [
        _choose(row.float(), temperature, int(top_k), top_p, min_p, number)
        for row, (temperature, top_k, top_p, min_p, number) in zip(logits, choices.T.tolist(), strict=True)
    ]
    return torch.tensor(tokens, dtype=torch.int64)


def _choose(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, number: float) -> int:
    if temperature < GREEDY_BELOW:
        return int(logits.argmax())
    scores = logits / temperature
    lowest = threshold(scores, top_k, top_p, min_p)
    return draw(scores, lowest, number)


def draw(scores: Tensor, lowest: float, number: float) -> int:
    """Inverse of the cumulative distribution of scores >= `lowest`, in order of token ids, at `number`."""
    kept = (scores >= lowest).nonzero().squeeze(1)
    cumulative = scores[kept].double().softmax(-1).cumsum(-1)
    if not len(kept) or not cumulative[-1] > 0:
        return 0  # NaN, or all ruled out: any token is as good
    return int(kept[torch.searchsorted(cumulative, number * cumulative[-1], right=True)])


def threshold(scores: Tensor, top_k: int, top_p: float, min_p: float) -> float:
    """The lowest of the scores that are kept. Equal scores stay together."""
    lowest = -math.inf
    if 0 < top_k < len(scores):
        lowest = float(scores.topk(top_k).values[-1])
    if top_p < 1.0:
        lowest = max(lowest, _top_p_threshold(scores[scores >= lowest], top_p))
    if min_p > 0.0:
        lowest = max(lowest, float(scores.max()) + math.log(min_p))
    return lowest


def _top_p_threshold(scores: Tensor, top_p: float) -> float:
    """Score of the last token of the smallest set of likeliest tokens whose probabilities reach top_p together."""
    total = scores.double().logsumexp(-1)
    for count in (TOP_P_CANDIDATES, len(scores)):
        likeliest = scores.topk(min(count, len(scores))).values
        reached = ((likeliest - total).exp().cumsum(-1) >= top_p).nonzero()
        if len(reached):
            return float(likeliest[reached[0, 0]])
    return -math.inf
