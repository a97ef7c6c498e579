"""How long things will take, from what workers measured and told. Pure; each argument is a number or an array.

A rate that a worker has not measured yet is 0 in the table. `filled` puts the mean of the others in its place; where
nobody has measured, a prediction is 0, "nothing known", and whoever asks decides by a rule instead.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

HALF_BATCH = 16.0
"""So many streams double the time of a step: weights are read once a step, the rest is each stream's own. On 2 CPU
cores it is about 9, an H100 with 8B parameters has about 30."""
ANSWER_TOKENS = 128.0
"""How long an answer is taken to be, at most what the request allows. Means of public traces are 150 to 340."""
HOST_S_PER_BYTE, DISK_S_PER_BYTE = 1 / 4e9, 1 / 1e9
"""Of blocks loaded from a worker's own tiers; heartbeats do not say. What takes longer than computing is computed."""

Vector = npt.NDArray[np.float64]
Number = float | npt.NDArray[Any]
"""Of several arguments that are arrays, all go together element by element."""


def filled(rates: Vector, others: Vector | None = None) -> Vector:
    """Those that are 0 replaced by the mean of the rest, or else of `others`."""
    if all_known(rates):
        return rates
    known = rates[rates > 0]
    if not len(known) and others is not None:
        known = others[others > 0]
    return np.where(rates > 0, rates, known.mean()) if len(known) else rates


def all_known(rates: Vector) -> bool:
    """`rates.all()`, which takes three times as long for a few: it is written in Python."""
    return not len(rates) or bool(rates[rates.argmin()])


def any_known(rates: Vector) -> bool:
    """`rates.any()`, in the same way."""
    return len(rates) > 0 and bool(rates[rates.argmax()])


def compute_s(uncached: Number, token_s: Number) -> Number:
    """To compute so many tokens."""
    return uncached * token_s


def saves_s(token_s: float, handover_s: float) -> float:
    """For each token that need not be computed because another worker's pool has it."""
    return max(token_s - handover_s, 0.0) if handover_s > 0 else 0.0


def load_s(host: Number, disk: Number, token_bytes: Number, token_s: Number) -> Number:
    """To load so many tokens' KV from the worker's own slower tiers; never longer than computing them."""
    from_host = np.minimum(HOST_S_PER_BYTE * token_bytes, token_s)
    from_disk = np.minimum(DISK_S_PER_BYTE * token_bytes, token_s)
    return host * from_host + disk * from_disk


def tail_s(tokens: Number, handover_s: Number, compute_s: Number) -> Number:
    """What is left to hand over when the prompt is computed: blocks go over while the next ones are computed."""
    return np.maximum(tokens * handover_s - compute_s, 0.0)


def stream_s(step_s: float, requests: float) -> float:
    """What each stream adds to a step that took `step_s` among so many."""
    return step_s / (max(requests, 1.0) + HALF_BATCH)


def itl_s(stream_s: Number, requests: Number) -> Number:
    """From token to token among so many requests."""
    return stream_s * (requests + HALF_BATCH)


def decode_s(stream_s: Number, requests: Number, answer_tokens: float) -> Number:
    """Seconds that clients of a decode worker wait in all when it gets one stream more: the new one for its tokens, the
    others for what it adds to their steps."""
    return 2 * answer_tokens * stream_s * (requests + (1 + HALF_BATCH) / 2)
