"""Joins who guesses with the policy that says how much: what the engine knows as its drafter."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from engine.plan import DraftRequest, StepPlan, StepResult
from engine.speculation.policy import Policy


class Guesses(NamedTuple):
    tokens: dict[str, list[int]]
    """By request id; fewer than asked for, or none, where a guesser is not ready."""
    depth_s: float
    """What one more guess for each sequence took. What was done once for a request does not count."""


class Guesser(Protocol):
    """Implemented by engine.speculation.ngram and engine.speculation.draft_model."""

    def reach(self, requests: Sequence[DraftRequest]) -> dict[str, int]:
        """The most guesses that it could make, at most `max_drafts`; requests that would get none are left out."""

    def guess(self, requests: Sequence[DraftRequest], lengths: dict[str, int], spare_s: float) -> Guesses:
        """For the requests of the last `reach`. `spare_s`: what it may take to read what it has not seen."""

    def forget(self, request_id: str) -> None: ...


class Speculator:
    """Implements engine.plan.Drafter. `most_tokens`: guesses for one request in one step."""

    def __init__(self, guesser: Guesser, policy: Policy, most_tokens: int) -> None:
        self._guesser = guesser
        self._policy = policy
        self._most_tokens = most_tokens

    def wants_drafts(self, num_requests: int) -> bool:
        return self._policy.wants(num_requests)

    def propose(self, requests: list[DraftRequest]) -> dict[str, list[int]]:
        num_sequences = len(requests)
        reach = {request_id: min(most, self._most_tokens) for request_id, most in self._guesser.reach(requests).items()}
        lengths = self._policy.choose(num_sequences, reach)
        if not lengths:
            return {}
        guesses = self._guesser.guess(requests, lengths, self._policy.spare_s(num_sequences))
        if guesses.tokens:
            self._policy.observe_guessing(num_sequences, guesses.depth_s)
        return guesses.tokens

    def observe(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        num_drafts = 0
        for sequence in plan.sequences:
            if sequence.num_drafts:
                num_drafts += sequence.num_drafts
                num_right = len(result.sampled[sequence.request_id]) - 1
                self._policy.observe_guesses(sequence.request_id, sequence.num_drafts, num_right)
        self._policy.observe_idle(not num_drafts)
        if plan.num_tokens == len(plan.sequences) + num_drafts:
            self._policy.observe_step(len(plan.sequences), num_drafts, seconds)

    def forget(self, request_id: str) -> None:
        self._guesser.forget(request_id)
        self._policy.forget(request_id)
