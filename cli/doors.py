"""Coordinators as processes of one command: started, announced, restarted, and several of them behind one port.

The kernel spreads connections over the processes that listen at a port with SO_REUSEPORT. Each of them is a coordinator
of its own: workers have a link to each, and a client that comes back finds its request through whichever it meets.

    --port 8000 --processes 2        8000  8001         8000  8002        HTTP: of all, of this one alone
    --grpc-port 50051                50051              50051             gRPC: of all
    --link-port 50052                       50052              50053      for workers
                                     process 0          process 1
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.config import CoordinatorOptions, to_arguments, validate
from baton.errors import BatonError, ConfigurationError

log = logging.getLogger(__name__)
ANNOUNCE_TIMEOUT_S = 30.0
FIRST_BACKOFF_S, MAX_BACKOFF_S = 1.0, 30.0
KILL_AFTER_S = 5.0
EXIT_CONFIGURATION = 2
PORT_STRIDE = 10
"""From the ports of one coordinator to those of the next."""


@dataclass
class Child:
    """One process and the words that start it again."""

    name: str
    words: list[str]
    process: asyncio.subprocess.Process | None = None
    backoff_s: float = FIRST_BACKOFF_S
    started_at: float = field(default_factory=time.monotonic)

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.returncode is None

    async def ended(self) -> int:
        """Its exit status."""
        assert self.process is not None, "started before anybody waits for its end"
        return await self.process.wait()

    async def start(self, pass_fds: Sequence[int] = ()) -> None:
        self.started_at = time.monotonic()
        # A session of its own: a Ctrl-C at the terminal must reach this command alone, which then drains in order.
        # -P: folders of the place where it was started must not pass for packages of ours.
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "cli.main", *self.words, pass_fds=pass_fds, start_new_session=True
        )

    async def keep(self, restart: bool) -> None:
        """Start it again whenever it dies, later each time unless it lived long."""
        while True:
            status = await self.ended()
            log.warning("%s exited with status %s", self.name, status)
            if not restart or status == EXIT_CONFIGURATION:
                return
            if time.monotonic() - self.started_at > MAX_BACKOFF_S:
                self.backoff_s = FIRST_BACKOFF_S
            await asyncio.sleep(self.backoff_s)
            self.backoff_s = min(self.backoff_s * 2, MAX_BACKOFF_S)
            log.info("starting %s again", self.name)
            await self.start()

    async def stop(self, timeout_s: float, number: signal.Signals = signal.SIGTERM) -> None:
        """The signal, then SIGKILL when the time is up."""
        if self.process is None or self.process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        try:
            await asyncio.wait_for(self.process.wait(), timeout_s)
        except TimeoutError:
            log.warning("%s did not stop in %.0f s and is killed", self.name, timeout_s)
            self.process.kill()
            await self.process.wait()


@dataclass
class Door:
    """One process of a coordinator."""

    options: CoordinatorOptions
    child: Child
    scheme: str = "http"
    shared: Sequence[socket.socket] = ()
    """Of the ports that it shares: open as long as it may be started again."""

    async def start(self, *others: object) -> None:
        """Raises BatonError when it does not come up. Started again, it has the ports that it got now."""
        read_fd, write_fd = os.pipe()
        self.child.words = ["coordinator", *words_of(self.options, *others), "--announce-fd", str(write_fd)]
        await self.child.start(pass_fds=[write_fd])
        os.close(write_fd)
        with os.fdopen(read_fd) as pipe:
            announced = await asyncio.wait_for(asyncio.to_thread(pipe.read), ANNOUNCE_TIMEOUT_S)
        if not announced:
            raise BatonError(f"the {self.child.name} did not start; its message is above")
        ports = json.loads(announced)
        self.options = dataclasses.replace(
            self.options, port=ports["http"], grpc_port=ports["grpc"], link_port=ports["link"], own_port=ports["own"]
        )
        self.child.words = ["coordinator", *words_of(self.options, *others)]

    @property
    def shared_url(self) -> str:
        """Where clients reach it, or another process of its coordinator."""
        return f"{self.scheme}://{self._reached(self.options.host)}:{self.options.port}"

    @property
    def base_url(self) -> str:
        """Where it alone is reached."""
        port = self.options.port if self.options.own_port < 0 else self.options.own_port
        return f"{self.scheme}://{self._reached(self.options.host)}:{port}"

    @property
    def grpc(self) -> str:
        return f"{self.options.host}:{self.options.grpc_port}"

    @property
    def link(self) -> str:
        return f"{self._reached(self.options.link_host)}:{self.options.link_port}"

    @staticmethod
    def _reached(host: str) -> str:
        """Where this machine reaches what listens there."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"[{host}]" if ":" in host else host


def doors(options: CoordinatorOptions, number: int, processes: int, scheme: str = "http") -> list[Door]:
    """Coordinators beside each other, each of so many processes; a port of 0 is a free one.

    Raises ConfigurationError when ports run out, or processes cannot share one.
    """
    if number < 1:
        raise ConfigurationError(f"--coordinators is {number}; it must be at least 1")
    if not 1 <= processes < PORT_STRIDE:
        raise ConfigurationError(f"--processes is {processes}; it must be 1 to {PORT_STRIDE - 1}")
    if options.monitor_port > 0 and number * processes > 1:
        raise ConfigurationError(
            "--monitor-port is one process's: with several coordinators or --processes, monitors ask each at its own "
            "HTTP port, or give --monitor-port 0"
        )
    if options.operator_port > 0 and number * processes > 1:
        raise ConfigurationError(
            "--operator-port is one process's: with several coordinators or --processes, leave it out, or give 0"
        )
    result: list[Door] = []
    for up in range(0, number * PORT_STRIDE, PORT_STRIDE):
        own = dataclasses.replace(
            options,
            port=options.port and options.port + up,
            grpc_port=options.grpc_port and options.grpc_port + up,
            link_port=options.link_port and options.link_port + up,
            parent_pid=os.getpid(),
        )
        validate(own)
        shared: list[socket.socket] = []
        if processes > 1:
            shared = [_hold(own.host, own.port, "--port"), _hold(own.host, own.grpc_port, "--grpc-port")]
            port, grpc_port = (each.getsockname()[1] for each in shared)
            own = dataclasses.replace(own, port=port, grpc_port=grpc_port)
        for process in range(processes):
            each = own
            if shared:
                own_port, link_port = options.port and own.port + 1 + process, own.link_port and own.link_port + process
                each = dataclasses.replace(own, own_port=own_port, link_port=link_port)
                validate(each)
            name = f"coordinator-{len(result)}" if number * processes > 1 else "coordinator"
            result.append(Door(each, Child(name, []), scheme, shared))
    return result


def _hold(host: str, port: int, flag: str) -> socket.socket:
    """A port for several processes: bound and listening to nobody, so that it stays theirs while they are away."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as alone:  # fails where anybody listens, be it to share
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(address)
            address = alone.getsockname()
        held = socket.socket(family, kind)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(address)
        return held
    except OSError as error:
        reason = error.strerror or error
        raise ConfigurationError(f"{flag} {port} on {host} cannot be opened: {reason}; choose another") from error


def words_of(*options: object) -> list[str]:
    return [word for each in options for word in to_arguments(each)]


def add_processes_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes", type=int, default=1,
        help="of each coordinator, behind its --port and --grpc-port; each also has an HTTP port of its own, the first "
        "the one after --port, where its /metrics are (default: 1)",
    )  # fmt: skip


async def watch(doors: Sequence[Door], restart: bool, stop: asyncio.Event) -> int:
    """Until asked to stop, or no process of any coordinator is left. The exit status."""
    keepers = [asyncio.create_task(door.child.keep(restart)) for door in doors]
    stopping, gone = asyncio.create_task(stop.wait()), asyncio.create_task(_no_door(doors))
    await asyncio.wait({gone, stopping}, return_when=asyncio.FIRST_COMPLETED)
    for task in [*keepers, stopping, gone]:
        task.cancel()
    if gone.done() and not stop.is_set():
        log.error("no coordinator is left")
        return 1
    return 0


async def _no_door(doors: Sequence[Door]) -> None:
    """Wait until no coordinator runs, be it for a moment."""
    while running := next((door.child for door in doors if door.child.is_running), None):
        await running.ended()


async def stop_doors(doors: Sequence[Door], number: signal.Signals) -> None:
    """Have them drain, all at once."""
    limits = [(door.child, door.options.drain_timeout_s + KILL_AFTER_S) for door in doors]
    await asyncio.gather(*(child.stop(limit_s, number) for child, limit_s in limits))
