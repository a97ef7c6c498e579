"""How fast each lane moves scattered KV blocks from one process to another, beside memcpy, raw sockets, UCX and NIXL.

    python -m benchmarks.lanes [--quick] [--json FILE] [--block-sizes 65536,262144] [--lanes shm,tcp] [--repeat 15]
                               [--peers FOLDER]

Every repetition moves 64 MiB: blocks in random order out of one 128 MiB pool into random places of another. The
memcpy is numpy's copy of 64 MiB from one array into another in the pulling process. Repetitions of both alternate,
so that other load on the machine hits both. A lane that does not run here is left out, and the notes say why.

Beside the lanes, in the same run:
    raw socket    one TCP connection that fills one buffer over and over: what a lane over sockets can hope for
    NIXL          its own Python interface, the same scattered blocks, where it is installed in --peers
    ucx_perftest  UCX's own benchmark; it reads one buffer over and over, which stays in cache

The peers' environments come from `python -m benchmarks.peers.environments`; nothing is installed here.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from baton.errors import ConfigurationError, TransferError
from benchmarks.peers.environments import UCX, Environment, Unavailable, add_peers_argument, find
from benchmarks.peers.process import run_script
from benchmarks.report import Report, add_common_arguments
from kvtransfer.lanes.registry import LANES, parse_lanes
from kvtransfer.lanes.trial import Figures, TrialServer, ask, measure

MOVED_BYTES = 64 << 20
POOL_BYTES = 128 << 20
RAW_BUFFER_BYTES = 1 << 20
LANE_BUDGET_S = 30.0
PEER_TIMEOUT_S = 90.0
SIZES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20)
QUICK_SIZES = (4 << 10, 64 << 10, 256 << 10, 1 << 20)
GOALS = {"shm": ">= 0.9", "tcp": ">= 3 GB/s"}
GOAL_SIZES = {"shm": range(64 << 10, (1 << 20) + 1), "tcp": range(256 << 10, (256 << 10) + 1)}
UCX_TESTS = {"shared memory": ("posix,cma,self", "ucp_get"), "TCP": ("tcp,self", "ucp_am_bw")}


def serve(lanes: str, block_bytes: int) -> None:
    """The offering process: serves a pool, and a raw socket, until its standard input ends."""
    server = TrialServer(POOL_BYTES // block_bytes, block_bytes)
    address = server.start(parse_lanes(lanes), "127.0.0.1", 0)
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve_raw, args=(listener,), daemon=True).start()
    print(json.dumps([address, listener.getsockname()[1]]), flush=True)
    sys.stdin.read()
    server.close()


def serve_raw(listener: socket.socket) -> None:
    """Send as many bytes as the peer asks for, 8 bytes of request each time."""
    buffer = memoryview(bytearray(RAW_BUFFER_BYTES))
    while True:
        peer, _ = listener.accept()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with peer:
            while request := peer.recv(8, socket.MSG_WAITALL):
                left = int.from_bytes(request, "little")
                while left:
                    left -= peer.send(buffer[: min(left, len(buffer))])


@contextlib.contextmanager
def serving(lanes: str, block_bytes: int) -> Iterator[tuple[str, int]]:
    command = [sys.executable, "-m", "benchmarks.lanes", "--serve", "--lanes", lanes, "--block-sizes", str(block_bytes)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        if child.stdout is None or not (line := child.stdout.readline()):
            raise SystemExit("the offering process did not start")
        address, raw_port = json.loads(line)
        yield address, raw_port
    finally:
        child.communicate(timeout=30)


def measure_lanes(report: Report, lanes: str, block_bytes: int, repeat: int) -> Figures:
    """One row or two a lane; returns the figures of the last lane, for its memcpy."""
    figures: Figures | None = None
    name_of_size = f"{block_bytes >> 10} KiB blocks"
    with serving(lanes, block_bytes) as (address, raw_port):
        served = ask(address)
        for lane in parse_lanes(lanes):
            try:
                if lane.name not in served.endpoints:
                    raise ConfigurationError(served.unavailable[lane.name])
                figures = measure(lane, served, repeat, LANE_BUDGET_S)
            except (ConfigurationError, TransferError) as error:
                report.note(f"lane {lane.name}, {name_of_size}: not measured: {error}")
                continue
            for kind, pick in (("best", min), ("median", statistics.median)):
                speed, limit = (MOVED_BYTES / pick(row) / 1e9 for row in (figures.pulls, figures.copies))
                has_goal = kind == "best" and block_bytes in GOAL_SIZES.get(lane.name, ())
                goal = GOALS[lane.name] if has_goal else None
                report.row(
                    f"{lane.name}, {name_of_size}, {kind}", speed, "GB/s", f"memcpy {limit:.1f}", speed / limit, goal
                )
            if block_bytes == 4 << 10:
                report.row(f"{lane.name}, one block of 4 KiB", figures.small_us, "us")
        if figures is None:
            raise SystemExit("no lane runs here")
        if block_bytes in (4 << 10, 256 << 10):
            measure_raw(report, raw_port, block_bytes, repeat, figures)
    return figures


def measure_raw(report: Report, port: int, block_bytes: int, repeat: int, beside: Figures) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = bytearray(RAW_BUFFER_BYTES)

        def take(num_bytes: int) -> None:
            connection.sendall(num_bytes.to_bytes(8, "little"))
            while num_bytes:
                num_bytes -= connection.recv_into(buffer, min(num_bytes, len(buffer)))

        if block_bytes == 4 << 10:
            times = [seconds(lambda: take(4 << 10)) for _ in range(200)]
            report.row("raw socket, 4 KiB", statistics.median(times) * 1e6, "us")
            return
        best = min(seconds(lambda: take(MOVED_BYTES)) for _ in range(repeat + 1))
        speed = MOVED_BYTES / best / 1e9
        report.row("raw socket, best", speed, "GB/s", f"memcpy {beside.memcpy_gbs:.1f}", speed / beside.memcpy_gbs)


def measure_nixl(report: Report, environment: Environment, block_bytes: int, repeat: int, beside: Figures) -> None:
    words = (POOL_BYTES // block_bytes, block_bytes, MOVED_BYTES // block_bytes, repeat)
    line = run_script(environment, "run_nixl.py", *map(str, words), timeout_s=PEER_TIMEOUT_S)
    theirs = json.loads(line)
    for kind, pick in (("best", min), ("median", statistics.median)):
        speed = MOVED_BYTES / pick(theirs["pulls"]) / 1e9
        limit = MOVED_BYTES / pick(beside.copies) / 1e9
        name = f"NIXL, {block_bytes >> 10} KiB blocks, {kind}"
        report.row(name, speed, "GB/s", f"memcpy {limit:.1f}", speed / limit)
    if block_bytes == 4 << 10:
        report.row("NIXL, one block of 4 KiB", statistics.median(theirs["small"]) * 1e6, "us")


def measure_ucx(report: Report, environment: Environment, block_bytes: int, beside: Figures) -> None:
    for what, (transports, test) in UCX_TESTS.items():
        speed = max(ucx_perftest(environment, transports, test, block_bytes) for _ in range(3))
        name = f"ucx_perftest over {what}, {block_bytes >> 10} KiB messages, best"
        report.row(name, speed, "GB/s", f"memcpy {beside.memcpy_gbs:.1f}", speed / beside.memcpy_gbs)


def ucx_perftest(environment: Environment, transports: str, test: str, num_bytes: int) -> float:
    """GB/s by its own account. Raises Unavailable."""
    home = next(environment.python.parent.parent.glob("lib/python*/site-packages/libucx"), None)
    if home is None:
        raise Unavailable("libucx is not where its package puts it")
    variables = {
        **os.environ,
        "LD_LIBRARY_PATH": str(home / "lib"),
        "UCX_TLS": transports,
        "UCX_WARN_UNUSED_ENV_VARS": "n",
    }
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [str(home / "bin" / "ucx_perftest"), "-p", port]
    asks = [
        "127.0.0.1",
        "-t",
        test,
        "-s",
        str(num_bytes),
        "-n",
        str(max(50, MOVED_BYTES // num_bytes)),
        "-w",
        "50",
        "-f",
        "-v",
    ]
    server = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(20):  # until it listens
            client = subprocess.run(
                [*command, *asks], env=variables, capture_output=True, text=True, timeout=PEER_TIMEOUT_S
            )
            rows = [line.split(",") for line in client.stdout.splitlines() if line.count(",") == 7]
            if client.returncode == 0 and len(rows) >= 2:
                return float(rows[-1][5]) * 2**20 / 1e9  # overall_bw, in MiB/s
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(0.1)
                break
    except subprocess.TimeoutExpired:
        raise Unavailable(f"ucx_perftest was not done after {PEER_TIMEOUT_S:.0f} s") from None
    finally:
        server.kill()
        server.wait()
    raise Unavailable(f"ucx_perftest failed: {client.stderr.strip()[-200:]}")


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_peers(report: Report, root: Path, sizes: Sequence[int], figures: dict[int, Figures], repeat: int) -> None:
    try:
        environment = find(UCX, root)
    except Unavailable as reason:
        report.note(f"NIXL and ucx_perftest: not measured: {reason}")
        return
    for block_bytes in sizes:
        try:
            measure_nixl(report, environment, block_bytes, repeat, figures[block_bytes])
            measure_ucx(report, environment, block_bytes, figures[block_bytes])
        except Unavailable as reason:
            report.note(f"NIXL or ucx_perftest, {block_bytes >> 10} KiB: not measured: {reason}")
    report.note("ucx_perftest reads one buffer over and over: what it moves stays in cache.")
    report.note("NIXL's pools are private memory, those of the lanes shared; both, and memcpy's, ask for huge pages.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    add_peers_argument(parser)
    parser.add_argument("--block-sizes", default="", help="bytes of a block, several separated by commas")
    parser.add_argument("--lanes", default=",".join(name for name in LANES if name != "fake"), help="lanes to measure")
    parser.add_argument("--repeat", type=int, default=0, help="repetitions of each figure (15; with --quick 7)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.block_sizes.split(",") if size]
    if arguments.serve:
        serve(arguments.lanes, sizes[0])
        return
    sizes = sizes or list(QUICK_SIZES if arguments.quick else SIZES)
    repeat = arguments.repeat or (7 if arguments.quick else 15)
    report = Report("KV blocks between two processes, 64 MiB scattered")
    figures = {size: measure_lanes(report, arguments.lanes, size, repeat) for size in sizes}
    measure_peers(report, arguments.peers, sizes, figures, repeat)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
