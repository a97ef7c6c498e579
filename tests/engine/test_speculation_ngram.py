"""Prompt lookup against a naive search, and its memory."""

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.plan import DraftRequest, SampleSpec
from engine.requests import SamplingParams
from engine.speculation.ngram import LENGTHS, TOKENS_PER_STEP, NgramGuesser, NgramIndex, continuation

texts = st.lists(st.integers(0, 3), max_size=60)


def naive_match(tokens: list[int], window: int) -> int | None:
    """End of the latest earlier occurrence of the longest end of `tokens`, among ends in the window."""
    oldest = len(tokens) - window
    for length in LENGTHS:
        for end in range(len(tokens) - 1, max(length, oldest) - 1, -1):
            if len(tokens) > length and tokens[end - length : end] == tokens[-length:]:
                return end
    return None


def request_of(request_id: str, tokens: list[int], max_drafts: int = 8) -> DraftRequest:
    return DraftRequest(request_id, tokens, 1, SampleSpec(SamplingParams(), [], []), max_drafts)


@given(texts, st.lists(st.integers(1, 7), max_size=30), st.sampled_from([5, 9, 1000]))
@settings(max_examples=400, deadline=None)
def test_the_longest_and_latest_match_is_found_however_the_text_arrives(
    tokens: list[int], pieces: list[int], window: int
) -> None:
    index, shown = NgramIndex(window), 0
    for piece in [*pieces, len(tokens)]:
        shown = min(shown + piece, len(tokens))
        index.extend(tokens[:shown], 1000)
        assert index.match(tokens[:shown]) == naive_match(tokens[:shown], window)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.data(), st.integers(0, 30))
def test_a_continuation_goes_on_with_the_period_of_the_text(tokens: list[int], data: st.DataObject, count: int) -> None:
    end = data.draw(st.integers(0, len(tokens) - 1))
    extended = list(tokens)
    for _ in range(count):
        extended.append(extended[end + len(extended) - len(tokens)])
    assert continuation(tokens, end, count) == extended[len(tokens) :]


def test_a_repeating_text_is_guessed_to_repeat() -> None:
    guesser, tokens = NgramGuesser(), [9, 1, 2, 3, 1, 2, 3, 1, 2]
    assert guesser.reach([request_of("a", tokens)]) == {"a": 8}
    assert guesser.guess([request_of("a", tokens)], {"a": 5}, 0.0).tokens == {"a": [3, 1, 2, 3, 1]}


def test_a_text_that_does_not_repeat_is_not_guessed() -> None:
    assert NgramGuesser().reach([request_of("a", list(range(500)))]) == {}


def test_a_long_prompt_is_indexed_over_several_steps() -> None:
    guesser, tokens = NgramGuesser(), [*range(2 * TOKENS_PER_STEP), 5, 6, 7]
    assert [bool(guesser.reach([request_of("a", tokens)])) for _ in range(3)] == [False, False, True]


def test_memory_is_bounded_and_given_back() -> None:
    guesser = NgramGuesser(max_tokens=100, window=40)
    tokens = [1, 2, 3, 4] * 200
    for _ in range(3):
        for name in "abcd":
            guesser.reach([request_of(name, tokens)])
    assert guesser._room == 0, "three windows of 40 do not fit into 100"
    assert sum(len(index) for index in guesser._indexes.values()) == 100
    for name in "abcdx":
        guesser.forget(name)
    assert (guesser._room, guesser._indexes) == (100, {})
    assert guesser.reach([request_of("d", tokens)]) == {"d": 8}, "there is room again"


def test_what_has_left_the_window_leaves_the_memory() -> None:
    index = NgramIndex(window=10)
    index.extend(list(range(1000)), 1000)
    assert len(index) == 10
    assert len(index._ends) <= 10 * len(LENGTHS)


def test_an_index_whose_window_has_filled_up_goes_on_when_others_have_taken_the_room() -> None:
    guesser = NgramGuesser(max_tokens=40, window=40)
    tokens = list(range(40)) * 3
    for count in range(50, len(tokens) + 1):
        reach = guesser.reach([request_of("a", tokens[:count])])
    assert reach == {"a": 8}
    assert guesser._room == 0
