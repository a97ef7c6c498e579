"""`baton trace`: one request's life as a waterfall, from the coordinator that had it.

admission  -          ▌                              0.4 ms
queue      prefill-0  ▌                              0.9 ms
prefill    prefill-0  ██████████                    61.0 ms
handover   decode-0    ─────██▌                     31.2 ms  wire 2.1 ms, wait 29.1 ms, 1.5 MiB shm
decode     decode-0             ██████████████████ 120.3 ms
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from baton.client import Client, ClientError
from cli.complete import add_server_arguments, client_of

WIDE = 120  # columns where the output is not a terminal
MIN_BAR, NOTES = 16, 45  # longer notes stand out at the right


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request_id", help="as in the answer, its X-Request-Id and the log")
    add_server_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def run(arguments: argparse.Namespace) -> int:
    trace = _found(arguments)
    if arguments.json:
        print(json.dumps(trace, indent=2))
        return 0
    columns = shutil.get_terminal_size((WIDE, 24)).columns if sys.stdout.isatty() else WIDE
    for line in waterfall(trace, columns, plain=(sys.stdout.encoding or "").lower() not in ("utf-8", "utf8")):
        print(line)
    return 0


def _found(arguments: argparse.Namespace) -> dict[str, Any]:
    """Each of the coordinators knows its own requests only. Raises ClientError."""
    urls = arguments.url.split(",")
    for number, url in enumerate(urls, 1):
        arguments.url = url
        client: Client
        with client_of(arguments) as client:
            try:
                return client.trace(arguments.request_id)
            except ClientError:
                if number == len(urls):
                    raise
    raise AssertionError("there is at least one")


def waterfall(trace: dict[str, Any], columns: int, plain: bool = False) -> Iterator[str]:
    """Lines for people, as long as `columns` unless notes are. `plain`: ASCII only."""
    total_s, spans = trace["total_s"], trace["spans"]
    first_s, tokens = trace["first_token_s"], trace["completion_tokens"]
    yield f"{trace['id']}  {trace['outcome']}"
    yield (
        f"{trace['model']} {trace['version']}, prompt {trace['prompt_tokens']} tokens, "
        f"completion {'-' if tokens is None else tokens} tokens, "
        f"first token {'-' if first_s is None else _duration(first_s)}, in all {_duration(total_s)}"
    )
    names = [span["name"] for span in spans]
    workers = [span.get("worker", "-") for span in spans]
    notes = [_note(span) for span in spans]
    left = max(map(len, names)) + 2 + max(map(len, workers)) + 2
    right = 2 + 9 + 2 + min(NOTES, max(map(len, notes)))
    width = max(MIN_BAR, columns - left - right)
    place = None
    for span, name, worker, note in zip(spans, names, workers, notes, strict=True):
        if "attempt" in span and place != (span["choice"], span["attempt"]):
            place = (span["choice"], span["attempt"])
            if len({each["choice"] for each in spans if "choice" in each}) > 1 or span["attempt"] > 1:
                yield f"choice {span['choice']}, attempt {span['attempt']}"
        bar = _bar(span, total_s, width, plain)
        took = _duration(span["end_s"] - span["start_s"])
        row = f"{name:<{max(map(len, names))}}  {worker:<{max(map(len, workers))}}  {bar:<{width}}  {took:>9}  {note}"
        yield row.rstrip()


def _bar(span: dict[str, Any], total_s: float, width: int, plain: bool) -> str:
    full, wait = ("#", "-") if plain else ("█", "─")
    scale = width / total_s if total_s > 0 else 0.0
    start: int = min(width - 1, int(span["start_s"] * scale))
    length: int = max(1, min(width - start, round((span["end_s"] - span["start_s"]) * scale)))
    if span["name"] != "handover":
        return " " * start + (wait if span["name"] == "queue" else full) * length
    # When blocks moved is not known, only for how long: what waits is drawn first.
    took_s = span["end_s"] - span["start_s"]
    on_wire = min(length, max(1, round(length * span["wire_s"] / took_s))) if took_s > 0 and span["wire_s"] else 0
    return " " * start + wait * (length - on_wire) + full * on_wire


def _note(span: dict[str, Any]) -> str:
    notes = []
    if span["name"] == "handover":
        wire, wait = _duration(span["wire_s"]), _duration(span["wait_s"])
        notes.append(f"wire {wire}, wait {wait}, {_size(span['bytes'])} {span['lane']}".rstrip())
    if span.get("cached_tokens"):
        notes.append(f"{span['cached_tokens']} tokens cached")
    if span.get("cause"):
        notes.append(f"given up: {span['cause'].replace('_', ' ')}")
    return ", ".join(notes)


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.1f} KiB"
