"""How many prompt tokens a step may compute beside running requests, so that these do not wait for it.

A step takes the time of its single tokens plus a time for each prompt token. Both are measured while serving, as they
depend on model, machine, batch and context; exponentially weighted, so that they follow the load. Chunked prefill with
a bound on the step is Sarathi-Serve's idea (Agrawal et al., 2024); the bound here is a time and not a number of tokens.
"""

from baton.rates import Rate
from engine.plan import StepPlan, StepResult

MIN_PROMPT_TOKENS = 16
"""A prompt always goes on, however slow the machine is."""
WEIGHT_UP, WEIGHT_DOWN = 0.5, 0.1
"""Of the newest measurement of what a prompt token costs. Above the estimate it counts for more: a step that was too
long is what somebody waits for, and cost rises with every chunk of a long prompt."""
WEIGHT_SINGLES = 0.2


class Pace:
    """`stretch`: longest step, as a multiple of one without prompt tokens; 0 sets no bound."""

    def __init__(self, stretch: float) -> None:
        self._stretch = stretch
        self._singles_s: float | None = None
        self._prompt_token_s: float | None = None
        self.prompts = Rate()
        """Tokens of prompts, in steps that compute some."""
        self.token_s: float | None = None
        """From one token of a running request to its next."""

    def prompt_tokens(self) -> int | None:
        """What may be computed beside single tokens; None sets no bound."""
        if not self._stretch:
            return None
        if self._singles_s is None or self._prompt_token_s is None:
            return MIN_PROMPT_TOKENS
        return max(MIN_PROMPT_TOKENS, int((self._stretch - 1) * self._singles_s / self._prompt_token_s))

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """A step took this long. Guesses belong to the singles: with them is how these run when no prompt is there."""
        lengths = [len(sequence.token_ids) - sequence.num_drafts for sequence in plan.sequences]
        num_singles = lengths.count(1)
        num_prompt_tokens = sum(lengths) - num_singles
        if num_prompt_tokens:
            self.prompts.add(num_prompt_tokens, seconds)
        if not num_prompt_tokens:
            self._singles_s = _blend(self._singles_s, seconds, WEIGHT_SINGLES)
        elif num_singles and self._singles_s is not None:
            token_s = max(seconds - self._singles_s, 0.05 * seconds) / num_prompt_tokens
            rising = self._prompt_token_s is not None and token_s > self._prompt_token_s
            self._prompt_token_s = _blend(self._prompt_token_s, token_s, WEIGHT_UP if rising else WEIGHT_DOWN)

    def observe_streams(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        """So long after the step before it, this one gave each running request a token, or several with guesses."""
        singles = [
            each for each in plan.sequences if each.sample is not None and len(each.token_ids) == 1 + each.num_drafts
        ]
        if singles:
            num_tokens = sum(len(result.sampled[each.request_id]) for each in singles)
            self.token_s = _blend(self.token_s, seconds * len(singles) / num_tokens, WEIGHT_SINGLES)


def _blend(old: float | None, new: float, weight: float) -> float:
    return new if old is None else (1 - weight) * old + weight * new
