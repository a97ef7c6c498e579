"""Prompts are computed beside running requests in pieces that keep these going."""

from dataclasses import replace

import pytest

from engine.pace import MIN_PROMPT_TOKENS, Pace
from engine.plan import PlannedSequence, Sampled, SampleSpec, StepPlan, StepResult
from engine.requests import SamplingParams


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


def sampled(plan: StepPlan, num_tokens: int) -> StepResult:
    return StepResult({each.request_id: [Sampled(1)] * num_tokens for each in plan.sequences})


def sampling(step: StepPlan) -> StepPlan:
    spec = SampleSpec(SamplingParams(), [], [])
    return StepPlan([replace(each, sample=spec) for each in step.sequences], [])


def test_from_token_to_token_it_takes_what_a_step_with_prompts_takes_and_less_with_guesses() -> None:
    pace, alone, mixed, guessed = Pace(0.0), sampling(plan(4, 0)), sampling(plan(4, 500)), sampling(plan(4, 0, 3))
    pace.observe_streams(sampling(plan(0, 500)), StepResult({"p": [Sampled(1)]}), 9.0)
    assert pace.token_s is None, "no stream waited for it"
    for _ in range(50):
        pace.observe_streams(alone, sampled(alone, 1), 0.010)
    assert pace.token_s == pytest.approx(0.010)
    for _ in range(50):
        pace.observe_streams(mixed, sampled(mixed, 1), 0.050)
    assert pace.token_s == pytest.approx(0.050, rel=1e-3)
    for _ in range(50):
        pace.observe_streams(guessed, sampled(guessed, 2), 0.030)
    assert pace.token_s == pytest.approx(0.015, rel=1e-3)


def test_prompts_are_as_fast_as_their_own_tokens_come_also_beside_streams() -> None:
    pace = Pace(0.0)
    pace.observe(plan(4, 0), 0.010)
    assert pace.prompts.per_s == 0.0
    pace.observe(plan(30, 20), 0.1)
    assert pace.prompts.per_s == pytest.approx(200)
