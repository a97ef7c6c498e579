"""A peer at work: a script of this folder in the peer's environment, every answer with a deadline."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.peers.environments import TAIL_CHARACTERS, Environment, Unavailable
from benchmarks.peers.protocol import Timed

HERE = Path(__file__).parent
START_TIMEOUT_S = 180.0
QUIT_TIMEOUT_S = 10.0


class PeerProcess:
    """A `Side` in another process, being started. Every method raises Unavailable when it died or is late.

    Ask nothing before `wait_until_ready`, so that several can start side by side.
    """

    def __init__(self, name: str, environment: Environment, script: str, *words: str, answer_s: float = 120.0) -> None:
        self.name = name
        self._answer_s = answer_s
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        # By its path, away from here: in a clone of this repository `engine` and `kernels` would be taken for others'.
        self._child = subprocess.Popen(
            [str(environment.python), str(HERE / script), *words], cwd=tempfile.gettempdir(),
            env={**_plain_environment(), **environment.variables}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, start_new_session=True,
        )  # fmt: skip
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def wait_until_ready(self) -> str:
        """What it says about itself."""
        return str(self._answer(START_TIMEOUT_S)["about"])

    def next_tokens(self, prompts: Sequence[list[int]]) -> list[int]:
        result: list[int] = self._ask(do="next_tokens", prompts=list(prompts))
        return result

    def decode(self, prompt: list[int], batch: int, new_tokens: int) -> Timed:
        return Timed(**self._ask(do="decode", prompt=prompt, batch=batch, new_tokens=new_tokens))

    def prefill(self, prompt: list[int]) -> Timed:
        return Timed(**self._ask(do="prefill", prompt=prompt))

    def _ask(self, **request: Any) -> Any:
        assert self._child.stdin is not None, "opened as a pipe"
        with contextlib.suppress(BrokenPipeError):  # it died: `_answer` says so, and why
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
        return self._answer(self._answer_s)

    def _answer(self, timeout_s: float) -> Any:
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise self._failed(f"no answer within {timeout_s:.0f} s") from None
        if not line:
            raise self._failed("it ended")
        return json.loads(line)

    def _failed(self, what: str) -> Unavailable:
        self.close()
        return Unavailable(f"{what}; its last words: {self.last_words}")

    def _read(self) -> None:
        assert self._child.stdout is not None, "opened as a pipe"
        for line in self._child.stdout:
            self._lines.put(line)
        self._lines.put("")

    def close(self) -> None:
        """End it, with everything that it started."""
        if self._errors.closed:
            return
        assert self._child.stdin is not None, "opened as a pipe"
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(QUIT_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._errors.seek(0)
        self.last_words = " ".join(self._errors.read().split())[-TAIL_CHARACTERS:]
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run_script(environment: Environment, script: str, *words: str, timeout_s: float) -> str:
    """Run a script of this folder to its end; what it printed. Raises Unavailable when it fails or is late."""
    command = [str(environment.python), str(HERE / script), *words]
    child = subprocess.Popen(
        command, cwd=tempfile.gettempdir(), env={**_plain_environment(), **environment.variables},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    started = time.monotonic()
    try:
        output, errors = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{script} was not done after {time.monotonic() - started:.0f} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
    if child.returncode:
        raise Unavailable(f"{script} failed: {' '.join(errors.split())[-TAIL_CHARACTERS:]}")
    return output


def _plain_environment() -> Mapping[str, str]:
    """Without what would let this environment's packages into the peer's."""
    return {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
