"""As much of etcd as discovery uses, in this process, with the accidents that a real one has rarely."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from baton.v1 import etcd_pb2 as api
from baton.v1 import etcd_pb2_grpc as rpc

FOLDER = "/baton/coordinators/"


class FakeEtcd(rpc.KVServicer, rpc.LeaseServicer, rpc.WatchServicer, rpc.AuthServicer):
    def __init__(self) -> None:
        self.port = 0
        self.revision = 1
        self.keys: dict[bytes, tuple[bytes, int]] = {}
        """Value and lease."""
        self.leases: set[int] = set()
        self.granted = 0
        self.watches = 0
        self.awake = asyncio.Event()
        """Clear: as if it were stopped; calls are taken and never answered."""
        self.awake.set()
        self.compacted_to = 0
        """Watches that begin before this revision are cancelled."""
        self.password = ""
        self._watchers: dict[asyncio.Queue[api.WatchResponse], int] = {}
        """And the revision that each begins at."""
        self._history: list[tuple[int, api.Event]] = []
        self._ids = itertools.count(7)

    # What a test does to it

    def put(self, address: str, lease: int = 0) -> None:
        key = f"{FOLDER}{address}".encode()
        self.keys[key] = (address.encode(), lease)
        self._tell(api.Event(type=api.Event.PUT, kv=api.KeyValue(key=key, value=address.encode())))

    def delete(self, key: bytes) -> None:
        del self.keys[key]
        self._tell(api.Event(type=api.Event.DELETE, kv=api.KeyValue(key=key)))

    def end_leases(self) -> None:
        self.leases.clear()
        for key in [key for key, (_, lease) in self.keys.items() if lease]:
            self.delete(key)

    def empty(self) -> None:
        """As after a restart without its data: nobody is told."""
        self.revision = 1
        self._history.clear()
        self.keys.clear()
        self.leases.clear()

    def break_watches(self, reason: str) -> None:
        for queue in self._watchers:
            queue.put_nowait(api.WatchResponse(canceled=True, cancel_reason=reason))

    @property
    def addresses(self) -> set[str]:
        return {value.decode() for value, _ in self.keys.values()}

    # What it answers

    async def Authenticate(self, request: Any, context: Any) -> Any:
        await self._check(context, anybody=True)
        if request.password != self.password:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "authentication failed, invalid user ID or password")
        return api.AuthenticateResponse(token=f"token of {request.name}")

    async def Range(self, request: Any, context: Any) -> Any:
        await self._check(context)
        kvs = [
            api.KeyValue(key=key, value=value)
            for key, (value, _) in self.keys.items()
            if request.key <= key < request.range_end
        ]
        return api.RangeResponse(header=self._header, kvs=kvs)

    async def Put(self, request: Any, context: Any) -> Any:
        await self._check(context)
        if request.lease not in self.leases:
            await context.abort(grpc.StatusCode.NOT_FOUND, "etcdserver: requested lease not found")
        self.put(request.value.decode(), request.lease)
        return api.PutResponse(header=self._header)

    async def LeaseGrant(self, request: Any, context: Any) -> Any:
        await self._check(context)
        self.granted += 1
        self.leases.add(id := next(self._ids))
        return api.LeaseGrantResponse(header=self._header, ID=id)

    async def LeaseRevoke(self, request: Any, context: Any) -> Any:
        await self._check(context)
        self.leases.discard(request.ID)
        for key in [key for key, (_, lease) in self.keys.items() if lease == request.ID]:
            self.delete(key)
        return api.LeaseRevokeResponse(header=self._header)

    async def LeaseKeepAlive(self, request_iterator: Any, context: Any) -> Any:
        async for request in request_iterator:
            await self._check(context)
            ttl = 1 if request.ID in self.leases else 0
            yield api.LeaseKeepAliveResponse(header=self._header, ID=request.ID, TTL=ttl)

    async def Watch(self, request_iterator: Any, context: Any) -> Any:
        await self._check(context)
        answers: asyncio.Queue[api.WatchResponse] = asyncio.Queue()
        listening = asyncio.ensure_future(self._hear(request_iterator, answers))
        try:
            while True:
                answer = await answers.get()
                await self.awake.wait()
                yield answer
                if answer.canceled:
                    return
        finally:
            self._watchers.pop(answers, None)
            listening.cancel()

    async def _hear(self, requests: Any, answers: "asyncio.Queue[api.WatchResponse]") -> None:
        async for request in requests:
            start = request.create_request.start_revision
            if not request.HasField("create_request"):
                answers.put_nowait(api.WatchResponse(header=self._header))
            elif start < self.compacted_to:
                answers.put_nowait(api.WatchResponse(canceled=True, compact_revision=self.compacted_to))
                self.compacted_to = 0
            else:
                missed = [event for revision, event in self._history if revision >= start]
                answers.put_nowait(api.WatchResponse(header=self._header, events=missed))
                self._watchers[answers] = start
                self.watches += 1

    @property
    def _header(self) -> api.ResponseHeader:
        return api.ResponseHeader(revision=self.revision)

    def _tell(self, event: api.Event) -> None:
        self.revision += 1
        self._history.append((self.revision, event))
        for queue, start in self._watchers.items():
            if self.revision >= start:
                queue.put_nowait(api.WatchResponse(header=self._header, events=[event]))

    async def _check(self, context: Any, anybody: bool = False) -> None:
        await self.awake.wait()
        if self.password and not anybody and ("token", "token of baton") not in context.invocation_metadata():
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "etcdserver: user name is empty")


@asynccontextmanager
async def fake_etcd(
    etcd: FakeEtcd | None = None, port: int = 0, credentials: grpc.ServerCredentials | None = None
) -> AsyncIterator[FakeEtcd]:
    etcd = etcd or FakeEtcd()
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    for add in (
        rpc.add_KVServicer_to_server, rpc.add_LeaseServicer_to_server,
        rpc.add_WatchServicer_to_server, rpc.add_AuthServicer_to_server,
    ):  # fmt: skip
        add(etcd, server)
    address = f"127.0.0.1:{port}"
    etcd.port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    await server.start()
    try:
        yield etcd
    finally:
        await server.stop(None)
