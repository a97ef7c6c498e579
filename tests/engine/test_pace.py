"""Prompts are computed beside running requests in pieces that keep these going."""

import pytest

from engine.pace import MIN_PROMPT_TOKENS, Pace
from engine.plan import PlannedSequence, StepPlan


def plan(singles: int, prompt_tokens: int, drafts: int = 0) -> StepPlan:
    """`drafts`: for each of the singles."""
    sequences = [
        PlannedSequence(f"s{number}", [1] * (1 + drafts), 0, [0], 1, None, drafts) for number in range(singles)
    ]
    if prompt_tokens:
        sequences.append(PlannedSequence("p", [1] * prompt_tokens, 0, [0], 1, None))
    return StepPlan(sequences, [])


def learn(pace: Pace, singles_s: float, prompt_token_s: float) -> None:
    for _ in range(100):
        allowed = pace.prompt_tokens()
        assert allowed is not None
        pace.observe(plan(4, 0), singles_s)
        pace.observe(plan(4, allowed), singles_s + allowed * prompt_token_s)


def test_a_step_takes_as_long_as_was_asked_for() -> None:
    pace = Pace(stretch=2.0)
    learn(pace, singles_s=0.020, prompt_token_s=0.0004)
    assert pace.prompt_tokens() == pytest.approx(50, abs=2)


def test_it_follows_a_machine_that_becomes_slower() -> None:
    pace = Pace(stretch=3.0)
    learn(pace, singles_s=0.020, prompt_token_s=0.0004)
    learn(pace, singles_s=0.020, prompt_token_s=0.0010)
    assert pace.prompt_tokens() == pytest.approx(40, abs=2)


def test_a_prompt_always_goes_on() -> None:
    pace = Pace(stretch=1.1)
    assert pace.prompt_tokens() == MIN_PROMPT_TOKENS
    learn(pace, singles_s=0.001, prompt_token_s=1.0)
    assert pace.prompt_tokens() == MIN_PROMPT_TOKENS


def test_steps_of_prompts_alone_teach_nothing_and_no_stretch_sets_no_bound() -> None:
    pace = Pace(stretch=2.0)
    pace.observe(plan(0, 512), 9.0)
    assert pace.prompt_tokens() == MIN_PROMPT_TOKENS
    assert Pace(stretch=0).prompt_tokens() is None


def test_tokens_with_guesses_are_singles_and_not_prompts() -> None:
    pace = Pace(stretch=2.0)
    for _ in range(100):
        allowed = pace.prompt_tokens()
        assert allowed is not None
        pace.observe(plan(4, 0, drafts=5), 0.024)
        pace.observe(plan(4, allowed, drafts=5), 0.024 + allowed * 0.0004)
    assert pace.prompt_tokens() == pytest.approx(60, abs=2)
