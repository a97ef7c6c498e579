"""`baton bench`: send load to a server, and say what its users would see. `baton bench compare`: two runs."""

import argparse
import asyncio
import contextlib
import json
import math
import random
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvloop
from rich import box
from rich.console import Console
from rich.table import Table

from baton.client import read_api_key
from baton.config import add_arguments as add_options
from baton.config import from_arguments
from baton.errors import BatonError
from baton.files import replace_file, writable_folder
from baton.processes import log_to_stderr
from cli.bench.asking import Asking
from cli.bench.compare import compared, gates, settings_that_differ
from cli.bench.content import prepare
from cli.bench.files import Asked, read
from cli.bench.frames import Job, Target
from cli.bench.measuring import percent_name
from cli.bench.options import (
    DEFAULT_SECONDS,
    DEFAULT_STREAMS,
    LoadOptions,
    OutputOptions,
    WorkloadOptions,
    check,
    is_grpc,
    parse_body,
    parse_objectives,
    parse_percentiles,
)
from cli.bench.progress import ProgressBar
from cli.bench.report import page
from cli.bench.results import load_result, result_of
from cli.bench.running import Outcome
from cli.bench.running import run as run_clients
from cli.bench.server import api_key, asked
from cli.complete import add_server_arguments

WIDE = 140
NAMES = {
    "ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E", "client_queue_time": "queue in the client",
    "e2el_including_client_queue": "E2E with that queue",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Send load to a server that speaks OpenAI's API (http://, https://) or Baton's gRPC (grpc://), and say what "
        "its users would see: throughput, TTFT, time per token, goodput, errors. Definitions and JSON are those of "
        "`vllm bench serve`; see docs/bench.md."
    )
    add_server_arguments(parser)
    add_options(parser, LoadOptions, WorkloadOptions, OutputOptions)
    parser.add_argument(
        "--goodput", nargs="+", default=[], metavar="NAME:MS",
        help="objectives, such as ttft:500 tpot:50 e2el:20000: requests that kept all of them are counted",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="bench_command", metavar="")
    comparing = commands.add_parser("compare", help="two results beside each other")
    comparing.add_argument("before", help="what --json wrote, here or from `vllm bench serve --save-result`")
    comparing.add_argument("after", help="the same of the run that is judged")
    comparing.add_argument(
        "--fail-if", nargs="+", default=[], metavar="NAME:RATIO",
        help="exit with 1 when a figure is worse than RATIO times the first one's, such as p99_ttft_ms:1.1 (more than "
        "that fails) or request_throughput:0.95 (less fails)",
    )  # fmt: skip
    reporting = commands.add_parser("report", help="the page of --html, from what --json wrote")
    reporting.add_argument("result")
    reporting.add_argument("page", help="file to write")


def run(arguments: argparse.Namespace) -> int:
    if arguments.bench_command == "compare":
        return _compare(arguments)
    if arguments.bench_command == "report":
        replace_file(Path(arguments.page), page(load_result(arguments.result)))
        return 0
    log_to_stderr("bench")
    load, workload = from_arguments(LoadOptions, arguments), from_arguments(WorkloadOptions, arguments)
    output = from_arguments(OutputOptions, arguments)
    url = arguments.url.rstrip("/").removesuffix("/v1")  # as other tools want it
    check(url, load, workload, output)
    objectives = parse_objectives(arguments.goodput)
    for path in filter(None, (output.json, output.html)):
        writable_folder(Path(path).absolute().parent)  # says so before the run, not after it
    key = read_api_key(arguments.api_key_file) if arguments.api_key_file else api_key()
    target = Target(url, arguments.ca, arguments.client_cert, arguments.client_key, f"Bearer {key}" if key else "")
    result = uvloop.run(_measure(target, load, workload, output, objectives))
    if output.json:
        replace_file(Path(output.json), json.dumps(result, allow_nan=False) + "\n")
    if output.html:
        replace_file(Path(output.html), page(result))
    _print(result, output)
    if result["baton"]["interrupted"]:
        return 130
    return 0 if result["completed"] else 1


async def _measure(
    target: Target, load: LoadOptions, workload: WorkloadOptions, output: OutputOptions, objectives: dict[str, float]
) -> dict[str, Any]:
    if not (load.requests or load.duration_s or workload.file):
        load = replace(load, duration_s=DEFAULT_SECONDS)
    of_file: list[Asked] | None = None
    facts: dict[str, Any] = {"url": target.url, "command": shlex.join(["baton", *sys.argv[1:]])}
    if workload.file:
        what = await asyncio.to_thread(read, workload.file, workload.longest, workload.output_tokens)
        of_file = what.asked
        facts |= {"file_kind": what.kind, "file_requests": len(what.asked), "file_left_out": what.left_out}
    is_closed = not load.rate and (of_file is None or of_file[0].at_s is None)
    if is_closed and not load.concurrency:
        load = replace(load, concurrency=DEFAULT_STREAMS)
        check(target.url, load, workload, output)
    seed = load.seed if load.seed >= 0 else random.SystemRandom().getrandbits(31)
    asking = Asking(
        is_grpc(target.url), workload.api == "chat", workload.model, not workload.stop_at_eos, parse_body(workload.body)
    )
    asking.check()
    async with asked(target, asking) as server:
        if not asking.model:
            asking.model = await server.first_model()
        prepared = await prepare(seed, workload.tokenizer, server.tokenize, server.count)
    facts |= {
        "model": asking.model, "seed": seed, "streams": load.concurrency, "open_loop": not is_closed,
        "prompt_lengths": prepared.source,
    }  # fmt: skip
    jobs = [
        Job(number, target, load, workload, asking, prepared.content, seed, output.detailed)
        for number in range(load.clients)
    ]
    outcome = await _run(jobs, load, len(of_file) if of_file else 0)
    return result_of(outcome, load, workload, output, objectives, facts)


async def _run(jobs: list[Job], load: LoadOptions, of_file: int) -> Outcome:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None

    def interrupted() -> None:
        if stop.is_set():
            task.cancel()  # asked twice: nothing is waited for any more
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted)
    rate = load.rate if math.isfinite(load.rate) else 0.0
    requests = 0 if load.duration_s and (rate or not load.requests) else load.requests or of_file
    try:
        with ProgressBar(requests, load.duration_s) as bar:
            return await run_clients(jobs, stop, bar.show, load.request_timeout_s if load.warmup else 0.0)
    except asyncio.CancelledError:
        raise BatonError("interrupted twice: nothing was written") from None
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):
                loop.remove_signal_handler(number)


# -- Printing --------------------------------------------------------------------------------------------------------


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=WIDE)


def _print(result: dict[str, Any], output: OutputOptions) -> None:
    console, own = _console(), result["baton"]
    percents = parse_percentiles(output.percentiles)
    top = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in _headline(result):
        top.add_row(name, value)
    console.print(top)
    table = Table(box=box.SIMPLE, title="latencies, ms", title_justify="left")
    for column in ("", "mean", *(percent_name(each) for each in percents)):
        table.add_column(column, justify="right" if column else "left")
    for name, title in NAMES.items():
        if f"mean_{name}_ms" in result:
            cells = [result[f"{each}_{name}_ms"] for each in ("mean", *map(percent_name, percents))]
            table.add_row(title, *(f"{each:,.2f}" for each in cells))
    console.print(table)
    for kind, number in own["errors"].items():
        example = own["error_examples"].get(kind, "")
        console.print(f"{number} x {kind}" + (f": {example}" if example else ""), markup=False, highlight=False)
    for line in own["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {line}", highlight=False)
    for path in filter(None, (output.json, output.html)):
        console.print(f"wrote {path}", highlight=False)


def _headline(result: dict[str, Any]) -> list[tuple[str, str]]:
    own = result["baton"]
    health = own["health"]
    failed = f", {result['failed']} failed" + (f" ({own['refused']} refused with 429)" if own["refused"] else "")
    rows = [
        ("requests", f"{result['completed']} completed{failed} in {result['duration']:.1f} s"),
        ("throughput", f"{result['request_throughput']:.2f} requests/s, {result['output_throughput']:,.0f} tokens/s "
                       f"out, {result['total_token_throughput']:,.0f} in and out"),
        ("tokens", f"{result['total_input_tokens']:,} in, {result['total_output_tokens']:,} out in "
                   f"{own['events']:,} events"),
        ("most at once", f"{result['max_concurrent_requests']}"),
    ]  # fmt: skip
    if result["request_goodput"] is not None:
        bounds = ", ".join(f"{NAMES[name]} <= {bound:g} ms" for name, bound in own["objectives_ms"].items())
        share = result["request_goodput"] / result["request_throughput"] if result["request_throughput"] else 0.0
        rows.insert(2, ("goodput", f"{result['request_goodput']:.2f} requests/s ({share:.1%}) with {bounds}"))
    settings = own["settings"]
    if settings.get("file"):
        left_out = f", {settings['file_left_out']:,} longer ones left out" if settings["file_left_out"] else ""
        rows.insert(0, ("file", f"{settings['file_kind']}: {settings['file_requests']:,} requests{left_out}"))
    share = max(health["cpu_share"], default=0.0)
    said = f"{share:.0%} of a core, p99 of its loop's lag {health['p99_lag']:.1f} ms"
    if settings.get("open_loop") and "mean_client_queue_time_ms" not in result:
        said += f", p99 of how late it sent {health['p99_send_delay']:.1f} ms"
    rows.append(("client", said))
    return rows


def _compare(arguments: argparse.Namespace) -> int:
    before, after = load_result(arguments.before), load_result(arguments.after)
    rows = compared(before, after)
    judged = gates(arguments.fail_if, rows)
    console = _console()
    table = Table(box=box.SIMPLE)
    for column in ("", "A", "B", "B / A", ""):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        colour = {"better": "green", "worse": "red", "": ""}[row.verdict]
        table.add_row(row.name, f"{row.before:,.4g}", f"{row.after:,.4g}", ratio, row.verdict, style=colour)
    console.print(f"A  {arguments.before}  {before.get('label', '')}\nB  {arguments.after}  {after.get('label', '')}",
                  markup=False, highlight=False)  # fmt: skip
    console.print(table)
    for line in settings_that_differ(before, after):
        console.print(f"asked differently: {line}", markup=False, highlight=False)
    failed = [gate for gate in judged if gate.failed]
    for gate in judged:
        console.print(f"{'FAILED' if gate.failed else 'kept'}  {gate}", markup=False, highlight=False)
    return 1 if failed else 0
