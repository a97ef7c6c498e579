"""A step's integers as arrays on the host, ready to go to the device in one copy."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.plan import PENDING, PlannedSequence

IDS, SOURCES, POSITIONS, ROPE_LENGTHS, BLOCKS = range(5)
"""Rows of `HostBatch.tokens`."""
NUM_ROWS = 5
Ints = NDArray[np.int32]


class HostBatch(NamedTuple):
    tokens: Ints
    """[5, tokens]: id; row of the latest step's samples to take the id from, or -1; position in the sequence; length
    that dynamic rotary scaling takes for the prompt; block that the token is written to."""
    sample_rows: Ints
    """Tokens whose logits are wanted."""


def singles_first(sequences: list[PlannedSequence]) -> list[PlannedSequence]:
    """Those of one token before longer ones, which other kernels compute; otherwise in order."""
    return sorted(sequences, key=lambda sequence: len(sequence.token_ids) > 1)


def host_batch(sequences: Sequence[PlannedSequence], page_size: int, row_of_sample: Callable[[str], int]) -> HostBatch:
    """`row_of_sample` says, by request id, where the latest step left the sample that a PENDING token stands for."""
    counts = [len(sequence.token_ids) for sequence in sequences]
    tokens = np.empty((NUM_ROWS, sum(counts)), np.int32)
    tokens[IDS] = [token_id for sequence in sequences for token_id in sequence.token_ids]
    ends = np.cumsum(counts, dtype=np.int32)
    firsts = ends - counts
    tokens[POSITIONS] = np.arange(tokens.shape[1]) + np.repeat([s.start for s in sequences] - firsts, counts)
    tokens[ROPE_LENGTHS] = np.repeat([sequence.rope_length for sequence in sequences], counts)
    tokens[SOURCES] = -1
    sample_rows: list[int] = []
    for sequence, count, first in zip(sequences, counts, firsts.tolist(), strict=True):
        if count == 1:
            tokens[BLOCKS, first] = sequence.block_ids[sequence.start // page_size]
        else:
            at = tokens[POSITIONS, first : first + count] // page_size
            own = np.asarray(sequence.block_ids[at[0] : at[-1] + 1], np.int32)
            tokens[BLOCKS, first : first + count] = own[at - at[0]]
        if sequence.token_ids[-1] == PENDING:
            tokens[SOURCES, first] = row_of_sample(sequence.request_id)
        if sequence.sample is not None:
            sample_rows += range(first + count - 1 - sequence.num_drafts, first + count)
    return HostBatch(tokens, np.asarray(sample_rows, np.int32))


def padded(tokens: Ints, size: int) -> Ints:
    """`HostBatch.tokens` of single tokens, with rows added that read nothing and write nowhere."""
    count = tokens.shape[1]
    result = np.full((NUM_ROWS, size), -1, np.int32)  # at position -1 a context is empty, a block -1 is no place
    result[IDS, count:] = 0
    result[:, :count] = tokens
    return result
