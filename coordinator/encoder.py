"""Text to tokens, as the `tokenizers` library of Hugging Face does it, but by fastokens wherever that gives the same.

fastokens takes a thirtieth of the time, a hundredth for long prompts. It reads most byte-level and BPE tokenizers of
language models, not all. So whoever opens one tries it on texts made to tell the two apart; and of what clients send,
one text in so many is encoded by both. The first difference, or failure, ends its use. What the rest of the software
asks of a tokenizer (text from tokens, the vocabulary) it asks the other library.
"""

import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

from tokenizers import Tokenizer

events = logging.getLogger("baton.events")
CHECKED = 256
"""One short text in so many is encoded twice: 1 us a text on the average."""
SHORT_CHARACTERS = 4096
NUM_TRIALS = 300
TRIAL_PIECES = 40
_TRICKY = (
    " ", "  ", "\n", "\n\n", "\r\n", "\t", "\xa0", "\u3000", "\u200b", "\u200d", "\ufeff", "\x00", "\x7f", "\x85",
    "'s", "'S", "'ll", "\u2019re", "I'm", "1", "12345678", "\u0663", "\xb2", "\xbd", "3.14", "-", "--", "...", "!?",
    "_", "\u2581", "<", "|>", "e\u0301", "\xe9", "\ufb01", "\u212b", "\u0130", "\xdf", "\u1e9e", "\u4e2d\u6587",
    "\u65e5\u672c\u8a9e", "\ud55c\uad6d\uc5b4", "\u0627\u0644", "\u05e9\u05dc\u05d5\u05dd",
    "\u0928\u092e\u0938\u094d", "\u0e2a\u0e27", "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f1e9\U0001f1ea", "\U00020000", "\ue000", "\U0010ffff", "A", "Zz", "camelCase", "http://a.b/c?d=e&f",
    "x" * 80, "=" * 40,
)  # fmt: skip


class Encoder:
    """Any thread may encode. `on_fallback` is called with why fastokens is not used, or not for a text."""

    def __init__(self, tokenizer: Tokenizer, on_fallback: Callable[[str], None] = lambda reason: None) -> None:
        self._exact = tokenizer
        self._on_fallback = on_fallback
        self._turn = 0
        self._fast: Any = None
        try:
            from fastokens import Tokenizer as FastTokenizer
        except ImportError as error:
            self._fall_back("absent", str(error))
            return
        try:
            self._fast = FastTokenizer.from_json_str(tokenizer.to_str())
            agrees = all(self._agrees(text) for text in trials(tokenizer))
        except Exception as error:  # noqa: BLE001 - the library raises what it likes for a tokenizer that it cannot read
            self._fall_back("unsupported", str(error))
            return
        if not agrees:
            self._fall_back("differs", "it gives other tokens for a trial text")

    @property
    def library(self) -> str:
        """The one in use."""
        return "tokenizers" if self._fast is None else "fastokens"

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        fast = self._fast
        if fast is None:
            return self._encode_exact(text, add_special_tokens)
        try:
            token_ids: list[int] = fast.encode(text, add_special_tokens).ids
        except Exception:  # noqa: BLE001 - such as a bound of its regular expressions; the other one says what is wrong
            self._on_fallback("failed")
            return self._encode_exact(text, add_special_tokens)
        self._turn += 1
        if self._turn % CHECKED == 0 and len(text) <= SHORT_CHARACTERS:
            exact = self._encode_exact(text, add_special_tokens)
            if exact != token_ids:
                self._fall_back("differs", "it gave other tokens for a client's text")
                return exact
        return token_ids

    def _encode_exact(self, text: str, add_special_tokens: bool) -> list[int]:
        # The batch form releases the interpreter lock, the single one does not; and this one finds no offsets, which
        # takes a quarter of the time.
        return self._exact.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def _agrees(self, text: str) -> bool:
        return all(self._fast.encode(text, each).ids == self._encode_exact(text, each) for each in (False, True))

    def _fall_back(self, reason: str, why: str) -> None:
        self._fast = None
        self._on_fallback(reason)
        events.warning("prompts are encoded by tokenizers instead of fastokens, which is slower: %s", why)


def trials(tokenizer: Tokenizer) -> Iterator[str]:
    """Texts of what tokenizers treat in their own ways, and of pieces of the vocabulary; the same at every start."""
    draw = random.Random(0)
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    vocab_size = tokenizer.get_vocab_size()
    yield from ("", *_TRICKY, *added)
    for _ in range(NUM_TRIALS):
        pieces = []
        for _ in range(draw.randrange(2, TRIAL_PIECES)):
            kind = draw.random()
            if kind < 0.3:
                pieces.append(draw.choice(_TRICKY))
            elif kind < 0.4 and added:
                pieces.append(draw.choice(added))
            else:
                pieces.append(tokenizer.decode([draw.randrange(vocab_size)], skip_special_tokens=False))
        yield "".join(pieces)
