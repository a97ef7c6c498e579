"""Executes a StepPlan: builds the ragged batch, runs the model over it, samples."""

import numpy as np
import torch

from engine.loading import LoadedModel
from engine.model import Batch, Model
from engine.plan import OnLayer, PlannedSequence, SampleSpec, StepPlan, StepResult
from engine.pool import KVPool
from engine.requests import SamplingParams
from engine.rotary import Rotary
from engine.sampler import choose
from kernels.paged_attention import SequenceSpan, plan_write


class ModelRunner:
    """Implements engine.plan.Runner. Not thread-safe: one step at a time."""

    def __init__(self, loaded: LoadedModel, pool: KVPool) -> None:
        self.pool = pool
        self._model = Model(loaded.config, loaded.weights, loaded.ops)
        self._rotary = Rotary(loaded.config.rope, loaded.config.head_dim)
        self._windows = set(loaded.config.sliding_windows)

    @torch.inference_mode()
    def run(self, plan: StepPlan, on_layer: OnLayer | None = None) -> StepResult:
        self.pool.copy_blocks(plan.copies)
        if not plan.sequences:
            return StepResult({})
        logits = self._model.forward(self._batch(plan.sequences), self.pool.slabs, on_layer)
        sampling = [sequence for sequence in plan.sequences if sequence.sample is not None]
        return StepResult(choose(logits, sampling, self._model.ops))

    def warm_up(self, max_batch_tokens: int) -> None:
        """Runs a prompt of up to that many tokens and a decode step, so that the first request finds libraries ready.

        Writes into the first blocks of the pool: only for before anything is served.
        """
        page_size = self.pool.shape.page_size
        length = max(1, min(max_batch_tokens, self.pool.num_blocks * page_size - 1))
        blocks = list(range(-(-(length + 1) // page_size)))
        spec = SampleSpec(SamplingParams(), [], [])
        for start, count in ((0, length), (length, 1)):
            self.run(StepPlan([PlannedSequence("warm-up", [0] * count, start, blocks, length, spec)], []))

    def _batch(self, sequences: list[PlannedSequence]) -> Batch:
        page_size = self.pool.shape.page_size
        token_ids: list[int] = []
        spans: list[SequenceSpan] = []
        sample_rows: list[int] = []
        positions, prompt_lengths, blocks = [], [], []
        for sequence in sequences:
            count = len(sequence.token_ids)
            spans.append(SequenceSpan(len(token_ids), count, sequence.start, sequence.block_ids))
            token_ids += sequence.token_ids
            if sequence.sample is not None:
                sample_rows += range(len(token_ids) - 1 - sequence.num_drafts, len(token_ids))
            places = np.arange(sequence.start, sequence.start + count)
            first_block = sequence.start // page_size
            own = np.asarray(sequence.block_ids[first_block : (sequence.start + count - 1) // page_size + 1])
            positions.append(places)
            prompt_lengths.append(np.full(count, sequence.rope_length))
            blocks.append(own[places // page_size - first_block])
        where = torch.from_numpy(np.concatenate(positions))
        slabs = self.pool.slabs
        return Batch(
            token_ids=torch.tensor(token_ids),
            rotation=self._rotary.cos_sin(where, torch.from_numpy(np.concatenate(prompt_lengths))),
            write=plan_write(slabs, torch.from_numpy(np.concatenate(blocks)), where % page_size),
            attention={window: self._model.ops.plan_attention(slabs, spans, window) for window in self._windows},
            sample_rows=torch.tensor(sample_rows, dtype=torch.int64),
        )
