"""`baton doctor` measures every lane, here and to a peer, and says what is wrong in words."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.errors import ConfigurationError, TransferError
from cli import host_facts
from cli.doctor import run
from cli.main import parse
from kvtransfer.lanes import trial
from kvtransfer.lanes.registry import LANES, parse_lanes
from kvtransfer.lanes.trial import TrialServer, ask, measure

ROOT = Path(__file__).parents[2]
SMALL = ("--block-size", "64KiB")


def doctor(*words: str) -> int:
    return run(parse(["doctor", *words]))


@contextlib.contextmanager
def serving(*words: str) -> Iterator[str]:
    """Another process that is to be measured; yields its address."""
    command = [sys.executable, "-m", "cli.main", "doctor", "--serve", "127.0.0.1:0", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert child.stdout is not None
        yield child.stdout.readline().split()[-1]
    finally:
        child.terminate()
        child.communicate(timeout=20)


def test_every_lane_of_this_host_is_measured_between_two_processes(capsys, tmp_path):
    assert doctor("--json", "--folder", str(tmp_path), *SMALL) == 0
    found = json.loads(capsys.readouterr().out)
    assert [lane["lane"] for lane in found["lanes"]] == [name for name in LANES if name != "fake"]
    for lane in found["lanes"]:
        assert (lane["gb_per_s"] or 0) > 0 or lane["problem"]
    assert {lane["lane"] for lane in found["lanes"] if lane["small_read_us"]} >= {"shm", "tcp"}
    facts = {fact["what"] for fact in found["host"]}
    assert {"shared memory", "locked memory", "ptrace", "io_uring", "native kernels", "GPU"} < facts
    assert f"O_DIRECT in {tmp_path}" in facts


def test_a_peer_is_measured_and_what_it_does_not_serve_is_explained(capsys):
    with serving("--lanes", "tcp", *SMALL) as address:
        assert doctor("--peer", address, "--lanes", "shm,tcp") == 0
        printed = capsys.readouterr().out
        assert f"lanes between this host and {address}" in printed
        assert "was not asked to serve it" in printed
        assert doctor("--peer", address, "--lanes", "shm") == 1, "nothing works"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--peer", "nonsense"), "HOST:PORT"),
        (("--peer", "host:99999"), "HOST:PORT"),
        (("--serve", ":80"), "HOST:PORT"),
        (("--serve", "0.0.0.0:80"), "every address"),
        (("--serve", "192.0.2.1:0"), "192.0.2.1"),
        (("--lanes", "smoke"), "'smoke'"),
        (("--block-size", "huge"), "'huge' is not a size"),
        (("--block-size", "1001"), "multiple of 8"),
        (("--block-size", "0"), "cannot be tried"),
        (("--block-size", "3GiB"), "cannot be tried"),
        (("--tls-cert", "cert.pem"), "--tls-key"),
        (("--folder", "/no/such/folder", "--lanes", "shm"), "no folder"),
    ],
)
def test_bad_input_is_a_configuration_error_that_says_what_to_change(words, says):
    with pytest.raises(ConfigurationError, match=says):
        doctor(*words)


def test_serve_and_peer_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        parse(["doctor", "--serve", "127.0.0.1:1", "--peer", "127.0.0.1:1"])
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"[1, 2]",
        b'{"num_blocks": 1000000, "block_bytes": 1048576, "endpoints": {}, "unavailable": {}}',
        b'{"num_blocks": 2, "block_bytes": 12, "endpoints": {}, "unavailable": {}}',
        b'{"num_blocks": 2, "block_bytes": 8, "endpoints": {"tcp": 5}, "unavailable": {}}',
        b"x" * 200_000,
    ],
)
def test_somebody_else_at_the_address_of_the_peer_is_said_so(reply):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(TransferError, match="baton doctor --serve"):
            doctor("--peer", f"127.0.0.1:{listener.getsockname()[1]}")
        thread.join(5)


def test_nobody_at_the_address_of_the_peer_is_said_so():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(TransferError, match="no trial of lanes answers"):
        doctor("--peer", address)


def test_a_lane_that_delivers_wrong_bytes_gets_no_figure():
    server = TrialServer(8, 4096)
    served = ask(server.start(parse_lanes("shm"), "127.0.0.1", 0))
    assert measure(parse_lanes("shm")[0], served, 2, 1.0).best_gbs > 0
    with pytest.raises(TransferError, match="wrong bytes"):
        measure(parse_lanes("faulty:shm?flip=1-")[0], served, 2, 1.0)
    server.close()
    with pytest.raises(TransferError):
        measure(parse_lanes("shm")[0], served, 2, 1.0)


def test_measuring_ends_when_its_time_is_over(monkeypatch):
    server = TrialServer(8, 4096)
    served = ask(server.start(parse_lanes("shm"), "127.0.0.1", 0))
    figures = measure(parse_lanes("shm")[0], served, 1000, 0.0)
    assert (len(figures.pulls), len(figures.small)) == (1, 1)
    monkeypatch.setattr(trial, "_MAX_SMALL_PULLS", 3)
    assert len(measure(parse_lanes("shm")[0], served, 2, 10.0).small) == 3
    server.close()


@pytest.mark.parametrize(("scope", "works"), [("", True), ("0", True), ("1", False), ("3", False)])
def test_ptrace_rules_are_told_with_what_they_mean_for_lane_cma(monkeypatch, scope, works):
    monkeypatch.setattr(host_facts, "_read", lambda path: scope)
    assert ("lane cma reads" in host_facts._ptrace().meaning) == works
