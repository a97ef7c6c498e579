"""`baton status`: one row a worker, or everything as JSON. Blocks are those in use of all there are."""

import argparse
import json
import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from cli.complete import add_server_arguments, client_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


COLUMNS = (
    "worker",
    "role",
    "version",
    "software",
    "state",
    "pid",
    "blocks",
    "cached",
    "leased",
    "quar.",
    "run",
    "wait",
    "lanes",
)
WIDE = 200  # columns where the output is not a terminal: nothing is cut short for a program


def _row(worker: dict[str, Any]) -> list[str]:
    blocks = worker["blocks"]
    in_use = blocks["total"] - blocks["free"] - blocks["cached"]
    return [
        worker["id"],
        "mixed" if len(worker["roles"]) > 1 else worker["roles"][0],
        worker["model_version"],
        worker["software"] or "-",
        worker["state"],
        str(worker["pid"]),
        f"{in_use}/{blocks['total']}",
        str(blocks["cached"]),
        str(blocks["leased"]),
        str(blocks["quarantined"]),
        str(worker["running"]),
        str(worker["waiting"]),
        ", ".join(f"{peer}: {lane}" for peer, lane in sorted(worker["lanes_in_use"].items())) or "-",
    ]


def _share(version: dict[str, Any]) -> str:
    if version["shadow"]:
        return f"shadow of {version['shadow']:.2%}"
    if version["weight"] is not None:
        return f"weight {version['weight']:g}"
    return "serves what no weight covers" if version["serves_unweighted"] else "no weight"


def run(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        status = client.status()
    if arguments.json:
        print(json.dumps(status, indent=2))
        return 0
    print(f"{status['model']}: {status['state']}, {status['requests']} requests running")
    if len(status["versions"]) > 1 or any(row["weight"] is not None or row["shadow"] for row in status["versions"]):
        for row in status["versions"]:
            print(f"version {row['version']}: {_share(row)}, {row['workers']} workers, {row['draining']} draining")
    if status["rollout_trouble"]:
        print(f"the --rollout file is broken, what it said before is in force: {status['rollout_trouble']}")
    table = Table(*COLUMNS, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for worker in sorted(status["workers"], key=lambda worker: str(worker["id"])):
        table.add_row(*_row(worker))
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)
    return 0
