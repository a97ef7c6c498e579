"""What is asked of the server before the load: its model's name, its tokens, and how long a prompt is for it."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol
from urllib.parse import urlsplit

import aiohttp

from baton.client import API_KEY_VARIABLE, trusting
from baton.errors import BatonError
from cli.bench.asking import PATHS, Asking
from cli.bench.frames import Target
from cli.bench.options import is_grpc

TIMEOUT_S = 30.0


class Server(Protocol):
    async def first_model(self) -> str:
        """Raises BatonError."""

    async def tokenize(self, text: str) -> list[int]:
        """Raises LookupError where it has no such thing."""

    async def count(self, text: str) -> int:
        """Tokens of a prompt, by the usage of an answer of one token; 0: it does not say."""


class _Http:
    def __init__(self, session: aiohttp.ClientSession, url: str, asking: Asking) -> None:
        self._session, self._url, self._asking = session, url.rstrip("/"), asking

    async def first_model(self) -> str:
        status, answer = await self._ask("GET", "/v1/models")
        try:
            return str(answer["data"][0]["id"])
        except (LookupError, TypeError):
            hint = f" (it wants an API key: --api-key-file, or {API_KEY_VARIABLE})" if status == 401 else ""
            raise BatonError(
                f"{self._url}/v1/models lists no model, HTTP {status}{hint}; name one with --model"
            ) from None

    async def tokenize(self, text: str) -> list[int]:
        body = {"model": self._asking.model, "prompt": text, "add_special_tokens": False}
        status, answer = await self._ask("POST", "/tokenize", body)
        if status != 200 or not isinstance(answer, dict) or not isinstance(answer.get("tokens"), list):
            raise LookupError(f"HTTP {status}")
        return [int(each) for each in answer["tokens"]]

    async def count(self, text: str) -> int:
        prompt = {"messages": [{"role": "user", "content": text}]} if self._asking.chat else {"prompt": text}
        body = {**prompt, "model": self._asking.model, "max_tokens": 1}
        _, answer = await self._ask("POST", PATHS["chat" if self._asking.chat else "completions"], body)
        try:
            return int(answer["usage"]["prompt_tokens"])
        except (LookupError, TypeError, ValueError):
            return 0

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        try:
            async with self._session.request(method, self._url + path, json=body) as response:
                try:
                    return response.status, await response.json(content_type=None)
                except ValueError:
                    return response.status, None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise BatonError(f"nobody answers at {self._url}: {error or type(error).__name__}; check --url") from error


class _Grpc:
    def __init__(self, stub: Any, metadata: tuple[tuple[str, str], ...], model: str) -> None:
        self._stub, self._metadata, self._model = stub, metadata, model

    async def first_model(self) -> str:
        from baton.v1 import inference_pb2 as api

        return str((await self._call("ListModels", api.ListModelsRequest())).models[0].id)

    async def tokenize(self, text: str) -> list[int]:
        from baton.v1 import inference_pb2 as api

        return list((await self._call("Tokenize", api.TokenizeRequest(model=self._model, text=text))).token_ids)

    async def count(self, text: str) -> int:
        return len(await self.tokenize(text))

    async def _call(self, name: str, request: Any) -> Any:
        import grpc

        try:
            return await getattr(self._stub, name)(request, metadata=self._metadata, timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise BatonError(f"the gRPC server says {error.code().name}: {error.details()}; check --url") from None


@asynccontextmanager
async def asked(target: Target, asking: Asking) -> AsyncIterator[Server]:
    """Raises BatonError when nobody answers."""
    if is_grpc(target.url):
        from baton.v1 import inference_pb2_grpc as rpc
        from cli.bench.grpc_stream import open_channel, read_ca

        parts = urlsplit(target.url)
        channel = open_channel(parts.netloc, read_ca(target.ca), parts.scheme == "grpcs")
        metadata = (("authorization", target.authorization),) if target.authorization else ()
        async with channel:
            yield _Grpc(rpc.InferenceStub(channel), metadata, asking.model)
        return
    tls = trusting(target.ca, target.client_cert, target.client_key) if target.url.startswith("https") else None
    headers = {"Authorization": target.authorization} if target.authorization else {}
    connector = aiohttp.TCPConnector(ssl=tls if tls is not None else True)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        yield _Http(session, target.url, asking)


def api_key() -> str:
    return os.environ.get(API_KEY_VARIABLE, "") or os.environ.get("OPENAI_API_KEY", "")
