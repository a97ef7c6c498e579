"""Coordinators and workers that find each other in a real etcd, which is killed, stopped, emptied and compacted."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.cluster import Cluster
from tests.system.etcd import INSTALLED, MISSING, Etcd, wait_for
from tests.system.test_coordinators import PROMPTS, ask, incarnations

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not INSTALLED, reason=MISSING)]
MODEL = ("--dtype", "float32", "--kv-memory", "64MiB")
TTL_S = 2
OUTAGE_S = 10.0


class Parts(Cluster):
    """Coordinators and workers started one by one, that know nothing of each other but etcd."""

    def __init__(self, etcd: Etcd) -> None:
        self._log = tempfile.NamedTemporaryFile("w+", prefix="baton-parts-", suffix=".log")  # noqa: SIM115
        self._etcd = etcd
        self._processes: list[subprocess.Popen[str]] = []

    def _start(self, *words: str, pass_fds: tuple[int, ...] = ()) -> "subprocess.Popen[str]":
        given = ["--discovery", self._etcd.url, "--parent-pid", str(os.getpid()), *words[1:]]
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cli.main", words[0], *given],
            stdout=subprocess.DEVNULL, stderr=self._log, text=True, pass_fds=pass_fds,
        )  # fmt: skip
        self._processes.append(process)
        return process

    def worker_process(self, kind: str, *words: str) -> "subprocess.Popen[str]":
        return self._start(kind, "--worker-id", f"{kind}-0", *MODEL, *words)

    def coordinator(self) -> "tuple[subprocess.Popen[str], Cluster]":
        read_fd, write_fd = os.pipe()
        ports = ["--port", "0", "--grpc-port", "0", "--link-port", "0"]
        process = self._start(
            "coordinator", *ports, "--discovery-ttl-s", str(TTL_S), "--announce-fd", str(write_fd),
            pass_fds=(write_fd,),
        )  # fmt: skip
        os.close(write_fd)
        with os.fdopen(read_fd) as pipe:
            told = pipe.read()
        port = re.search(r'"http": (\d+)', told)
        assert port, Path(self._log.name).read_text()
        return process, self.at(f"http://127.0.0.1:{port[1]}")

    def whole_log(self) -> str:
        return Path(self._log.name).read_text()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        for process in self._processes:
            process.kill()
            process.wait()
        return 0


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    etcd = Etcd(tmp_path_factory.mktemp("etcd") / "data")
    yield etcd
    etcd.kill()


@pytest.fixture(scope="module")
def parts(etcd: Etcd) -> Iterator[Parts]:
    with Parts(etcd) as parts:
        yield parts


@pytest.fixture(scope="module")
def doors(parts: Parts) -> list[Cluster]:
    """Two coordinators that both workers have found."""
    doors = [parts.coordinator()[1] for _ in range(2)]
    for kind in ("prefill", "decode"):
        parts.worker_process(kind)
    for door in doors:
        door.wait_for(lambda door=door: has_all(door), "the workers have found it", 60)  # type: ignore[misc]
    return doors


@pytest.fixture(scope="module")
def expected(doors: list[Cluster]) -> list[str]:
    return [ask(doors[0], prompt) for prompt in PROMPTS]


def has_all(door: Cluster) -> bool:
    return set(incarnations(door)) == {"prefill-0", "decode-0"}


class Load:
    """Requests at every coordinator, one after the other, until the block ends; each must be answered right."""

    def __init__(self, doors: list[Cluster], expected: list[str]) -> None:
        self._doors, self._expected = doors, expected
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(door, shift)) for door in doors for shift in (0, 3)]
        self.answered = 0
        self._wrong: list[str] = []

    def _ask(self, door: Cluster, number: int) -> None:
        while not self._stop.is_set():
            number = (number + 1) % len(PROMPTS)
            try:
                text = ask(door, PROMPTS[number])
            except OSError as error:
                text = repr(error)
            self.answered += 1
            if text != self._expected[number]:
                self._wrong.append(f"{door.url}: {text}")

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        assert not self._wrong, self._wrong
        assert self.answered > 2 * len(self._threads), "requests ran during all of it"


def is_up(door: Cluster) -> bool:
    return door.metric("baton_discovery_up") == 1


def test_what_was_announced_by_a_dead_coordinator_goes_and_a_new_one_gets_all_workers(
    etcd: Etcd, parts: Parts, doors: list[Cluster], expected: list[str]
) -> None:
    process, late = parts.coordinator()
    late.wait_for(lambda: has_all(late), "the workers have found it")
    assert etcd.announced() == 3
    with Load(doors, expected):
        assert ask(late, PROMPTS[0]) == expected[0]
        process.kill()
        process.wait()
        wait_for(lambda: etcd.announced() == 2, "its lease ends", 5 * TTL_S)
        time.sleep(1.0)
    process, late = parts.coordinator()
    late.wait_for(lambda: has_all(late), "the workers have found it")
    process.terminate()
    process.wait(20)
    assert etcd.announced() == 2, "one that ends in order takes its announcement back at once"


@pytest.mark.parametrize("accident", ["killed", "stopped", "emptied", "compacted"])
def test_no_request_notices_that_etcd_is(
    etcd: Etcd, parts: Parts, doors: list[Cluster], expected: list[str], accident: str
) -> None:
    before = [incarnations(door) for door in doors]
    joined = parts.whole_log().count(" joined: ")
    losses = [door.metric("baton_discovery_losses_total") for door in doors]
    with Load(doors, expected):
        if accident == "compacted":
            etcd.compact()
            time.sleep(2.0)
        elif accident == "stopped":
            os.kill(etcd.process.pid, signal.SIGSTOP)
            time.sleep(OUTAGE_S)
            assert not any(is_up(door) for door in doors), "its silence is noticed"
            os.kill(etcd.process.pid, signal.SIGCONT)
        else:
            etcd.kill()
            time.sleep(OUTAGE_S if accident == "killed" else 3.0)
            assert not any(is_up(door) for door in doors)
            if accident == "emptied":
                etcd.empty()
            etcd.start()
        wait_for(lambda: all(is_up(door) for door in doors), "etcd is back for the coordinators")
        wait_for(lambda: etcd.announced() == 2, "both are announced again")
    assert parts.whole_log().count(" joined: ") == joined, "no link was cut"
    assert [incarnations(door) for door in doors] == before
    if accident != "compacted":
        assert all(door.metric("baton_discovery_losses_total") > old for door, old in zip(doors, losses, strict=True))
    process, late = parts.coordinator()
    late.wait_for(lambda: has_all(late), "the workers watch again")
    process.terminate()
    process.wait(20)


def test_a_coordinator_that_comes_while_etcd_is_down_says_so_and_is_found_once_it_is_back(
    etcd: Etcd, parts: Parts, doors: list[Cluster]
) -> None:
    etcd.kill()
    process, late = parts.coordinator()
    late.wait_for(lambda: late.metric("baton_discovery_losses_total") == 1, "it has tried")
    assert not is_up(late)
    assert "nobody new is found until it is back" in parts.whole_log()
    time.sleep(1.0)
    assert not incarnations(late)
    etcd.start()
    late.wait_for(lambda: has_all(late), "it is found")
    assert is_up(late)
    process.terminate()
    process.wait(20)


def test_a_worker_that_finds_nobody_says_why_and_ends(etcd: Etcd, parts: Parts) -> None:
    wrong = parts.worker_process("mixed", "--discovery", etcd.url + "/elsewhere", "--connect-timeout-s", "1")
    assert wrong.wait(60) == 2
    assert "no coordinator was announced for 1 s" in parts.whole_log()
    etcd.kill()
    try:
        lonely = parts.worker_process("mixed", "--connect-timeout-s", "1")
        assert lonely.wait(60) == 2
        assert "check --discovery" in parts.whole_log()
    finally:
        etcd.start()
