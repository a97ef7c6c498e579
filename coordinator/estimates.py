"""How long things will take, from what workers measured and told. Pure; each argument is a number or an array.

A rate that a worker has not measured yet is 0 in the table. `filled` puts the mean of the others in its place; where
nobody has measured, a prediction is 0, "nothing known", and whoever asks decides by a rule instead.
"""

import numpy as np

from coordinator.worker_table import Vector

HALF_BATCH = 16.0
"""So many streams double the time of a step: weights are read once a step, the rest is each stream's own. On 2 CPU
cores it is about 9, an H100 with 8B parameters has about 30."""
ANSWER_TOKENS = 128.0
"""How long an answer is taken to be, at most what the request allows. Means of public traces are 150 to 340."""
HOST_S_PER_BYTE, DISK_S_PER_BYTE = 1 / 4e9, 1 / 1e9
"""Of blocks loaded from a worker's own tiers; heartbeats do not say. What takes longer than computing is computed."""

Number = float | Vector
"""Of several arguments that are arrays, all go together element by element."""


def filled(rates: Vector, others: Vector | None = None) -> Vector:
    """Those that are 0 replaced by the mean of the rest, or else of `others`."""
    if rates.all():
        return rates
    known = rates[rates > 0]
    if not len(known) and others is not None:
        known = others[others > 0]
    return np.where(rates > 0, rates, known.mean()) if len(known) else rates


def compute_s(
    uncached: Number, host: Number, disk: Number, peers: Number, token_bytes: Number, token_s: Number, peer_s: Number
) -> Number:
    """To have the KV of a prompt: so many tokens in no cache of the worker, `peers` of them in that of another one, and
    so many in its slower tiers. `token_s`: to compute one. `peer_s`: to get a byte from a peer, 0 if not known."""
    from_host = np.minimum(HOST_S_PER_BYTE * token_bytes, token_s)
    from_disk = np.minimum(DISK_S_PER_BYTE * token_bytes, token_s)
    saved = np.maximum(token_s - peer_s * token_bytes, 0.0) * (peer_s > 0)
    return uncached * token_s - peers * saved + host * from_host + disk * from_disk


def handover_s(num_bytes: Number, per_byte_s: Number, compute_s: Number) -> Number:
    """What is left to move when the prompt is computed: blocks go over while the next ones are computed."""
    return np.maximum(num_bytes * per_byte_s - compute_s, 0.0)


def stream_s(step_s: float, requests: float) -> float:
    """What each stream adds to a step that took `step_s` among so many."""
    return step_s / (max(requests, 1.0) + HALF_BATCH)


def itl_s(stream_s: Number, requests: Number) -> Number:
    """From token to token among so many requests."""
    return stream_s * (requests + HALF_BATCH)


def decode_s(stream_s: Number, requests: Number, answer_tokens: float) -> Number:
    """Seconds that clients of a decode worker wait in all when it gets one stream more: the new one for its tokens, the
    others for what it adds to their steps."""
    return answer_tokens * (itl_s(stream_s, requests + 1) + requests * stream_s)
