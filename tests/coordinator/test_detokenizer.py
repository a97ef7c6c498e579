"""Text never shows half a character or part of a stop string, and nothing is lost."""

import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import SPECIAL, byte_fallback, byte_level
from tokenizers import Tokenizer

from coordinator.detokenizer import StopFinder, TextStream, WindowDetokenizer

MULTIBYTE = "na\u00efve \u4e2d\u6587 \U0001f600\U0001f468\u200d\U0001f469 Hello there, e\u0301"


def detokenizer(tokenizer: Tokenizer, context: Sequence[int] = ()) -> WindowDetokenizer:
    special = {tokenizer.token_to_id(token) for token in SPECIAL}
    return WindowDetokenizer(tokenizer.decode, context, special)


def pieces(tokenizer: Tokenizer, token_ids: Sequence[int], context: Sequence[int] = ()) -> list[str]:
    detok = detokenizer(tokenizer, context)
    return [*(detok.push(token_id) for token_id in token_ids), detok.flush()]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 399), max_size=80))
def test_deltas_of_any_byte_level_tokens_add_up_to_the_whole_decoding(token_ids: list[int]) -> None:
    assert "".join(pieces(byte_level(), token_ids)) == byte_level().decode(token_ids)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40), st.sampled_from(["byte_level", "byte_fallback"]))
def test_deltas_of_any_text_add_up_to_it_and_hold_no_half_character(text: str, kind: str) -> None:
    tokenizer = byte_level() if kind == "byte_level" else byte_fallback()
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    deltas = pieces(tokenizer, token_ids)
    assert "".join(deltas) == tokenizer.decode(token_ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in delta for delta in deltas)


def test_a_character_of_several_tokens_comes_whole_and_at_once() -> None:
    token_ids = byte_level().encode("\U0001f600!", add_special_tokens=False).ids
    assert len(token_ids) == 5
    assert pieces(byte_level(), token_ids) == ["", "", "", "\U0001f600", "!", ""]


def test_a_character_that_never_comes_is_shown_at_the_end() -> None:
    token_ids = byte_level().encode("ab\u4e2d", add_special_tokens=False).ids[:-1]
    assert "".join(pieces(byte_level(), token_ids)) == "ab\ufffd"


def test_the_first_word_after_a_prompt_keeps_its_space_and_the_prompt_is_not_repeated() -> None:
    tokenizer = byte_fallback()
    prompt, answer = tokenizer.encode("abc").ids, [tokenizer.token_to_id("\u2581Hello")]
    assert pieces(tokenizer, answer, prompt) == [" Hello", ""]
    assert pieces(tokenizer, answer) == ["Hello", ""]


def test_special_tokens_between_words_cost_no_space() -> None:
    tokenizer = byte_fallback()
    ids = [tokenizer.token_to_id(token) for token in ("\u2581Hello", "<|end|>", "\u2581there", "</s>")]
    assert "".join(pieces(tokenizer, ids)) == "Hello there"


def test_endless_rubbish_costs_bounded_time() -> None:
    started_s = time.perf_counter()
    byte = byte_level().encode("\u4e2d", add_special_tokens=False).ids[0]
    assert len("".join(pieces(byte_level(), [byte] * 3000))) >= 3000
    assert time.perf_counter() - started_s < 2


texts = st.text(alphabet="abcX", max_size=60)
stop_lists = st.lists(st.text(alphabet="abcX", min_size=1, max_size=5), min_size=1, max_size=4)


def first_complete(text: str, stops: Sequence[str]) -> int | None:
    """The slow and obvious way: read character by character until the text ends with a stop string."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts)
    return None


@settings(max_examples=500, deadline=None)
@given(texts, stop_lists, st.lists(st.integers(1, 7), min_size=1, max_size=10))
def test_text_is_cut_before_the_stop_string_that_is_complete_first_however_it_is_cut_in_pieces(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    finder, shown, at, turn, stopped = StopFinder(stops), "", 0, 0, False
    while at < len(text) and not stopped:
        size = sizes[turn % len(sizes)]
        found = finder.push(text[at : at + size])
        shown += found.text
        stopped = found.stopped
        at, turn = at + size, turn + 1
        held = text[len(shown) : at]
        assert stopped or not held or any(stop.startswith(held) and stop != held for stop in stops)
    if not stopped:
        shown += finder.flush()
    cut = first_complete(text, stops)
    assert shown == (text if cut is None else text[:cut])
    assert stopped == (cut is not None)


def run(text: str, **options: object) -> tuple[str, bool]:
    stream = TextStream(detokenizer(byte_level()), **options)
    shown = ""
    for token_id in byte_level().encode(text, add_special_tokens=False).ids:
        shown += stream.push(token_id)
        if stream.stopped:
            return shown, True
    return shown + stream.finish(), stream.stopped


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["stop sign"], "Once upon a time, there was a "),
        (["zebra", " upon"], "Once"),
        (["zebra"], "Once upon a time, there was a stop sign, and more."),
        (["more.!"], "Once upon a time, there was a stop sign, and more."),
        (["O"], ""),
    ],
)
def test_stop_strings_are_found_across_tokens(stops: list[str], expected: str) -> None:
    text = "Once upon a time, there was a stop sign, and more."
    assert run(text, stops=stops) == (expected, expected != text)


def test_no_stop_string_ends_the_text_of_the_first_min_tokens_tokens() -> None:
    tokens = len(byte_level().encode("Once upon", add_special_tokens=False).ids)
    shown, stopped = run("Once upon a time, Once more", stops=["Once"], min_tokens=tokens)
    assert (shown, stopped) == ("Once upon a time, ", True)
    assert len(byte_level().encode("xyzy", add_special_tokens=False).ids) == 4
    assert run("xyzy", stops=["y"], min_tokens=1) == ("x", True)
    assert run("xyzy", stops=["y"], min_tokens=2) == ("xyz", True)


def test_a_stop_string_in_what_the_end_flushes_still_cuts() -> None:
    stream = TextStream(detokenizer(byte_level()), stops=["\ufffd"])
    half = byte_level().encode("\u4e2d", add_special_tokens=False).ids[0]
    assert stream.push(half) == ""
    assert stream.finish() == ""
    assert stream.stopped
