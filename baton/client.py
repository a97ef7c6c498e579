"""A small client of the HTTP API: streams text, reports errors in words. Behind `baton complete`, `chat`, `status`.

    async with AsyncClient() as client:                 with Client() as client:
        async for delta in client.complete("Once"):         for delta in client.complete("Once"):
            print(delta.text, end="")                           print(delta.text, end="")

Any other field of the API goes in by name: `client.chat(messages, temperature=0, max_tokens=64)`.

An answer whose connection breaks, or falls silent, goes on where it stopped, at the same coordinator, at the one that
took its place at this address, or at another one of several addresses: no piece is lost or comes twice.
"""

import asyncio
import contextlib
import json
import os
import ssl
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar
from urllib.parse import quote

import aiohttp

from baton.errors import BatonError, ConfigurationError
from baton.tls import check_secret, reason_of

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"
API_KEY_VARIABLE = "BATON_API_KEY"
URL_VARIABLE = "BATON_URL"
"""Of commands: where they ask if they are not told."""
SILENCE_S = 2.0
"""A coordinator that has nothing to say gives a sign of life every half second."""
_TOKENISED_BYTES_S = 1 << 18
"""What a coordinator takes in before it answers, at the very least."""
_SEARCH_S = 4.0
"""What a coordinator takes to find a request that it does not know, and a bit."""
_LOST_AFTER_S = 4.0
"""From a break until an answer that nobody knows is taken to be lost."""
_ABORT_TIMEOUT_S = 1.0
_RESUME_FOR_S = 30.0
"""From a break to the last try."""
_KEEP_S = 10.0
"""What a coordinator that lives is asked to keep a request for when the connection breaks."""
_MAX_BACKOFF_S = 1.0
_HUNG_UP = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError)
_NO_TLS = -1
"""In place of a status of HTTP: trying again does not help."""
_ID_IN_USE = "request_id_in_use"
_NO_KEY = 401
_OVERLOADED = 429
_PATIENCE_S = 60.0
"""All that a request waits for when it is refused again and again."""
_UNAVAILABLE = 503
"""Shutting down, or without workers: it has taken nothing on."""
_HINTS = ("; does it want https://?", "; does it want a certificate (--client-cert)?")
_TRY_AGAIN = {0, 429, 502, 503, 504}  # nobody answers, or whoever does has no workers yet
_READ_BUFFER_BYTES = 1 << 20  # an event with many logprobs is one long line


class ClientError(BatonError):
    """The coordinator refused or failed, or nobody answers. `status` is that of HTTP, 0 without an answer; `code`: the
    error's name; `retry_after_s`: when to try again, where the coordinator said that."""

    def __init__(self, message: str, status: int = 0, code: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s


class TextDelta(NamedTuple):
    """What one choice gained."""

    choice: int
    text: str
    finish_reason: str | None


def trusting(ca: str = "", cert: str = "", key: str = "") -> ssl.SSLContext:
    """What to talk https with: PEM files of the server's authority (empty: those of the system, or of SSL_CERT_FILE),
    and of a certificate for servers that want one. Raises ConfigurationError."""
    try:
        context = ssl.create_default_context(cafile=ca or None)
        if cert:
            context.load_cert_chain(cert, key or None, password=lambda: "")
    except (OSError, ValueError) as error:
        files = ", ".join(name for name in (ca, cert, key) if name)
        raise ConfigurationError(f"'{files}' cannot be used for TLS: {reason_of(error)}; give PEM files") from error
    return context


def read_api_key(path: str) -> str:
    """From a file. Raises ConfigurationError for one that every user of this machine may read, without its contents."""
    if path.startswith("sk-"):  # not repeated here
        raise ConfigurationError("--api-key-file takes a file with the key: on the command line everybody sees it")
    check_secret("--api-key-file", path)
    try:
        return _checked(Path(path).read_text(encoding="utf-8").strip(), f"'{path}'")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"'{path}' cannot be read: {reason_of(error)}") from None


def _checked(key: str, where: str) -> str:
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigurationError(f"{where} holds no API key: that is one word, such as sk-baton-…")
    return key


class AsyncClient:
    """`url`: of a coordinator, or of several with commas between them, such as "http://a:8000,http://b:8000": asked is
    the one that answered last, or the next. `silence_s`: a coordinator that gives no sign of life for so long hangs, or
    is cut off, and the answer goes on at whatever answers now. `tls`: see `trusting`. `api_key`: for coordinators that
    want one; None: that of the environment. `refusals`: how often a request that was refused because too much is
    waiting is asked again, each time when the coordinator said, for a minute at most; 0: not at all. `num_refused`
    counts refusals."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        silence_s: float = SILENCE_S,
        tls: ssl.SSLContext | None = None,
        api_key: str | None = None,
        refusals: int = 2,
    ) -> None:
        key = os.environ.get(API_KEY_VARIABLE, "") if api_key is None else api_key
        self._headers = {"Authorization": f"Bearer {_checked(key, API_KEY_VARIABLE)}"} if key else {}
        self._refusals = refusals
        self.num_refused = 0
        self._urls = [each.strip().rstrip("/") for each in url.split(",")]
        self._silence_s = silence_s
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None
        self._has_answered = False

    @property
    def url(self) -> str:
        """The one that is asked now."""
        return self._urls[0]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def complete(self, prompt: str, **options: Any) -> AsyncIterator[TextDelta]:
        """Continue a text. Raises ClientError."""
        return self._stream("/v1/completions", {"prompt": prompt, **options})

    def chat(self, messages: Sequence[dict[str, str]], **options: Any) -> AsyncIterator[TextDelta]:
        """Answer a conversation. Raises ClientError."""
        return self._stream("/v1/chat/completions", {"messages": list(messages), **options})

    async def models(self) -> list[str]:
        """Names that requests may use."""
        return [model["id"] for model in (await self._get("/v1/models"))["data"]]

    async def status(self) -> dict[str, Any]:
        """State of the coordinator and its workers; answered only on the coordinator's own machine."""
        return await self._get("/status")

    async def dashboard(self) -> dict[str, Any]:
        """The figures of the dashboard: for whom and from where as `status`. Rates need two looks."""
        return await self._get("/dashboard/feed")

    async def trace(self, id: str) -> dict[str, Any]:
        """When what happened to a request, one of the last; answered on the coordinator's own machine, to operators,
        and to whose request it is."""
        return await self._get(f"/v1/requests/{quote(id, safe='')}/trace")

    async def drain(self, workers: Sequence[str] = (), version: str = "") -> dict[str, Any]:
        """Have workers, or all of a model version, finish and end; answered only on the coordinator's own machine."""
        body = {"workers": list(workers), "version": version}
        async with await self._request("POST", "/drain", _SEARCH_S, json=body) as response:
            return dict(await response.json())

    async def _get(self, path: str) -> dict[str, Any]:
        async with await self._request("GET", path, _SEARCH_S) as response:
            return dict(await response.json())

    async def _stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[TextDelta]:
        answer = _Answer(uuid.uuid4().hex)
        headers = {
            "Content-Type": "application/json", "X-Request-Id": answer.id, "X-Baton-Resume-S": f"{_KEEP_S:g}",
        }  # fmt: skip
        data = json.dumps({**body, "stream": True}).encode()
        patience_s = self._silence_s + len(data) / _TOKENISED_BYTES_S

        async def ask() -> aiohttp.ClientResponse:
            return await self._request("POST", path, patience_s, data=data, headers={**headers, **answer.had})

        try:
            response: aiohttp.ClientResponse | None = await self._patiently(ask)
            again = False
        except _BrokenOff as error:
            self._next_url()
            response, again = None, isinstance(error, _HungUp)
        try:
            while True:
                if response is None:
                    response = await self._resume(answer, ask, again)
                while line := await self._line(response):
                    for delta in answer.deltas(line):
                        yield delta
                    if answer.complete:
                        return
                response.close()
                self._next_url()
                response, again = None, False
        finally:
            if response is not None:
                response.close()
            if not answer.complete:
                await self._abort(answer.id)

    async def _patiently(
        self, ask: Callable[[], Coroutine[Any, Any, aiohttp.ClientResponse]]
    ) -> aiohttp.ClientResponse:
        """Come back after a refusal when the coordinator said. Raises ClientError."""
        left, left_s = self._refusals, _PATIENCE_S
        while True:
            try:
                return await ask()
            except ClientError as error:
                if error.status != _OVERLOADED or error.retry_after_s is None:
                    raise
                self.num_refused += 1
                left, left_s = left - 1, left_s - error.retry_after_s
                if left < 0 or left_s < 0:
                    raise
                await asyncio.sleep(error.retry_after_s)

    async def _line(self, response: aiohttp.ClientResponse) -> bytes:
        """The next one of a stream; empty where it broke off or fell silent."""
        with contextlib.suppress(aiohttp.ClientError, ConnectionError, TimeoutError):
            async with asyncio.timeout(self._silence_s):
                return await response.content.readline()
        return b""

    async def _resume(
        self, answer: "_Answer", ask: Callable[[], Coroutine[Any, Any, aiohttp.ClientResponse]], lost: bool
    ) -> aiohttp.ClientResponse:
        """The rest of an answer. `lost`: nobody is known to have it, so that it is asked for again. Raises ClientError
        when it cannot be had within `_RESUME_FOR_S`."""
        loop = asyncio.get_running_loop()
        broke_at, backoff_s = loop.time(), 0.05
        while True:
            try:
                if lost:
                    return await ask()
                return await self._request("GET", f"/v1/streams/{answer.id}", _SEARCH_S, headers=answer.had)
            except ClientError as error:
                # Nobody knows it. Where nothing of it has come it never got further than that coordinator. Otherwise a
                # worker may still be on its way with it; or it died as well: then the answer is computed again, and
                # compared with what is here.
                not_yet = error.status == 404 and not lost and loop.time() < broke_at + _LOST_AFTER_S
                unknown = error.status == 404 and not lost and not (answer.last_event_id and not_yet)
                known_after_all = lost and error.status == 409 and error.code == _ID_IN_USE
                if not (unknown or known_after_all or not_yet or error.status in _TRY_AGAIN):
                    raise
                if loop.time() > broke_at + _RESUME_FOR_S:
                    raise ClientError(f"the answer of {self.url} broke off, and cannot be resumed: {error}") from error
                if error.status in _TRY_AGAIN:
                    self._next_url()
                lost = unknown or (lost and not known_after_all and not isinstance(error, _BrokenOff))
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    async def _abort(self, id: str) -> None:
        """Tell the coordinator that nobody comes back for the rest; without it, it would keep it for `_KEEP_S`."""
        with contextlib.suppress(ClientError, RuntimeError):
            (await self._request("DELETE", f"/v1/requests/{id}", _ABORT_TIMEOUT_S)).close()

    def _next_url(self) -> None:
        self._urls.append(self._urls.pop(0))

    async def _request(self, method: str, path: str, patience_s: float, **options: Any) -> aiohttp.ClientResponse:
        """From the first address where somebody answers, and can serve. Raises ClientError."""
        for _ in self._urls[1:]:
            try:
                return await self._request_here(method, path, patience_s, **options)
            except ClientError as error:
                if not (isinstance(error, _NobodyThere) or error.status == _UNAVAILABLE):
                    raise
            self._next_url()
        return await self._request_here(method, path, patience_s, **options)

    async def _request_here(self, method: str, path: str, patience_s: float, **options: Any) -> aiohttp.ClientResponse:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(sock_connect=self._silence_s)
            is_https = any(url.startswith("https://") for url in self._urls)
            connector = aiohttp.TCPConnector(ssl=self._tls or (trusting() if is_https else True))
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=timeout, read_bufsize=_READ_BUFFER_BYTES, headers=self._headers
            )
        try:
            async with asyncio.timeout(patience_s):
                response = await self._session.request(method, self.url + path, **options)
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            raise self._explained(error, patience_s) from error
        self._has_answered = True
        if response.status == 200:
            return response
        code, retry_after_s = "", _retry_after_s(response)
        async with response:
            try:
                error_body = (await response.json())["error"]
                message, code = error_body["message"], str(error_body.get("code") or "")
            except aiohttp.ClientPayloadError as error:
                raise _BrokenOff(f"{self.url} hung up in the middle of an error") from error
            except (aiohttp.ClientError, ValueError, LookupError, TypeError):
                message = f"{self.url} answered {response.status} {response.reason}; is it a Baton coordinator?"
        if response.status == _NO_KEY:
            message += f" (for baton: --api-key-file, or {API_KEY_VARIABLE} in the environment)"
        raise ClientError(message, response.status, code, retry_after_s)

    def _explained(self, error: Exception, patience_s: float) -> ClientError:
        """Why there was no answer at all."""
        if problem := _tls_problem(error):
            return ClientError(f"no TLS with {self.url}: {problem}", _NO_TLS)
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            return _NobodyThere(f"no coordinator answers at {self.url}; start one with `baton serve`")
        if isinstance(error, TimeoutError):
            return _BrokenOff(f"{self.url} gave no answer for {patience_s:.1f} s")
        if isinstance(error, _HUNG_UP):
            hint = "" if self._has_answered else _HINTS[self.url.startswith("https://")]
            return _HungUp(f"{self.url} hung up before its answer{hint}")
        return ClientError(f"{self.url} cannot be asked: {error}")


def _retry_after_s(response: aiohttp.ClientResponse) -> float | None:
    with contextlib.suppress(KeyError, ValueError):
        seconds = int(response.headers["Retry-After-Ms"]) / 1e3
        return seconds if seconds >= 0 else None
    return None


def _tls_problem(error: BaseException) -> str:
    """Why TLS failed, if that was it, and not a server that went away in the middle."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return ""
        is_waiting = isinstance(cause, ssl.SSLWantReadError | ssl.SSLWantWriteError)
        if isinstance(cause, ssl.SSLError) and not is_waiting and not isinstance(cause, aiohttp.ClientError):
            advice = "; name its authority with --ca or SSL_CERT_FILE"
            return reason_of(cause) + (advice if isinstance(cause, ssl.SSLCertVerificationError) else "")
        cause = cause.__cause__ or cause.__context__
    return ""


class _NobodyThere(ClientError):
    """Nobody has taken the connection."""


class _BrokenOff(ClientError):
    """The coordinator may have the request, and went away, or silent, before it answered."""


class _HungUp(_BrokenOff):
    """It went away. Most often the connection had been kept, and was being closed when the request came by it."""


class _Answer:
    """A streamed answer as far as it has come, over all connections that it takes."""

    def __init__(self, id: str) -> None:
        self.id = id
        self.last_event_id = ""
        self.complete = False
        self._next_event_id = ""

    @property
    def had(self) -> dict[str, str]:
        """Headers that say what has come."""
        return {"Last-Event-ID": self.last_event_id} if self.last_event_id else {}

    def deltas(self, line: bytes) -> list[TextDelta]:
        """What a line of the event stream adds. A line that was cut off adds nothing. Raises ClientError."""
        name, _, value = line.partition(b": ")
        if name == b"id" and line.endswith(b"\n"):
            self._next_event_id = value.strip().decode()
        if name != b"data" or not line.endswith(b"\n"):
            return []
        if value.strip() == b"[DONE]":
            self.complete = True
            return []
        event = json.loads(value)
        if "error" in event:
            self.complete = True  # nothing follows, and nobody needs to be told
            raise ClientError(event["error"]["message"], 200)
        self.last_event_id = self._next_event_id
        return [
            TextDelta(
                choice["index"],
                (choice["text"] if "text" in choice else choice["delta"].get("content")) or "",
                choice["finish_reason"],
            )
            for choice in event["choices"]
        ]


class Client:
    """The same without asyncio, in an event loop of its own."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        silence_s: float = SILENCE_S,
        tls: ssl.SSLContext | None = None,
        api_key: str | None = None,
        refusals: int = 2,
    ) -> None:
        self._client = AsyncClient(url, silence_s, tls, api_key, refusals)
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._run(self._client.close())
        self._runner.close()

    def complete(self, prompt: str, **options: Any) -> Iterator[TextDelta]:
        return self._iterate(self._client.complete(prompt, **options))

    def chat(self, messages: Sequence[dict[str, str]], **options: Any) -> Iterator[TextDelta]:
        return self._iterate(self._client.chat(messages, **options))

    def models(self) -> list[str]:
        return self._run(self._client.models())

    def status(self) -> dict[str, Any]:
        return self._run(self._client.status())

    def dashboard(self) -> dict[str, Any]:
        return self._run(self._client.dashboard())

    def trace(self, id: str) -> dict[str, Any]:
        return self._run(self._client.trace(id))

    def drain(self, workers: Sequence[str] = (), version: str = "") -> dict[str, Any]:
        return self._run(self._client.drain(workers, version))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def _iterate(self, deltas: AsyncIterator[TextDelta]) -> Iterator[TextDelta]:
        async def following() -> TextDelta | None:
            return await anext(deltas, None)

        while (delta := self._run(following())) is not None:
            yield delta
