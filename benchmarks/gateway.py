"""What a gateway costs: Baton's coordinator, Dynamo's frontend and smg, each before engines that compute nothing.

    python -m benchmarks.gateway [--quick] [--json FILE] [--shapes 64x32,64x256] [--seconds 8] [--only baton,smg]
                                 [--rounds 3] [--peers FOLDER]

One client asks all of them the same: chats of about 1 kB, no two alike, as so many streams that each ask again when
they have ended; 64x32: 64 streams, 32 tokens an answer. The engines give every stream a token each 12 ms, as fast ones
do, so that no gateway gets tokens faster than it can pass them on one by one; with 1024 streams that is more than two
cores can carry.

    Baton     `baton coordinator` before `baton fake`: a prefill and a decode worker
    Dynamo    its frontend, KV-aware, before its mockers, found through files: a prefill and a decode worker, or one
              that does both
    smg       before mock workers that speak HTTP: a prefill and two decode workers, or one that does both

The gateways take turns, round after round, and of each that round counts in which a token took the least. Of the
gateway's own processes: processor time, so that tokens for each second of it are tokens a second of one core, whoever
has the other one; resident memory. Of the client: time to the first token, with one stream and engines that take no
time; gaps between tokens. Answers that the measured time cuts at its ends count by their events.

Environments of the peers are made on the first run (`benchmarks.peers.environments`). Dynamo's mockers listen on every
address of the machine; where that matters, run all of it inside `unshare -rn sh -c 'ip link set lo up && ...'`.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.peers.environments import DYNAMO, SMG, TAIL_CHARACTERS, Unavailable, add_peers_argument, ensure, find
from benchmarks.report import Report, add_common_arguments
from benchmarks.sse_load import NUMBER, Load, measure, percentile

HERE = Path(__file__).parent
DEMO = HERE.parent / "engine" / "demo_model"
STEP_MS = 12.0
SHAPES = "16x32,64x32,256x32,1024x32,16x256,64x256,256x256,1024x256"
QUICK_SHAPES = "64x32"
PROMPT_CHARACTERS = 1000
WARM_UP = 64, 2.0
"""Streams, seconds: until Baton has met every token of the vocabulary, whose text it finds once."""
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
WORKERS = 200


class Processes:
    """What one gateway needs, each with what it writes; all are ended with the context, and all that they started."""

    def __init__(self) -> None:
        self._children: list[subprocess.Popen[str]] = []
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the processes
        self._folder = tempfile.TemporaryDirectory(prefix="gateway-")
        self.folder = Path(self._folder.name)
        """For what they write."""
        self.gateway: list[int] = []

    def start(
        self, *words: str, env: dict[str, str] | None = None, gateway: bool = False, fds: Sequence[int] = ()
    ) -> None:
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, text=True, start_new_session=True,
            env={**os.environ, **(env or {})}, pass_fds=fds,
        )  # fmt: skip
        self._children.append(child)
        if gateway:
            self.gateway.append(child.pid)

    def answer_of(self, *words: str, lines: int = 1) -> list[str]:
        """Start a process of ours that prints its addresses."""
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", *words], stdout=subprocess.PIPE, stderr=self._log, text=True,
            start_new_session=True, env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        )  # fmt: skip
        self._children.append(child)
        assert child.stdout is not None, "opened as a pipe"
        return [child.stdout.readline().strip() for _ in range(lines)]

    def wait_for(self, promise: Callable[[], bool], what: str) -> None:
        """Raises Unavailable when it does not come true in time."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(OSError, ValueError):
                if promise():
                    return
            if time.monotonic() > deadline or any(child.poll() is not None for child in self._children):
                raise Unavailable(f"{what}: not within {START_TIMEOUT_S:.0f} s; its last words: {self.last_words()}")
            time.sleep(0.02)

    def last_words(self) -> str:
        self._log.seek(0)
        return " ".join(self._log.read().split())[-TAIL_CHARACTERS:]

    def cpu_s(self) -> float:
        """Of the gateway's processes so far, all threads."""
        return sum(map(_cpu_s, self.gateway))

    def rss_mib(self) -> float:
        return sum(map(rss_mib, self.gateway))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for child in self._children:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, number)
            deadline = time.monotonic() + STOP_TIMEOUT_S
            for child in self._children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(max(0.01, deadline - time.monotonic()))
        self._log.close()
        self._folder.cleanup()


def _cpu_s(pid: int) -> float:
    """By the clock that clock_getcpuclockid(3) names, which Python does not have: /proc counts ticks of 10 ms."""
    return time.clock_gettime(~pid << 3 | 2)


def rss_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def get(port: int, path: str) -> Any:
    """Raises OSError, or ValueError for what is no JSON."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        return json.load(answer)


@dataclass
class Side:
    """A gateway with its engines, ready."""

    processes: Processes
    port: int
    model: str
    workers: Callable[[], int]
    """How many engines it knows now."""
    expected: int
    """How many it is to know."""

    def answers(self) -> bool:
        body = {"model": self.model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=10) as answer:
            return bool(answer.status == 200)

    def load(self, num_streams: int, seconds: float, tokens: int = 32) -> Load:
        """Raises Unavailable when it fails under it."""
        text = f"{NUMBER} " + (DEMO / "smalltalk.txt").read_text()[:PROMPT_CHARACTERS]
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "max_tokens": tokens}
        body["ignore_eos"] = True
        try:
            return measure("127.0.0.1", self.port, [body], num_streams, seconds, self.processes.cpu_s)
        except (RuntimeError, OSError) as error:
            raise Unavailable(
                f"{num_streams} streams: {error}; its last words: {self.processes.last_words()}"
            ) from error


Start = Callable[[Processes, float, int], Side]
"""`(processes, ms a step, number of engines)`: 0 ms are engines as fast as they can be."""


def baton(role: str, processes: Processes, step_ms: float, workers: int) -> Side:
    read_fd, write_fd = os.pipe()
    processes.start(
        sys.executable, "-P", "-m", "cli.main", "coordinator", "--port", "0", "--grpc-port", "0", "--link-port", "0",
        "--max-requests", "4096", "--heartbeat-timeout-s", "10", "--announce-fd", str(write_fd),
        gateway=True, fds=[write_fd],
    )  # fmt: skip
    os.close(write_fd)
    with os.fdopen(read_fd) as pipe:
        announced = pipe.read()
    if not announced:
        raise Unavailable(f"the coordinator did not start: {processes.last_words()}")
    ports = json.loads(announced)
    side = Side(
        processes,
        ports["http"],
        "demo",
        lambda: len(get(ports["http"], "/status")["workers"]),
        workers * len(role.split("+")),
    )
    processes.start(
        sys.executable, "-P", "-m", "cli.main", "fake", "--coordinator", f"127.0.0.1:{ports['link']}",
        "--step-ms", str(step_ms), "--role", role, "--workers", str(workers),
    )  # fmt: skip
    return side


def dynamo(python: Path, disaggregated: bool, processes: Processes, step_ms: float, workers: int) -> Side:
    local = ("DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST", "DYN_EVENT_PLANE_HOST", "DYN_SYSTEM_HOST")
    env = {
        "HF_HUB_OFFLINE": "1",
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(processes.folder / "kv"),
        "PYTHONPATH": "",
    }
    env |= {"DYN_REQUEST_PLANE": "tcp", "DYN_EVENT_PLANE": "zmq", **dict.fromkeys(local, "127.0.0.1")}
    # At ratio 1 it takes 6 ms a token; "0: infinitely fast" runs at ratio 1.
    ratio = str(6.0 / step_ms if step_ms else 1e6)
    mocker: tuple[str, ...] = (str(python), "-m", "dynamo.mocker", "--model-path", str(DEMO), "--model-name", "demo")
    mocker += ("--block-size", "16", "--speedup-ratio", ratio)
    many = ("--num-workers", str(workers)) if workers > 1 else ()
    if disaggregated:
        ports = ("--bootstrap-ports", ",".join(str(free_port()) for _ in range(workers)))
        processes.start(*mocker, *many, "--disaggregation-mode", "prefill", *ports, env=env)
        processes.start(*mocker, *many, "--disaggregation-mode", "decode", env=env)
    else:
        processes.start(*mocker, *many, env=env)
    port = free_port()
    processes.start(
        str(python), "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port),
        "--router-mode", "kv", "--kv-cache-block-size", "16", env=env, gateway=True,
    )  # fmt: skip

    def known() -> int:
        return sum(each["endpoint"] == "generate" for each in get(port, "/health").get("instances", []))

    return Side(processes, port, "demo", known, workers * (1 + disaggregated))


def smg(python: Path, disaggregated: bool, processes: Processes, step_ms: float, workers: int) -> Side:
    def engines(mode: str, count: int) -> list[str]:
        words = ("benchmarks.peers.mock_engine", "--mode", mode, "--step-ms", str(step_ms), "--count", str(count))
        return processes.answer_of(*words, lines=count)

    port, prometheus = free_port(), free_port()
    words = [str(python.parent / "smg"), "launch", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(prometheus)]
    if disaggregated:
        words += ["--pd-disaggregation", "--prefill-policy", "cache_aware", "--decode-policy", "round_robin"]
        for url in engines("prefill", workers):
            words += ["--prefill", url, "9001"]
        for url in engines("decode", workers):
            words += ["--decode", url]
    else:
        words += ["--policy", "cache_aware", "--worker-urls", *engines("null", workers)]
    processes.start(*words, env={"PYTHONPATH": ""}, gateway=True)
    return Side(
        processes, port, "mock", lambda: len(get(port, "/workers").get("workers", [])), workers * (1 + disaggregated)
    )


@contextlib.contextmanager
def running(start: Start, step_ms: float, workers: int = 1) -> Iterator[Side]:
    """Raises Unavailable when it does not come up."""
    with Processes() as processes:
        side = start(processes, step_ms, workers)
        processes.wait_for(lambda: side.workers() >= side.expected, f"{side.expected} workers")
        processes.wait_for(side.answers, "an answer")
        yield side


@dataclass
class Best:
    """Of one gateway: of several rounds that which took the least of a core."""

    first: Load | None = None
    """One stream, engines that take no time."""
    shapes: dict[str, tuple[Load, float]] = field(default_factory=dict)
    """Load, and memory in MiB after it."""
    trouble: str = ""

    @property
    def ttft_s(self) -> float:
        return percentile(self.first.first_event_s, 0.5) if self.first is not None else math.inf


def cpu_per_token_s(shape: str, load: Load) -> float:
    return load.cpu_s / (load.num_answers * _parsed(shape)[1])


def _parsed(shape: str) -> tuple[int, int]:
    num_streams, tokens_each = map(int, shape.split("x"))
    return num_streams, tokens_each


def measure_round(start: Start, shapes: Sequence[str], seconds: float, best: Best) -> None:
    try:
        with running(start, 0.0) as side:
            side.load(1, 1.0)
            load = side.load(1, seconds / 2)
        if percentile(load.first_event_s, 0.5) < best.ttft_s:
            best.first = load
        with running(start, STEP_MS) as side:
            side.load(*WARM_UP)
            for shape in shapes:
                num_streams, tokens_each = _parsed(shape)
                load = side.load(num_streams, max(seconds, 2 * tokens_each * STEP_MS / 1e3), tokens_each)
                if not load.num_requests:
                    raise Unavailable(f"{shape}: no answer ended in {load.seconds:.0f} s")
                before = best.shapes.get(shape)
                if before is None or cpu_per_token_s(shape, load) < cpu_per_token_s(shape, before[0]):
                    best.shapes[shape] = load, side.processes.rss_mib()
    except Unavailable as reason:
        best.trouble = str(reason)


def describe(report: Report, name: str, best: Best) -> None:
    if best.first is not None:
        tail = percentile(best.first.first_event_s, 0.99) * 1e3
        report.row(f"{name}: first token, 1 stream, p50", best.ttft_s * 1e3, "ms", f"p99 {tail:.2f}")
    for shape, (load, memory_mib) in best.shapes.items():
        num_streams, tokens_each = _parsed(shape)
        what, each_s, ideal = f"{name}, {shape}", cpu_per_token_s(shape, load), num_streams / STEP_MS * 1e3
        report.row(f"{what}: requests", load.num_answers / load.seconds, "req/s")
        speed = load.num_answers * tokens_each / load.seconds
        report.row(f"{what}: tokens", speed, "tok/s", f"the engines' {ideal:.0f}", speed / ideal)
        report.row(f"{what}: tokens a core", 1 / each_s, "tok/s", f"{each_s * 1e6:.1f} us each")
        report.row(f"{what}: first token, p99", percentile(load.first_event_s, 0.99) * 1e3, "ms")
        gap = percentile(load.gaps_s, 0.99) * 1e3
        report.row(f"{what}: gap, p99", gap, "ms", f"the engines' {STEP_MS:g}", gap / STEP_MS)
        report.row(f"{what}: memory", memory_mib, "MiB")
        if load.events_each < 0.9 * tokens_each:
            report.note(f"{what}: {tokens_each / load.events_each:.1f} tokens an event")
    if best.trouble:
        report.note(f"{name}: not measured, or not all: {best.trouble}")


def measure_registration(report: Report, name: str, start: Start) -> None:
    """How long until a gateway serves many engines, beside one, whose processes take as long to start."""
    found: dict[int, tuple[float, float]] = {}
    try:
        for workers in (1, WORKERS):
            began = time.monotonic()
            with running(start, STEP_MS, workers) as side:
                found[workers] = time.monotonic() - began, side.processes.rss_mib()
    except Unavailable as reason:
        report.note(f"{name}, {WORKERS} workers: not measured: {reason}")
        return
    (one_s, one_mib), (all_s, all_mib) = found[1], found[WORKERS]
    report.row(f"{name}: {WORKERS} workers ready", all_s, "s", f"1 worker {one_s:.1f} s", all_s / one_s)
    report.row(f"{name}: memory with {WORKERS} workers", all_mib, "MiB", f"1 worker {one_mib:.0f}", all_mib / one_mib)


def measure_engine(report: Report, name: str, seconds: float) -> float:
    """What the client and an engine take without a gateway between them: the mock engine of smg."""
    with Processes() as processes:
        (url,) = processes.answer_of("benchmarks.peers.mock_engine", "--step-ms", "0")
        side = Side(processes, int(url.rpartition(":")[2]), "mock", lambda: 1, 1)
        load = side.load(1, seconds)
    ttft_s = percentile(load.first_event_s, 0.5)
    report.row(f"{name}: first token, 1 stream, p50", ttft_s * 1e3, "ms")
    return ttft_s


def compare(report: Report, all: dict[str, Best], engine_s: float) -> None:
    ours = all.get("Baton")
    if ours is None or ours.first is None:
        return
    # Of Baton the way to its engines and back is a part, and all that it does there and smg does not: text to tokens.
    ours_s = ours.ttft_s - engine_s
    report.row("Baton: added to the first token", ours_s * 1e3, "ms", "an engine asked directly", None, "<= 1 ms")
    for name, goal in (
        ("Dynamo, disaggregated", ">= 3"),
        ("Dynamo", None),
        ("smg, disaggregated", ">= 1.5"),
        ("smg", ">= 1.5"),
    ):
        theirs = all.get(name)
        if theirs is None:
            continue
        if theirs.first is not None:
            added = theirs.ttft_s - engine_s
            report.row(f"{name}: added to the first token", added * 1e3, "ms", "Baton's", added / ours_s)
        for shape in [each for each in theirs.shapes if each in ours.shapes]:
            mine, other = (1 / cpu_per_token_s(shape, each.shapes[shape][0]) for each in (ours, theirs))
            report.row(f"tokens a core, {shape}, Baton", mine, "tok/s", f"{name} {other:.0f}", mine / other, goal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    add_peers_argument(parser)
    parser.add_argument("--shapes", default="", help=f"streams x tokens ({SHAPES}; with --quick {QUICK_SHAPES})")
    parser.add_argument("--seconds", type=float, default=0.0, help="of each figure (8; with --quick 3)")
    parser.add_argument("--rounds", type=int, default=3, help="in which the gateways take turns (with --quick 1)")
    parser.add_argument("--only", default="baton,dynamo,smg", help="which gateways")
    arguments = parser.parse_args()
    shapes = (arguments.shapes or (QUICK_SHAPES if arguments.quick else SHAPES)).split(",")
    seconds = arguments.seconds or (3.0 if arguments.quick else 8.0)
    report = Report(
        f"Gateways before engines that compute nothing, {STEP_MS:g} ms a token; streams x tokens of an answer"
    )
    sides: dict[str, Start] = {}
    wanted = arguments.only.split(",")
    if "baton" in wanted:
        sides["Baton"] = partial(baton, "prefill+decode")
    for recipe, start in ((DYNAMO, dynamo), (SMG, smg)):
        if recipe.name.lower() not in wanted:
            continue
        try:
            python = (find if arguments.quick else ensure)(recipe, arguments.peers).python
        except Unavailable as reason:
            report.note(f"{recipe.name}: not measured: {reason}")
            continue
        for suffix, disaggregated in ((", disaggregated", True), ("", False)):
            sides[recipe.name + suffix] = partial(start, python, disaggregated)
    engine_s = measure_engine(report, "an engine asked directly", seconds / 2)
    best = {name: Best() for name in sides}
    for _ in range(1 if arguments.quick else arguments.rounds):
        for name, side in sides.items():
            measure_round(side, shapes, seconds, best[name])
    for name in sides:
        describe(report, name, best[name])
    for name, side in sides.items():
        if not arguments.quick and "disaggregated" not in name:
            measure_registration(report, name, partial(baton, "mixed") if name == "Baton" else side)
    compare(report, best, engine_s)
    report.note("Dynamo's first token includes what its mockers take for a prompt, which cannot be had alone.")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
