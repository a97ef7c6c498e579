"""A `baton serve` of real processes on free ports, for benchmarks and tests."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0


class Serving:
    """Runs while the context is open; its log is kept for when it fails.

    `urls`: where its coordinators listen; `url` and `grpc` are the first one's. `alone`: where each process of them
    listens that shares a port.
    """

    def __init__(self, *words: str, env: dict[str, str] | None = None, command: Sequence[str] = ("cli.main",)) -> None:
        """`words` are those of `baton serve`; `command`: the module that is the `baton` command, and what it takes."""
        self._log = tempfile.NamedTemporaryFile("w+", prefix="baton-serve-", suffix=".log")  # noqa: SIM115
        ports = ["--port", "0", "--grpc-port", "0", "--link-port", "0"]
        started_at = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", *command, "serve", *ports, *words],
            stdout=subprocess.PIPE, stderr=self._log, text=True, env={**os.environ, **(env or {})},
        )  # fmt: skip
        self.urls, self.grpc, self.alone = self._addresses()
        self.url = self.urls[0]
        self.ready_after_s = time.monotonic() - started_at

    def _addresses(self) -> tuple[list[str], str, list[str]]:
        lines: list[str] = []
        said = threading.Event()

        def read() -> None:
            assert self.process.stdout is not None
            for line in self.process.stdout:
                lines.append(line)
                if line.strip().startswith("try"):
                    said.set()
            said.set()

        threading.Thread(target=read, daemon=True).start()
        said.wait(START_TIMEOUT_S)
        text = "".join(lines)
        http, grpc = re.search(r"OpenAI API .*", text), re.search(r"gRPC\s+(\S+)", text)
        if not (http and grpc):
            self.stop()
            raise RuntimeError(f"baton serve did not get ready:\n{text}\n{self.log()}")
        alone = re.search(r"processes\s+(.*)", text)
        return re.findall(r"(\S+)/v1", http[0]), grpc[1], alone[1].split() if alone else []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if error is not None:
            print(self.log())

    def log(self) -> str:
        """The end of what its processes wrote."""
        return Path(self._log.name).read_text()[-8000:]

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return str(answer.read().decode())

    def status(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self.get("/status"))
        return result

    def worker(self, worker_id: str) -> dict[str, Any]:
        """Its row of the status. Raises StopIteration for a worker that is not there."""
        return next(worker for worker in self.status()["workers"] if worker["id"] == worker_id)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the signal and wait; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
