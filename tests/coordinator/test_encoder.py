"""Prompts have the tokens that Hugging Face's library gives them, whichever library encodes them."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from coordinator_harness import DEMO_FOLDER
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import SPECIAL, byte_fallback, byte_level, composed_digits, numbers_of_three
from tokenizers import Tokenizer

from coordinator import encoder as module
from coordinator.encoder import Encoder, trials


def demo() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO_FOLDER / "tokenizer.json"))


def exact(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    return ids


FAMILIES = [demo, byte_level, numbers_of_three, composed_digits, byte_fallback]
ENCODERS = {family: Encoder(family()) for family in FAMILIES}
PIECES = st.one_of(
    st.text(max_size=20), st.sampled_from([*SPECIAL, "<tool>", "brown fox", *module._TRICKY]),
    st.sampled_from(["the quick", " lazy", "dog.", " Once", "\n\n  upon"]),
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(PIECES, max_size=12), add_special_tokens=st.booleans())
def test_any_text_has_its_exact_tokens(
    family: Callable[[], Tokenizer], pieces: list[str], add_special_tokens: bool
) -> None:
    text = "".join(pieces).encode(errors="ignore").decode()
    assert ENCODERS[family].encode(text, add_special_tokens) == exact(family(), text, add_special_tokens)


def test_what_language_models_mostly_have_is_encoded_by_the_faster_library() -> None:
    pytest.importorskip("fastokens")
    families = demo, byte_level, numbers_of_three, composed_digits
    assert {family: ENCODERS[family].library for family in families} == dict.fromkeys(families, "fastokens")


def test_trials_are_the_same_at_every_start_and_reach_special_tokens() -> None:
    texts = list(trials(byte_level()))
    assert texts == list(trials(byte_level()))
    assert all(any(token in text and text != token for text in texts) for token in SPECIAL)


class Wrong:
    """A library that gives other tokens for texts with a certain word, and fails at others."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, add_special_tokens: bool) -> Any:
        if "breaks" in text:
            raise ValueError("a bound of a regular expression")
        ids = exact(self._tokenizer, text, add_special_tokens)
        return SimpleNamespace(ids=[*ids, 7] if "other" in text else ids)


def opened(monkeypatch: pytest.MonkeyPatch, from_json_str: Callable[[str], Any]) -> tuple[Encoder, list[str]]:
    library, reasons = SimpleNamespace(Tokenizer=SimpleNamespace(from_json_str=from_json_str)), list[str]()
    monkeypatch.setitem(sys.modules, "fastokens", library)
    return Encoder(byte_level(), reasons.append), reasons


def test_the_first_difference_that_is_found_ends_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, reasons = opened(monkeypatch, lambda text: Wrong(byte_level()))
    assert (encoder.library, reasons) == ("fastokens", [])
    for at in range(module.CHECKED + 1):
        encoder.encode(f"other {at}", False)
    assert (encoder.library, reasons) == ("tokenizers", ["differs"])
    assert encoder.encode("other", True) == exact(byte_level(), "other", True)


def test_a_text_that_it_fails_at_is_encoded_by_the_other_one(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, reasons = opened(monkeypatch, lambda text: Wrong(byte_level()))
    assert encoder.encode("it breaks", False) == exact(byte_level(), "it breaks", False)
    assert (encoder.library, reasons) == ("fastokens", ["failed"])


def test_a_tokenizer_that_it_cannot_read_or_reads_wrongly_is_left_to_the_other_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(text: str) -> None:
        raise ValueError("unknown pre-tokenizer")

    encoder, reasons = opened(monkeypatch, refuses)
    assert (encoder.library, reasons) == ("tokenizers", ["unsupported"])
    monkeypatch.setattr(module, "_TRICKY", ("other",))
    encoder, reasons = opened(monkeypatch, lambda text: Wrong(byte_level()))
    assert (encoder.library, reasons) == ("tokenizers", ["differs"])
    monkeypatch.setitem(sys.modules, "fastokens", None)
    reasons.clear()
    assert Encoder(byte_level(), reasons.append).library == "tokenizers"
    assert reasons == ["absent"]
    assert "slower" in caplog.text
