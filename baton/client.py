"""A small client of the HTTP API: streams text, reports errors in words. Behind `baton complete`, `chat`, `status`.

    async with AsyncClient() as client:                 with Client() as client:
        async for delta in client.complete("Once"):         for delta in client.complete("Once"):
            print(delta.text, end="")                           print(delta.text, end="")

Any other field of the API goes in by name: `client.chat(messages, temperature=0, max_tokens=64)`.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import aiohttp

from baton.errors import BatonError

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"
_CONNECT_TIMEOUT_S = 5.0
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

    async def _get(self, path: str) -> dict[str, Any]:
        async with await self._request("GET", path) as response:
            return dict(await response.json())

    async def _stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[TextDelta]:
        async with await self._request("POST", path, json={**body, "stream": True}) as response:
            try:
                async for line in response.content:
                    if not line.startswith(b"data: "):
                        continue
                    if line.strip() == b"data: [DONE]":
                        return
                    event = json.loads(line[len(b"data: ") :])
                    if "error" in event:
                        raise ClientError(event["error"]["message"], response.status)
                    for choice in event["choices"]:
                        text = choice["text"] if "text" in choice else choice["delta"].get("content")
                        yield TextDelta(choice["index"], text or "", choice["finish_reason"])
            except (aiohttp.ClientError, TimeoutError) as error:
                raise ClientError(f"the answer of {self.url} broke off: {error or 'silence'}") from error
        raise ClientError(f"the answer of {self.url} broke off before its end")

    async def _request(self, method: str, path: str, **options: Any) -> aiohttp.ClientResponse:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(sock_connect=_CONNECT_TIMEOUT_S, sock_read=self._silence_s)
            self._session = aiohttp.ClientSession(timeout=timeout, read_bufsize=_READ_BUFFER_BYTES)
        try:
            response = await self._session.request(method, self.url + path, **options)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ClientError(f"no coordinator answers at {self.url}; start one with `baton serve`") from error
        if response.status == 200:
            return response
        async with response:
            try:
                message = (await response.json())["error"]["message"]
            except (aiohttp.ClientError, ValueError, LookupError, TypeError):
                message = f"{self.url} answered {response.status} {response.reason}; is it a Baton coordinator?"
        raise ClientError(message, response.status)


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

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def _iterate(self, deltas: AsyncIterator[TextDelta]) -> Iterator[TextDelta]:
        async def following() -> TextDelta | None:
            return await anext(deltas, None)

        while (delta := self._run(following())) is not None:
            yield delta
