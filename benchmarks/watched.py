"""The `baton` command with its seams timed: what a hand-over passes through, in every process of a `baton serve`.

    python -m benchmarks.watched FOLDER serve …

Each process writes FOLDER/<its subcommand>: a line a call, 'name start end detail', times in nanoseconds of
CLOCK_MONOTONIC, which all processes of a host share. Calls are let through as they are; one costs some 3 microseconds
more. Everything else is the command itself.
"""

import asyncio
import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

MODULE = "benchmarks.watched"
_COMMAND = "cli.main"
_WORKER_SEAMS = (
    ("worker.shell", "WorkerShell.on_assignment"),
    ("worker.shell", "WorkerShell._on_output"),
    ("worker.step_loop", "StepLoop.submit"),
    ("engine.engine", "Engine.step"),
    ("engine.engine", "Engine.receive"),
    ("engine.runner", "ModelRunner.run"),
    ("kvtransfer.offers", "OfferServer._checksum"),
    ("kvtransfer.offers", "OfferServer._send"),
    ("kvtransfer.intake", "Intake._on_message"),
    ("kvtransfer.intake", "pull_and_verify"),
)
_COORDINATOR_SEAMS = (
    ("coordinator.dispatch", "Dispatcher.start"),
    ("coordinator.dispatch", "Dispatcher._on_tokens"),
)


class Call(NamedTuple):
    """One call of a seam; nanoseconds of CLOCK_MONOTONIC."""

    seam: str
    start: int
    end: int
    detail: str
    """The kind of the message, where there is one."""


def read(path: Path) -> list[Call]:
    """The calls that a process has noted, by their start."""
    words = (line.split(" ") for line in path.read_text().splitlines())
    return sorted((Call(seam, int(start), int(end), detail) for seam, start, end, detail in words), key=lambda c: c[1])


def _watch(file: int, module: str, seam: str) -> None:
    owner: Any = importlib.import_module(module)
    *inside, name = seam.split(".")
    for each in inside:
        owner = getattr(owner, each)
    setattr(owner, name, _timed(file, seam, getattr(owner, name)))


def _timed(file: int, seam: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*arguments: Any, **named: Any) -> Any:
        start = time.monotonic_ns()
        result = call(*arguments, **named)
        end = time.monotonic_ns()
        message = arguments[-1]
        kind = message.WhichOneof("message") if hasattr(message, "WhichOneof") and seam in _WITH_MESSAGE else "-"
        os.write(file, f"{seam} {start} {end} {kind}\n".encode())
        return result

    return timed


_WITH_MESSAGE = {"OfferServer._send", "Intake._on_message"}


def _watch_children(folder: str) -> None:
    """Processes that `serve` starts run this module in place of the command."""
    unwatched = asyncio.create_subprocess_exec

    async def start(*words: Any, **options: Any) -> asyncio.subprocess.Process:
        at = words.index(_COMMAND)
        return await unwatched(*words[:at], MODULE, folder, *words[at + 1 :], **options)

    setattr(asyncio, "create_subprocess_exec", start)  # noqa: B010 - a function of another signature, for the checker


def main() -> None:
    folder, command = sys.argv[1:3]
    del sys.argv[1]
    if command == "serve":
        _watch_children(folder)
    else:
        file = os.open(Path(folder, command), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for module, seam in _COORDINATOR_SEAMS if command == "coordinator" else _WORKER_SEAMS:
            _watch(file, module, seam)
    importlib.import_module(_COMMAND).main()


if __name__ == "__main__":
    main()
