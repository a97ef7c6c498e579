"""The fast path of a token: from its worker's message to its client's connection in one function.

Most tokens of most answers need nothing but their text and an event around it, and they come one a stream and step.
When a step comes after a sleep, nothing of a stream is in the processor's caches any more, so that each object that its
token touches is a wait for memory. Here is what such a stream needs, in one object:

    worker's message -> Worker.fast_paths[handle] -> FastPath.take -> connection

The slow path (`dispatch`, `delivery`, `event_stream`) begins every stream, ends it, and does all that is rare. The fast
one is entered when all that the slow one has done is written, and left before anything else happens to the stream: then
what it kept for itself is where others look for it. What either writes is the same.
"""

from typing import TYPE_CHECKING, Final

import msgspec

from baton.cork import Corked
from baton.token_ids import TOKEN_BYTES
from coordinator.delivery import Choice
from coordinator.openai_answers import Frame

if TYPE_CHECKING:
    from coordinator.workers import Leg

_encode: Final = msgspec.json.Encoder().encode


class _Encoded(dict[str, bytes]):
    """Texts as they stand in an event. Of whole tokens alone: as many as the vocabulary has."""

    def __missing__(self, text: str) -> bytes:
        encoded = self[text] = _encode(text)
        return encoded


_encoded: Final = _Encoded()


class FastPath:
    """Of the only choice of a request, one that is `plain`, to a connection that takes chunks of HTTP/1.1."""

    __slots__ = (
        "_between_characters",
        "_choice",
        "_connection",
        "_detokenizer",
        "_digest",
        "_end",
        "_entered",
        "_entered_at",
        "_figures",
        "_frame",
        "_frame_bytes",
        "_itl",
        "_pieces",
        "_stops",
        "_texts",
        "_tokens",
        "last_token_s",
        "last_write_s",
    )  # fmt: skip

    def __init__(self, choice: Choice, connection: Corked, frame: Frame) -> None:
        """`frame`: of the events of its tokens. `choice` has had its first token."""
        figures, stream = choice.request.figures, choice.stream
        assert figures is not None, "they are known from the first token on"
        self._choice = choice
        self._connection = connection
        self._frame, self._frame_bytes = frame, len(frame.before) + len(frame.between) + len(frame.after)
        self._tokens, self._pieces = stream.tokens, choice.pieces
        self._stops, self._end = stream.stop_token_ids, stream.max_tokens - 1
        self._detokenizer = choice.text.detokenizer
        self._texts = self._detokenizer.texts
        self._figures, self._itl = figures, figures.itl
        self._entered: Leg | None = None
        self._entered_at = 0
        # What is kept here while it is entered
        self._digest = choice.digest
        self._between_characters = False
        """As the detokenizer has it."""
        self.last_token_s = 0.0
        self.last_write_s = 0.0
        """Tokens without text are no signs of life."""

    def enter(self, leg: "Leg") -> bool:
        """Take the tokens of this leg from now on, if all that came before has been written."""
        choice = self._choice
        current = leg.attempt == choice.stream.attempt and not choice.stream.closed
        if self._entered is not None or not current or not choice.all_taken or not leg.remembered or leg.waiting_tokens:
            return False
        assert choice.last_token_s is not None, "a token has been taken"
        self._entered, self._entered_at = leg, len(self._tokens)
        self._digest, self.last_token_s = choice.digest, choice.last_token_s
        self._between_characters = self._detokenizer.between_characters
        leg.worker.fast_paths[leg.handle] = self
        return True

    def leave(self) -> None:
        """Idempotent."""
        if (leg := self._entered) is None:
            return
        self._entered = None
        del leg.worker.fast_paths[leg.handle]
        self._figures.fast_path_tokens += len(self._tokens) - self._entered_at
        self._choice.taken_to_here(self.last_token_s)

    def take(self, index: int, token_id: int, now_s: float) -> bool:
        """Write the token. False, and nothing was done: this one has to take the slow path."""
        tokens, connection = self._tokens, self._connection
        if index != len(tokens) or index >= self._end or token_id in self._stops or connection.stuck:
            return False
        if self._between_characters and isinstance(text := self._texts[token_id], str):
            shown = _encoded[text]
        else:
            text = self._detokenizer.push(token_id)
            self._between_characters = self._detokenizer.between_characters
            shown = _encode(text)
        tokens.append(token_id)
        self._pieces.append(text)
        self._itl.observe(now_s - self.last_token_s)
        self.last_token_s = now_s
        digest, frame = self._digest, self._frame
        digest.update(token_id.to_bytes(TOKEN_BYTES, "little"))
        if text:
            had = f"{index + 1}-{digest.hexdigest()}".encode()
            size = b"%x\r\n" % (self._frame_bytes + len(had) + len(shown))
            connection.write(b"".join((size, frame.before, had, frame.between, shown, frame.after, b"\r\n")))
            self.last_write_s = now_s
        return True
