"""The fast path of a token, from its worker's step to its client's connection: compiled, in `fast_path.cpp`.

Most tokens of most answers need nothing but their text and an event around it, and they come one a stream and step.
When a step comes after a sleep, nothing of a stream is in the processor's caches any more, so that each object that its
token touches is a wait for memory. Here is what such a stream needs, in one piece:

    StepTokens -> FastPaths.take -> stream (by handle) -> text -> event -> send(2)

The slow path (`dispatch`, `delivery`, `event_stream`) begins every stream, ends it, and does all that is rare. The fast
one is entered when all that the slow one wrote has left, and left before anything but the next token happens to the
stream or its connection. Whoever looks at the stream is first told what was taken. What either path writes is the same.
Without a compiler all tokens take the slow one.
"""

import ctypes
import functools
import logging
import struct
from array import array
from collections.abc import Iterable, Sequence
from ctypes import POINTER, Structure, c_bool, c_char_p, c_double, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from weakref import finalize

from baton.compiled import Unavailable, compiled
from baton.cork import Corked
from coordinator.delivery import Choice
from coordinator.detokenizer import ByteLevelDetokenizer, TokenTexts
from coordinator.openai_answers import Frame
from coordinator.version_metrics import SECONDS

if TYPE_CHECKING:
    from coordinator.workers import Leg

MAX_TOKEN_ID: Final = 1 << 20
"""Of a token whose text is kept, in a table: no vocabulary is that large."""
_TAKEN, _HELD_UP, _UNKNOWN = 1, 2, 3
"""Of a token; 0 is refused. As in fast_path.cpp, which also says what they mean."""
_SECONDS: Final = array("d", SECONDS)
events = logging.getLogger("baton.events")


_OPENING: Final = struct.Struct("@qqPPqPPd6q")
"""Socket, end, texts; bounds, their number, counts and sum; time of the last token; sizes of the parts behind it."""


class _Progress(Structure):
    _fields_ = (
        ("last_token_s", c_double), ("last_write_s", c_double), ("taken", POINTER(c_uint32)), ("num_taken", c_int64),
        ("unsent", c_void_p), ("begun", c_void_p), ("num_unsent", c_int64), ("num_begun", c_int64),
    )  # fmt: skip


@functools.cache
def library() -> Any:
    """Compiled, if need be; None where it cannot be, and the log says why."""
    try:
        # With Python's lock held: what takes microseconds must not have to ask for it again.
        native = ctypes.PyDLL(str(compiled(Path(__file__).with_suffix(".cpp"), ["-O2"])))
    except (Unavailable, OSError) as error:
        events.warning("no fast path, so that tokens cost more: %s", error)
        return None
    for name, arguments, result in (
        ("texts_new", (), c_void_p),
        ("texts_free", (c_void_p,), None),
        ("texts_set", (c_void_p, c_uint32, c_char_p, c_int64, c_bool), None),
        ("streams_new", (), c_void_p),
        ("streams_free", (c_void_p,), None),
        ("stream_enter", (c_void_p, c_uint64, c_char_p), c_void_p),
        ("stream_leave", (c_void_p, c_uint64), None),
        ("stream_told", (POINTER(_Progress),), None),
        ("step", (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_double, c_char_p), None),
    ):
        function = getattr(native, name)
        function.argtypes, function.restype = arguments, result
    return native


class _Texts:
    """What tokens add, of those that came so far."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self.native: int = library().texts_new()
        finalize(self, library().texts_free, self.native).atexit = False

    def learn(self, token_id: int) -> bool:
        if token_id > MAX_TOKEN_ID:
            return False
        text = self._texts[token_id]
        octets = text.encode() if isinstance(text, str) else text
        library().texts_set(self.native, token_id, octets, len(octets), isinstance(text, str))
        return True


def _texts_of(texts: TokenTexts) -> _Texts:
    if texts.compiled is None:
        texts.compiled = _Texts(texts)
    found: _Texts = texts.compiled
    return found


class FastPaths:
    """Of the streams of one worker."""

    def __init__(self) -> None:
        self.entered: dict[int, FastPath] = {}
        """By handle."""
        if library() is not None:
            self.native: int = library().streams_new()
            finalize(self, library().streams_free, self.native).atexit = False

    def take(
        self, handles: Sequence[int], indices: Iterable[int], token_ids: Sequence[int], now_s: float
    ) -> Sequence[int]:
        """Write the tokens. Those that are not true here were left alone: they have to take the slow path."""
        if not self.entered:
            return bytes(len(handles))
        columns = array("Q", handles), array("I", indices), array("I", token_ids)
        addresses = [column.buffer_info()[0] for column in columns]
        outcomes = ctypes.create_string_buffer(len(handles))
        library().step(self.native, *addresses, len(handles), now_s, outcomes)
        taken = outcomes.raw
        if _HELD_UP not in taken and _UNKNOWN not in taken:
            return taken
        return [self._taken(*each, now_s) for each in zip(taken, *columns, strict=True)]

    def _taken(self, outcome: int, handle: int, index: int, token_id: int, now_s: float) -> bool:
        path = self.entered.get(handle)
        if outcome == _HELD_UP and path is not None:
            path.leave()
        if outcome == _UNKNOWN and path is not None and path.learn(token_id):
            return bool(self.take([handle], [index], [token_id], now_s)[0])
        return outcome in (_TAKEN, _HELD_UP)


class FastPath:
    """Of the only choice of a request, one that is `plain`, to a connection that takes plain chunks of HTTP/1.1."""

    __slots__ = ("_choice", "_connection", "_detokenizer", "_frame", "_last_write_s", "_leg", "_progress", "_texts")

    def __init__(self, choice: Choice, connection: Corked, frame: Frame) -> None:
        """`frame`: of the events of its tokens. `choice` has had its first token."""
        assert isinstance(choice.text.detokenizer, ByteLevelDetokenizer), "it is plain"
        self._choice = choice
        self._connection = connection
        self._frame = frame
        self._detokenizer = choice.text.detokenizer
        self._texts = _texts_of(self._detokenizer.texts)
        self._leg: Leg | None = None
        """Whose tokens it takes."""
        self._progress = _Progress()
        """The stream's own memory: to be read only while there is a leg."""
        self._last_write_s = 0.0

    @property
    def last_write_s(self) -> float:
        """Tokens without text are no signs of life."""
        return max(self._last_write_s, self._progress.last_write_s) if self._leg is not None else self._last_write_s

    def enter(self, leg: "Leg") -> bool:
        """Take the tokens of this leg from now on, if all that came before has left."""
        choice, stream, connection = self._choice, self._choice.stream, self._connection
        current = self._leg is None and leg.attempt == stream.attempt and not stream.closed
        if not current or not choice.all_taken or not leg.remembered or leg.waiting_tokens:
            return False
        if connection.is_closing() or connection.get_write_buffer_size():
            return False
        figures = choice.request.figures
        assert figures is not None, "they are known from the first token on"
        counts, total = figures.itl.addresses()
        frame, paths = self._frame, leg.worker.fast_paths
        parts = (
            array("I", stream.tokens).tobytes(), array("I", stream.stop_token_ids).tobytes(), self._detokenizer.begun,
            frame.before, frame.between, frame.after,
        )  # fmt: skip
        opening = _OPENING.pack(
            connection.get_extra_info("socket").fileno(), stream.max_tokens - 1, self._texts.native,
            _SECONDS.buffer_info()[0], len(_SECONDS), counts, total, choice.last_token_s, *map(len, parts),
        )  # fmt: skip
        native = library().stream_enter(paths.native, leg.handle, opening + b"".join(parts))
        if native is None:
            return False
        self._leg, self._progress = leg, _Progress.from_address(native)
        stream.ahead = self._tell
        paths.entered[leg.handle] = self
        return True

    def leave(self) -> None:
        """Idempotent."""
        if (leg := self._leg) is None:
            return
        self._tell()
        progress, paths = self._progress, leg.worker.fast_paths
        self._last_write_s = self.last_write_s
        unsent = ctypes.string_at(progress.unsent, progress.num_unsent) if progress.num_unsent else b""
        library().stream_leave(paths.native, leg.handle)
        del paths.entered[leg.handle]
        self._leg = self._choice.stream.ahead = None
        if unsent:
            self._connection.write(unsent)

    def _tell(self) -> None:
        """The stream of what was taken since the last time."""
        progress = self._progress
        if not progress.num_taken:
            return
        taken = progress.taken[: progress.num_taken]
        self._detokenizer.begun = ctypes.string_at(progress.begun, progress.num_begun) if progress.num_begun else b""
        library().stream_told(progress)
        self._choice.took(taken, progress.last_token_s)

    def learn(self, token_id: int) -> bool:
        """Its text; False where there is no room for it."""
        return self._texts.learn(token_id)


if __name__ == "__main__":
    print("fast path of tokens: compiled" if library() is not None else "tokens take the slow path")
