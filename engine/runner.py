"""Executes a StepPlan: builds the ragged batch, runs the model over it, samples."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.model import Batch, Model
from engine.model_config import ModelConfig
from engine.plan import PlannedSequence, SampleSpec, StepPlan, StepResult
from engine.pool import KVPool
from engine.requests import SamplingParams
from engine.rotary import Rotary
from engine.sampler import sample
from engine.weights import Weights, expected_tensors, load_weights, model_fingerprint, resolve_dtype
from kernels.cpu.build import Unavailable
from kernels.cpu.native import NativeOps
from kernels.ops import Ops, TorchOps
from kernels.paged_attention import SequenceSpan, plan_write

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    config: ModelConfig
    weights: Weights
    ops: Ops[Any]
    """The kernels that its weights are laid out for."""
    dtype: torch.dtype
    fingerprint: str
    """Equal for models that compute equal KV."""


def load_model(
    folder: Path, dtype: str = "auto", on_progress: Callable[[float], None] | None = None, page_size: int = 16
) -> LoadedModel:
    """Raises ModelError when the folder is unusable. `on_progress` gets the fraction done."""
    config = ModelConfig.load(folder)
    resolved = resolve_dtype(dtype, config)
    fingerprint = model_fingerprint(folder, config, resolved)
    ops = choose_ops(config, resolved, page_size)
    return LoadedModel(config, load_weights(folder, config, resolved, ops, on_progress), ops, resolved, fingerprint)


def choose_ops(config: ModelConfig, dtype: torch.dtype, page_size: int) -> Ops[Any]:
    """The fastest kernels that this processor has for this model."""
    if dtype != torch.bfloat16:
        return TorchOps()
    shapes = [shape for shape in expected_tensors(config).values() if len(shape) == 2]
    reason = NativeOps.unsupported(
        [rows for rows, _ in shapes], [columns for _, columns in shapes], config.head_dim,
        config.num_heads // config.num_kv_heads, page_size,
    )  # fmt: skip
    try:
        if reason is None:
            return NativeOps()
    except Unavailable as unavailable:
        reason = str(unavailable)
    log.warning("native CPU kernels cannot be used, torch is slower: %s", reason)
    return TorchOps()


class ModelRunner:
    """Implements engine.plan.Runner. Not thread-safe: one step at a time."""

    def __init__(self, loaded: LoadedModel, pool: KVPool) -> None:
        self.pool = pool
        self._model = Model(loaded.config, loaded.weights, loaded.ops)
        self._rotary = Rotary(loaded.config.rope, loaded.config.head_dim)
        self._windows = set(loaded.config.sliding_windows)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        self.pool.copy_blocks(plan.copies)
        if not plan.sequences:
            return StepResult({})
        logits = self._model.forward(self._batch(plan.sequences), self.pool.slabs)
        sampled = [(sequence.request_id, spec) for sequence in plan.sequences if (spec := sequence.sample) is not None]
        tokens = sample(logits, [spec for _, spec in sampled])
        return StepResult({request_id: token for (request_id, _), token in zip(sampled, tokens, strict=True)})

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
        spans, sample_rows = [], []
        positions, prompt_lengths, blocks = [], [], []
        for sequence in sequences:
            count = len(sequence.token_ids)
            spans.append(SequenceSpan(len(token_ids), count, sequence.start, sequence.block_ids))
            token_ids += sequence.token_ids
            if sequence.sample is not None:
                sample_rows.append(len(token_ids) - 1)
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
