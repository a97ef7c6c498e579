"""`baton coordinator`: the front door as a process of its own."""

import argparse
import asyncio
import json
import logging
import os
import signal
from typing import Any

import uvloop

from baton.config import (
    CoordinatorOptions,
    DiscoveryOptions,
    ModelOptions,
    PublicTlsOptions,
    TlsOptions,
    from_arguments,
)
from baton.config import add_arguments as add_options
from baton.processes import log_to_stderr, stop_signals, watch_parent
from cli.doors import add_processes_argument, doors, stop_doors, watch
from cli.model import model_folder

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, CoordinatorOptions, DiscoveryOptions, ModelOptions, TlsOptions, PublicTlsOptions)
    add_processes_argument(parser)
    parser.add_argument("--announce-fd", type=int, default=-1, help="write the bound ports as JSON to this descriptor")


def run(arguments: argparse.Namespace) -> int:
    options = from_arguments(CoordinatorOptions, arguments)
    model = from_arguments(ModelOptions, arguments)
    discovery = from_arguments(DiscoveryOptions, arguments)
    tls, public_tls = from_arguments(TlsOptions, arguments), from_arguments(PublicTlsOptions, arguments)
    log_to_stderr("coordinator")
    if arguments.announce_fd >= 0:
        os.set_inheritable(arguments.announce_fd, False)  # who reads it waits until nobody has it any more
    if arguments.processes != 1:
        return uvloop.run(_processes(options, arguments, discovery, model, tls, public_tls))
    from coordinator.server import serve

    def announce(ports: Any) -> None:
        if arguments.announce_fd >= 0:
            with os.fdopen(arguments.announce_fd, "w") as pipe:
                json.dump({"http": ports.http, "grpc": ports.grpc, "link": ports.link, "own": ports.own}, pipe)

    uvloop.run(serve(options, model, model_folder(model, weights=False), announce, discovery, tls, public_tls))
    return 0


async def _processes(options: CoordinatorOptions, arguments: argparse.Namespace, *others: object) -> int:
    """Several behind one port, of which each is started again when it dies."""
    stop, fronts = stop_signals(), doors(options, 1, arguments.processes)
    watch_parent(options.parent_pid, stop.set)
    try:
        await asyncio.gather(*(front.start(*others) for front in fronts))
        if arguments.announce_fd >= 0:
            with os.fdopen(arguments.announce_fd, "w") as pipe:
                first, links = fronts[0].options, [front.options.link_port for front in fronts]
                own = [front.options.own_port for front in fronts]
                json.dump({"http": first.port, "grpc": first.grpc_port, "link": links, "own": own}, pipe)
        log.info("workers find them at --coordinator %s", ",".join(front.link for front in fronts))
        return await watch(fronts, True, stop)
    finally:
        await stop_doors(fronts, stop.by or signal.SIGINT)
