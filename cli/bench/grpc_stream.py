"""Baton's gRPC as a transport: a response of the stream is an event, its arrival is when the library had it."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from baton.errors import ConfigurationError
from baton.v1 import inference_pb2 as api
from baton.v1 import inference_pb2_grpc as rpc
from cli.bench.measuring import REFUSED
from cli.bench.stream import AskError, Seen, now

_KINDS = {grpc.StatusCode.RESOURCE_EXHAUSTED: REFUSED, grpc.StatusCode.DEADLINE_EXCEEDED: "timed out"}
_PUSHBACK = "grpc-retry-pushback-ms"
MAX_CALLS = 512
"""Of one connection. What a server takes no more of, 1024 of Baton's, would wait in the library, seen by nobody."""


def read_ca(path: str) -> bytes | None:
    """PEM certificates; None where no file is named. Raises ConfigurationError."""
    try:
        return Path(path).read_bytes() if path else None
    except OSError as error:
        raise ConfigurationError(f"--ca {path} cannot be read: {error.strerror}") from None


def open_channel(target: str, ca: bytes | None, secure: bool) -> grpc.aio.Channel:
    """`target`: host:port. `ca`: PEM of the server's authority, where it is not one of the system's."""
    options = [("grpc.max_receive_message_length", 64 << 20), ("grpc.use_local_subchannel_pool", 1)]
    if secure:
        return grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(ca), options)
    return grpc.aio.insecure_channel(target, options)


class _Connection:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.generate = rpc.InferenceStub(channel).Generate
        self.num_calls = 0


class GrpcTransport:
    def __init__(self, opened: Callable[[], grpc.aio.Channel], metadata: tuple[tuple[str, str], ...]) -> None:
        self._opened, self._metadata = opened, metadata
        self._all: list[_Connection] = []
        self.reconnections = 0

    @property
    def connections(self) -> int:
        return len(self._all)

    def _connection(self) -> _Connection:
        for connection in self._all:
            if connection.num_calls < MAX_CALLS:
                return connection
        self._all.append(_Connection(self._opened()))
        return self._all[-1]

    async def ask(self, request: bytes, seen: Seen) -> None:
        connection = self._connection()
        connection.num_calls += 1
        try:
            await self._ask(connection, request, seen)
        finally:
            connection.num_calls -= 1

    async def _ask(self, connection: _Connection, request: bytes, seen: Seen) -> None:
        call = connection.generate(api.GenerateRequest.FromString(request), metadata=self._metadata)
        try:
            async for response in call:
                at = now()
                if response.token_ids or not response.finish_reason:
                    seen.event(at, is_end=False)
                if response.finish_reason:
                    seen.finished, seen.ended_at = True, at
                if response.HasField("usage"):
                    usage = response.usage
                    seen.prompt_tokens, seen.output_tokens = usage.prompt_tokens, usage.completion_tokens
                    seen.counted = True
                if seen.keep:
                    seen.ids.extend(response.token_ids)
                    seen.texts.append(response.text)
        except grpc.aio.AioRpcError as error:
            trailing: Any = error.trailing_metadata() or ()
            after_ms = str(next((value for key, value in trailing if key == _PUSHBACK), ""))
            kind = _KINDS.get(error.code(), f"gRPC {error.code().name}")
            retry_after_s = int(after_ms) / 1e3 if after_ms.isdigit() else None
            raise AskError(kind, error.details() or "", retry_after_s) from None
        except asyncio.CancelledError:
            call.cancel()
            raise
        if not seen.finished:
            raise AskError("broke off", "the call ended without saying how the answer did")

    async def close(self) -> None:
        for connection in self._all:
            await connection.channel.close(None)
