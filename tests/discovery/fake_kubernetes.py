"""As much of the Kubernetes API as discovery uses, in this process, with the accidents that a real one has rarely."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

SERVICE = "baton-coordinator"
PATH = "/apis/discovery.k8s.io/v1/namespaces/models/endpointslices"


def endpoint_slice(
    uid: str, *addresses: str, terminating: bool = False, ready: bool = True, port: int = 50052
) -> dict[str, Any]:
    """As the controller of a Service makes them; a pod that terminates is not ready."""
    conditions = {"ready": ready and not terminating, "serving": ready, "terminating": terminating}
    return {
        "kind": "EndpointSlice",
        "apiVersion": "discovery.k8s.io/v1",
        "metadata": {"name": uid, "uid": uid, "labels": {"kubernetes.io/service-name": SERVICE}},
        "addressType": "IPv6" if any(":" in each for each in addresses) else "IPv4",
        "endpoints": [{"addresses": [each], "conditions": conditions} for each in addresses] or None,
        "ports": [{"name": "http", "port": 8000, "protocol": "TCP"}, {"name": "link", "port": port, "protocol": "TCP"}],
    }


class FakeKubernetes:
    def __init__(self) -> None:
        self.port = 0
        self.version = 100
        self.token = "first"
        self.slices: dict[str, dict[str, Any]] = {}
        self.lists = 0
        self.watched_from: list[int] = []
        """Version of every watch that was begun."""
        self.status = 200
        """Of every answer."""
        self.body: bytes | None = None
        """Of lists, instead of the truth."""
        self.oldest = 0
        """Watches from before this version are refused."""
        self.awake = asyncio.Event()
        """Clear: as if it were stopped; calls are taken and never answered."""
        self.awake.set()
        self._watchers: set[asyncio.Queue[bytes]] = set()
        self._history: list[tuple[int, bytes]] = []

    # What a test does to it

    def put(self, slice: dict[str, Any]) -> None:
        uid = slice["metadata"]["uid"]
        kind = "MODIFIED" if uid in self.slices else "ADDED"
        self.slices[uid] = slice
        self._tell(kind, slice)

    def delete(self, uid: str) -> None:
        self._tell("DELETED", self.slices.pop(uid))

    def bookmark(self) -> None:
        """Time goes by for other objects."""
        self.version += 50
        self._send("BOOKMARK", {"kind": "EndpointSlice", "metadata": {"resourceVersion": str(self.version)}})

    def fail_watches(self, code: int, message: str) -> None:
        self._send("ERROR", {"kind": "Status", "code": code, "message": message})

    def send(self, line: bytes) -> None:
        """To every watch."""
        for queue in self._watchers:
            queue.put_nowait(line)

    def end_watches(self) -> None:
        self.send(b"")

    @property
    def num_watches(self) -> int:
        return len(self._watchers)

    # What it answers

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get(PATH, self._slices)
        return app

    async def _slices(self, request: web.Request) -> web.StreamResponse:
        await self.awake.wait()
        assert request.query["labelSelector"] == f"kubernetes.io/service-name={SERVICE}"
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"kind": "Status", "code": 401}, status=401)
        if self.status != 200:
            return web.json_response({"kind": "Status", "code": self.status}, status=self.status)
        if "watch" in request.query:
            return await self._watch(request)
        self.lists += 1
        listed = {
            "kind": "EndpointSliceList",
            "metadata": {"resourceVersion": str(self.version)},
            "items": list(self.slices.values()),
        }
        return web.Response(body=json.dumps(listed).encode() if self.body is None else self.body)

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        version = int(request.query["resourceVersion"])
        assert request.query["allowWatchBookmarks"] == "true"
        self.watched_from.append(version)
        if version < self.oldest:
            return web.json_response({"kind": "Status", "code": 410}, status=410)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        lines: asyncio.Queue[bytes] = asyncio.Queue()
        for at, line in self._history:
            if at > version:
                lines.put_nowait(line)
        self._watchers.add(lines)
        try:
            async with asyncio.timeout(float(request.query["timeoutSeconds"])):
                while line := await lines.get():
                    await self.awake.wait()
                    await response.write(line)
        except TimeoutError:
            await self.awake.wait()
        finally:
            self._watchers.discard(lines)
        return response

    def _tell(self, kind: str, slice: dict[str, Any]) -> None:
        self.version += 1
        slice["metadata"]["resourceVersion"] = str(self.version)
        self._history.append((self.version, self._send(kind, slice)))

    def _send(self, kind: str, content: dict[str, Any]) -> bytes:
        line = json.dumps({"type": kind, "object": content}).encode() + b"\n"
        self.send(line)
        return line


@asynccontextmanager
async def fake_kubernetes(
    context: ssl.SSLContext, kubernetes: FakeKubernetes | None = None, port: int = 0
) -> AsyncIterator[FakeKubernetes]:
    kubernetes = kubernetes or FakeKubernetes()
    runner = web.AppRunner(kubernetes.application(), access_log=None, shutdown_timeout=0.05)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, ssl_context=context, reuse_address=True).start()
    kubernetes.port = runner.addresses[0][1]
    try:
        yield kubernetes
    finally:
        await runner.cleanup()
