"""Several processes of a coordinator behind one port: each serves, and the death of one is not the others'."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import grpc
import pytest

from baton.client import Client
from baton.config import CoordinatorOptions
from baton.v1 import inference_pb2, inference_pb2_grpc
from cli.doors import doors
from tests.system.cluster import Cluster, alive
from tests.system.test_coordinator_death import OPTIONS, PROMPTS, Streams
from tests.system.test_coordinators import coordinators

WORDS = ("--processes", "2", "--mixed", "1", "--dtype", "float32", "--kv-memory", "64MiB")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(*WORDS) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> list[str]:
    with Client(cluster.url) as client:
        return ["".join(delta.text for delta in client.complete(prompt, **OPTIONS)) for prompt in PROMPTS]


def test_connections_to_the_one_port_are_served_by_all(cluster: Cluster) -> None:
    assert len(cluster.urls) == 1
    doors = [cluster.at(url) for url in cluster.alone]
    assert len(doors) == 2
    body = {"model": "demo", "prompt": "hello", "max_tokens": 1}
    for _ in range(40):  # each over a connection of its own
        cluster.post("/v1/completions", body)
    served = [door.metric("baton_requests_total", outcome="completed") for door in doors]
    assert sum(served) >= 40
    assert all(served), "one process got every connection"
    for door in doors:
        assert [worker["id"] for worker in door.status()["workers"]] == ["mixed-0"]


def test_grpc_is_behind_one_port_as_well(cluster: Cluster) -> None:
    with Client(cluster.url) as client:
        text = "".join(delta.text for delta in client.complete("hello", max_tokens=5, temperature=0))
    with grpc.insecure_channel(cluster.grpc) as channel:
        sampling = inference_pb2.Sampling(max_tokens=5, temperature=0)
        request = inference_pb2.GenerateRequest(model="demo", text="hello", sampling=sampling)
        responses = inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=30)
        assert "".join(response.text for response in responses) == text


def test_when_one_is_killed_the_rest_goes_on_with_its_streams_and_it_comes_back(
    cluster: Cluster, undisturbed: list[str]
) -> None:
    pids = coordinators(cluster)
    doors = [cluster.at(url) for url in cluster.alone]
    streams = Streams(cluster, PROMPTS * 4, len(undisturbed[-1]) // 2)
    assert streams.reached.wait(60)
    busiest = max(range(2), key=lambda number: doors[number].status()["streams"])
    assert doors[busiest].status()["streams"], "there was something to lose"
    os.kill(pids[busiest], signal.SIGKILL)
    cluster.wait_for(lambda: not alive(pids[busiest]), "it is dead")
    assert streams.texts() == undisturbed * 4
    back = doors[busiest]

    def is_back() -> bool:
        with contextlib.suppress(OSError):
            return len(back.status()["workers"]) == 1
        return False

    cluster.wait_for(is_back, "it is back where it was", 30)
    cluster.wait_for(cluster.is_whole, "every block is free or cached")


def test_processes_of_baton_coordinator_share_a_port_that_nobody_else_has_and_end_together() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ["coordinator", "--processes", "2", "--port", str(port), "--grpc-port", "0", "--link-port", "0"]
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "cli.main", *words], capture_output=True, text=True, timeout=60
        )
    assert ended.returncode == 2
    assert f"--port {port}" in ended.stderr
    read_fd, write_fd = os.pipe()
    words[4] = "0"
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "cli.main", *words, "--announce-fd", str(write_fd)], pass_fds=[write_fd]
    )
    os.close(write_fd)
    try:
        with os.fdopen(read_fd) as pipe:
            ports = json.load(pipe)
        pids = [int(pid) for pid in _children(child.pid)]
        assert len(pids) == 2
        assert len({ports["http"], *ports["own"]}) == 3
        for own in (ports["http"], *ports["own"]):
            with urllib.request.urlopen(f"http://127.0.0.1:{own}/health", timeout=10) as answer:
                assert answer.status == 200
    finally:
        child.terminate()
        assert child.wait(30) == 0
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a process outlives its command"
        time.sleep(0.05)


def _children(pid: int) -> list[str]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()


def test_processes_share_what_clients_use_and_have_the_rest_of_their_own() -> None:
    with socket.socket() as one, socket.socket() as two:
        for each in (one, two):
            each.bind(("127.0.0.1", 0))
        port, grpc_port = one.getsockname()[1], two.getsockname()[1]
    found = [door.options for door in doors(CoordinatorOptions(port=port, grpc_port=grpc_port), 1, 3)]
    assert {(each.port, each.grpc_port) for each in found} == {(port, grpc_port)}
    assert [each.own_port for each in found] == [port + 1, port + 2, port + 3]
    assert [each.link_port for each in found] == [50052, 50053, 50054]


def test_free_ports_are_chosen_for_each_coordinator_and_nobody_else_gets_them() -> None:
    found = doors(CoordinatorOptions(port=0, grpc_port=0, link_port=0), 2, 2)
    shared = [door.options.port for door in found]
    assert shared[0] == shared[1] != shared[2] == shared[3]
    assert {door.options.own_port for door in found} == {door.options.link_port for door in found} == {0}
    with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind(("127.0.0.1", shared[0]))


def test_one_process_shares_nothing() -> None:
    (door,) = doors(CoordinatorOptions(), 1, 1)
    assert door.options.own_port == -1
    assert door.base_url == door.shared_url


@pytest.mark.parametrize("processes", ["0", "10"])
def test_a_number_of_processes_that_cannot_be_is_refused(processes: str) -> None:
    words = ["coordinator", "--processes", processes, "--port", "0", "--grpc-port", "0", "--link-port", "0"]
    ended = subprocess.run([sys.executable, "-P", "-m", "cli.main", *words], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "--processes" in ended.stderr
