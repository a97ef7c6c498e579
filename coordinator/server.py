"""Puts the coordinator together and runs it: three ports, one event loop, a drain at the end.

clients --HTTP/SSE--> HttpApi --+                                        +-- LinkServer <==TCP==> workers
clients --gRPC------> GrpcApi --+--> Intake --> Dispatcher --> Registry --+
"""

import asyncio
import contextlib
import gc
import logging
import signal
import ssl
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from aiohttp import web

from baton.config import CoordinatorOptions, DiscoveryOptions, ModelOptions, PublicTlsOptions, TlsOptions, parse_otlp
from baton.cork import Cork
from baton.discovery import open_discovery
from baton.errors import ConfigurationError
from baton.grpc_tls import server_credentials
from baton.model_folder import served_name, tokenizer_fingerprint
from baton.monitor import monitored
from baton.processes import stop_signals, watch_parent
from baton.tls import COORDINATOR_NAME, inside, outside
from coordinator.dashboard.feed import Feed
from coordinator.dispatch import Dispatcher
from coordinator.drains import Drains
from coordinator.failures import revoked, unavailable
from coordinator.fast_path import library
from coordinator.filters import load
from coordinator.grpc_api import GrpcApi
from coordinator.http_api import NOT_READY, HttpApi
from coordinator.limits import HttpConnections, Listener, Refusals, most_connections
from coordinator.link import LinkServer
from coordinator.metrics import Metrics
from coordinator.otlp import OtlpExporter
from coordinator.requests import Intake
from coordinator.resumption import Resumption
from coordinator.rollout import Rollout, parse_rollout
from coordinator.routing_metrics import RoutingMetrics
from coordinator.shadows import Shadows
from coordinator.status import cluster_status
from coordinator.tenants.tenants import Tenants
from coordinator.tokenizer import ModelTokenizer
from coordinator.tracing import Tracer
from coordinator.vllm_metrics import VllmMetrics
from coordinator.watched_file import WatchedFile
from coordinator.workers import WorkerRegistry

events = logging.getLogger("baton.events")
GC_THRESHOLDS = (50_000, 10, 10)
"""See `gc.set_threshold`: no request leaves anything to find (`Request.forget`), and to look takes milliseconds."""
_STOP_GRACE_S = 1.0
_RETRACT_TIMEOUT_S = 2.0
_NOWHERE, _NO_TLS, _NO_PUBLIC_TLS = DiscoveryOptions(), TlsOptions(), PublicTlsOptions()


@dataclass(frozen=True, slots=True)
class Ports:
    """As opened, where 0 was asked for."""

    http: int
    grpc: int
    link: int
    own: int = -1
    """HTTP, where no other process listens; -1: nowhere does one."""
    monitor: int = -1
    operator: int = -1
    """HTTP of this machine alone, without TLS; -1: none."""


class Coordinator:
    """Raises ModelError if the folder's tokenizer is unusable, ConfigurationError for what else is, before any port is
    opened. Needs a running loop."""

    def __init__(
        self, options: CoordinatorOptions, model: ModelOptions, model_folder: Path,
        discovery: DiscoveryOptions = _NOWHERE,
        tls: TlsOptions = _NO_TLS, public_tls: PublicTlsOptions = _NO_PUBLIC_TLS,
    ) -> None:  # fmt: skip
        self._options = options
        self._tls, self._public_tls = inside(tls, COORDINATOR_NAME), outside(public_tls)
        self._announced_host = _announced_host(options, discovery)
        name = served_name(model)
        self.metrics = Metrics()
        self._tokenizer = ModelTokenizer(
            model_folder, lambda reason: self.metrics.tokenizer_fallbacks.labels(reason).inc()
        )
        self._discovery = open_discovery(discovery, on_lost=self.metrics.discovery_losses.inc)
        self.metrics.discovery_up.set_function(lambda: float(not self._discovery.trouble))
        self.registry = WorkerRegistry(name, tokenizer_fingerprint(model_folder))
        self.metrics.watch_workers(self.registry)
        self.dispatcher = Dispatcher(options, self.registry, self.metrics)
        self.metrics.registry.register(RoutingMetrics(options.routing, self.dispatcher.knowledge))
        self.intake = Intake(options, name, self._tokenizer, self.registry, self.dispatcher, self.metrics)
        if (filters := load(options, self.metrics)) is not None:
            self.intake.filters = filters
            filters.cut = self.dispatcher.cut
            filters.fail = lambda request, failure: self.dispatcher.end(request, "failed", failure)
        self.dispatcher.model = name
        self._tracing = self._trace(options) if options.otlp_endpoint else None
        self.metrics.watch_timelines(self.dispatcher.timelines)
        self._vllm = VllmMetrics(self.dispatcher, self.registry, self.metrics)
        self.metrics.registry.register(self._vllm)
        self.resumption = Resumption(options, self.intake, self.dispatcher, self.metrics)
        self._drains = Drains(self.registry, self.dispatcher, self.metrics, options.drain_timeout_s)
        self.shadows = Shadows(
            self.dispatcher, self.metrics, options.max_shadows, options.max_requests, self.intake.copy_choices
        )
        self.intake.on_started = self.shadows.started
        self.tenants = _tenants(options, name)
        if self.tenants is not None:
            self.intake.needs_key = True
            self.tenants.revoke = lambda request: self.dispatcher.end(request, "revoked", revoked())
            self.metrics.registry.register(self.tenants)
        self._rollout = WatchedFile("--rollout", Path(options.rollout), parse_rollout) if options.rollout else None
        if self._rollout is not None:
            self.dispatcher.versions.rollout = self._rollout.content
        self._feed = Feed(name, self.registry, self.dispatcher, self.metrics, self._rollout_trouble)
        self._refusals = Refusals()
        self.metrics.registry.register(self._refusals)
        library()  # before clients come: to compile it takes a second
        self._max_connections = most_connections(options.max_connections)
        self._cork = Cork()
        self._link = LinkServer(options, self.registry, self.dispatcher, self._refusals, self._cork, self._tls)
        self.metrics.watch_tls({"inside": self._tls, "public": self._public_tls})
        self._tasks: set[asyncio.Task[None]] = set()
        self._announcing: asyncio.Task[None] | None = None
        self._closing = contextlib.AsyncExitStack()

    def _trace(self, options: CoordinatorOptions) -> tuple[Tracer, OtlpExporter]:
        def count(event: str) -> None:
            self.metrics.traces.labels(event).inc()

        exporter = OtlpExporter(parse_otlp(options.otlp_endpoint), count)
        tracer = Tracer(options.trace_ratio, options.trace_slow_s, exporter.put, count)
        timelines = self.dispatcher.timelines
        timelines.on_begun, timelines.on_ended = tracer.begin, tracer.ended
        return tracer, exporter

    async def start(self) -> Ports:
        """Open the ports. Raises ConfigurationError naming the flag of one that cannot be opened."""
        options = self._options
        try:
            link = await self._start_link()
            self._grpc = GrpcApi(
                self.intake, self.resumption, options, self._max_connections, self.tenants,
            )  # fmt: skip
            credentials = server_credentials(self._public_tls) if self._public_tls else None
            grpc_port = _bind(self._grpc.server, options.host, options.grpc_port, "--grpc-port", credentials)
            await self._grpc.server.start()
            self._closing.push_async_callback(self._grpc.server.stop, _STOP_GRACE_S)
            await self._grpc.set_ready(False)
            self.registry.on_change = self._readiness_changed
            http, own, operator = await self._start_http()
            pages = {"/metrics": self.metrics.page, "/metrics/load": self._vllm.load_page}
            monitors = monitored(options.host, options.monitor_port, str, self._unready, pages)
            monitor = await self._closing.enter_async_context(monitors)
            for tls in (self._tls, self._public_tls):
                if tls is not None:
                    self._spawn(tls.watch())
            self._announce(link)
        except BaseException:
            await self.stop()
            raise
        return Ports(http, grpc_port, link, own, monitor, operator)

    async def _start_link(self) -> int:
        options = self._options
        try:
            port = self._link.start()
        except OSError as error:
            reason = error.strerror or str(error)
            raise _port_error("--link-port", options.link_host, options.link_port, reason) from error
        self._closing.push_async_callback(self._link.stop)
        self._spawn(self._link.watch())
        self._spawn(self._drains.watch())
        if self._rollout is not None:
            self._spawn(self._rollout.watch(self._roll_out, self.metrics.rollout_errors.inc))
        if self.tenants is not None:
            self._spawn(self.tenants.watch())
        return port

    async def _start_http(self) -> tuple[int, int, int]:
        options = self._options
        api = HttpApi(
            self.intake,
            self.resumption,
            options.max_body_bytes,
            self._status,
            self._feed.json,
            self._drains,
            options.heartbeat_interval_s,
            self.tenants,
        )
        runner = web.AppRunner(
            api.application(), access_log=None, handler_cancellation=True, shutdown_timeout=_STOP_GRACE_S
        )
        await runner.setup()
        self._closing.push_async_callback(runner.cleanup)
        assert runner.server is not None, "it was set up"
        self._connections = connections = HttpConnections(
            runner.server,
            self._refusals,
            options.head_timeout_s,
            options.idle_timeout_s,
            self._cork,
            self.metrics.slow_readers.inc,
        )
        self._closing.callback(connections.close)

        def listener(context: ssl.SSLContext | None) -> Listener:
            opened = Listener(
                "http", connections.connection, self._refusals, max_open=self._max_connections,
                max_per_address=options.max_connections_per_address, handshake_s=options.head_timeout_s,
                context=context, make_room=connections.make_room,
            )  # fmt: skip
            self._closing.callback(opened.close)
            return opened

        clients = listener(self._public_tls.listener("http") if self._public_tls else None)
        shares = options.own_port >= 0
        port = _listen(clients, options.host, options.port, "--port", shares)
        own = _listen(clients, options.host, options.own_port, "--own-port") if shares else -1
        operator = options.operator_port
        if operator >= 0:
            operator = _listen(listener(None), "127.0.0.1", operator, "--operator-port")
            events.info("operators on this machine ask http://127.0.0.1:%d (BATON_URL)", operator)
        return port, own, operator

    def _unready(self) -> str:
        return "" if self.intake.ready else NOT_READY

    def _status(self) -> dict[str, Any]:
        status = cluster_status(self.intake.model_name, self.registry, self.dispatcher, self._rollout_trouble())
        return status | {"encoder": self._tokenizer.encoded_by}

    def _rollout_trouble(self) -> str:
        return self._rollout.trouble if self._rollout is not None else ""

    def _roll_out(self, rollout: Rollout) -> None:
        events.info("rollout: weights %s, shadow %s", dict(rollout.weights), dict(rollout.shadow))
        self.dispatcher.versions.rollout = rollout
        self.shadows.rolled_out(rollout)
        self._readiness_changed()

    def _announce(self, link_port: int) -> None:
        """So that workers dial this coordinator, too. Retracted before the ports are closed."""
        self._announcing = asyncio.create_task(self._discovery.announce(_address(self._announced_host, link_port)))
        self._announcing.add_done_callback(self._finished)
        self._closing.push_async_callback(self._retract)

    async def _retract(self) -> None:
        if self._announcing is not None:
            self._announcing.cancel()
            await asyncio.wait({self._announcing}, timeout=_RETRACT_TIMEOUT_S)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            events.error("a background task of the coordinator failed: %r", task.exception())

    def _readiness_changed(self) -> None:
        if self._grpc.ready is not self.intake.ready:
            self._spawn(self._grpc.set_ready(self.intake.ready))

    async def drain(self) -> None:
        """Tell everybody, then refuse what is new, and let what runs finish for up to drain_timeout_s."""
        self.dispatcher.leaving = True
        self.shadows.close()
        self._readiness_changed()
        await asyncio.sleep(self._options.drain_notice_s)
        self.dispatcher.draining = True
        await self._retract()
        # Whoever kept a connection would come by it, only to be refused. Not so with gRPC, whose server would cancel
        # what comes while it tells; its clients are told by the health service.
        self._connections.hang_up_idle()
        events.info("draining: %d requests are running", len(self.dispatcher.requests))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.dispatcher.idle.wait(), self._options.drain_timeout_s)

    async def hand_on(self) -> None:
        """Leave what still runs to other coordinators, or to the next one here, as if this process had died.

        Workers keep it when their links break, and clients, who see their connections end without an end of their
        answers, go on with it by its id.
        """
        if running := len(self.dispatcher.requests):
            events.info("handing on: %d requests are left to other coordinators", running)
        self.dispatcher.let_go()
        await self._link.stop()

    async def stop(self) -> None:
        """End what still runs, close the ports. Idempotent."""
        self.dispatcher.leaving = self.dispatcher.draining = True
        self.shadows.close()
        for request in list(self.dispatcher.requests.values()):
            self.dispatcher.end(request, "failed", unavailable("this coordinator was shut down before the end"))
        self.resumption.close()
        for task in list(self._tasks):
            task.cancel()
        await self._closing.aclose()
        self._feed.close()
        self._tokenizer.close()
        if self.tenants is not None:
            await asyncio.to_thread(self.tenants.close)
        if self._tracing is not None:
            tracer, exporter = self._tracing
            tracer.flush()
            await asyncio.to_thread(exporter.stop)


async def serve(
    options: CoordinatorOptions,
    model: ModelOptions,
    model_folder: Path,
    on_ready: Callable[[Ports], None],
    discovery: DiscoveryOptions = _NOWHERE,
    tls: TlsOptions = _NO_TLS,
    public_tls: PublicTlsOptions = _NO_PUBLIC_TLS,
) -> None:
    """Run a coordinator until SIGTERM, SIGINT or the end of its parent, and then drain it.

    After SIGTERM others go on with what does not finish in time; otherwise nobody does, and clients are told so. A
    SIGINT after that ends the process at once. Raises ConfigurationError before anything is served.
    """
    coordinator = Coordinator(options, model, model_folder, discovery, tls, public_tls)
    stop = stop_signals()
    watch_parent(options.parent_pid, stop.set)
    try:
        on_ready(await coordinator.start())
        # What is here now stays: the collector of garbage need not look at it again and again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        await stop.wait()
        await coordinator.drain()
        if stop.by is signal.SIGTERM:
            await coordinator.hand_on()
    finally:
        await coordinator.stop()


def _tenants(options: CoordinatorOptions, model: str) -> Tenants | None:
    """Raises ConfigurationError."""
    if not options.keys:
        return None
    if options.host not in ("127.0.0.1", "::1", "localhost"):
        events.info("--keys: clients send their keys as they are; where others can listen, use --public-tls-cert")
    return Tenants(Path(options.keys), Path(options.audit_log) if options.audit_log else None, model)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _announced_host(options: CoordinatorOptions, discovery: DiscoveryOptions) -> str:
    host = options.advertise_host or options.link_host
    if discovery.discovery and host in ("0.0.0.0", "::"):
        raise ConfigurationError(f"--link-host {host} says not where workers reach this host; add --advertise-host")
    return host


def _bind(server: grpc.aio.Server, host: str, port: int, flag: str, credentials: grpc.ServerCredentials | None) -> int:
    address = _address(host, port)
    try:
        bound = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError as error:
        raise _port_error(flag, host, port, "it may be in use") from error
    if not bound:
        raise _port_error(flag, host, port, "it may be in use")
    return bound


def _listen(listener: Listener, host: str, port: int, flag: str, shares: bool = False) -> int:
    """`shares`: with processes that do so as well."""
    try:
        return listener.open(host, port, shares)
    except OSError as error:
        raise _port_error(flag, host, port, error.strerror or str(error)) from error


def _port_error(flag: str, host: str, port: int, reason: str) -> ConfigurationError:
    return ConfigurationError(f"{flag} {port} on {host} cannot be opened: {reason}; choose another with {flag}")
