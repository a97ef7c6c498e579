"""What the benchmark of hand-overs promises: parts of a request's time that are right and add up."""

import pytest

from benchmarks.timeline import (
    COMPUTE,
    QUEUE,
    UNNAMED,
    WAIT,
    WIRE,
    NoHandOver,
    Part,
    Seen,
    Span,
    of_kind,
    split,
    understand,
)
from benchmarks.watched import Call

A, B = Part(WIRE, "a"), Part(WAIT, "b")


def test_each_moment_belongs_to_the_first_span_that_covers_it_and_the_parts_add_up() -> None:
    parts = split(10, 100, [Span(A, 0, 20), Span(A, 30, 50), Span(B, 40, 60), Span(A, 90, 300), Span(B, 95, 99)])
    assert parts == {A: 10 + 20 + 10, B: 10, Part(UNNAMED, ""): 10 + 30}
    assert parts.total() == 90


def seen(pulled: bool) -> Seen:
    """One step of prefill from 20 to 100, whose blocks are checked from 110 to 120 and pulled from 135 to 150, or were
    written in place; a step of decode from 170 to 270. The client has its first token at 130.
    """
    moved = [Call("OfferServer._checksum", 110, 120, "-"), Call("OfferServer._send", 122, 123, "offer")]
    prefill = [
        Call("WorkerShell.on_assignment", 5, 6, "-"),
        Call("Engine.step", 10, 11, "-"),  # computes nothing
        Call("Engine.step", 20, 100, "-"),
        Call("ModelRunner.run", 21, 99, "-"),
        Call("WorkerShell._on_output", 104, 106, "-"),
        *(moved if pulled else []),
        Call("OfferServer._send", 124, 125, "closed" if pulled else "written"),
    ]
    heard = [Call("Intake._on_message", 128, 129, "offer"), Call("pull_and_verify", 135, 150, "-")]
    decode = [
        *(heard if pulled else [Call("Intake._on_message", 128, 129, "written")]),
        Call("StepLoop.submit", 160, 161, "-"),
        Call("Engine.receive", 165, 166, "-"),
        Call("Engine.step", 170, 270, "-"),
        Call("ModelRunner.run", 171, 269, "-"),
        Call("WorkerShell._on_output", 275, 276, "-"),
    ]
    coordinator = [Call("Dispatcher._on_tokens", 112, 113, "-"), Call("Dispatcher._on_tokens", 280, 281, "-")]
    return Seen(0, [130, 290, 392, 492, 594], prefill, decode, coordinator)


@pytest.mark.parametrize("pulled", [True, False])
def test_ttft_and_first_gap_are_cut_into_parts_that_add_up(pulled: bool) -> None:
    hand_over = understand(seen(pulled))
    assert hand_over.ttft.total() == 130
    assert [of_kind(hand_over.ttft, kind) for kind in (QUEUE, COMPUTE, WIRE, UNNAMED)] == [15, 80, 0, 0]
    assert hand_over.first_gap.total() == 160
    # The checksums ran before the client had its first token, so that they are in no gap.
    assert of_kind(hand_over.first_gap, WIRE) == (15 if pulled else 0)
    assert of_kind(hand_over.first_gap, COMPUTE) == 100
    assert of_kind(hand_over.first_gap, WAIT) == (45 if pulled else 60)
    assert hand_over.beyond_wire == 160 - 102 - (15 if pulled else 0)
    assert hand_over.until_decode_beyond_wire == 70 - (25 if pulled else 0)


def test_a_request_that_was_prefilled_by_decode_is_no_hand_over() -> None:
    lost = seen(True)
    with pytest.raises(NoHandOver):
        understand(Seen(lost.sent, lost.tokens, [], lost.decode, lost.coordinator))
    with pytest.raises(NoHandOver):
        understand(Seen(lost.sent, lost.tokens, lost.prefill, [], lost.coordinator))
