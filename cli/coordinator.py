"""`baton coordinator`: the front door as a process of its own."""

import argparse
import json
import os
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
from baton.processes import log_to_stderr
from cli.model import model_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, CoordinatorOptions, DiscoveryOptions, ModelOptions, TlsOptions, PublicTlsOptions)
    parser.add_argument("--announce-fd", type=int, default=-1, help="write the bound ports as JSON to this descriptor")


def run(arguments: argparse.Namespace) -> int:
    from coordinator.server import serve

    options = from_arguments(CoordinatorOptions, arguments)
    model = from_arguments(ModelOptions, arguments)
    discovery = from_arguments(DiscoveryOptions, arguments)
    tls, public_tls = from_arguments(TlsOptions, arguments), from_arguments(PublicTlsOptions, arguments)
    log_to_stderr("coordinator")

    def announce(ports: Any) -> None:
        if arguments.announce_fd >= 0:
            with os.fdopen(arguments.announce_fd, "w") as pipe:
                json.dump({"http": ports.http, "grpc": ports.grpc, "link": ports.link}, pipe)

    uvloop.run(serve(options, model, model_folder(model), announce, discovery, tls, public_tls))
    return 0
