"""Discovery by the Kubernetes API: coordinators are the endpoints of a Service, and workers watch its EndpointSlices.

Nobody announces anything: a pod that the Service selects is found as soon as it has an address, ready or not, as a
coordinator gets ready by its workers, until it has ended: whoever terminates still has requests, which new workers may
have to take over from workers that go at the same time. So only workers need access to the API:
`get`, `list` and `watch` of `endpointslices` in the Service's namespace, by the service account of their pod. Its token
and authority are files that the kubelet replaces now and then; they are read for each call and each session.

A session lists, then watches from the list's version on, and lasts until something fails: the next one starts from
nothing. A version that is too old (410) only ends it. A watch is silent by nature, and so is an API server that was
stopped or cut off: the server is asked to end every watch after `WATCH_S`, so one that says nothing for that and a
call's time is lost. As versions of a store that was restored from a backup may count backwards, which a watch does not
notice, every session ends after `WATCHES` of them.
"""

import asyncio
import logging
import os
import random
import ssl
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec

from baton.config import DiscoveryOptions, parse_kubernetes
from baton.discovery.base import Discovery
from baton.errors import ConfigurationError

events = logging.getLogger("baton.events")
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where the kubelet puts token, ca.crt and namespace."""

CALL_TIMEOUT_S = 5.0
WATCH_S = 30.0
WATCHES = 10
RETRY_S = (0.2, 1.0)
"""Before the next session, drawn anew each time, so that workers do not come back to the API all at once."""

MAX_RETRY_S = 10.0
"""After failures in a row, as hundreds of workers wait for the same API server."""

PORT_NAME = "link"
MAX_ANSWER_BYTES = 4 << 20
"""Of a list, and of one event: a slice of 1000 endpoints is far below."""


OnChange = Callable[[frozenset[str]], None]


class _TooOld(Exception):
    """The API server has no history from the asked version on: list again."""


# As much as is used of what the API sends. https://kubernetes.io/docs/reference/kubernetes-api/


class _Metadata(msgspec.Struct, rename="camel"):
    resource_version: str
    uid: str = ""


class _Endpoint(msgspec.Struct):
    addresses: list[str]


class _Port(msgspec.Struct):
    name: str | None = None
    port: int | None = None


class _Slice(msgspec.Struct):
    metadata: _Metadata
    endpoints: list[_Endpoint] | None = None
    ports: list[_Port] | None = None

    def addresses(self) -> Iterable[str]:
        for port in self.ports or ():
            if port.name == PORT_NAME and port.port:
                for endpoint in self.endpoints or ():
                    yield from (f"[{each}]:{port.port}" if ":" in each else f"{each}:{port.port}"
                                for each in endpoint.addresses)  # fmt: skip


class _List(msgspec.Struct):
    metadata: _Metadata
    items: list[_Slice]


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Status(msgspec.Struct):
    code: int = 0
    message: str = ""


class Kubernetes(Discovery):
    """`fixed` addresses count as found at any time. `on_lost` is called whenever the API is lost.

    Raises ConfigurationError outside of a pod, or in one without a service account.
    """

    def __init__(self, options: DiscoveryOptions, fixed: frozenset[str], on_lost: Callable[[], None]) -> None:
        namespace, self._service = parse_kubernetes(options.discovery)
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise ConfigurationError("--discovery kubernetes:// needs a pod: KUBERNETES_SERVICE_HOST is not set")
        try:
            namespace = namespace or (ACCOUNT / "namespace").read_text().strip()
            self._token(), self._authority()
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"--discovery kubernetes:// needs a service account whose token is mounted: {error}"
            ) from error
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._url = f"https://{where}/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        self._fixed = fixed
        self._on_lost = on_lost
        self._failures = 0
        self.trouble = "it has not answered yet"

    async def announce(self, address: str) -> None:
        """The Service does so by itself."""
        self.trouble = ""
        await asyncio.Event().wait()

    async def watch(self, on_change: OnChange) -> None:
        if self._fixed:
            on_change(self._fixed)
        while True:
            try:
                await self._session(lambda found: on_change(self._fixed | found))
            except _TooOld:
                pass
            except (aiohttp.ClientError, OSError, ValueError) as error:
                self._lost(error)
            longest_s = min(RETRY_S[1] * 2 ** min(self._failures, 10), MAX_RETRY_S)
            await asyncio.sleep(random.uniform(RETRY_S[0], longest_s))

    async def _session(self, on_change: OnChange) -> None:
        """List, then follow. Raises _TooOld, and aiohttp.ClientError, OSError or ValueError when the API is lost."""
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._authority()), read_bufsize=MAX_ANSWER_BYTES // 2
        ) as session:
            listed = await self._list(session)
            slices = {each.metadata.uid: each for each in listed.items}
            self._answers(len(_addresses(slices)))
            on_change(_addresses(slices))
            version = listed.metadata.resource_version
            for _ in range(WATCHES):
                version = await self._follow(session, slices, version, on_change)

    async def _list(self, session: aiohttp.ClientSession) -> _List:
        body = b""
        async with asyncio.timeout(CALL_TIMEOUT_S), self._call(session, {}) as answer:
            async for piece in answer.content.iter_any():
                body += piece
                if len(body) > MAX_ANSWER_BYTES:
                    raise ValueError("its answer is too long")
        return msgspec.json.decode(body, type=_List)

    async def _follow(
        self, session: aiohttp.ClientSession, slices: dict[str, _Slice], version: str, on_change: OnChange
    ) -> str:
        """Until the API server ends the watch, as it was asked to. Returns the version to go on from."""
        watch_s = max(1, round(WATCH_S * random.uniform(0.7, 1.0)))  # or all workers would come at once, for ever
        ends_at = asyncio.get_running_loop().time() + watch_s + CALL_TIMEOUT_S
        query = {
            "watch": "1", "resourceVersion": version, "allowWatchBookmarks": "true", "timeoutSeconds": str(watch_s),
        }  # fmt: skip
        async with asyncio.timeout(CALL_TIMEOUT_S) as limit, self._call(session, query) as answer:
            limit.reschedule(ends_at)
            while line := await answer.content.readline():
                event = msgspec.json.decode(line, type=_Event)
                if event.type == "ERROR":
                    status = msgspec.json.decode(event.object, type=_Status)
                    raise _TooOld if status.code == 410 else ConnectionError(status.message or "the watch failed")
                slice = msgspec.json.decode(event.object, type=_Slice)
                version = slice.metadata.resource_version
                if event.type == "DELETED":
                    slices.pop(slice.metadata.uid, None)
                elif event.type != "BOOKMARK":
                    slices[slice.metadata.uid] = slice
                if event.type != "BOOKMARK":
                    on_change(_addresses(slices))
        return version

    @asynccontextmanager
    async def _call(
        self, session: aiohttp.ClientSession, query: dict[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        params = {"labelSelector": f"kubernetes.io/service-name={self._service}", **query}
        headers = {"Authorization": f"Bearer {self._token()}", "Accept": "application/json"}
        async with session.get(self._url, params=params, headers=headers, allow_redirects=False) as answer:
            if answer.status == 410:
                raise _TooOld
            if answer.status != 200:
                raise ConnectionError(_REASONS.get(answer.status, f"it answers with status {answer.status}"))
            yield answer

    @staticmethod
    def _token() -> str:
        token = (ACCOUNT / "token").read_text().strip()
        if not token or not token.isascii() or not token.isprintable():
            raise ValueError(f"{ACCOUNT / 'token'} holds no token")
        return token

    @staticmethod
    def _authority() -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))

    # What is said about it

    def _answers(self, num_coordinators: int) -> None:
        if self.trouble:
            events.info("the Kubernetes API answers: it knows of %d coordinators", num_coordinators)
        self.trouble = ""
        self._failures = 0

    def _lost(self, error: Exception) -> None:
        self.trouble = str(error) or ("silent" if isinstance(error, TimeoutError) else type(error).__name__)
        self._failures += 1
        if self._failures == 1:  # once an outage
            self._on_lost()
            events.warning(
                "the Kubernetes API is lost (%s): what was found last stays in use, and nobody new is found until it "
                "is back", self.trouble,
            )  # fmt: skip


_REASONS = {
    401: "it does not take the token of this pod's service account",
    403: "this pod's service account may not list and watch endpointslices; give it a Role that lets it",
}


def _addresses(slices: dict[str, _Slice]) -> frozenset[str]:
    return frozenset(address for each in slices.values() for address in each.addresses())
