"""Chooses tokens on the device, where the next step finds them without waiting for the host.

Temperature, top_k, top_p, min_p and logprobs are computed there. Rows whose scores only the host can adjust (penalties,
bias, min_tokens) are copied, and `engine.sampler` chooses their tokens when the result is asked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.gpu.device import HostCopy, wait_for
from engine.plan import PlannedSequence, Sampled, SampleSpec, StepResult
from engine.requests import TokenLogprobs
from engine.sampler import choices_of, drafts_of, num_right, verify
from kernels.gpu.ops import GpuOps, to_device
from kernels.ops import TorchOps
from kernels.sampling import GREEDY_BELOW

HOST = TorchOps()


class DeviceSampler:
    """`latest` [max_rows], int32: the tokens of the newest step. `row_of` says which belongs to whom."""

    def __init__(self, ops: GpuOps, max_rows: int, device: torch.device) -> None:
        self.latest = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._ops = ops
        self._rows: dict[str, int] = {}

    def row_of(self, request_id: str) -> int:
        return self._rows[request_id]

    def launch(self, logits: Tensor, sequences: list[PlannedSequence]) -> "DeviceSamples":
        """`logits` [rows, vocab_size]: of each sequence that samples, for its guesses and for one token more."""
        firsts: dict[str, int] = {}
        specs: list[SampleSpec] = []
        indices: list[int] = []
        for sequence in sequences:
            if sequence.sample is not None:
                firsts[sequence.request_id] = len(specs)
                specs += [sequence.sample] * (sequence.num_drafts + 1)
                indices += range(sequence.sample_index, sequence.sample_index + sequence.num_drafts + 1)
        if specs:
            self._choose(logits, specs, indices)
        wanting = [row for row, spec in enumerate(specs) if spec.params.logprobs is not None]
        parts: list[_Part] = []
        adjusted: list[int] = []
        for sequence in sequences:
            if sequence.sample is not None:
                rows = range(first := firsts[sequence.request_id], first + sequence.num_drafts + 1)
                needs_host = any(sequence.sample.adjusts(indices[row]) for row in rows)
                parts.append(_Part.of(sequence, rows, len(adjusted) if needs_host else None))
                adjusted += rows if needs_host else ()
        self._rows = firsts
        return DeviceSamples(
            parts,
            HostCopy(self.latest[: len(specs)]),  # also of nothing: whoever waits for it waits for the step
            HostCopy(logits.index_select(0, _index(adjusted, logits.device))) if adjusted else None,
            self._logprobs(logits, wanting, specs),
        )

    def _choose(self, logits: Tensor, specs: list[SampleSpec], indices: list[int]) -> None:
        out = self.latest[: len(specs)]
        if all(spec.params.temperature < GREEDY_BELOW for spec in specs):
            out.copy_(self._ops.argmax(logits))
            return
        choices = np.array(choices_of(specs, indices), np.float64).T
        out.copy_(self._ops.sample(logits, to_device(logits.device, choices)[0]))

    def _logprobs(self, logits: Tensor, rows: list[int], specs: list[SampleSpec]) -> "dict[int, _Logprobs]":
        """By row, the model's own distribution, on its way to the host."""
        if not rows:
            return {}
        index = _index(rows, logits.device)
        logprobs = logits.index_select(0, index).float().log_softmax(-1)
        most = max(specs[row].params.logprobs or 0 for row in rows)
        likeliest = logprobs.topk(min(most, logprobs.shape[1]))
        chosen = logprobs.gather(1, self.latest.index_select(0, index).long()[:, None])
        copies = HostCopy(likeliest.indices), HostCopy(likeliest.values), HostCopy(chosen)
        return {row: _Logprobs(number, specs[row].params.logprobs or 0, *copies) for number, row in enumerate(rows)}


def _index(rows: list[int], device: torch.device) -> Tensor:
    return to_device(device, np.array(rows, np.int32))[0]


@dataclass(frozen=True, slots=True)
class _Part:
    """The rows of one sequence."""

    request_id: str
    rows: range
    drafts: list[int]
    spec: SampleSpec | None
    """Where the host chooses: with lists of its own, as the scheduler's go on growing."""
    first_adjusted: int

    @classmethod
    def of(cls, sequence: PlannedSequence, rows: range, first_adjusted: int | None) -> "_Part":
        spec = sequence.sample
        drafts = drafts_of(sequence)
        if first_adjusted is None or spec is None:
            return cls(sequence.request_id, rows, drafts, None, 0)
        own = replace(spec, output_token_ids=list(spec.output_token_ids))
        return cls(sequence.request_id, rows, drafts, own, first_adjusted)


@dataclass(frozen=True, slots=True)
class _Logprobs:
    number: int
    num_alternatives: int
    ids: HostCopy
    values: HostCopy
    chosen: HostCopy

    def read(self) -> TokenLogprobs:
        count = self.num_alternatives
        ids, values = (tuple(copy.wait()[self.number, :count].tolist()) for copy in (self.ids, self.values))
        return TokenLogprobs(float(self.chosen.wait()[self.number, 0]), ids, values)


class DeviceSamples:
    """Implements engine.plan.Launched."""

    def __init__(
        self, parts: list[_Part], tokens: HostCopy | None, adjusted: HostCopy | None, logprobs: dict[int, _Logprobs]
    ) -> None:
        self._parts = parts
        self._tokens = tokens
        self._adjusted = adjusted
        self._logprobs = logprobs
        self.marks: list[tuple[int, torch.cuda.Event | None]] = []
        """Numbers of leading layers, and what tells that they are in the blocks; None: they are."""

    @classmethod
    def none(cls) -> "DeviceSamples":
        return cls([], None, None, {})

    def layers(self) -> Iterator[int]:
        """Raises DeviceError when the device hangs."""
        for num_layers, mark in self.marks:
            if mark is not None:
                wait_for(mark)
            yield num_layers

    def result(self) -> StepResult:
        """Waits for the step. Raises DeviceError when the device hangs."""
        if self._tokens is None:
            return StepResult({})
        tokens = self._tokens.wait().tolist()
        return StepResult({part.request_id: self._sampled(part, tokens) for part in self._parts})

    def _sampled(self, part: _Part, tokens: list[int]) -> list[Sampled]:
        if part.spec is not None and self._adjusted is not None:
            rows = slice(part.first_adjusted, part.first_adjusted + len(part.rows))
            return verify(self._adjusted.wait()[rows], part.spec, part.drafts, HOST)
        count = num_right(tokens[part.rows.start : part.rows.stop], part.drafts) + 1
        return [
            Sampled(tokens[row], self._logprobs[row].read() if row in self._logprobs else None)
            for row in part.rows[:count]
        ]
