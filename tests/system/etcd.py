"""A real etcd of one member, for tests."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.ports import free_port

INSTALLED = bool(shutil.which("etcd") and shutil.which("etcdctl"))
MISSING = "etcd is not installed: make system-packages"


class Etcd:
    """One member with a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._client, self._peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        self.url = self._client.replace("http", "etcd")
        self.start()

    def start(self) -> None:
        self.launch()
        wait_for(self.answers, "etcd answers")

    def launch(self) -> None:
        """Start it, and wait for nothing."""
        words = [
            "--name", "n0", "--data-dir", str(self._folder), "--initial-cluster", f"n0={self._peer}",
            "--listen-client-urls", self._client, "--advertise-client-urls", self._client,
            "--listen-peer-urls", self._peer, "--initial-advertise-peer-urls", self._peer,
        ]  # fmt: skip
        self.process = subprocess.Popen(["etcd", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def answers(self) -> bool:
        return self._ctl("endpoint", "health").returncode == 0

    def announced(self) -> int:
        return self._ctl("get", "--prefix", "--keys-only", "/baton/coordinators/").stdout.count("coordinators/")

    def compact(self) -> None:
        """Every revision up to now."""
        for number in range(20):
            self._ctl("put", "/other", str(number))
        revision = re.search(r'"revision":(\d+)', self._ctl("get", "/other", "-w", "json").stdout)
        assert revision
        assert self._ctl("compact", revision[1], "--physical").returncode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def empty(self) -> None:
        shutil.rmtree(self._folder)

    def _ctl(self, *words: str) -> "subprocess.CompletedProcess[str]":
        command = ["etcdctl", "--endpoints", self._client, "--command-timeout", "2s", *words]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=False, env={**os.environ, "ETCDCTL_API": "3"}
        )


def wait_for(promise: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not promise():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)
