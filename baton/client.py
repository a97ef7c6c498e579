"""A small client of the HTTP API: streams text, reports errors in words. Behind `baton complete`, `chat`, `status`.

    async with AsyncClient() as client:                 with Client() as client:
        async for delta in client.complete("Once"):         for delta in client.complete("Once"):
            print(delta.text, end="")                           print(delta.text, end="")

Any other field of the API goes in by name: `client.chat(messages, temperature=0, max_tokens=64)`.

An answer whose connection breaks goes on where it stopped, at the same coordinator or at the one that took its place at
this address: no piece is lost or comes twice.
"""

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import aiohttp

from baton.errors import BatonError

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"
_CONNECT_TIMEOUT_S = 5.0
_ABORT_TIMEOUT_S = 1.0
_RESUME_FOR_S = 30.0
"""From a break to the last try."""
_KEEP_S = 10.0
"""What a coordinator that lives is asked to keep a request for when the connection breaks."""
_MAX_BACKOFF_S = 1.0
_HUNG_UP = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError)
_TRY_AGAIN = {0, 429, 502, 503, 504}  # nobody answers, or whoever does has no workers yet
_READ_BUFFER_BYTES = 1 << 20  # an event with many logprobs is one long line


class ClientError(BatonError):
    """The coordinator refused or failed, or nobody answers. `status` is that of HTTP, 0 without an answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class TextDelta(NamedTuple):
    """What one choice gained."""

    choice: int
    text: str
    finish_reason: str | None


class AsyncClient:
    """`silence_s`: longest wait for the next piece of an answer."""

    def __init__(self, url: str = DEFAULT_URL, silence_s: float = 600.0) -> None:
        self.url = url.rstrip("/")
        self._silence_s = silence_s
        self._session: aiohttp.ClientSession | None = None

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

    async def drain(self, workers: Sequence[str] = (), version: str = "") -> dict[str, Any]:
        """Have workers, or all of a model version, finish and end; answered only on the coordinator's own machine."""
        body = {"workers": list(workers), "version": version}
        async with await self._request("POST", "/drain", json=body) as response:
            return dict(await response.json())

    async def _get(self, path: str) -> dict[str, Any]:
        async with await self._request("GET", path) as response:
            return dict(await response.json())

    async def _stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[TextDelta]:
        answer = _Answer(uuid.uuid4().hex)
        headers = {"X-Request-Id": answer.id, "X-Baton-Resume-S": f"{_KEEP_S:g}"}

        async def ask() -> aiohttp.ClientResponse:
            return await self._request("POST", path, json={**body, "stream": True}, headers=headers)

        try:
            response: aiohttp.ClientResponse | None = await ask()
        except _BrokenOff:
            response = None
        try:
            while True:
                if response is None:
                    response = await self._resume(answer, ask)
                async with response:
                    try:
                        async for line in response.content:
                            for delta in answer.deltas(line):
                                yield delta
                            if answer.complete:
                                return
                    except (aiohttp.ClientError, ConnectionError):
                        pass
                    except TimeoutError as error:
                        raise ClientError(f"the answer of {self.url} broke off: silence") from error
                response = None
        finally:
            if not answer.complete:
                await self._abort(answer.id)

    async def _resume(
        self, answer: "_Answer", ask: Callable[[], Coroutine[Any, Any, aiohttp.ClientResponse]]
    ) -> aiohttp.ClientResponse:
        """The rest of an answer. Raises ClientError when it cannot be had within `_RESUME_FOR_S`."""
        loop = asyncio.get_running_loop()
        give_up_at, backoff_s, lost = loop.time() + _RESUME_FOR_S, 0.05, False
        while True:
            headers = {"Last-Event-ID": answer.last_event_id} if answer.last_event_id else {}
            try:
                return await (ask() if lost else self._request("GET", f"/v1/streams/{answer.id}", headers=headers))
            except ClientError as error:
                # Nobody knows it, and nothing of it has come: it never got further than that coordinator.
                unknown = error.status == 404 and not answer.last_event_id and not lost
                known_after_all = lost and error.status == 409
                if not (unknown or known_after_all or error.status in _TRY_AGAIN):
                    raise
                if loop.time() > give_up_at:
                    raise ClientError(f"the answer of {self.url} broke off, and cannot be resumed: {error}") from error
                lost = unknown or (lost and not known_after_all and not isinstance(error, _BrokenOff))
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    async def _abort(self, id: str) -> None:
        """Tell the coordinator that nobody comes back for the rest; without it, it would keep it for `_KEEP_S`."""
        with contextlib.suppress(ClientError, TimeoutError, RuntimeError):
            async with asyncio.timeout(_ABORT_TIMEOUT_S):
                (await self._request("DELETE", f"/v1/requests/{id}")).close()

    async def _request(self, method: str, path: str, **options: Any) -> aiohttp.ClientResponse:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(sock_connect=_CONNECT_TIMEOUT_S, sock_read=self._silence_s)
            self._session = aiohttp.ClientSession(timeout=timeout, read_bufsize=_READ_BUFFER_BYTES)
        try:
            response = await self._session.request(method, self.url + path, **options)
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            if isinstance(error, _HUNG_UP) and not isinstance(error, aiohttp.ClientConnectorError):
                raise _BrokenOff(f"{self.url} hung up before its answer") from error
            raise ClientError(f"no coordinator answers at {self.url}; start one with `baton serve`") from error
        if response.status == 200:
            return response
        async with response:
            try:
                message = (await response.json())["error"]["message"]
            except (aiohttp.ClientError, ValueError, LookupError, TypeError):
                message = f"{self.url} answered {response.status} {response.reason}; is it a Baton coordinator?"
        raise ClientError(message, response.status)


class _BrokenOff(ClientError):
    """The coordinator had the request, and went away before it answered."""


class _Answer:
    """A streamed answer as far as it has come, over all connections that it takes."""

    def __init__(self, id: str) -> None:
        self.id = id
        self.last_event_id = ""
        self.complete = False
        self._next_event_id = ""

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

    def __init__(self, url: str = DEFAULT_URL, silence_s: float = 600.0) -> None:
        self._client = AsyncClient(url, silence_s)
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

    def drain(self, workers: Sequence[str] = (), version: str = "") -> dict[str, Any]:
        return self._run(self._client.drain(workers, version))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def _iterate(self, deltas: AsyncIterator[TextDelta]) -> Iterator[TextDelta]:
        async def following() -> TextDelta | None:
            return await anext(deltas, None)

        while (delta := self._run(following())) is not None:
            yield delta
