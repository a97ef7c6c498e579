"""From tokens to text, one token at a time: never half a character, never part of a stop string."""

from codecs import utf_8_decode
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

_INCOMPLETE = "\ufffd"
_CONTEXT_TOKENS = 4
_MAX_HELD_TOKENS = 64  # beyond this the bytes are no character to come, and the window would grow without bound


class TokenTexts(dict[int, str | bytes]):
    """What each token adds in any company: a text of whole characters, or else bytes. `find` is asked once for each."""

    def __init__(self, find: Callable[[int], str | bytes]) -> None:
        self._find = find
        self.compiled: Any = None
        """The same, as the fast path has it."""

    def __missing__(self, token_id: int) -> str | bytes:
        text = self[token_id] = self._find(token_id)
        return text


class ByteLevelDetokenizer:
    """The text that each token adds, where the bytes of all tokens are the text. Concatenated, deltas and `flush` are
    the decoding of all tokens, with U+FFFD for bytes that are no character."""

    __slots__ = ("begun", "texts")

    def __init__(self, texts: TokenTexts) -> None:
        self.texts = texts
        self.begun = b""
        """The beginning of a character, which is held back."""

    def push(self, token_id: int) -> str:
        added = self.texts[token_id]
        if isinstance(added, str):
            if not self.begun:
                return added
            added = added.encode()
        return self._decode(added, final=False)

    def flush(self) -> str:
        """What was held back: the start of a character that never came."""
        return self._decode(b"", final=True)

    def _decode(self, added: bytes, final: bool) -> str:
        data = self.begun + added
        text, length = utf_8_decode(data, "replace", final)
        self.begun = data[length:]
        return text


class WindowDetokenizer:
    """The text that each token adds, where it may depend on the ones before it: the last piece shown is decoded again
    together with the new tokens, and what the longer text adds is new. The method is that of Text Generation Inference.

        tokens   ... | shown last | new ...        window = shown last + new
        text     ... | `shown`    | delta

    Concatenated, deltas and `flush` are the decoding of all tokens. `decode` turns ids into text. `context` is what
    stands before the first token (the prompt): its text is not repeated, but decides, for instance, whether the first
    word begins with a space. `skip` are ids without text.
    """

    __slots__ = ("_decode", "_num_shown", "_shown", "_skip", "_window")

    def __init__(
        self, decode: Callable[[list[int]], str], context: Sequence[int] = (), skip: Collection[int] = ()
    ) -> None:
        self._decode = decode
        self._skip = skip
        self._window = list(context[-_CONTEXT_TOKENS:])
        self._num_shown = len(self._window)
        self._shown: str | None = None
        """None: that of the context, which is decoded when the first token comes."""

    def push(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        window, shown = self._window, self._context() if self._shown is None else self._shown
        window.append(token_id)
        text = self._decode(window)
        nothing_whole = len(text) <= len(shown) or text.endswith(_INCOMPLETE)
        if nothing_whole and len(window) - self._num_shown < _MAX_HELD_TOKENS:
            return ""
        delta = text[len(shown) :]
        del window[: self._num_shown]
        self._num_shown = len(window)
        self._shown = self._decode(window)
        return delta

    def flush(self) -> str:
        """What was held back: the start of a character that never came."""
        if len(self._window) == self._num_shown:
            return ""
        text, shown = self._decode(self._window), self._shown or ""
        self._num_shown, self._shown = len(self._window), text
        return text[len(shown) :]

    def _context(self) -> str:
        """The text before the first token, or nothing where that is cut within a character."""
        text = self._decode(self._window) if self._window else ""
        if text.endswith(_INCOMPLETE):
            text = ""
            self._window.clear()
            self._num_shown = 0
        self._shown = text
        return text


Detokenizer = ByteLevelDetokenizer | WindowDetokenizer


class Found(NamedTuple):
    text: str
    """What may be shown now."""
    stopped: bool


class StopFinder:
    """Cuts a text, arriving in pieces, before the stop string that is complete first.

    Of two that are complete with the same character, the one that begins earlier wins. So the cut does not depend on
    the pieces. Held back are only characters that could still begin a stop string.
    """

    __slots__ = ("_held", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> Found:
        text = self._held + text
        matches = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            self._held = ""
            return Found(text[: min(matches)[1]], True)
        keep = min((_possible_start(text, stop) for stop in self._stops), default=len(text))
        self._held = text[keep:]
        return Found(text[:keep], False)

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _possible_start(text: str, stop: str) -> int:
    """Where the longest end of `text` that is a proper beginning of `stop` starts; len(text) if there is none."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return at
        at = text.find(stop[0], at + 1)
    return len(text)


class TextStream:
    """Text of one choice: detokenised, cut at the first stop string that begins after `min_tokens` tokens."""

    __slots__ = ("_finder", "_min_tokens", "_num_tokens", "detokenizer", "has_stops", "length", "stopped")

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str] = (), min_tokens: int = 0) -> None:
        self.detokenizer = detokenizer
        self._finder = StopFinder(stops)
        self.has_stops = bool(stops)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self.length = 0
        """Characters of all tokens so far, those held back included: where the next token's text begins."""
        self.stopped = False

    @property
    def byte_level(self) -> bool:
        """What a token adds does not depend on the tokens before it."""
        return isinstance(self.detokenizer, ByteLevelDetokenizer)

    def push(self, token_id: int) -> str:
        """The text that may be shown now; sets `stopped` when a stop string is complete."""
        text = self.detokenizer.push(token_id)
        self.length += len(text)
        if not self.has_stops:
            return text
        self._num_tokens += 1
        return self._search(text)

    def again(self, token_ids: Iterable[int]) -> list[str]:
        """What `push` gave for the first tokens, of a text that is byte-level and has no stop strings."""
        assert isinstance(self.detokenizer, ByteLevelDetokenizer), "else it cannot be known"
        return [*map(ByteLevelDetokenizer(self.detokenizer.texts).push, token_ids)]

    def finish(self) -> str:
        """What is still held back, when no token follows."""
        text = self.detokenizer.flush()
        self.length += len(text)
        text = self._search(text) if self.has_stops else text
        return text if self.stopped else text + self._finder.flush()

    def _search(self, text: str) -> str:
        if self._num_tokens <= self._min_tokens:
            return text
        found = self._finder.push(text)
        self.stopped = found.stopped
        return found.text
