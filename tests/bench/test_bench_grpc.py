"""Baton's gRPC as a transport of `baton bench`."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc
import pytest

from baton.v1 import inference_pb2 as api
from baton.v1 import inference_pb2_grpc as rpc
from cli.bench import grpc_stream
from cli.bench.grpc_stream import GrpcTransport, open_channel
from cli.bench.stream import Seen


class Together(rpc.InferenceServicer):
    """Answers nobody before so many have asked."""

    def __init__(self, number: int) -> None:
        self._all = asyncio.Barrier(number)

    async def Generate(self, request: api.GenerateRequest, context: Any) -> AsyncIterator[api.GenerateResponse]:
        await self._all.wait()
        yield api.GenerateResponse(token_ids=[7], finish_reason=api.FINISH_REASON_LENGTH)


def test_no_call_waits_in_the_library_for_others_of_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_stream, "MAX_CALLS", 2)

    async def main() -> None:
        server = grpc.aio.server(options=[("grpc.max_concurrent_streams", 2)])
        rpc.add_InferenceServicer_to_server(Together(5), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        transport = GrpcTransport(partial(open_channel, f"127.0.0.1:{port}", None, False), ())
        try:
            for _ in range(2):  # connections are taken up again
                seen = [Seen() for _ in range(5)]
                await asyncio.gather(*(transport.ask(b"", each) for each in seen))
                assert all(each.finished and len(each.times) == 1 for each in seen)
                assert transport.connections == 3
        finally:
            await transport.close()
            await server.stop(None)

    asyncio.run(asyncio.wait_for(main(), 20))
