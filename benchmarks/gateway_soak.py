"""Whether a coordinator keeps anything of requests that are over: its memory and descriptors over 100,000 of them.

    python -m benchmarks.gateway_soak [--requests 100000] [--streams 64] [--quick] [--json FILE]

`baton coordinator` before `baton fake`. The requests are of every kind that takes another way: one choice and several,
logprobs, stop strings, usage; beside them clients hang up in the middle, and some ask for what is no request. Memory is
resident memory of the coordinator's process, beside what it is after the first tenth: by then all pools and caches
that grow with use have grown.
"""

import argparse
import contextlib
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from functools import partial
from typing import Any

from benchmarks.gateway import Side, baton, get, rss_mib, running
from benchmarks.report import Report, add_common_arguments
from benchmarks.sse_load import NUMBER, measure, request_of

WINDOW_S = 4.0
QUICK_REQUESTS = 5000
HANG_UP_EVERY_S = 0.05
GOAL = "<= 1.03"


def bodies() -> list[dict[str, Any]]:
    chat = {"model": "demo", "messages": [{"role": "user", "content": f"{NUMBER} Tell me a story."}], "max_tokens": 8}
    return [
        chat,
        chat | {"n": 2},
        chat | {"logprobs": True, "top_logprobs": 2},
        chat | {"stop": ["never", "ever"], "stream_options": {"include_usage": True}},
        chat | {"max_tokens": 1},
    ]


class Disturbance:
    """Clients that hang up after the first event, and clients that ask for nonsense, while the context is open."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.hung_up = self.refused = 0

    def __enter__(self) -> "Disturbance":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(10)

    def _run(self) -> None:
        request = request_of("127.0.0.1", self._port, bodies()[0] | {"max_tokens": 1000})
        while not self._over.wait(HANG_UP_EVERY_S):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 10) as client:
                client.sendall(request)
                if client.recv(1 << 12):
                    self.hung_up += 1
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self._port}/v1/completions", b'{"prompt": 7}', timeout=10)
            except urllib.error.HTTPError as error:
                error.close()
                self.refused += 1


def completed(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return round(sum(map(float, re.findall(r'baton_requests_total\{outcome="completed"\} (\S+)', text))))


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def idle(side: Side, pid: int, before: int) -> int:
    """Descriptors once everybody has hung up, at most so many as `before` if that is so within a few seconds."""
    deadline = time.monotonic() + 10
    while (now := descriptors(pid)) > before and time.monotonic() < deadline:
        time.sleep(0.1)
    return now


def soak(report: Report, num_requests: int, num_streams: int, window_s: float = WINDOW_S) -> None:
    """Memory is looked at after each `window_s`. Raises Unavailable or RuntimeError when the coordinator fails."""
    with running(partial(baton, "prefill+decode"), 0.0) as side:
        (pid,) = side.processes.gateway
        _load(side, num_streams, window_s)
        started, before = time.monotonic(), descriptors(pid)
        memory: list[tuple[int, float]] = []
        with Disturbance(side.port) as disturbance:
            done = completed(side.port)
            while done < num_requests:
                _load(side, num_streams, window_s)
                done = completed(side.port)
                memory.append((done, rss_mib(pid)))
        seconds = time.monotonic() - started
        report.row("requests completed", done, "requests")
        report.row("speed", done / seconds, "req/s")
        report.row("clients that hung up", disturbance.hung_up, "requests")
        report.row("clients that were refused", disturbance.refused, "requests")
        settled = next(mib for count, mib in memory if count >= num_requests / 10)
        for tenth in range(1, 11):
            count, mib = next(each for each in memory if each[0] >= num_requests * tenth / 10)
            goal = GOAL if tenth == 10 else None
            report.row(f"memory after {count}", mib, "MiB", f"{settled:.1f} after a tenth", mib / settled, goal)
        after = idle(side, pid, before)
        report.row("streams left", get(side.port, "/status")["streams"], "streams", None, None, "<= 0 streams")
        report.row("descriptors", after, "files", f"{before} before", after / before, "<= 1")


def _load(side: Side, num_streams: int, seconds: float) -> None:
    measure("127.0.0.1", side.port, bodies(), num_streams, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--requests", type=int, default=0, help=f"how many (100000; with --quick {QUICK_REQUESTS})")
    parser.add_argument("--streams", type=int, default=64, help="clients at the same time")
    arguments = parser.parse_args()
    num_requests = arguments.requests or (QUICK_REQUESTS if arguments.quick else 100_000)
    report = Report(f"A coordinator over {num_requests} requests of {arguments.streams} clients")
    soak(report, num_requests, arguments.streams)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
