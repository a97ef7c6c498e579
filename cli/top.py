"""`baton top`: the dashboard in a terminal, drawn anew every second. q ends it.

Where the output is no terminal, or with --once, it prints one frame: for logs and tickets.
"""

import argparse
import contextlib
import math
import os
import re
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from baton.client import Client, ClientError
from baton.errors import BatonError
from cli.complete import add_server_arguments, client_of

COLUMNS = (
    "worker", "role", "state", "KV pool", "used", "run", "wait", "in/s", "out/s", "step", "lanes", "faults",
)  # fmt: skip
"""in/s: prompt tokens computed; out/s: tokens generated."""
RIGHT = {"used", "run", "wait", "in/s", "out/s", "step", "faults"}
WIDE_ONLY, NARROW = {"in/s", "step", "lanes"}, 100
WIDE, HIGH = 160, 200
"""Of the frame where the output is no terminal."""
BAR = 12
TABLE_LINES, MIN_ROWS = 4, 8
"""Of the table besides its rows; rows that are worth more than what stands below them."""
MAX_ALERTS, MAX_LOSSES, MAX_EVENTS = 6, 4, 6
_LOST_S = 300.0
_LEVELS = {"bad": ("✕", "bold red"), "warn": ("▲", "yellow"), "info": ("○", "dim")}
_STAGES = {
    "waiting": "no worker", "queued": "queued", "prefill": "prefill", "hand_over": "hand-over", "decode": "decode",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server_arguments(parser)
    parser.add_argument("--once", action="store_true", help="print one frame and exit")
    parser.add_argument("--interval-s", type=float, default=1.0, help="between two frames (default: %(default)g)")


def run(arguments: argparse.Namespace) -> int:
    if not 0.1 <= arguments.interval_s < math.inf:
        raise BatonError(f"--interval-s is {arguments.interval_s:g}; it must be at least 0.1")
    with client_of(arguments) as client:
        if arguments.once or not (sys.stdout.isatty() and sys.stdin.isatty()):
            _print_once(client)
        else:
            _live(client, arguments.interval_s)
    return 0


def _print_once(client: Client) -> None:
    """Two looks, as there are no rates in one."""
    client.dashboard()
    time.sleep(1.0)
    console = Console() if sys.stdout.isatty() else Console(width=WIDE)
    console.print(frame(client.dashboard(), console.width, HIGH))


def _live(client: Client, interval_s: float) -> None:
    console = Console()
    feed = client.dashboard()
    with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        trouble = ""
        while True:
            body = frame(feed, console.width, console.height - 2)
            foot = Text(f" {trouble}" if trouble else " q quits", style="bold red" if trouble else "dim")
            live.update(Group(body, foot), refresh=True)
            if pressed(interval_s) in ("q", "Q", "\x03", "\x04"):
                return
            try:
                feed, trouble = client.dashboard(), ""
            except ClientError as error:
                if error.status in (401, 403):
                    raise
                trouble = f"no answer: {error} (shown: {time.time() - feed['at']:.0f} s ago)"


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """Gives a function that waits so many seconds for a key; "" if none was pressed."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def pressed(timeout_s: float) -> str:
        readable, _, _ = select.select([descriptor], [], [], timeout_s)
        return os.read(descriptor, 1).decode(errors="replace") or "q" if readable else ""

    try:
        tty.setcbreak(descriptor)
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


# One frame, a function of the feed


def frame(feed: Mapping[str, Any], width: int, height: int) -> RenderableType:
    """At most `height` lines: what there is no room for is counted."""
    above = [_head(feed), *_alerts(feed), Text(), *_figures(feed), _stages(feed)]
    room = height - len(above) - TABLE_LINES
    below = [*_losses(feed), *_events(feed)][: max(0, room - min(MIN_ROWS, len(feed["workers"]) + 1))]
    return Group(*above, _workers(feed, width, max(2, room - len(below))), *below)


def plain(text: str) -> str:
    """Without what a terminal would obey: names and messages come from other machines."""
    return "".join(each if each.isprintable() else "?" for each in text)


def _line(*parts: tuple[str, str]) -> Text:
    line = Text.assemble(*((plain(text), style) for text, style in parts))
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _head(feed: Mapping[str, Any]) -> Text:
    up = duration(feed["at"] - feed["started"])
    at = time.strftime("%H:%M:%S", time.localtime(feed["at"]))
    return _line(
        (f" {feed['model']} ", "bold reverse"), (f" {feed['state']} · up {up} · routed by ", ""),
        (f"{feed['routing']['policy']} · baton {feed['version']} · {at}", ""),
    )  # fmt: skip


def _alerts(feed: Mapping[str, Any]) -> list[Text]:
    alerts = feed["alerts"]
    if not any(alert["level"] in ("bad", "warn") for alert in alerts):
        alerts = [{"level": "well", "text": "All well."}, *alerts]
    marks = _LEVELS | {"well": ("✓", "green")}
    lines = [_line((f" {marks[each['level']][0]} {each['text']}", marks[each["level"]][1])) for each in alerts]
    rest = len(lines) - MAX_ALERTS
    return lines[:MAX_ALERTS] + ([_line((f"   and {rest} more", "dim"))] if rest > 0 else [])


def _figures(feed: Mapping[str, Any]) -> list[Text]:
    recent, blocks = feed["recent"], [worker["blocks"] for worker in feed["workers"]]
    total = sum(each["total"] for each in blocks)
    used = sum(each["held"] + each["leased"] for each in blocks)
    ttft, itl = recent["latencies"]["ttft"], recent["latencies"]["itl"]
    refused = sum(recent["refused"].values())
    now = (
        ("output", "–" if recent["tokens_per_s"] is None else f"{recent['tokens_per_s']:,.0f} tok/s"),
        ("KV in use", f"{used / total:.0%}" if total else "–"),
        ("refused", f"{refused:.0f}"),
    )
    lately = (
        ("first token", f"{duration(ttft['p50'])}, p99 {duration(ttft['p99'])}"),
        ("between tokens", f"{duration(itl['p50'])}, p99 {duration(itl['p99'])}"),
    )
    return [
        _line(*(piece for name, value in parts for piece in ((f" {name} ", "dim"), (f"{value}  ", "bold"))), end)
        for parts, end in ((now, ("", "")), (lately, (f"last {recent['window_s']:.0f} s", "dim")))
    ]


def _stages(feed: Mapping[str, Any]) -> Text:
    stages, parts = feed["on_their_way"]["stages"], []
    for name, words in _STAGES.items():
        style = "bold red" if name == "waiting" and stages[name] else "bold" if stages[name] else "dim"
        parts += [(f" {words} ", "dim"), (str(stages[name]), style), (" →", "dim")]
    return _line(
        *parts, (" completed ", "dim"), (f"{feed['recent']['requests'].get('completed', 0):.0f}", "bold green")
    )


def _workers(feed: Mapping[str, Any], width: int, room: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), expand=False)
    columns = [name for name in COLUMNS if width >= NARROW or name not in WIDE_ONLY]
    for name in columns:
        table.add_column(name, justify="right" if name in RIGHT else "left", no_wrap=True)
    there = {worker["id"] for worker in feed["workers"]}
    gone = {
        loss["worker"]: loss for loss in reversed(feed["losses"])
        if loss["died"] and loss["worker"] not in there and feed["at"] - loss["at"] < _LOST_S
    }  # fmt: skip
    lines = [_lost_row(loss, feed["at"]) for loss in gone.values()]
    lines += [_row(worker) for worker in sorted(feed["workers"], key=_order)]
    hidden = len(lines) - room + feed["num_workers"] - len(feed["workers"])
    for line in lines if hidden <= 0 else lines[: room - 1]:
        table.add_row(*(line.get(name, "") for name in columns))
    if hidden > 0:
        table.add_row(Text(f"+{hidden + 1} more", style="dim"))
    return table


def _order(worker: Mapping[str, Any]) -> tuple[bool, str, list[tuple[int, str]]]:
    """Trouble first; then prefill before decode, and worker 9 before worker 10."""
    calm = worker["state"] == "ready" and worker["breaker"] == "closed"
    number = [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", worker["id"])]
    return calm, "mixed" if len(worker["roles"]) > 1 else {"prefill": "a", "decode": "z"}[worker["roles"][0]], number


def _lost_row(loss: Mapping[str, Any], now: float) -> dict[str, Text | str]:
    state = Text(f"✕ lost {duration(now - loss['at'])} ago", style="bold red")
    return {"worker": Text(plain(loss["worker"])), "role": "+".join(loss["roles"]), "state": state}


def _row(worker: Mapping[str, Any]) -> dict[str, Text | str]:
    blocks, rates = worker["blocks"], worker["rates"]
    used = blocks["held"] + blocks["leased"] + blocks["quarantined"]
    faults = sum(worker["faults"].values())
    return {
        "worker": Text(plain(worker["id"])),
        "role": "mixed" if len(worker["roles"]) > 1 else worker["roles"][0],
        "state": _state(worker),
        "KV pool": _bar(blocks),
        "used": f"{used / max(1, blocks['total']):.0%}",
        "run": str(worker["running"]),
        "wait": str(worker["waiting"]),
        "in/s": _rate(rates["prompt_tokens_computed"]),
        "out/s": _rate(rates["generated_tokens"]),
        "step": duration(worker["measured"]["step_s"] or None),
        "lanes": Text(plain(", ".join(sorted(set(worker["lanes_in_use"].values()))) or "–")),
        "faults": Text(f"{faults:.0f}", style="yellow" if faults else "dim"),
    }


def _state(worker: Mapping[str, Any]) -> Text:
    if worker["breaker"] != "closed":
        return Text(f"▲ breaker {worker['breaker'].replace('_', '-')}", style="yellow")
    return (
        Text("● ready", style="green") if worker["state"] == "ready" else Text(f"◐ {worker['state']}", style="yellow")
    )


def _bar(blocks: Mapping[str, int]) -> Text:
    """Held and leased full, quarantined crossed, cached shaded, free dotted."""
    total, bar = max(1, blocks["total"]), Text()
    for number, sign, style in (
        (blocks["held"], "█", "cyan"), (blocks["leased"], "▓", "magenta"), (blocks["quarantined"], "╳", "red"),
        (blocks["cached"], "░", "blue"),
    ):  # fmt: skip
        bar.append(sign * min(BAR - len(bar), math.ceil(BAR * number / total)), style)
    return bar.append("·" * (BAR - len(bar)), "dim")


def _losses(feed: Mapping[str, Any]) -> list[Text]:
    lines = []
    for loss in feed["losses"][:MAX_LOSSES]:
        ended = [f"{number} {outcome}" for outcome, number in loss["ended"].items()]
        going = [f"{loss['running']} going on"] if loss["running"] else []
        fate = f"{loss['requests']} requests: {', '.join(ended + going)}" if loss["requests"] else "no requests"
        at = time.strftime("%H:%M:%S", time.localtime(loss["at"]))
        mark, style = ("✕", "red") if loss["died"] else ("○", "dim")
        lines.append(_line((f" {at} ", "dim"), (f"{mark} {loss['worker']}", style), (f" {loss['reason']}; {fate}", "")))
    return [_line((" Workers that went", "dim")), *lines] if lines else []


def _events(feed: Mapping[str, Any]) -> list[Text]:
    styles = {"warning": "yellow", "error": "red"}
    lines = [
        _line(
            (f" {time.strftime('%H:%M:%S', time.localtime(each['at']))} ", "dim"),
            (each["text"] + (f" (×{each['times']})" if each["times"] > 1 else ""), styles.get(each["level"], "")),
        )
        for each in feed["journal"][:MAX_EVENTS]
    ]
    return [_line((" Events", "dim")), *lines] if lines else []


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Short, with its unit."""
    if seconds is None:
        return "–"
    for limit, factor, unit in ((0.9995, 1e3, "ms"), (120, 1, "s"), (7200, 1 / 60, "min"), (172800, 1 / 3600, "h")):
        if seconds < limit:
            value = seconds * factor
            return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 or unit == 'min' else 2}f} {unit}"
    return f"{seconds / 86400:.0f} d"
