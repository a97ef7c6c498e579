"""`baton serve`: coordinator and workers as separate processes on this machine, started, watched and stopped together.

Nothing outlives the command: children watch their parent, and a Ctrl-C reaches only this process, which asks the
coordinator to drain first and the workers after it. A worker that dies is started again, later each time.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import uvloop

from baton.client import AsyncClient
from baton.config import (
    CoordinatorOptions,
    EngineOptions,
    HandoverOptions,
    ModelOptions,
    WorkerOptions,
    from_arguments,
    to_arguments,
)
from baton.config import (
    add_arguments as add_options,
)
from baton.errors import BatonError, ConfigurationError
from baton.model_folder import served_name
from baton.processes import log_to_stderr, stop_signals
from cli.model import cores_for, model_folder, own_cores, threads_for
from engine.weights import check_model
from kvtransfer.lanes.registry import lanes_of

log = logging.getLogger(__name__)
T = TypeVar("T")
ANNOUNCE_TIMEOUT_S = 30.0
START_TIMEOUT_S = 600.0
KILL_AFTER_S = 5.0
FIRST_BACKOFF_S, MAX_BACKOFF_S = 1.0, 30.0
EXIT_CONFIGURATION = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pools")
    group.add_argument("--prefill", type=int, default=None, help="prefill workers (default: 1, or 0 with --mixed)")
    group.add_argument("--decode", type=int, default=None, help="decode workers (default: 1, or 0 with --mixed)")
    group.add_argument("--mixed", type=int, default=0, help="workers that carry both roles (default: 0)")
    group.add_argument("--no-restart", action="store_true", help="leave a worker that died dead")
    add_options(parser, CoordinatorOptions, ModelOptions, EngineOptions, HandoverOptions)


@dataclass
class Child:
    """One process and the words that start it again."""

    name: str
    words: list[str]
    process: asyncio.subprocess.Process | None = None
    backoff_s: float = FIRST_BACKOFF_S
    started_at: float = field(default_factory=time.monotonic)

    async def start(self, pass_fds: Sequence[int] = ()) -> None:
        self.started_at = time.monotonic()
        # A session of its own: a Ctrl-C at the terminal must reach this command alone, which then drains in order.
        # -P: folders of the place where it was started must not pass for packages of ours.
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "cli.main", *self.words, pass_fds=pass_fds, start_new_session=True
        )

    async def stop(self, timeout_s: float) -> None:
        """SIGTERM, then SIGKILL when the time is up."""
        if self.process is None or self.process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.process.wait(), timeout_s)
        except TimeoutError:
            log.warning("%s did not stop in %.0f s and is killed", self.name, timeout_s)
            self.process.kill()
            await self.process.wait()


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


class Cluster:
    """The processes of one `baton serve`."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.sizes = pool_sizes(arguments)
        self.restart = not arguments.no_restart
        self.coordinator_options = from_arguments(CoordinatorOptions, arguments)
        self.model = from_arguments(ModelOptions, arguments)
        self.handover = from_arguments(HandoverOptions, arguments)
        lanes_of(self.handover)
        folder = model_folder(self.model)
        check_model(folder)
        engine = from_arguments(EngineOptions, arguments)
        cores_for(engine)
        self.engine = dataclasses.replace(engine, threads=threads_for(engine, folder, sum(self.sizes.values())))
        self.model = dataclasses.replace(
            self.model, model=str(folder), revision="", served_name=served_name(self.model)
        )
        self.ports: dict[str, int] = {}
        self.coordinator = Child("coordinator", [])
        self.workers: list[Child] = []

    async def start(self) -> None:
        await self._start_coordinator()
        link = f"{self.coordinator_options.link_host}:{self.ports['link']}"
        names = [(kind, f"{kind}-{number}") for kind, size in self.sizes.items() for number in range(size)]
        for (kind, name), cores in zip(names, own_cores(len(names), self.engine.threads), strict=True):
            worker = WorkerOptions(worker_id=name, coordinator=link, parent_pid=os.getpid())
            engine = dataclasses.replace(self.engine, cores=self.engine.cores or cores)
            self.workers.append(Child(name, [kind, *words_of(worker, self.model, engine, self.handover)]))
        for child in self.workers:
            await child.start()

    async def _start_coordinator(self) -> None:
        options = dataclasses.replace(self.coordinator_options, parent_pid=os.getpid())
        read_fd, write_fd = os.pipe()
        self.coordinator.words = ["coordinator", *words_of(options, self.model), "--announce-fd", str(write_fd)]
        await self.coordinator.start(pass_fds=[write_fd])
        os.close(write_fd)
        with os.fdopen(read_fd) as pipe:
            announced = await asyncio.wait_for(asyncio.to_thread(pipe.read), ANNOUNCE_TIMEOUT_S)
        if not announced:
            raise BatonError("the coordinator did not start; its message is above")
        self.ports = json.loads(announced)

    async def ready(self, stop: asyncio.Event) -> None:
        """Wait until every worker is registered. Raises when one fails for good, or the time is up."""
        deadline = time.monotonic() + START_TIMEOUT_S
        async with AsyncClient(self.base_url) as client:
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

    @property
    def base_url(self) -> str:
        host = self.coordinator_options.host
        return f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{self.ports['http']}"

    async def watch(self, stop: asyncio.Event) -> int:
        """Until asked to stop, or the coordinator is gone."""
        keepers = [asyncio.create_task(self._keep(child)) for child in self.workers]
        assert self.coordinator.process is not None
        coordinator = asyncio.create_task(self.coordinator.process.wait())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({coordinator, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in [*keepers, stopping]:
            task.cancel()
        if coordinator.done():
            log.error("the coordinator exited with status %s", coordinator.result())
            return 1
        return 0

    async def _keep(self, child: Child) -> None:
        """Start a worker again whenever it dies, later each time unless it lived long."""
        while child.process is not None:
            status = await child.process.wait()
            log.warning("%s exited with status %s", child.name, status)
            if not self.restart or status == EXIT_CONFIGURATION:
                return
            if time.monotonic() - child.started_at > MAX_BACKOFF_S:
                child.backoff_s = FIRST_BACKOFF_S
            await asyncio.sleep(child.backoff_s)
            child.backoff_s = min(child.backoff_s * 2, MAX_BACKOFF_S)
            log.info("starting %s again", child.name)
            await child.start()

    async def stop(self) -> None:
        # The coordinator drains first, while its workers still work for it; they have nothing to drain afterwards.
        await self.coordinator.stop(self.coordinator_options.drain_timeout_s + KILL_AFTER_S)
        await asyncio.gather(*(child.stop(KILL_AFTER_S) for child in self.workers))


def words_of(*options: object) -> list[str]:
    return [word for each in options for word in to_arguments(each)]


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
    grpc_address = f"{cluster.coordinator_options.host}:{cluster.ports['grpc']}"
    print(
        f"\nBaton is ready after {seconds:.1f} s: {cluster.model.served_name} on {pools}\n"
        f"  OpenAI API  {cluster.base_url}/v1\n"
        f"  gRPC        {grpc_address}\n"
        f"  try         baton chat --url {cluster.base_url}\n",
        flush=True,
    )


def run(arguments: argparse.Namespace) -> int:
    log_to_stderr("serve")
    return uvloop.run(_serve(Cluster(arguments)))
