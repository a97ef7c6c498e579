"""Discovery in etcd (v3 API, over the few stubs of baton/v1/etcd.proto).

    <prefix>/coordinators/<address> = <address>      under a lease that its coordinator keeps alive

A session lasts until something fails: it takes the next endpoint, makes a channel of its own, and starts from nothing.
A coordinator's gets a lease and puts its key; a worker's lists all keys and watches from the revision after the list.
So no change is missed, and a store that was compacted, restored or emptied meanwhile needs no case of its own: a watch
that resumed at its old revision would wait for ever on a store that was emptied and counts from 1 again.

Every call has a deadline, as a stopped etcd is silent and gRPC does not notice. A watch is silent by nature; it is
asked for a sign of life (a progress request) every `BEAT_S`. A lease is kept alive by short calls and not on one long
stream, whose end a writer does not get to see.
"""

import asyncio
import itertools
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from baton.config import DiscoveryOptions, parse_etcd
from baton.discovery.base import Discovery
from baton.errors import ConfigurationError
from baton.tls import check_secret
from baton.v1 import etcd_pb2 as api
from baton.v1 import etcd_pb2_grpc as rpc

events = logging.getLogger("baton.events")
CALL_TIMEOUT_S = 2.0
BEAT_S = 1.0
"""Between signs of life that a watch asks for; one that hears nothing for this and a call's time is given up."""

RETRY_S = (0.2, 0.8)
"""Before the next session, drawn anew each time, so that a cluster does not come back to etcd all at once."""

REVOKE_TIMEOUT_S = 1.0
_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),  # or a new session would wait for the backoff of the old one
    ("grpc.enable_retries", 0),
]

Metadata = list[tuple[str, str]]


@dataclass(frozen=True)
class _Session:
    channel: grpc.aio.Channel
    metadata: Metadata


class Etcd(Discovery):
    """`fixed` addresses count as found at any time. `on_lost` is called whenever etcd is lost.

    Raises ConfigurationError for files that cannot be read, and nothing later.
    """

    def __init__(self, options: DiscoveryOptions, fixed: frozenset[str], on_lost: Callable[[], None]) -> None:
        endpoints, prefix = parse_etcd(options.discovery)
        self._endpoints = endpoints
        self._folder = f"{prefix}coordinators/"
        self._options = options
        self._fixed = fixed
        self._on_lost = on_lost
        self._is_lost = False
        self.trouble = "it has not answered yet"
        for flag, path in ("--discovery-login", options.discovery_login), ("--discovery-key", options.discovery_key):
            if path:
                check_secret(flag, path)
        try:
            self._credentials(), self._login()
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"--discovery: {error}") from error

    async def announce(self, address: str) -> None:
        async def work(session: _Session) -> None:
            await self._keep(session, address)

        await self._in_sessions(work)

    async def watch(self, on_change: Callable[[frozenset[str]], None]) -> None:
        if self._fixed:
            on_change(self._fixed)

        async def work(session: _Session) -> None:
            await self._follow(session, lambda found: on_change(self._fixed | found))

        await self._in_sessions(work)

    async def _in_sessions(self, work: Callable[[_Session], Awaitable[None]]) -> None:
        """Do the work with one endpoint after the other, until cancelled."""
        for endpoint in itertools.cycle(self._endpoints):
            try:
                async with self._channel(endpoint) as channel:
                    await work(_Session(channel, await self._authenticated(channel)))
            except (grpc.aio.AioRpcError, OSError, ValueError) as error:
                self._lost(endpoint, error)
            await asyncio.sleep(random.uniform(*RETRY_S))

    # A coordinator's session

    async def _keep(self, session: _Session, address: str) -> None:
        """Announce the address until the lease is lost or etcd is. Revokes the lease when cancelled."""
        lease = rpc.LeaseStub(session.channel)
        ttl_s = self._options.discovery_ttl_s
        granted = await lease.LeaseGrant(
            api.LeaseGrantRequest(TTL=ttl_s), timeout=CALL_TIMEOUT_S, metadata=session.metadata
        )
        put = api.PutRequest(key=f"{self._folder}{address}".encode(), value=address.encode(), lease=granted.ID)
        try:
            await rpc.KVStub(session.channel).Put(put, timeout=CALL_TIMEOUT_S, metadata=session.metadata)
            self._answers("this coordinator is announced")
            while True:
                await asyncio.sleep(ttl_s / 3)
                await self._renew(session, granted.ID)
        except asyncio.CancelledError:
            revoke = api.LeaseRevokeRequest(ID=granted.ID)
            try:
                await lease.LeaseRevoke(revoke, timeout=REVOKE_TIMEOUT_S, metadata=session.metadata)
            except grpc.aio.AioRpcError as error:
                events.info("etcd keeps this coordinator for up to %d s more: %s", ttl_s, error.code().name)
            raise

    @staticmethod
    async def _renew(session: _Session, lease_id: int) -> None:
        async def one() -> AsyncIterator[api.LeaseKeepAliveRequest]:
            yield api.LeaseKeepAliveRequest(ID=lease_id)

        stub = rpc.LeaseStub(session.channel)
        call = stub.LeaseKeepAlive(one(), timeout=CALL_TIMEOUT_S, metadata=session.metadata)
        answer = await call.read()
        call.cancel()
        if not isinstance(answer, api.LeaseKeepAliveResponse):  # the end of the stream
            raise ConnectionError("it hung up")
        if answer.TTL <= 0:
            raise ConnectionError("the lease had ended")

    # A worker's session

    async def _follow(self, session: _Session, on_change: Callable[[frozenset[str]], None]) -> None:
        """List, then watch from there on, until etcd is lost."""
        first = self._folder.encode()
        end = first[:-1] + bytes([first[-1] + 1])  # the first key behind all that begin with the folder's name
        kv = rpc.KVStub(session.channel)
        listed = await kv.Range(
            api.RangeRequest(key=first, range_end=end), timeout=CALL_TIMEOUT_S, metadata=session.metadata
        )
        found = {each.key: each.value.decode(errors="replace") for each in listed.kvs}
        on_change(frozenset(found.values()))
        self._answers(f"it knows of {len(found)} coordinators")

        async def asks() -> AsyncIterator[api.WatchRequest]:
            start = listed.header.revision + 1
            yield api.WatchRequest(
                create_request=api.WatchCreateRequest(key=first, range_end=end, start_revision=start)
            )
            while True:
                await asyncio.sleep(BEAT_S)
                yield api.WatchRequest(progress_request=api.WatchProgressRequest())

        # A member that lost the others must say so instead of being silent.
        metadata = [*session.metadata, ("hasleader", "true")]
        call = rpc.WatchStub(session.channel).Watch(asks(), metadata=metadata)
        try:
            while True:
                async with asyncio.timeout(BEAT_S + CALL_TIMEOUT_S):
                    answer = await call.read()
                if not isinstance(answer, api.WatchResponse):
                    raise ConnectionError("it hung up")
                if answer.canceled:
                    raise ConnectionError(answer.cancel_reason or f"compacted to revision {answer.compact_revision}")
                for event in answer.events:
                    if event.type == api.Event.DELETE:
                        found.pop(event.kv.key, None)
                    else:
                        found[event.kv.key] = event.kv.value.decode(errors="replace")
                if answer.events:
                    on_change(frozenset(found.values()))
        finally:
            call.cancel()

    # How it is reached

    def _channel(self, endpoint: str) -> grpc.aio.Channel:
        credentials = self._credentials()
        if credentials is None:
            return grpc.aio.insecure_channel(endpoint, options=_OPTIONS)
        return grpc.aio.secure_channel(endpoint, credentials, options=_OPTIONS)

    def _credentials(self) -> grpc.ChannelCredentials | None:
        """Read for each session, so that files which were replaced are used."""
        options = self._options
        if not options.discovery_ca:
            return None
        ca = Path(options.discovery_ca).read_bytes()
        if not options.discovery_cert:
            return grpc.ssl_channel_credentials(ca)
        key, cert = Path(options.discovery_key).read_bytes(), Path(options.discovery_cert).read_bytes()
        return grpc.ssl_channel_credentials(ca, key, cert)

    def _login(self) -> api.AuthenticateRequest | None:
        if not self._options.discovery_login:
            return None
        user, colon, password = Path(self._options.discovery_login).read_text().strip().partition(":")
        if not (user and colon):
            raise ValueError(f"the file {self._options.discovery_login} of --discovery-login must hold user:password")
        return api.AuthenticateRequest(name=user, password=password)

    async def _authenticated(self, channel: grpc.aio.Channel) -> Metadata:
        """What every call carries."""
        login = self._login()
        if login is None:
            return []
        answer = await rpc.AuthStub(channel).Authenticate(login, timeout=CALL_TIMEOUT_S)
        return [("token", answer.token)]

    # What is said about it

    def _answers(self, what: str) -> None:
        self.trouble = ""
        self._is_lost = False
        events.info("etcd answers: %s", what)

    def _lost(self, endpoint: str, error: Exception) -> None:
        reason = str(error) or "silent"
        if isinstance(error, grpc.aio.AioRpcError):
            reason = f"{error.code().name}: {error.details()}"
        self.trouble = f"{endpoint}: {reason}"
        if not self._is_lost:  # once an outage
            self._is_lost = True
            self._on_lost()
            events.warning(
                "etcd at %s is lost (%s): what was found last stays in use, and nobody new is found until it is back",
                endpoint, reason,
            )  # fmt: skip
