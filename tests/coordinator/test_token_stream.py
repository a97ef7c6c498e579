"""Exactly-once delivery, whatever order, repetition and loss the messages of two workers and many attempts suffer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.v1 import worker_link_pb2 as wire
from coordinator.stream import ABANDON, COMPLETE, Outcome, TokenStream

RIGHT = [7, 3, 7, 7, 1, 9, 2, 2, 8, 4, 5, 6]


def started(max_tokens: int = len(RIGHT), **options: object) -> TokenStream:
    stream = TokenStream(max_tokens, **options)
    stream.begin_attempt()
    return stream


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Messages (attempt, index) in any interleaving: each worker's are in order, but may be lost or repeated."""
    queues = []
    for attempt in range(1, draw(st.integers(1, 4)) + 1):
        for _ in range(2):
            kept = draw(st.lists(st.integers(0, len(RIGHT) - 1), max_size=20))
            queues.append([(attempt, index) for index in kept])
            whole = draw(st.booleans())
            if whole:
                queues.append([(attempt, index) for index in range(len(RIGHT))])
    history = []
    while queues:
        queue = draw(st.sampled_from(queues))
        if queue:
            history.append(queue.pop(0))
        else:
            queues.remove(queue)
    return history


@settings(max_examples=300, deadline=None)
@given(histories())
def test_each_index_is_delivered_once_and_in_order_through_loss_repetition_and_interleaving(
    history: list[tuple[int, int]],
) -> None:
    stream, delivered = started(), []
    for attempt, index in history:
        before = len(stream.tokens)
        outcome = stream.accept(attempt, index, RIGHT[index])
        if outcome in COMPLETE or outcome is Outcome.DELIVERED:
            assert index == before == len(stream.tokens) - 1
            delivered.append(RIGHT[index])
        else:
            assert len(stream.tokens) == before
        if outcome in ABANDON:
            stream.begin_attempt()
    assert delivered == stream.tokens == RIGHT[: len(delivered)]


@settings(max_examples=300, deadline=None)
@given(histories(), st.lists(st.integers(0, 5), min_size=1, max_size=60))
def test_two_tokens_for_one_index_are_never_both_delivered(history: list[tuple[int, int]], lies: list[int]) -> None:
    stream, shown = started(), {}
    for at, (attempt, index) in enumerate(history):
        token = RIGHT[index] + (100 if lies[at % len(lies)] == 0 else 0)
        outcome = stream.accept(attempt, index, token)
        if outcome in COMPLETE or outcome is Outcome.DELIVERED:
            assert index not in shown
            shown[index] = token
        elif outcome is Outcome.IGNORED and attempt == stream.attempt and not stream.closed:
            assert shown[index] == token
        elif outcome in ABANDON:
            stream.begin_attempt()
    assert list(shown) == list(range(len(shown)))


def test_the_first_token_may_come_from_prefill_and_again_from_decode() -> None:
    stream = started()
    assert stream.accept(1, 0, 7) is Outcome.DELIVERED
    assert stream.accept(1, 0, 7) is Outcome.IGNORED
    assert stream.accept(1, 1, 3) is Outcome.DELIVERED
    assert stream.tokens == [7, 3]


def test_another_token_for_a_delivered_index_abandons_the_attempt() -> None:
    stream = started()
    stream.accept(1, 0, 7)
    assert stream.accept(1, 0, 8) is Outcome.DIVERGED
    assert stream.tokens == [7]


def test_an_abandoned_attempt_is_not_heard_any_more() -> None:
    stream = started()
    stream.begin_attempt()
    assert stream.accept(1, 0, 7) is Outcome.IGNORED
    assert stream.ended(1, True, wire.END_REASON_STOP, 0) is Outcome.IGNORED
    assert stream.worker_lost(1, True) is Outcome.IGNORED
    assert stream.refused(1) is Outcome.IGNORED
    assert stream.accept(2, 0, 7) is Outcome.DELIVERED


def test_a_missing_token_abandons_the_attempt() -> None:
    assert started().accept(1, 1, 3) is Outcome.GAP


def test_a_stop_token_ends_the_stream_but_not_before_min_tokens() -> None:
    stream = started(stop_token_ids=[7], min_tokens=1)
    assert stream.accept(1, 0, 7) is Outcome.DELIVERED
    assert stream.accept(1, 1, 7) is Outcome.STOP
    assert stream.accept(1, 2, 7) is Outcome.IGNORED


def test_max_tokens_ends_the_stream() -> None:
    stream = started(max_tokens=2)
    assert stream.accept(1, 0, 7) is Outcome.DELIVERED
    assert stream.accept(1, 1, 3) is Outcome.LENGTH


@pytest.mark.parametrize("num_tokens", [0, 2, 99])
def test_an_ending_that_counts_other_tokens_than_arrived_is_a_failure_not_a_short_answer(num_tokens: int) -> None:
    stream = started()
    stream.accept(1, 0, 7)
    assert stream.ended(1, True, wire.END_REASON_STOP, num_tokens) is Outcome.FAILED
    assert not stream.closed


def test_decode_ends_the_stream_and_prefill_alone_does_not() -> None:
    for reason in (wire.END_REASON_HANDED_OVER, wire.END_REASON_ERROR, wire.END_REASON_ABORTED):
        assert started().ended(1, False, reason, 0) is Outcome.IGNORED
        assert started().ended(1, True, reason, 0) is Outcome.FAILED
    assert started().ended(1, True, wire.END_REASON_LENGTH, 0) is Outcome.LENGTH
    assert started().ended(1, True, wire.END_REASON_STOP, 0) is Outcome.STOP


def test_only_the_loss_of_the_decode_worker_needs_another_attempt() -> None:
    assert started().worker_lost(1, decode=False) is Outcome.IGNORED
    assert started().worker_lost(1, decode=True) is Outcome.FAILED


def test_a_closed_stream_ignores_everything() -> None:
    stream = started()
    stream.close()
    assert stream.accept(1, 0, 7) is Outcome.IGNORED
    assert stream.ended(1, True, wire.END_REASON_ERROR, 0) is Outcome.IGNORED
    assert stream.worker_lost(1, True) is Outcome.IGNORED


def test_numbers_that_a_coordinator_before_may_use_are_left_out() -> None:
    stream = TokenStream(5)
    stream.attempt, stream.skip = 3, 1000
    assert stream.accept(3, 0, 7) is Outcome.DELIVERED, "what was adopted goes on"
    assert [stream.begin_attempt() for _ in range(2)] == [1004, 1005]
    assert stream.accept(4, 1, 7) is Outcome.IGNORED
