"""Who may keep a connection to a port of ours, for how long, doing what: so that no client can take it from the others.

A connection counts from the moment it is accepted, in a TLS handshake too, until it is closed:

    accepted -> handshake -> waits for a head -> request under way -> idle -> waits for a head ...
                                  ^ the slow ones of slowloris            ^ makes room for new ones

What a request under way may take is bounded where it is served: its body, its whole time. Whoever makes no room for
what is written is hung up on. When a port is full the connection that has been idle for longest makes room, then one
that has long owed the rest of a head. So a client that keeps many connections open costs itself, and the others a new
connection.
"""

import asyncio
import contextlib
import errno
import functools
import ipaddress
import logging
import socket
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from baton.cork import Cork
from baton.processes import raise_descriptor_limit
from coordinator.metric_families import counters, gauges
from coordinator.openai_answers import ErrorBody, ErrorDetail, json_body

events = logging.getLogger("baton.events")

MAX_HEADERS: Final = 64
MAX_FIELD_BYTES: Final = 8190
"""Of a request line, and of each header."""
BACKLOG: Final = 1024
SWEEP_S: Final = 0.5
MIN_OWED_S: Final = 1.0
"""A head that has been owed for less makes no room."""
READ_TIMEOUT_S: Final = 30.0
"""A client that makes no room for the next piece for so long is not reading."""
NEVER_S: Final = 1e9
"""aiohttp's own timer for idle connections does not fire."""
BREATHE_S: Final = 1.0
"""When there are no descriptors."""
RESERVED_DESCRIPTORS: Final = 1024
"""For links of workers, gRPC's connections, files."""
_IPV6_CLIENT_BITS: Final = 64  # what one customer is given, at least
Leave = Callable[[], None]


class Refusals(Collector):
    """Connections and requests turned away, by door (http, grpc, link) and reason; connections that are open."""

    def __init__(self) -> None:
        # What an alert looks at is there from the start: what begins at 1 has no rate.
        self.counts: Counter[tuple[str, str]] = Counter(
            {(door, reason): 0 for door in ("http", "link") for reason in ("full", "descriptors")}
        )
        self.open: Counter[str] = Counter()

    def count(self, door: str, reason: str) -> None:
        self.counts[door, reason] += 1

    def collect(self) -> Iterator[Metric]:
        family = counters("baton_connections_refused")
        for (door, reason), number in list(self.counts.items()):
            family.add_metric([door, reason], number)
        yield family
        now = gauges("baton_connections_open")
        for door, number in list(self.open.items()):
            now.add_metric([door], number)
        yield now


class Listener:
    """A listening port. `factory` makes a connection's protocol, which calls what it is given once when it is lost.

    `make_room`: called when the port is full; whether somebody goes.
    """

    def __init__(
        self, door: str, factory: Callable[[Leave], asyncio.Protocol], refusals: Refusals, *, max_open: int,
        max_per_address: int = 0, handshake_s: float, context: ssl.SSLContext | None,
        make_room: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self._door = door
        self._factory = factory
        self._refusals = refusals
        self._max_open, self._max_per_address = max_open, max_per_address
        self._handshake_s = handshake_s
        self._context = context
        self._make_room = make_room
        self._by_address: Counter[str] = Counter()
        self._sockets: list[socket.socket] = []
        self._arriving: set[asyncio.Task[None]] = set()

    def open(self, host: str, port: int, shares: bool = False) -> int:
        """Listen; returns the port. `shares`: with processes that do so as well. Raises OSError."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        missing: OSError | None = None
        opened = []
        for family, address in dict.fromkeys((each[0], each[4]) for each in found):
            try:
                opened.append(_listening(family, (address[0], port, *address[2:]), shares))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    for each in opened:
                        each.close()
                    raise
                missing = error  # such as ::1 of localhost, where there is no IPv6
                continue
            port = port or opened[-1].getsockname()[1]
        if missing is not None and not opened:
            raise missing
        self._sockets += opened
        for each in opened:
            self._watch(each)
        return port

    def close(self) -> None:
        """Let nobody else in. Connections go on. Idempotent."""
        loop = asyncio.get_running_loop()
        for listening in self._sockets:
            loop.remove_reader(listening)
            listening.close()
        self._sockets.clear()
        if self._context is not None:  # handshakes; without TLS who was accepted may have asked for something already
            for task in self._arriving:
                task.cancel()

    def _watch(self, listening: socket.socket) -> None:
        if listening in self._sockets:
            asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(BACKLOG):
            try:
                connection, address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._refusals.count(self._door, "descriptors")
                events.error("%s: no connection can be accepted: %s; raise ulimit -n", self._door, error.strerror)
                self._make_room()
                loop = asyncio.get_running_loop()
                loop.remove_reader(listening)
                loop.call_later(BREATHE_S, self._watch, listening)
                return
            client = _client(address[0])
            if reason := self._why_not(client):
                self._refusals.count(self._door, reason)
                connection.close()
                continue
            connection.setblocking(False)
            self._refusals.open[self._door] += 1
            self._by_address[client] += 1
            task = asyncio.get_running_loop().create_task(self._welcome(connection, self._leave(client)))
            self._arriving.add(task)
            task.add_done_callback(self._arriving.discard)

    def _why_not(self, client: str) -> str:
        if self._max_per_address and self._by_address[client] >= self._max_per_address:
            return "address"
        if self._refusals.open[self._door] >= self._max_open and not self._make_room():
            return "full"
        return ""

    def _leave(self, client: str) -> Leave:
        here = True

        def leave() -> None:
            nonlocal here
            if here:
                here = False
                self._refusals.open[self._door] -= 1
                self._by_address[client] -= 1
                if not self._by_address[client]:
                    del self._by_address[client]

        return leave

    async def _welcome(self, connection: socket.socket, leave: Leave) -> None:
        timeout_s = self._handshake_s if self._context is not None else None
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                functools.partial(self._factory, leave), connection, ssl=self._context, ssl_handshake_timeout=timeout_s
            )
        except OSError as error:  # a handshake that failed is counted where TLS is
            leave()
            if isinstance(error, ConnectionAbortedError):
                self._refusals.count(self._door, "handshake")
        except BaseException:
            leave()
            connection.close()
            raise


def _listening(family: int, address: tuple[Any, ...], shares: bool) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setblocking(False)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # and so do those that it accepts
        if shares:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening


@functools.lru_cache(4096)
def _client(host: str) -> str:
    """Whom an address stands for: itself; with IPv6 its network, of which a client has all addresses."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, _IPV6_CLIENT_BITS), strict=False))


class HttpConnections:
    """What every connection of HTTP is doing, as far as it can be hung up on for it."""

    def __init__(
        self, server: web.Server, refusals: Refusals, head_s: float, idle_s: float, cork: Cork,
        on_slow_reader: Callable[[], None],
    ) -> None:  # fmt: skip
        """Of the requests that `server` has handled from now on. `on_slow_reader`: one was hung up on."""
        self.cork = cork
        self.refusals = refusals
        self._server = server
        self._head_s, self._idle_s = head_s, idle_s
        self._owed: dict[HttpConnection, float] = {}
        """Since when they owe the rest of a head; whoever has owed for longest first."""
        self._idle: dict[HttpConnection, float] = {}
        self._full: dict[HttpConnection, float] = {}
        """Since when their clients have made no room for what is written."""
        self._on_slow_reader = on_slow_reader
        self._timer: asyncio.TimerHandle | None = None
        server.request_handler = self._serving(server.request_handler)

    def connection(self, leave: Leave) -> "HttpConnection":
        return HttpConnection(self, self._server, leave)

    def owes(self, connection: "HttpConnection") -> None:
        """It is new, or has begun a head."""
        self._idle.pop(connection, None)
        self._owed.setdefault(connection, time.monotonic())
        self._sweep_soon()

    def rests(self, connection: "HttpConnection") -> None:
        self._idle[connection] = time.monotonic()
        self._sweep_soon()

    def fills(self, connection: "HttpConnection") -> None:
        self._full[connection] = time.monotonic()
        self._sweep_soon()

    def flows(self, connection: "HttpConnection") -> None:
        self._full.pop(connection, None)

    def asks(self, connection: "HttpConnection") -> None:
        """It neither owes anything nor rests."""
        self._owed.pop(connection, None)
        self._idle.pop(connection, None)

    def forget(self, connection: "HttpConnection") -> None:
        self.asks(connection)
        self.flows(connection)

    def make_room(self) -> bool:
        """Hang up on somebody who asks for nothing. False: everybody does."""
        now = time.monotonic()
        for waiting, least_s in ((self._idle, 0.0), (self._owed, MIN_OWED_S)):
            oldest = next(iter(waiting), None)
            if oldest is not None and now - waiting[oldest] >= least_s:
                self._hang_up(oldest, "made_room")
                return True
        return False

    def hang_up_idle(self) -> None:
        """On whoever asks for nothing now: what they ask next, somebody else answers."""
        for connection in list(self._idle):
            if connection.transport is not None:
                connection.transport.close()  # when the last answer has left

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _sweep_soon(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        now, self._timer = time.monotonic(), None
        for waiting, limit_s, reason in (
            (self._owed, self._head_s, "head_late"), (self._idle, self._idle_s, ""), (self._full, READ_TIMEOUT_S, ""),
        ):  # fmt: skip
            while waiting:
                oldest, since = next(iter(waiting.items()))
                if now - since < limit_s:
                    break
                self._hang_up(oldest, reason)
                if waiting is self._full:
                    self._on_slow_reader()
        if self._owed or self._idle or self._full:
            self._sweep_soon()

    def _hang_up(self, connection: "HttpConnection", reason: str) -> None:
        self.forget(connection)
        if reason:
            self.refusals.count("http", reason)
        if connection.transport is not None:
            connection.transport.abort()

    def _serving(self, serve: Callable[[Any], Awaitable[web.StreamResponse]]) -> Any:
        async def served(request: web.BaseRequest) -> web.StreamResponse:
            connection = request.protocol
            assert isinstance(connection, HttpConnection), "there are no others"
            self.asks(connection)
            connection.is_busy = True
            try:
                return await serve(request)
            finally:
                connection.is_busy = False
                if connection.transport is not None:
                    self.rests(connection)

        return served


class HttpConnection(web.RequestHandler):
    """aiohttp's, which says when it owes something and when it is lost. Errors of what is no HTTP are ours."""

    __slots__ = ("_all", "_leave", "is_busy")

    def __init__(self, all: HttpConnections, server: web.Server, leave: Leave) -> None:
        super().__init__(
            server, loop=asyncio.get_running_loop(), access_log=None,  # type: ignore[arg-type]
            keepalive_timeout=NEVER_S, max_headers=MAX_HEADERS, max_line_size=MAX_FIELD_BYTES,
            max_field_size=MAX_FIELD_BYTES,
        )  # fmt: skip
        self._all = all
        self._leave = leave
        self.is_busy = False
        """With a request, from its head to the end of its answer."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(self._all.cork.transport(transport))
        self._all.owes(self)

    def data_received(self, data: bytes) -> None:
        if not self.is_busy:
            self._all.owes(self)
        super().data_received(data)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._all.fills(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._all.flows(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._leave()
        self._all.forget(self)
        super().connection_lost(exc)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """For a head that is none; repeats nothing of it."""
        if status != 400:
            return super().handle_error(request, status, exc, message)
        too_large = isinstance(exc, LineTooLong) or "Too many" in (message or "")
        self._all.refusals.count("http", "head_size" if too_large else "malformed")
        text = "the headers are too large" if too_large else "this is not HTTP"
        body = json_body(ErrorBody(ErrorDetail(text, "invalid_request_error", None, None)))
        response = web.Response(body=body, status=431 if too_large else 400, content_type="application/json")
        response.force_close()
        return response


def is_name_of_this_machine(host: str) -> bool:
    """Of a Host header. A web page whose own name was made to lead here (DNS rebinding) sends that name."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name in ("", "localhost", socket.gethostname().lower()):
        return True
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return False


def most_connections(asked: int) -> int:
    """As many of them as there are descriptors for, after this process's limit is raised as far as it may be."""
    descriptors = raise_descriptor_limit()
    each = 3  # HTTP's, its copy on the fast path, and gRPC's
    if descriptors < 0 or descriptors >= each * asked + RESERVED_DESCRIPTORS:
        return asked
    most = max(64, (descriptors - RESERVED_DESCRIPTORS) // each)
    events.warning("--max-connections is %d, and there are descriptors for %d; raise ulimit -n", asked, most)
    return most
