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
    uncached: Number, from_host: Number, from_disk: Number, bytes_per_token: Number, per_token_s: Number
) -> Number:
    """To have the KV of a prompt of which so many tokens are in no cache of the worker, and so many in slower tiers."""
    host = np.minimum(HOST_S_PER_BYTE * bytes_per_token, per_token_s)
    disk = np.minimum(DISK_S_PER_BYTE * bytes_per_token, per_token_s)
    return uncached * per_token_s + from_host * host + from_disk * disk


def handover_s(num_bytes: Number, per_byte_s: Number, compute_s: Number) -> Number:
    """What is left to move when the prompt is computed: blocks go over while the next ones are computed."""
    return np.maximum(num_bytes * per_byte_s - compute_s, 0.0)


def itl_s(step_s: Number, measured_requests: Number, requests: Number) -> Number:
    """From token to token among so many requests, where a step took `step_s` among `measured_requests`."""
    return step_s * (requests + HALF_BATCH) / (np.maximum(measured_requests, 1.0) + HALF_BATCH)


def decode_s(step_s: Number, measured_requests: Number, requests: Number, answer_tokens: float) -> Number:
    """Seconds that all clients of a decode worker wait more when it gets one stream more: the new one for its tokens,
    the others for their steps, which grow."""
    before, after = itl_s(step_s, measured_requests, requests), itl_s(step_s, measured_requests, requests + 1)
    return answer_tokens * (after + requests * (after - before))
