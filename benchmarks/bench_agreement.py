"""`baton bench` beside guidellm, before the same server at the same time: workers that compute nothing, whose times are
set.

    python -m benchmarks.bench_agreement [--quick] [--json FILE] [--requests 320] [--streams 3] [--peers FOLDER]

guidellm and two of `baton bench` each keep so many streams busy in a closed loop, with chats of 1000 tokens in and 64
out; a prompt takes 100 ms, one after the other, a token 20 ms. All three meet what this machine does meanwhile; how
much the two differ is what chance is worth. What the server says of its mean TTFT, from a request's arrival, stands
beside.

guidellm's ITL is the time after the first token by the tokens after it, which is vLLM's TPOT; its TPOT counts the first
token in.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gateway import DEMO, Processes, get
from benchmarks.peers.environments import Recipe, Unavailable, add_peers_argument, ensure, find
from benchmarks.report import Report, add_common_arguments

GUIDELLM = Recipe(
    "guidellm",
    installs=(("torch==2.13.0",), ("guidellm==0.8.1",)),  # without a torch of its own it brings one for CUDA
    wanted=frozenset({"guidellm"}),
)
INPUT_TOKENS, OUTPUT_TOKENS = 1000, 64
STEP_MS, PREFILL_TOKENS_PER_S = 20.0, 10_000.0
TIMEOUT_S = 600.0


class Seen(NamedTuple):
    """Of a run; latencies in ms."""

    requests_per_s: float
    tokens_per_s: float
    ttft_mean: float
    ttft_median: float
    tpot_mean: float
    tpot_median: float
    e2e_mean: float
    e2e_median: float


NAMES = (
    "requests/s",
    "tokens/s",
    "TTFT, mean",
    "TTFT, median",
    "TPOT, mean",
    "TPOT, median",
    "E2E, mean",
    "E2E, median",
)


class Addresses(NamedTuple):
    http: str
    grpc: str


@contextlib.contextmanager
def server() -> Iterator[Addresses]:
    """Raises Unavailable."""
    with Processes() as processes:
        read_fd, write_fd = os.pipe()
        processes.start(
            sys.executable, "-P", "-m", "cli.main", "coordinator", "--port", "0", "--grpc-port", "0", "--link-port",
            "0", "--service-classes", "standard=0/0", "--announce-fd", str(write_fd), fds=[write_fd],
        )  # fmt: skip
        os.close(write_fd)
        with os.fdopen(read_fd) as pipe:
            announced = pipe.read()
        if not announced:
            raise Unavailable(f"the coordinator did not start: {processes.last_words()}")
        ports = json.loads(announced)
        processes.start(
            sys.executable, "-P", "-m", "cli.main", "fake", "--coordinator", f"127.0.0.1:{ports['link']}",
            "--step-ms", str(STEP_MS), "--prefill-tokens-per-s", str(PREFILL_TOKENS_PER_S),
        )  # fmt: skip
        processes.wait_for(lambda: len(get(ports["http"], "/status")["workers"]) == 2, "two workers")
        yield Addresses(f"http://127.0.0.1:{ports['http']}", f"grpc://127.0.0.1:{ports['grpc']}")


def bench(name: str, url: str, requests: int, streams: int, folder: Path) -> Seen:
    path = folder / f"{name}.json"
    _run(
        sys.executable, "-P", "-m", "cli.main", "bench", "--url", url, "--api", "chat", "--requests", str(requests),
        "--concurrency",
        str(streams), "--input-tokens", str(INPUT_TOKENS), "--output-tokens", str(OUTPUT_TOKENS), "--json", str(path),
    )  # fmt: skip
    result = json.loads(path.read_text())
    return Seen(
        result["request_throughput"], result["output_throughput"], result["mean_ttft_ms"],
        result["median_ttft_ms"], result["mean_tpot_ms"],
        result["median_tpot_ms"], result["mean_e2el_ms"], result["median_e2el_ms"],
    )  # fmt: skip


def guidellm(python: Path, url: str, requests: int, streams: int, folder: Path) -> Seen:
    path = folder / "guidellm.json"
    backend = {
        "kind": "openai_http", "target": url, "model": "demo", "request_format": "/v1/chat/completions",
    }  # fmt: skip
    _run(
        str(python.parent / "guidellm"), "run", "--backend", json.dumps(backend), "--tokenizer",
        f"kind=hf_auto,model={DEMO}", "--data",
        f"kind=synthetic_text,prompt_tokens={INPUT_TOKENS},output_tokens={OUTPUT_TOKENS}", "--profile",
        f"kind=concurrent,streams={streams}", "--constraint", f"kind=max_requests,count={requests}", "--output",
        f"kind=json,path={path}", "--disable-progress",
    )  # fmt: skip
    metrics: dict[str, Any] = json.loads(path.read_text())["benchmarks"][0]["metrics"]
    of = {name: each["successful"] for name, each in metrics.items() if isinstance(each, dict) and "successful" in each}
    if of["request_latency"]["count"] != requests:
        raise Unavailable(f"guidellm: {of['request_latency']['count']} of {requests} requests succeeded")
    ttft, itl, latency = of["time_to_first_token_ms"], of["inter_token_latency_ms"], of["request_latency"]
    return Seen(
        of["requests_per_second"]["mean"], of["output_tokens_per_second"]["mean"],
        ttft["mean"], ttft["median"], itl["mean"], itl["median"], 1e3 * latency["mean"],
        1e3 * latency["median"],
    )  # fmt: skip


def _run(*words: str) -> None:
    """Raises Unavailable when it fails."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, env=env, check=False)
    if done.returncode:
        raise Unavailable(f"{Path(words[0]).name} ended with {done.returncode}: {(done.stderr or done.stdout)[-400:]}")


class Ttft(NamedTuple):
    """The server's own, of all requests so far."""

    total_ms: float
    count: float


def ttft_of(url: str) -> Ttft:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        lines = [line.split() for line in answer.read().decode().splitlines() if line.startswith("baton_ttft_seconds_")]
    total, count = (sum(float(value) for name, value in lines if name.startswith(f"baton_ttft_seconds_{each}"))
                    for each in ("sum", "count"))  # fmt: skip
    return Ttft(1e3 * total, count)


def _all_at_once(python: Path, url: str, requests: int, streams: int, folder: Path) -> list[Seen]:
    """guidellm, which takes long to begin, and when it has begun the others."""
    before = ttft_of(url).count
    with ThreadPoolExecutor(3) as pool:
        peer = pool.submit(guidellm, python, url, requests, streams, folder)
        while ttft_of(url).count == before and not peer.done():
            time.sleep(0.05)
        others = [pool.submit(bench, name, url, requests, streams, folder) for name in ("one", "two")]
        return [each.result() for each in (peer, *others)]


def _differences(report: Report, what: str, a: Seen, b: Seen, goal: str | None) -> None:
    """TTFT by itself: it is short, so that what a client takes to send a request shows in it first."""
    percents = {name: 100 * abs(own / other - 1) for name, own, other in zip(NAMES, a, b, strict=True)}
    for kind in ("TTFT", "the rest"):
        names = [name for name in NAMES if name.startswith("TTFT") == (kind == "TTFT")]
        worst = max(names, key=percents.__getitem__)
        report.row(f"largest difference to {what}: {kind}", percents[worst], "%", worst, None, goal)


def compare(report: Report, python: Path, url: str, requests: int, streams: int, folder: Path) -> None:
    bench("warm", url, 2 * streams, streams, folder)
    before = ttft_of(url)
    peer, one, two = _all_at_once(python, url, requests, streams, folder)
    after = ttft_of(url)
    served_ms = (after.total_ms - before.total_ms) / (after.count - before.count)
    mine = Seen(*((a + b) / 2 for a, b in zip(one, two, strict=True)))
    for name, own, other in zip(NAMES, mine, peer, strict=True):
        report.row(name, own, "ms" if "," in name else "/s", f"guidellm: {other:.4g}", own / other)
    _differences(report, "guidellm", mine, peer, "<= 3 %")
    _differences(report, "another of its own", one, two, None)
    said = "the server's own, of all"
    report.row("mean TTFT, beyond the server's", mine.ttft_mean - served_ms, "ms", said, mine.ttft_mean / served_ms)
    report.row("the same, guidellm", peer.ttft_mean - served_ms, "ms", said, peer.ttft_mean / served_ms)
    report.row("TPOT beside a step of the server", mine.tpot_mean, "ms", "the step", mine.tpot_mean / STEP_MS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    add_peers_argument(parser)
    parser.add_argument("--requests", type=int, default=0, help="of each run (default: 320, with --quick 96)")
    parser.add_argument("--streams", type=int, default=3)
    arguments = parser.parse_args()
    requests = arguments.requests or (96 if arguments.quick else 320)
    report = Report(f"baton bench beside guidellm: {arguments.streams} streams, {requests} requests")
    try:
        peer = (find if arguments.quick else ensure)(GUIDELLM, Path(arguments.peers))
        with Processes() as scratch, server() as at:
            compare(report, peer.python, at.http, requests, arguments.streams, scratch.folder)
    except Unavailable as error:
        report.note(f"Not measured: {error}")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
