"""`baton drain`: workers finish what they run, take nothing new, and end. Behind a rolling upgrade."""

import argparse
import time

from baton.client import Client, ClientError
from baton.errors import BatonError, ConfigurationError
from cli.complete import add_server_arguments, client_of

POLL_S = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workers", nargs="*", metavar="WORKER_ID", help="as in `baton status`")
    parser.add_argument("--version", dest="model_version", default="", metavar="LABEL", help="all of a model version")
    add_server_arguments(parser)
    parser.add_argument("--wait", action="store_true", help="until they have ended")
    parser.add_argument(
        "--timeout-s", type=float, default=900.0, help="longest that --wait takes (default: %(default)g)"
    )


def run(arguments: argparse.Namespace) -> int:
    if bool(arguments.workers) == bool(arguments.model_version):
        raise ConfigurationError("name workers, or give --version")
    with client_of(arguments) as client:
        told = client.drain(arguments.workers, arguments.model_version)
        print(f"draining: {', '.join(told['draining'])}")
        if not told["left"]:
            print("no worker that decodes is left: new requests are refused until one comes")
        if arguments.wait:
            _wait(client, told["draining"], arguments.timeout_s)
    return 0


def _wait(client: Client, lives: dict[str, str], timeout_s: float) -> None:
    """`lives`: incarnations by worker; one that was started anew has ended before. Raises BatonError."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            there = {worker["id"]: worker for worker in client.status()["workers"]}
        except ClientError as error:
            if error.status:
                raise
            there = None  # the coordinator may be back soon
        if there is not None:
            left = [id for id, life in lives.items() if id in there and there[id]["incarnation"] == life]
            if not left:
                print("ended: " + ", ".join(lives))
                return
        if time.monotonic() > deadline:
            raise BatonError(f"not ended after {timeout_s:g} s: {', '.join(lives)}; see `baton status`")
        time.sleep(POLL_S)
