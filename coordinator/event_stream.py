"""One client's stream of server-sent events, on the connection that its request came on.

Every token of every stream passes here, so no task is woken for one: whatever a step brought is taken and written, as
one chunk, by a callback of the event loop. The handler's task sleeps until there is something that takes a wait:

    flowing    callbacks write; silence is filled by signs of life
    held up    the client reads slowly: nothing is taken until its connection has room, so that what waits for it is
               tokens, which `max_tokens` bounds
    over       all is written but the end; the request failed, or another client has it; the connection broke
"""

import asyncio
from collections.abc import Callable, Sequence

from aiohttp import HttpVersion11, web

from baton.cork import Corked
from coordinator.delivery import Delta, Request
from coordinator.fast_path import FastPath, library
from coordinator.openai_answers import AnswerWriter

ALIVE = b":\n"
"""A comment, which clients skip. Not a blank line more: some take that for an event without data."""
NEARLY = 0.9
"""Of the time after which a stream says that it lives."""


class EventStreams:
    """What all streams of a coordinator share: a turn of the event loop for those that a step brought something, and a
    timer for those that have been silent for `alive_s`, or nearly, which then say that they live."""

    def __init__(self, alive_s: float) -> None:
        self.alive_s = alive_s
        self._open: set[EventStream] = set()
        self.with_news: list[EventStream] = []
        """To take it in the next turn of the event loop."""
        self._timer: asyncio.TimerHandle | None = None

    def enter(self, stream: "EventStream") -> None:
        """It has written something just now."""
        loop = asyncio.get_running_loop()
        self._open.add(stream)
        stream.wrote_at = now = loop.time()
        if self._timer is None:
            self._timer = loop.call_at(now + self.alive_s, self._tick)

    def leave(self, stream: "EventStream") -> None:
        self._open.discard(stream)

    def turn(self) -> None:
        """What the event loop calls once whoever brought news has finished."""
        now = asyncio.get_running_loop().time()
        streams, self.with_news = self.with_news, []
        for stream in streams:
            stream.take(now)

    def _tick(self) -> None:
        loop, self._timer = asyncio.get_running_loop(), None
        now = loop.time()
        # Those whose time has nearly come speak as well: streams are looked at a few times an interval, not each alone.
        for stream in [each for each in self._open if each.last_write_s + NEARLY * self.alive_s <= now]:
            stream.say_alive(now)
        if self._open:
            next_at = min(stream.last_write_s for stream in self._open) + self.alive_s
            self._timer = loop.call_at(next_at, self._tick)


class EventStream:
    """`better_elsewhere`: whether a client that hears nothing should rather ask another coordinator."""

    __slots__ = (
        "_all",
        "_better_elsewhere",
        "_choice",
        "_connection",
        "_due",
        "_failure",
        "_fast_path",
        "_frame",
        "_held_up",
        "_http",
        "_over",
        "_reader",
        "_request",
        "_rest",
        "_transport",
        "_turn",
        "_writer",
        "wrote_at",
    )  # fmt: skip

    def __init__(
        self,
        http: web.Request,
        request: Request,
        reader: int,
        writer: AnswerWriter,
        all: EventStreams,
        better_elsewhere: Callable[[Request], bool],
    ) -> None:
        self._http = http
        self._connection, self._transport = http.protocol, http.transport
        self._request = request
        self._choice = request.choices[0]
        """The only one, where there is a fast path."""
        self._reader = reader
        self._writer = writer
        self._all = all
        self.wrote_at = 0.0
        """By the clock of the loop; the fast path counts for itself."""
        self._fast_path: FastPath | None = None
        self._better_elsewhere = better_elsewhere
        # Until HTTP/1.1 an answer of unknown length ended with its connection.
        self._frame: Callable[[bytes], bytes] = _chunk if http.version >= HttpVersion11 else bytes
        self._due = False
        self._held_up = False
        self._over = False
        self._failure: Exception | None = None
        self._rest = b""
        """The last events, once they are all that is left to write."""
        self._turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def last_write_s(self) -> float:
        """By the clock of the loop."""
        return self.wrote_at if self._fast_path is None else max(self.wrote_at, self._fast_path.last_write_s)

    def begin(self, deltas: Sequence[Delta] | None) -> bytes:
        """What goes with the head of the answer: `deltas`, or a sign of life where they show nothing or are None.

        Empty where `run` has nothing to do but to say how it ends.
        """
        if deltas is None and self._better_elsewhere(self._request):
            self._over = True
            return b""
        data = self._events(deltas or ())
        return b"" if self._over else data or ALIVE

    async def run(self) -> bytes:
        """Write what follows, until all is written but the last events.

        These are returned. What `begin` gave has been written, and nobody else writes meanwhile. Raises RequestFailed,
        or ConnectionError when the client is gone.
        """
        try:
            if not self._over:
                self._request.listen(self._reader, self._on_news)
                self._all.enter(self)
                self._enter_fast_path()
                self._on_news()  # whatever came before anybody was to be called
            while not self._over:
                await self._turn
                self._turn = asyncio.get_running_loop().create_future()
                if self._held_up and not self._over:
                    await self._http.writer.drain()
                    self._held_up = False
                    self._on_news()
        finally:
            self._over = True
            self._leave_fast_path()
            self._all.leave(self)
            if self._request.on_news == self._on_news:  # else it is that of a reader that came meanwhile
                self._request.on_news = None
            failure, self._failure = self._failure, None  # its traceback knows this stream
        try:
            if failure is not None:
                raise failure
        finally:
            failure = None  # and now this frame
        return self._rest

    def _on_news(self) -> None:
        if self._due:
            return
        self._due, with_news = True, self._all.with_news
        if not with_news:
            asyncio.get_running_loop().call_soon(self._all.turn)
        with_news.append(self)

    def take(self, now: float) -> None:
        """Write what is new."""
        self._due = False
        if self._over or self._held_up:
            return
        if self._connection.writing_paused:  # the fast path has written what its reader did not take
            self._hold_up()
            return
        try:
            if data := self._events(self._request.take(self._reader)):
                self._write(data, now)
                self._enter_fast_path()
            if self._request.failure is not None and self._request.drained:
                raise self._request.failure
        except Exception as failure:  # noqa: BLE001 - `run` raises it: nobody else waits for this callback
            self._finish(failure)

    def _enter_fast_path(self) -> None:
        """The tokens that follow may take the fast path."""
        choice, transport = self._choice, self._transport
        if self._fast_path is not None or not choice.plain or choice.last_token_s is None or library() is None:
            return
        if not isinstance(transport, Corked) or transport.get_extra_info("sslcontext") is not None:
            return
        if self._frame is _chunk and (frame := self._writer.plain_frame()) is not None:
            choice.fast_path = self._fast_path = FastPath(choice, transport, frame)

    def _leave_fast_path(self) -> None:
        """No token may take the fast path any more."""
        choice = self._choice
        if self._fast_path is not None and choice.fast_path is self._fast_path:  # else it is that of a later reader
            choice.settle()
            choice.fast_path = None

    def _events(self, deltas: Sequence[Delta]) -> bytes:
        """To be written now: nothing where they are the last, which go with the end of the answer."""
        chunk = self._writer.chunk
        data = chunk(deltas[0]) if len(deltas) == 1 else b"".join(map(chunk, deltas))
        request = self._request
        if not request.ended or not request.drained or request.failure is not None:
            return data
        self._rest = data + self._writer.last()
        self._finish(None)
        return b""

    def _write(self, data: bytes, now: float) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client hung up")
        if self._fast_path is not None:
            self._fast_path.leave()
        transport.write(self._frame(data))
        self.wrote_at = now
        if self._connection.writing_paused:
            self._hold_up()

    def _hold_up(self) -> None:
        self._held_up = True
        self._wake()

    def say_alive(self, now: float) -> None:
        self.wrote_at = now
        if self._over or self._held_up:
            return
        if self._better_elsewhere(self._request):
            self._finish(None)
            return
        try:
            self._write(ALIVE, now)
        except ConnectionError as failure:
            self._finish(failure)

    def _finish(self, failure: Exception | None) -> None:
        self._over, self._failure = True, failure
        self._wake()

    def _wake(self) -> None:
        if not self._turn.done():
            self._turn.set_result(None)


def _chunk(data: bytes) -> bytes:
    """As HTTP/1.1 frames a part of an answer whose length is not known yet."""
    return b"%x\r\n%b\r\n" % (len(data), data)
