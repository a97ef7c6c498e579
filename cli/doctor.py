"""`baton doctor`: what this host offers for moving KV blocks, and how fast each lane is, here or to another host.

baton doctor                                # this host: what it has, and every lane between two of its processes
baton doctor --serve 10.0.0.7:7777          # on one host ...
baton doctor --peer 10.0.0.7:7777           # ... and on another: every lane between the two
"""

import argparse
import contextlib
import json
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from baton.config import TlsOptions, from_arguments, parse_bytes, to_arguments
from baton.config import add_arguments as add_options
from baton.errors import ConfigurationError, TransferError
from baton.tls import inside
from cli.host_facts import Fact, host_facts
from kvtransfer.lanes.registry import LANES, Lane, parse_lanes
from kvtransfer.lanes.trial import Served, TrialServer, ask, measure

POOL_BYTES = 64 << 20
REPEAT = 7
LANE_BUDGET_S = 5.0
CHILD_START_S = 30.0
DEFAULT_LANES = ",".join(name for name in LANES if name != "fake")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--serve", metavar="HOST:PORT", help="be measured; HOST is where the other host reaches this one"
    )
    where.add_argument("--peer", metavar="HOST:PORT", help="measure every lane to the host that serves there")
    parser.add_argument("--lanes", default=DEFAULT_LANES, help="lanes to try (default: %(default)s)")
    parser.add_argument("--block-size", default="256KiB", help="of a KV block, where blocks are served")
    parser.add_argument("--folder", help="also look at this folder, as a place for KV blocks on a disk")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    add_options(parser, TlsOptions)
    parser.add_argument("--until-eof", action="store_true", help=argparse.SUPPRESS)  # of the process started here


def run(arguments: argparse.Namespace) -> int:
    tls = from_arguments(TlsOptions, arguments)
    lanes = parse_lanes(arguments.lanes, inside(tls))
    if arguments.serve:
        _serve(lanes, *host_and_port(arguments.serve), parse_bytes(arguments.block_size), arguments.until_eof)
        return 0
    if arguments.peer:
        host_and_port(arguments.peer)
        between, reports = f"this host and {arguments.peer}", _reports(lanes, ask(arguments.peer))
    else:
        words = ["--lanes", arguments.lanes, "--block-size", arguments.block_size, *to_arguments(tls)]
        with _child(words) as address:
            between, reports = "two processes of this host", _reports(lanes, ask(address))
    facts = host_facts(arguments.folder)
    if arguments.json:
        found = {"host": [fact._asdict() for fact in facts], "lanes": [report._asdict() for report in reports]}
        print(json.dumps(found, indent=2))
    else:
        _print(facts, reports, between)
    return 0 if any(report.gb_per_s for report in reports) else 1


def host_and_port(text: str) -> tuple[str, int]:
    """Raises ConfigurationError."""
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigurationError(f"'{text}' is no HOST:PORT, such as 10.0.0.7:7777")
    if host in ("0.0.0.0", "::"):
        raise ConfigurationError(f"'{text}' is every address of this host; write the one where the other reaches it")
    return host, int(port)


def _serve(lanes: Sequence[Lane], host: str, port: int, block_bytes: int, until_eof: bool) -> None:
    server = TrialServer(max(2, POOL_BYTES // max(1, block_bytes)), block_bytes)
    with contextlib.closing(server), contextlib.suppress(KeyboardInterrupt):
        address = server.start(lanes, host, port)
        print(f"serving until Ctrl-C; measure it with: baton doctor --peer {address}", flush=True)
        if until_eof:
            sys.stdin.read()
        else:
            signal.pause()


@contextlib.contextmanager
def _child(words: list[str]) -> Iterator[str]:
    """The serving side as a process of its own; yields its address. It ends when its standard input does."""
    command = [sys.executable, "-m", "cli.main", "doctor", "--serve", "127.0.0.1:0", "--until-eof", *words]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if child.stdout is None:
        raise RuntimeError("the serving process has no pipes")
    try:
        ready, _, _ = select.select([child.stdout], [], [], CHILD_START_S)
        line = child.stdout.readline() if ready else ""
        if not line:
            child.kill()
            raise ConfigurationError(
                child.communicate()[1].strip().removeprefix("baton doctor: ") or "it did not start"
            )
        yield line.split()[-1]
    finally:
        try:
            child.communicate(timeout=CHILD_START_S)  # closes its standard input
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()


class LaneReport(NamedTuple):
    """Figures of one lane; `problem` says why there are none."""

    lane: str
    gb_per_s: float | None = None
    memcpy_gb_per_s: float | None = None
    small_read_us: float | None = None
    problem: str = ""


def _reports(lanes: Sequence[Lane], served: Served) -> list[LaneReport]:
    return [_report(lane, served) for lane in lanes]


def _report(lane: Lane, served: Served) -> LaneReport:
    if lane.name not in served.endpoints:
        return LaneReport(
            lane.name, problem=served.unavailable.get(lane.name, "the other side was not asked to serve it")
        )
    try:
        figures = measure(lane, served, REPEAT, LANE_BUDGET_S)
    except (TransferError, ConfigurationError) as error:
        return LaneReport(lane.name, problem=str(error))
    return LaneReport(lane.name, figures.best_gbs, figures.memcpy_gbs, figures.small_us)


def _print(facts: Sequence[Fact], reports: Sequence[LaneReport], between: str) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="this host", title_justify="left")
    for column in ("what", "found", "what it means"):
        table.add_column(column)
    for fact in facts:
        table.add_row(fact.what, fact.found, fact.meaning)
    console.print(table)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"lanes between {between}", title_justify="left")
    for column in ("lane", "GB/s", "of one memcpy", "read of 4 KiB", "why not"):
        table.add_column(column, justify="left" if column in ("lane", "why not") else "right")
    memcpy = max((report.memcpy_gb_per_s or 0.0 for report in reports), default=0.0)  # the one least disturbed
    for report in reports:
        if report.gb_per_s is None:
            table.add_row(report.lane, "-", "-", "-", report.problem)
        else:
            share = report.gb_per_s / memcpy
            table.add_row(report.lane, f"{report.gb_per_s:.1f}", f"{share:.2f}", f"{report.small_read_us:.0f} us", "")
    console.print(table)
