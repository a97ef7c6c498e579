"""Executes plans on a device: launches a step and returns, so that the host plans the next one meanwhile.

    host     plan N+1 │ launch N+1 │ apply N   │ plan N+2 ...
    device   ...... step N ....... │ step N+1 ................
                                   ▲ tokens of step N are read here by step N+1, without the host

A step of single tokens is a replayed recording (`engine.gpu.decode_graphs`); any other is launched kernel by kernel.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from engine.gpu.batch import BLOCKS, IDS, POSITIONS, ROPE_LENGTHS, SOURCES, HostBatch, host_batch, singles_first
from engine.gpu.decode_graphs import Capture, DecodeGraphs
from engine.gpu.device import mark_stream
from engine.gpu.sampler import DeviceSampler, DeviceSamples
from engine.loading import LoadedModel
from engine.model import Batch, Model
from engine.plan import OnLayer, PlannedSequence, SampleSpec, StepPlan, StepResult
from engine.pool import KVPool
from engine.requests import SamplingParams
from engine.rotary import Rotary
from kernels.gpu.ops import GpuOps, GpuPlan, Places, Singles, block_table, to_device
from kernels.paged_attention import SequenceSpan

SHORTER = 8
"""How many times the short prompt of the warm-up is shorter: libraries have other kernels for it."""


class DeviceRunner:
    """Implements engine.plan.LaunchingRunner. Not thread-safe.

    The model's `ops` are GpuOps. `counters`: its share of
    `baton.metrics.WORKER_COUNTERS`.
    """

    def __init__(self, loaded: LoadedModel, pool: KVPool, *, max_rows: int) -> None:
        """`max_rows`: most tokens that one step samples, guesses included."""
        self.pool = pool
        self.counters = {"decode_steps_without_graph": 0.0}
        self._ops = cast("GpuOps", loaded.ops)
        self._device = pool.slabs.device
        self._model = Model(loaded.config, loaded.weights, loaded.ops)
        self._rotary = Rotary(loaded.config.rope, loaded.config.head_dim, self._device)
        self._windows = set(loaded.config.sliding_windows)
        self._sampler = DeviceSampler(self._ops, max_rows, self._device)
        self._graphs: DecodeGraphs | None = None

    def count_into(self, counters: dict[str, float]) -> None:
        """Count there from now on."""
        counters.update(self.counters)
        self.counters = counters

    def run(self, plan: StepPlan, on_layer: OnLayer | None = None) -> StepResult:
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan, layer_groups: Sequence[int] = ()) -> DeviceSamples:
        self.pool.copy_blocks(plan.copies)
        if not plan.sequences:
            return DeviceSamples.none()
        sequences = singles_first(plan.sequences)
        batch = host_batch(sequences, self.pool.shape.page_size, self._sampler.row_of)
        marks: list[tuple[int, torch.cuda.Event | None]] = []

        def mark(num_layers: int) -> None:
            if num_layers in layer_groups:
                marks.append((num_layers, mark_stream(self._device)))

        if len(sequences[-1].token_ids) > 1:
            logits = self._eager(batch, sequences, mark if layer_groups else None)
        elif self._graphs is not None and self._graphs.fits(len(sequences)):
            logits = self._replay(self._graphs, batch, sequences)
        else:
            self.counters["decode_steps_without_graph"] += 1
            logits = self._eager(batch, sequences)
        samples = self._sampler.launch(logits, sequences)
        samples.marks = marks
        return samples

    @torch.inference_mode()
    def record_graphs(self, sizes: tuple[int, ...], max_tokens: int, capture: Capture) -> None:
        """Record decode steps of these batch sizes, for sequences of up to `max_tokens`. Writes into no block."""
        widest = -(-max_tokens // self.pool.shape.page_size)
        self._graphs = DecodeGraphs(self._decode, sizes, widest, self._device, capture)

    def warm_up(self, max_batch_tokens: int) -> None:
        """Runs a long and a short prompt and decode steps, greedy and drawn, so that the kernels are compiled.

        Writes into the first blocks of the pool: only for before anything is served.
        """
        page_size = self.pool.shape.page_size
        longest = min(max_batch_tokens, self.pool.num_blocks * page_size - 1)
        drawn = SamplingParams(temperature=1.0, top_k=5, top_p=0.9, min_p=0.01, logprobs=1)
        for length, params in ((longest, SamplingParams()), (max(1, longest // SHORTER), drawn)):
            blocks, spec = list(range(length // page_size + 1)), SampleSpec(params, [], [])
            for start, count in ((0, length), (length, 1)):
                self.run(StepPlan([PlannedSequence("warm-up", [0] * count, start, blocks, length, spec)], []))

    def _eager(self, batch: HostBatch, sequences: list[PlannedSequence], on_layer: OnLayer | None = None) -> Tensor:
        spans: list[SequenceSpan] = []
        first = 0
        for sequence in sequences:
            count = len(sequence.token_ids)
            spans.append(SequenceSpan(first, count, sequence.start, sequence.block_ids))
            first += count
        tokens, sample_rows = to_device(self._device, *batch)
        return self._forward(tokens, sample_rows, {
            window: self._ops.plan_attention(self.pool.slabs, spans, window) for window in self._windows
        }, on_layer)  # fmt: skip

    def _replay(self, graphs: DecodeGraphs, batch: HostBatch, sequences: list[PlannedSequence]) -> Tensor:
        logits = graphs.run(batch.tokens, block_table([sequence.block_ids for sequence in sequences]))
        if len(batch.sample_rows) == len(sequences):
            return logits
        return logits[to_device(self._device, batch.sample_rows)[0]]

    def _decode(self, tokens: Tensor, tables: Tensor) -> Tensor:
        """Logits of all rows; launches kernels and nothing else, so that it can be recorded."""
        singles = Singles(tables, tokens[POSITIONS] + 1)
        rows = torch.arange(tokens.shape[1], dtype=torch.int32, device=self._device)
        return self._forward(tokens, rows, {window: GpuPlan(window, singles, None) for window in self._windows})

    def _forward(
        self,
        tokens: Tensor,
        sample_rows: Tensor,
        attention: dict[int | None, GpuPlan],
        on_layer: OnLayer | None = None,
    ) -> Tensor:
        """`tokens` as in `HostBatch`. Logits [len(sample_rows), vocab_size]."""
        sources, positions = tokens[SOURCES], tokens[POSITIONS]
        ids = torch.where(sources < 0, tokens[IDS], self._sampler.latest.index_select(0, sources.clamp(min=0)))
        slabs = self.pool.slabs
        return self._model.forward(
            Batch(
                token_ids=ids,
                rotation=self._rotary.cos_sin(positions.long(), tokens[ROPE_LENGTHS].long()),
                write=Places(tokens[BLOCKS].clone(), positions % self.pool.shape.page_size),  # aligned, see to_device
                attention=dict(attention),
                sample_rows=sample_rows,
            ),
            slabs,
            on_layer,
        )
