"""A coordinator of its own before `baton fake`, as processes: what a browser looks at in tests."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 60.0


class Fleet:
    def __init__(self, folder: Path, *words: str) -> None:
        """`words` are those of `baton coordinator`; `folder` gets the logs."""
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._streams: list[threading.Thread] = []
        self._stopping = threading.Event()
        read_fd, write_fd = os.pipe()
        ports = ["--port", "0", "--grpc-port", "0", "--link-port", "0", "--announce-fd", str(write_fd)]
        self._start("coordinator", ["coordinator", *ports, *words], pass_fds=[write_fd])
        os.close(write_fd)
        with os.fdopen(read_fd) as pipe:
            assert select.select([pipe], [], [], START_TIMEOUT_S)[0], self.log("coordinator")
            announced = pipe.read()
        assert announced, self.log("coordinator")
        self._ports = json.loads(announced)
        self.url = f"http://127.0.0.1:{self._ports['http']}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait(10)
        for stream in self._streams:
            stream.join(10)

    def _start(self, name: str, words: list[str], **options: Any) -> None:
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-P", "-m", "cli.main", *words],
                stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT)}, **options,
            )  # fmt: skip

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text()[-4000:]

    def fakes(self, name: str, role: str, *words: str) -> None:
        """A process of fake workers, once the coordinator has the first of them."""
        link = f"127.0.0.1:{self._ports['link']}"
        self._start(name, ["fake", "--coordinator", link, "--role", role, "--worker-id", name, *words])
        self.wait_for(lambda feed: any(each["id"].startswith(name) for each in feed["workers"]), name)

    def kill(self, name: str) -> None:
        self._processes[name].send_signal(signal.SIGKILL)
        self._processes[name].wait(10)

    def feed(self, **headers: str) -> dict[str, Any]:
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/dashboard/feed", headers=headers)) as answer:
            feed: dict[str, Any] = json.load(answer)
            return feed

    def wait_for(self, promise: Callable[[dict[str, Any]], bool], what: str, timeout_s: float = 20.0) -> dict[str, Any]:
        """The feed of which it holds."""
        deadline = time.monotonic() + timeout_s
        while not promise(feed := self.feed()):
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}\n{self.log('coordinator')}"
            time.sleep(0.1)
        return feed

    def stream(self, prompt: str, max_tokens: int) -> None:
        """Have an answer streamed, which nobody waits for."""
        body = {"model": "demo", "prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
        self._streams.append(threading.Thread(target=self._read, args=(json.dumps(body).encode(),), daemon=True))
        self._streams[-1].start()

    def _read(self, body: bytes) -> None:
        request = urllib.request.Request(f"{self.url}/v1/completions", body, {"Content-Type": "application/json"})
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=30) as answer:
            for _ in _until(answer, self._stopping):
                pass


def _until(lines: Any, stop: threading.Event) -> Iterator[bytes]:
    for line in lines:
        if stop.is_set():
            return
        yield line
