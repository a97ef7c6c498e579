"""`baton top`: one frame of the feed, the live view on a terminal, and what it says when there is nothing to see."""

import copy
import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fleet import ROOT, Fleet
from rich.console import Console

from cli.top import duration, frame

WORKER: dict[str, Any] = {
    "id": "decode-0", "pid": 7, "roles": ["decode"], "address": "127.0.0.1", "model_version": "v", "software": "",
    "state": "ready", "breaker": "closed", "running": 3, "waiting": 1, "streams": 3, "waiting_prefill_tokens": 0,
    "blocks": {"total": 100, "free": 40, "cached": 20, "held": 30, "leased": 5, "quarantined": 5},
    "measured": {"step_s": 0.025}, "lanes_in_use": {"prefill-0": "shm"}, "tiers": {},
    "rates": {"generated_tokens": 120.0, "prompt_tokens_computed": None, "handover_bytes_received": 0.0},
    "faults": {"handover_failures": 2.0},
}  # fmt: skip
HISTOGRAM = {"bounds": [1.0], "counts": [0, 0], "p50": 0.0521, "p90": 0.1, "p99": 2.5}
FEED: dict[str, Any] = {
    "model": "demo", "state": "ready", "version": "0.1.0", "at": 1000.0, "started": 400.0, "requests": 3,
    "routing": {"policy": "cost_based"}, "num_workers": 1, "workers": [WORKER],
    "alerts": [{"level": "warn", "text": "decode-1 died 12 s ago"}],
    "on_their_way": {
        "stages": {"waiting": 1, "queued": 0, "prefill": 2, "hand_over": 0, "decode": 3}, "shown": [],
    },
    "recent": {
        "window_s": 60.0, "tokens_per_s": 321.0, "requests": {"completed": 9}, "refused": {"overloaded": 4},
        "latencies": dict.fromkeys(("ttft", "itl", "request"), HISTOGRAM),
    },
    "losses": [
        {"worker": "decode-1", "roles": ["decode"], "pid": 8, "at": 988.0, "died": True, "reason": "its link closed",
         "requests": 5, "ended": {"completed": 4}, "running": 1},
    ],
    "journal": [{"at": 988.0, "level": "warning", "text": "worker decode-1 lost", "times": 1}],
}  # fmt: skip


def drawn(feed: dict[str, Any], width: int = 140, height: int = 40) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(frame(feed, width, height))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_frame_says_what_matters() -> None:
    text = drawn(FEED)
    for wanted in (
        "demo", "up 10.0 min", "▲ decode-1 died 12 s ago", "321 tok/s", "52.1 ms, p99 2.50 s", "KV in use 35%",
        "refused 4", "no worker 1 →", "prefill 2 →", "completed 9", "✕ lost 12.0 s ago", "decode-0", "40%", "25.0 ms",
        "shm", "5 requests: 4 completed, 1 going on", "worker decode-1 lost",
    ):  # fmt: skip
        assert wanted in text, f"{wanted} is not in\n{text}"
    assert "████▓╳░░░" in text


def test_a_frame_fits_the_terminal_and_counts_what_it_leaves_out() -> None:
    feed = copy.deepcopy(FEED)
    feed["workers"] = [{**WORKER, "id": f"decode-{number}"} for number in range(200)]
    feed["num_workers"] = 700
    for width, height in ((80, 24), (120, 50)):
        lines = drawn(feed, width, height).splitlines()
        assert len(lines) <= height
        assert all(len(line) <= width for line in lines)
        assert not any("…" in line for line in lines)
        (left_out,) = [line for line in lines if line.startswith(" +")]
        shown = sum(line.startswith(" decode-") and "ready" in line for line in lines)
        assert left_out.split() == [f"+{700 - shown}", "more"]


def test_names_cannot_command_the_terminal_nor_its_styles() -> None:
    feed = copy.deepcopy(FEED)
    feed["workers"][0]["id"] = "\x1b[2Jdecode[bold]"
    feed["losses"][0]["worker"] = "\x1b]0;title\x07[red]"
    feed["alerts"][0]["text"] = "\x1b[31mbad"
    text = drawn(feed)
    assert "\x1b" not in text
    assert "?[2Jdecode[bold]" in text
    assert "?]0;title?[red]" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"), (0.0004, "0.40 ms"), (0.0123, "12.3 ms"), (0.99999, "1.00 s"), (119.6, "120 s"), (600, "10.0 min"),
        (7000, "117 min"), (90000, "25.0 h"), (9e5, "10 d"),
    ],
)  # fmt: skip
def test_durations_have_their_unit(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def command(*words: str) -> list[str]:
    return [sys.executable, "-P", "-m", "cli.main", "top", *words]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def test_without_a_terminal_it_prints_one_frame(tmp_path: Path) -> None:
    with Fleet(tmp_path) as fleet:
        fleet.fakes("d", "decode")
        done = subprocess.run(command("--url", fleet.url), capture_output=True, text=True, env=ENVIRONMENT, timeout=30)
        assert done.returncode == 0, done.stderr
        assert "d-decode-0" in done.stdout
        assert "● ready" in done.stdout
        assert "\x1b" not in done.stdout
        _live_until_q(fleet)


def _live_until_q(fleet: Fleet) -> None:
    """It draws again and again, and q ends it with the terminal as it was."""
    master, slave = pty.openpty()
    words = command("--url", fleet.url, "--interval-s", "0.2")
    process = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, env={**ENVIRONMENT, "TERM": "xterm"})
    os.close(slave)
    try:
        _read_until(master, b"d-decode-0")
        fleet.fakes("late", "decode")
        _read_until(master, b"late-decode-0")
        os.write(master, b"q")
        rest = _read_until(master, b"\x1b[?1049l")  # the screen before it
        assert b"Traceback" not in rest
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait(10)
        os.close(master)


def _read_until(descriptor: int, wanted: bytes, timeout_s: float = 20.0) -> bytes:
    seen, deadline = b"", time.monotonic() + timeout_s
    while wanted not in seen:
        assert select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0], seen[-2000:]
        seen += os.read(descriptor, 65536)
    return seen


def test_where_nobody_answers_it_says_so() -> None:
    done = subprocess.run(
        command("--url", "http://127.0.0.1:9"), capture_output=True, text=True, env=ENVIRONMENT, timeout=30
    )
    assert done.returncode == 1
    assert done.stderr.startswith("baton top: ")
    assert json.dumps(done.stderr).count("\\n") == 1
