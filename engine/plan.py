"""The contract between the scheduler, which knows requests, and the runner, which knows tensors."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from engine.requests import SamplingParams, TokenLogprobs

PENDING = -1
"""As a token id: the token that the step launched just before this one samples for this request. The only token of its
sequence in the plan; it stays on the device, and the host has not read it when the step is launched."""


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """What choosing the next token of one sequence needs beside its logits."""

    params: SamplingParams
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    """Those known so far: a list that grows. It lacks the token of a step in flight; the index of the new token is
    `PlannedSequence.sample_index`."""

    def adjusts(self, index: int) -> bool:
        """Whether a penalty, a bias or min_tokens changes the scores of output token `index`."""
        params = self.params
        return (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
            or bool(params.logit_bias)
            or index < params.min_tokens
        )


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
    """Covers at least start + len(token_ids) positions; those written are owned by this request alone. A list that
    changes after the step has been launched."""
    rope_length: int
    """Length of the prompt, which dynamic rotary scaling depends on."""
    sample: SampleSpec | None
    """None: the prompt goes on in a later step."""
    num_drafts: int = 0
    """How many of the last `token_ids` are guesses, to be verified (speculative decoding)."""
    sample_index: int = 0
    """Place in the output stream of the (first) token that the step samples: with the seed it decides the draw."""


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


OnLayer = Callable[[int], None]
"""on_layer(n): the keys and values of all tokens of the step are in the blocks for the first n layers."""


class Runner(Protocol):
    """Executes a plan. The real one is engine.runner; tests drive the scheduler with a stand-in."""

    def run(self, plan: StepPlan, on_layer: OnLayer | None = None) -> StepResult:
        """`on_layer`: called in between, in this thread, by a runner that knows how far it is; others never do."""


class Launched(Protocol):
    """A step on its way."""

    def layers(self) -> Iterator[int]:
        """Of the groups it was launched with, each once it is in the blocks; waits in between. Before `result`."""

    def result(self) -> StepResult:
        """Waits for the step. Called once, in the order of the launches."""


@runtime_checkable
class LaunchingRunner(Runner, Protocol):
    """A runner that can start a step before it has given back the result of the one before.

    At most two steps are on their way. They take effect in the order of their launches, copies of blocks included, as
    on one stream of a device. `launch` reads the plan's lists before it returns, as they change afterwards; only the
    token lists of a sequence whose SampleSpec `adjusts` stay as they are until `result`. After a plan with such a
    sequence, or with drafts, the next one is launched only when its result is known: PENDING is always a token that
    logits, the seed and the index alone decide.
    """

    def launch(self, plan: StepPlan, layer_groups: Sequence[int] = ()) -> Launched:
        """`layer_groups`: numbers of leading layers that the caller wants to know of, in a step with a prompt."""


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """A running request that needs one token computed, so that a step can verify guesses of what follows."""

    request_id: str
    token_ids: list[int]
    """Prompt and outputs: the scheduler's own list, which grows. Not to be changed or kept."""
    num_prompt_tokens: int
    sample: SampleSpec
    max_drafts: int
    """More would go beyond the stream's greatest length; at least 1."""


class Drafter(Protocol):
    """Guesses what follows. A guess that is wrong costs time and never changes a stream.

    The engine calls, in one thread: `wants_drafts`, `propose`, the step, `observe`, and `forget` once for each request
    that has ended, before its id can be proposed for again.
    """

    def wants_drafts(self, num_requests: int) -> bool:
        """Whether `propose` would try to guess for so many requests; cheap. While it says no, `propose` is not called
        and the engine may plan a step before the tokens of the one before are known."""

    def propose(self, requests: list[DraftRequest]) -> dict[str, list[int]]:
        """Guesses by request id, none for those left out. The scheduler uses as many leading ones as there is room
        for, which may be none: what was used is in the plan that `observe` gets."""

    def observe(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        """A step, with or without guesses, took this long, `propose` not included."""

    def forget(self, request_id: str) -> None:
        """The request has ended; nothing was proposed for it, perhaps."""
