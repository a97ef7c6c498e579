"""The parts started one by one, as on several machines: they find each other, survive a coordinator, and drain."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from baton.client import Client, ClientError
from tests.ports import free_port
from tests.system.cluster import ELSEWHERE

WORKER = ("--dtype", "float32", "--kv-memory", "32MiB", "--threads", "1")
TIMEOUT_S = 60.0


class Parts:
    """Each part a process of its own, stopped at the end."""

    def __init__(self, folder: Path) -> None:
        self.http, self.grpc, self.link = free_port(), free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.http}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._folder = folder

    def start(self, name: str, *words: str) -> None:
        if name == "coordinator":
            words += ELSEWHERE
        log = (self._folder / f"{name}.log").open("ab")
        command = [sys.executable, "-P", "-m", "cli.main", name.split("-")[0], *words]
        self.processes[name] = subprocess.Popen(command, stdout=log, stderr=log)
        log.close()

    def start_coordinator(self) -> None:
        ports = ["--port", str(self.http), "--grpc-port", str(self.grpc), "--link-port", str(self.link)]
        self.start("coordinator", *ports)

    def start_worker(self, name: str, *words: str) -> None:
        self.start(name, "--worker-id", name, "--coordinator", f"127.0.0.1:{self.link}", *WORKER, *words)

    def status(self) -> dict[str, Any]:
        with urllib.request.urlopen(self.url + "/status", timeout=5) as answer:
            return dict(json.load(answer))

    def workers(self) -> dict[str, Any]:
        try:
            return {worker["id"]: worker for worker in self.status()["workers"]}
        except (urllib.error.URLError, ConnectionError):
            return {}

    def wait_for(self, *names: str) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_S
        while set(workers := self.workers()) != set(names):
            assert time.monotonic() < deadline, f"{names} are not there:\n{self.logs()}"
            time.sleep(0.05)
        return workers

    def counted(self, name: str, worker: str) -> float:
        with urllib.request.urlopen(self.url + "/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        start = f'baton_worker_{name}_total{{worker="{worker}"}} '
        return sum(float(line.removeprefix(start)) for line in lines if line.startswith(start))

    def logs(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self._folder.glob("*.log")))

    def ask(self, prompt: str, max_tokens: int = 8, on_text: Callable[[], None] = lambda: None) -> str:
        """The whole answer; `on_text` is called with every piece of it."""
        text = ""
        with Client(self.url) as client:
            for delta in client.complete(prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True):
                text += delta.text
                on_text()
        return text

    def stop(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            process.wait(TIMEOUT_S)


def ask_until_refused(parts: Parts) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        parts.ask("Hello", 1)


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    with ExitStack() as stack:
        parts = Parts(tmp_path)
        stack.callback(parts.stop)
        yield parts


def test_parts_find_each_other_and_survive_a_killed_coordinator(parts: Parts) -> None:
    parts.start_coordinator()
    parts.start_worker("prefill-a")
    parts.start_worker("decode-a", "--lanes", "tcp")
    before = parts.wait_for("prefill-a", "decode-a")
    prompt = "A module is a file that contains definitions. " * 12
    text = parts.ask(prompt)
    assert parts.workers()["decode-a"]["lanes_in_use"] in ({}, {"prefill-a": "tcp"})

    parts.processes["coordinator"].kill()
    parts.processes["coordinator"].wait(TIMEOUT_S)
    parts.start_coordinator()
    after = parts.wait_for("prefill-a", "decode-a")
    assert {name: worker["incarnation"] for name, worker in after.items()} == {
        name: worker["incarnation"] for name, worker in before.items()
    }
    assert parts.ask(prompt) == text
    assert parts.ask(prompt + "And more of it, which no cache holds. " * 9)


def test_sigterm_lets_a_worker_finish_its_streams_and_take_no_new_ones(parts: Parts) -> None:
    parts.start_coordinator()
    parts.start_worker("decode-a")
    parts.wait_for("decode-a")
    expected = parts.ask("The list type", 400)
    running = threading.Event()
    answers: list[str] = []
    stream = threading.Thread(target=lambda: answers.append(parts.ask("The list type", 400, running.set)))
    stream.start()
    assert running.wait(TIMEOUT_S), "no token came"
    worker = parts.processes["decode-a"]
    worker.send_signal(signal.SIGTERM)
    with pytest.raises(ClientError, match="worker"):
        ask_until_refused(parts)
    stream.join(TIMEOUT_S)
    assert answers == [expected]
    assert worker.wait(TIMEOUT_S) == 0


def test_a_worker_with_another_page_size_takes_blocks_over_all_the_same(parts: Parts) -> None:
    prompt = "A module is a file that contains definitions. " * 12
    parts.start_coordinator()
    parts.start_worker("decode-a")
    parts.wait_for("decode-a")
    text = parts.ask(prompt)
    parts.processes["decode-a"].terminate()
    parts.start_worker("prefill-a")
    parts.start_worker("decode-b", "--page-size", "32")
    parts.wait_for("prefill-a", "decode-b")
    assert parts.ask(prompt) == text
    deadline = time.monotonic() + TIMEOUT_S
    while not parts.counted("handover_blocks_converted", "decode-b"):  # told with the next heartbeat
        assert time.monotonic() < deadline, parts.logs()
        time.sleep(0.05)
    assert not parts.counted("local_prefill_fallbacks", "decode-b")


def test_a_worker_with_another_dtype_is_refused_and_says_why(parts: Parts) -> None:
    parts.start_coordinator()
    parts.start_worker("decode-a")
    parts.wait_for("decode-a")
    parts.start_worker("decode-b", "--dtype", "bfloat16")
    assert parts.processes["decode-b"].wait(TIMEOUT_S) == 2
    assert "start all workers with the same model and dtype" in parts.logs()
    assert set(parts.workers()) == {"decode-a"}


@pytest.mark.parametrize(("giver", "taker"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_with_convert_kv_dtype_a_decode_worker_takes_kv_of_another_dtype_and_shares_none_of_it(
    parts: Parts, giver: str, taker: str
) -> None:
    prompt = "A module is a file that contains definitions. " * 12
    parts.start_coordinator()
    parts.start_worker("decode-a", "--dtype", taker, "--convert-kv-dtype")
    parts.start_worker("prefill-a", "--dtype", giver)
    parts.wait_for("prefill-a", "decode-a")
    tokens = 0

    def count() -> None:
        nonlocal tokens
        tokens += 1

    assert parts.ask(prompt, 8, count)
    assert 1 <= tokens <= 8, "events, of which one may bring several"
    deadline = time.monotonic() + TIMEOUT_S
    while not parts.counted("handover_blocks_converted", "decode-a"):  # told with the next heartbeat
        assert time.monotonic() < deadline, parts.logs()
        time.sleep(0.05)
    while (blocks := parts.workers()["decode-a"]["blocks"])["held"]:
        assert time.monotonic() < deadline, parts.logs()
        time.sleep(0.05)
    assert (blocks["cached"], blocks["free"]) == (0, blocks["total"]), "what has no name is not kept"
    assert not parts.counted("local_prefill_fallbacks", "decode-a")


def test_a_worker_exits_when_the_process_that_started_it_is_gone(parts: Parts) -> None:
    parent = subprocess.Popen(["sleep", "600"])
    try:
        parts.start_coordinator()
        parts.start_worker("decode-a", "--parent-pid", str(parent.pid))
        parts.wait_for("decode-a")
        assert os.getpid() != parent.pid
    finally:
        parent.kill()
        parent.wait(TIMEOUT_S)
    assert parts.processes["decode-a"].wait(TIMEOUT_S) == 0
