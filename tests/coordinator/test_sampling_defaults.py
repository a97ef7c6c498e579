"""What a client leaves out is filled in the same way for every attempt, and what it asks for is bounded."""

import pytest

from baton.errors import InvalidRequestError
from coordinator.model_files import ModelFacts
from coordinator.sampling import SamplingRequest, check, for_choice, resolve

FACTS = ModelFacts(100, (1, 2), {"temperature": 0.6, "top_k": 20})


def test_the_clients_word_beats_the_models_default_which_beats_the_stated_one() -> None:
    resolved = resolve(SamplingRequest(top_k=5), FACTS, max_tokens=9)
    assert (resolved.top_k, round(resolved.temperature, 3), resolved.top_p, resolved.max_tokens) == (5, 0.6, 1.0, 9)
    assert resolve(SamplingRequest(temperature=0.0), FACTS, 9).temperature == 0.0


def test_top_k_minus_one_keeps_all() -> None:
    assert resolve(SamplingRequest(top_k=-1), FACTS, 9).top_k == 0


def test_ends_of_sequence_stop_unless_ignored_and_own_stop_tokens_always_do() -> None:
    assert list(resolve(SamplingRequest(stop_token_ids=[7, 1]), FACTS, 9).stop_token_ids) == [7, 1, 2]
    assert list(resolve(SamplingRequest(stop_token_ids=[7], ignore_eos=True), FACTS, 9).stop_token_ids) == [7]


def test_without_a_seed_requests_differ_and_with_one_each_choice_has_its_own() -> None:
    assert resolve(SamplingRequest(), FACTS, 9).seed != resolve(SamplingRequest(), FACTS, 9).seed
    sampling = resolve(SamplingRequest(seed=2**64 - 1), FACTS, 9)
    assert [for_choice(sampling, number).seed for number in range(3)] == [2**64 - 1, 0, 1]
    assert resolve(SamplingRequest(seed=-1), FACTS, 9).seed == 2**64 - 1


def test_logprobs_zero_is_not_absent() -> None:
    assert resolve(SamplingRequest(logprobs=0), FACTS, 9).HasField("logprobs")
    assert not resolve(SamplingRequest(), FACTS, 9).HasField("logprobs")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -0.1, 1e9])
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"])
def test_numbers_out_of_bounds_are_refused_by_name(name: str, value: float) -> None:
    if (name, value) == ("presence_penalty", -0.1):
        return check(SamplingRequest(presence_penalty=value), 100)
    with pytest.raises(InvalidRequestError, match=f"^{name} must be") as raised:
        check(SamplingRequest(**{name: value}), 100)
    assert raised.value.param == name
    return None


def test_what_is_in_bounds_is_taken() -> None:
    check(SamplingRequest(0.0, -1, 1.0, 0.0, 0, 0.5, -2, 2, {99: -100}, 3, 3, True, [0], 20, 16, ["\n"]), 100)
