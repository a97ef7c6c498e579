"""The contract between the scheduler, which knows requests, and the runner, which knows tensors."""

from dataclasses import dataclass
from typing import Protocol

from engine.requests import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """What choosing the next token of one sequence needs beside its logits."""

    params: SamplingParams
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    """Tokens so far; the new one gets index len(output_token_ids). Read only when a penalty is set."""


@dataclass(frozen=True, slots=True)
class PlannedSequence:
    """A run of new tokens of one sequence.

    position   0 ........ start ........ start + len(token_ids)
               | KV in the blocks | computed in this step |
    """

    request_id: str
    token_ids: list[int]
    start: int
    block_ids: list[int]
    """Covers at least start + len(token_ids) positions; those written are owned by this request alone."""
    rope_length: int
    """Length of the prompt, which dynamic rotary scaling depends on."""
    sample: SampleSpec | None
    """None: the prompt goes on in a later step."""
    num_drafts: int = 0
    """How many of the last `token_ids` are guesses, to be verified (speculative decoding)."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    sequences: list[PlannedSequence]
    """Decodes first, then prefill chunks."""
    copies: list[tuple[int, int]]
    """(source block, target block), to be made before anything is computed: copy on write."""

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class Sampled:
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    sampled: dict[str, list[Sampled]]
    """By request id, for each planned sequence with a SampleSpec: the guesses that proved right, and one token more."""


class Runner(Protocol):
    """Executes a plan. The real one is engine.runner; tests drive the scheduler with a stand-in."""

    def run(self, plan: StepPlan) -> StepResult: ...
