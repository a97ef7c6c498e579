"""`baton serve`: coordinators and workers as separate processes on this machine, started, watched and stopped together.

Nothing outlives the command: children watch their parent, and a Ctrl-C reaches only this process, which asks the
coordinators to drain first and the workers after them. A process that dies is started again, later each time; without
any coordinator left the command ends.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import ssl
import time
from pathlib import Path
from typing import TypeVar

import uvloop

from baton.client import AsyncClient
from baton.config import (
    CoordinatorOptions,
    DiscoveryOptions,
    EngineOptions,
    HandoverOptions,
    ModelOptions,
    PublicTlsOptions,
    TierOptions,
    TlsOptions,
    WorkerOptions,
    from_arguments,
    parse_bytes,
)
from baton.config import (
    add_arguments as add_options,
)
from baton.errors import BatonError, ConfigurationError
from baton.model_folder import served_name
from baton.processes import log_to_stderr, stop_signals
from baton.tls import COORDINATOR_NAME, check_secret, inside, outside, reason_of
from cli.doors import KILL_AFTER_S, PORT_STRIDE, Child, Door, add_processes_argument, doors, stop_doors, watch, words_of
from cli.model import cores_for, model_folder, own_cores, threads_for
from engine.weights import check_model
from kvtransfer.lanes.registry import parse_lanes

log = logging.getLogger(__name__)
T = TypeVar("T")
START_TIMEOUT_S = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pools")
    group.add_argument("--prefill", type=int, default=None, help="prefill workers (default: 1, or 0 with --mixed)")
    group.add_argument("--decode", type=int, default=None, help="decode workers (default: 1, or 0 with --mixed)")
    group.add_argument("--mixed", type=int, default=0, help="workers that carry both roles (default: 0)")
    group.add_argument(
        "--coordinators", type=int, default=1,
        help=f"front doors to the same workers; each has its ports {PORT_STRIDE} above those before it (default: 1)",
    )  # fmt: skip
    add_processes_argument(parser)
    group.add_argument("--no-restart", action="store_true", help="leave a process that died dead")
    group.add_argument(
        "--client-cert", default="", metavar="FILE",
        help="PEM certificate that this command shows to its coordinators; only with --public-tls-client-ca",
    )  # fmt: skip
    group.add_argument("--client-key", default="", metavar="FILE", help="PEM private key of that certificate")
    add_options(
        parser, CoordinatorOptions, DiscoveryOptions, ModelOptions, EngineOptions, HandoverOptions, TierOptions,
        TlsOptions, PublicTlsOptions,
    )  # fmt: skip


def pool_sizes(arguments: argparse.Namespace) -> dict[str, int]:
    mixed = arguments.mixed
    sizes = {
        "prefill": arguments.prefill if arguments.prefill is not None else int(not mixed),
        "decode": arguments.decode if arguments.decode is not None else int(not mixed),
        "mixed": mixed,
    }
    for name, size in sizes.items():
        if size < 0:
            raise ConfigurationError(f"--{name} is {size}; it must not be negative")
    if not sizes["decode"] + sizes["mixed"]:
        raise ConfigurationError("nothing would decode; give --decode or --mixed at least 1")
    return sizes


def trusted(options: PublicTlsOptions, cert: str, key: str) -> ssl.SSLContext | None:
    """What this command asks its own coordinators with: their certificate is the only one that is good, whatever name
    it has. Raises ConfigurationError."""
    if len({bool(cert), bool(key), bool(options.public_tls_client_ca)}) > 1:
        raise ConfigurationError(
            "--public-tls-client-ca, --client-cert and --client-key of `baton serve` belong together"
        )
    tls = outside(options)
    if tls is None:
        return None
    if cert:
        check_secret("--client-key", key)
        try:
            tls.client.load_cert_chain(cert, key, password=lambda: "")
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"--client-cert and --client-key cannot be used: {reason_of(error)}") from error
    return tls.client


class Cluster:
    """The processes of one `baton serve`."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.sizes = pool_sizes(arguments)
        self.restart = not arguments.no_restart
        self.tls = from_arguments(TlsOptions, arguments)
        self.public_tls = from_arguments(PublicTlsOptions, arguments)
        self._trusted = trusted(self.public_tls, arguments.client_cert, arguments.client_key)
        scheme = "https" if self.public_tls.public_tls_cert else "http"
        self.doors = doors(
            from_arguments(CoordinatorOptions, arguments), arguments.coordinators, arguments.processes, scheme
        )
        self.discovery = from_arguments(DiscoveryOptions, arguments)
        self.model = from_arguments(ModelOptions, arguments)
        self.handover = from_arguments(HandoverOptions, arguments)
        self.tiers = from_arguments(TierOptions, arguments)
        parse_lanes(self.handover.lanes, inside(self.tls, COORDINATOR_NAME))
        folder = model_folder(self.model)
        check_model(folder)
        engine = from_arguments(EngineOptions, arguments)
        cores_for(engine)
        self.engine = dataclasses.replace(engine, threads=threads_for(engine, folder, sum(self.sizes.values())))
        self.model = dataclasses.replace(
            self.model, model=str(folder), revision="", served_name=served_name(self.model)
        )
        self.workers: list[Child] = []

    async def start(self) -> None:
        await asyncio.gather(
            *(door.start(self.discovery, self.model, self.tls, self.public_tls) for door in self.doors)
        )
        links = ",".join(door.link for door in self.doors)
        names = [(kind, f"{kind}-{number}") for kind, size in self.sizes.items() for number in range(size)]
        for (kind, name), cores in zip(names, own_cores(len(names), self.engine.threads), strict=True):
            worker = WorkerOptions(worker_id=name, coordinator=links, parent_pid=os.getpid())
            engine = dataclasses.replace(self.engine, cores=self.engine.cores or cores)
            self.workers.append(
                Child(
                    name,
                    [
                        kind,
                        *words_of(
                            worker, self.discovery, self.model, engine, self.handover, self._tiers_of(name), self.tls
                        ),
                    ],
                )
            )
        for child in self.workers:
            await child.start()

    def _tiers_of(self, name: str) -> TierOptions:
        """Every worker has a folder of its own on the disk, and an equal part of what they may take there."""
        if not self.tiers.disk_kv_folder:
            return self.tiers
        share = parse_bytes(self.tiers.disk_kv_memory) // sum(self.sizes.values())
        folder = Path(self.tiers.disk_kv_folder).absolute() / name
        return dataclasses.replace(self.tiers, disk_kv_folder=str(folder), disk_kv_memory=str(share))

    async def ready(self, stop: asyncio.Event) -> None:
        """Wait until every coordinator has every worker. Raises when one fails for good, or the time is up."""
        deadline = time.monotonic() + START_TIMEOUT_S
        for door in self.doors:
            await self._ready_at(door, stop, deadline)

    async def _ready_at(self, door: Door, stop: asyncio.Event, deadline: float) -> None:
        async with AsyncClient(door.base_url, tls=self._trusted, api_key="") as client:
            while not stop.is_set():
                status = await client.status()
                if len(status["workers"]) >= len(self.workers):
                    return
                for child in self.workers:
                    if child.process and child.process.returncode is not None:
                        raise BatonError(f"{child.name} did not start; its message is above")
                if time.monotonic() > deadline:
                    raise BatonError(f"not ready after {START_TIMEOUT_S:g} s; the log above says how far it came")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), 0.1)

    async def watch(self, stop: asyncio.Event) -> int:
        """Until asked to stop, or no coordinator is left."""
        keepers = [asyncio.create_task(child.keep(self.restart)) for child in self.workers]
        status = await watch(self.doors, self.restart, stop)
        for task in keepers:
            task.cancel()
        return status

    async def stop(self) -> None:
        # Coordinators drain first, while workers still work for them; they have nothing to drain afterwards.
        # SIGINT: there will be no workers to hand anything on to.
        await stop_doors(self.doors, signal.SIGINT)
        await asyncio.gather(*(child.stop(KILL_AFTER_S) for child in self.workers))


async def _serve(cluster: Cluster) -> int:
    stop = stop_signals()
    started = time.monotonic()
    try:
        await cluster.start()
        await cluster.ready(stop)
        if not stop.is_set():
            greet(cluster, time.monotonic() - started)
        return await cluster.watch(stop)
    finally:
        await cluster.stop()


def greet(cluster: Cluster, seconds: float) -> None:
    pools = ", ".join(f"{size} {kind}" for kind, size in cluster.sizes.items() if size)
    urls = "  ".join(f"{url}/v1" for url in dict.fromkeys(door.shared_url for door in cluster.doors))
    grpc = dict.fromkeys(door.grpc for door in cluster.doors)
    alone = [door.base_url for door in cluster.doors if door.base_url != door.shared_url]
    print(
        f"\nBaton is ready after {seconds:.1f} s: {cluster.model.served_name} on {pools}\n"
        f"  OpenAI API  {urls}\n"
        f"  gRPC        {'  '.join(grpc)}\n"
        + (f"  processes   {'  '.join(alone)}\n" if alone else "")
        + f"  try         baton chat --url {cluster.doors[0].shared_url}\n",
        flush=True,
    )


def run(arguments: argparse.Namespace) -> int:
    log_to_stderr("serve")
    return uvloop.run(_serve(Cluster(arguments)))
