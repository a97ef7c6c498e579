"""HTTP/1.1 and server-sent events, as little of both as a load generator needs: it shares the machine with a server.

Connections are kept alive and taken up again, last used first. The time of an event is when the loop had its bytes.
"""

import asyncio
import contextlib
import ssl
from typing import Any, cast
from urllib.parse import urlsplit

import msgspec

from cli.bench.stream import AskError, Seen, http_kind, now

CONNECT_TIMEOUT_S = 10.0
MAX_HEAD_BYTES = 64 << 10
MAX_ERROR_BYTES = 64 << 10
MAX_LINE_BYTES = 16 << 20
_DONE = b"[DONE]"


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


def take(data: bytes, at: float, seen: Seen) -> None:
    """One event of a stream. Raises AskError for one that says that the answer failed, or that is none of OpenAI's.

    The event that only names the role of a chat's answer brings nothing of it, and neither does the one that only says
    how it ended. An event with an empty text is a token that is no text yet, such as half a character.
    """
    if data == _DONE:
        seen.finished = True
        return
    try:
        event = _decode(data)
    except msgspec.DecodeError as error:
        raise AskError("not OpenAI's events", str(error)) from None
    if event.error is not None:
        raise AskError("error in the stream", str(event.error))
    if event.usage is not None and event.usage.completion_tokens:
        seen.prompt_tokens, seen.output_tokens = event.usage.prompt_tokens, event.usage.completion_tokens
        seen.counted = True
    for choice in event.choices[:1]:
        delta = choice.delta
        if delta is None:
            brings = bool(choice.text)
        else:
            brings = bool(delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls)
        if choice.finish_reason:
            seen.finished = True
        elif not brings and delta is not None and delta.role:
            continue
        seen.event(at, is_end=bool(choice.finish_reason) and not brings)
        if seen.keep:
            seen.texts.append((choice.text if delta is None else delta.content) or "")


class _Connection(asyncio.Protocol):
    """One request after the other. Whoever asks waits for `answered`."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.open = True
        self.heard = False
        """Something of the answer has come."""
        self._answered: asyncio.Future[None] | None = None
        self._seen = Seen()
        self._buffer = bytearray()
        self._line = bytearray()
        self._reset()

    def _reset(self) -> None:
        self._status = 0
        self._headers: dict[bytes, bytes] = {}
        self._chunked = self._until_close = self._keep_alive = False
        self._left = 0
        """Bytes of the body, or of the chunk, that are to come."""
        self._in_trailer = False
        self.heard = False
        self._buffer.clear()
        self._line.clear()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its class

    def send(self, request: bytes, seen: Seen) -> "asyncio.Future[None]":
        assert self.transport is not None
        self._reset()
        self._seen = seen
        self._answered = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._answered

    @property
    def reusable(self) -> bool:
        return self.open and self._keep_alive and not self._until_close

    def abort(self) -> None:
        self.open = False
        if self.transport is not None:
            self.transport.abort()

    # What comes

    def data_received(self, data: bytes) -> None:
        at = now()
        self.heard = True
        if self._answered is None or self._answered.done():
            self.abort()  # it says something that nobody asked for
            return
        try:
            self._buffer += data
            if not self._status and not self._read_head():
                return
            if self._read_body(at):
                self._end()
        except AskError as error:
            self._fail(error)
        except (ValueError, IndexError):
            self._fail(AskError("not HTTP/1.1", bytes(data[:80]).decode("latin-1")))

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self._answered is None or self._answered.done():
            return
        if self._until_close and self._status and exc is None:
            with contextlib.suppress(AskError):
                self._lines(now(), b"\n")
                self._end()
                return
        self._fail(AskError("hung up", str(exc or "")))

    def _read_head(self) -> bool:
        while True:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > MAX_HEAD_BYTES:
                    raise AskError("not HTTP/1.1", "its headers have no end")
                return False
            first, *lines = bytes(self._buffer[:end]).split(b"\r\n")
            del self._buffer[: end + 4]
            if not first.startswith(b"HTTP/1."):
                raise AskError("not HTTP/1.1", first[:80].decode("latin-1"))
            status = int(first.split()[1])
            if status >= 200:
                break  # 100 Continue and the like come before the answer
        self._status = status
        pairs = (line.partition(b":") for line in lines)
        self._headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        self._chunked = b"chunked" in self._headers.get(b"transfer-encoding", b"").lower()
        said = self._headers.get(b"connection", b"").lower()
        self._keep_alive = b"close" not in said and (first.startswith(b"HTTP/1.1") or b"keep-alive" in said)
        if not self._chunked:
            length = self._headers.get(b"content-length")
            self._until_close, self._left = length is None, int(length or 0)
        return True

    def _read_body(self, at: float) -> bool:
        """Whether that is all of it."""
        if not self._chunked:
            taken = len(self._buffer) if self._until_close else min(self._left, len(self._buffer))
            self._left -= taken
            self._body(at, taken)
            return not self._until_close and self._left == 0
        while True:
            if self._left > 0:  # of a chunk, and the two bytes behind it
                taken = min(self._left - 2, len(self._buffer))
                if taken > 0:
                    self._body(at, taken)
                    self._left -= taken
                if self._left > 2 or len(self._buffer) < self._left:
                    return False
                del self._buffer[: self._left]
                self._left = 0
            end = self._buffer.find(b"\r\n")
            if end < 0:
                if len(self._buffer) > MAX_HEAD_BYTES:
                    raise AskError("not HTTP/1.1", "a chunk's size has no end")
                return False
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 2]
            if self._in_trailer:
                if not line:
                    return True
                continue
            size = int(line.partition(b";")[0], 16)
            if size:
                self._left = size + 2
            else:
                self._in_trailer = True

    def _body(self, at: float, taken: int) -> None:
        data = bytes(self._buffer[:taken])
        del self._buffer[:taken]
        if self._status == 200 and b"event-stream" in self._headers.get(b"content-type", b""):
            self._lines(at, data)
        elif len(self._line) < MAX_ERROR_BYTES:
            self._line += data

    def _lines(self, at: float, data: bytes) -> None:
        self._line += data
        if b"\n" not in data:
            if len(self._line) > MAX_LINE_BYTES:
                raise AskError("not OpenAI's events", "a line has no end")
            return
        *lines, rest = bytes(self._line).split(b"\n")
        self._line[:] = rest
        for line in lines:
            if line.startswith(b"data:"):
                take(line[5:].strip(), at, self._seen)

    def _end(self) -> None:
        if self._status != 200:
            self._fail(AskError(http_kind(self._status), _said(bytes(self._line)), self._retry_after_s()), alive=True)
        elif b"event-stream" not in self._headers.get(b"content-type", b""):
            self._fail(AskError("not a stream", self._headers.get(b"content-type", b"").decode("latin-1")), alive=True)
        elif not self._seen.finished:
            self._fail(AskError("broke off", "the stream ended without saying how the answer did"), alive=True)
        elif self._answered is not None and not self._answered.done():
            self._answered.set_result(None)

    def _retry_after_s(self) -> float | None:
        with contextlib.suppress(ValueError):
            if after_ms := self._headers.get(b"retry-after-ms"):
                return max(0.0, int(after_ms) / 1e3)
            if after_s := self._headers.get(b"retry-after"):
                return max(0.0, float(after_s))
        return None

    def _fail(self, error: AskError, alive: bool = False) -> None:
        if not alive:
            self.abort()
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(error)


def _said(body: bytes) -> str:
    """The message of an error, where the body is like OpenAI's."""
    try:
        answer = msgspec.json.decode(body)
        error = answer.get("error", answer) if isinstance(answer, dict) else answer
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except msgspec.DecodeError:
        return body.decode("utf-8", "replace")


class HttpTransport:
    """`path`: of the requests. `headers`: beside those that every request has."""

    def __init__(self, url: str, path: str, tls: ssl.SSLContext | None, headers: dict[str, str]) -> None:
        parts = urlsplit(url)
        self._host, self._tls = parts.hostname or "", tls
        self._port = parts.port or (443 if tls else 80)
        lines = {"Host": parts.netloc, "Content-Type": "application/json", "Accept": "text/event-stream", **headers}
        text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._head = f"POST {parts.path.rstrip('/')}{path} HTTP/1.1\r\n{text}Content-Length: ".encode()
        self._idle: list[_Connection] = []
        self.connections = self.reconnections = 0

    async def ask(self, request: bytes, seen: Seen) -> None:
        data = b"%s%d\r\n\r\n%s" % (self._head, len(request), request)
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                try:
                    await self._on(connection, data, seen)
                    return
                except AskError as error:
                    if connection.heard or error.kind != "hung up":
                        raise
                self.reconnections += 1  # it was closed while it was idle: nobody took the request
        await self._on(await self._connect(), data, seen)

    async def _on(self, connection: _Connection, data: bytes, seen: Seen) -> None:
        try:
            await connection.send(data, seen)
        except asyncio.CancelledError:
            connection.abort()
            raise
        finally:
            if connection.reusable:
                self._idle.append(connection)
            elif connection.open:
                connection.abort()

    async def _connect(self) -> _Connection:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await asyncio.get_running_loop().create_connection(
                    _Connection, self._host, self._port, ssl=self._tls
                )
        except TimeoutError:
            raise AskError("cannot connect", f"not within {CONNECT_TIMEOUT_S:g} s") from None
        except OSError as error:
            raise AskError("cannot connect", str(error)) from None
        self.connections += 1
        return connection

    async def close(self) -> None:
        for connection in self._idle:
            connection.abort()
        self._idle.clear()
