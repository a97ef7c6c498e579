"""Real processes at the price of a fork: the nursery has imported what a worker imports, and forks one when asked.

Starting Python with torch takes seconds of a core; a suite that kills a worker in most of its cases would do little
else. A forked worker runs `cli.main` with its own words, in a session of its own, as if it had been started anew.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).parents[2]


class Nursery:
    """Starts processes while the context is open."""

    def __enter__(self) -> Self:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRPC_VERBOSITY": "ERROR", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.faults.processes"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self._answer()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)

    def start(self, words: Sequence[str], log: Path) -> int:
        """Fork a process that runs `baton` with these words; its number."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(log), *words]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the nursery has ended")
        return int(line)


def state(pid: int) -> str:
    """As the kernel writes it: R and S run, T is stopped; X, as well, once the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0].replace("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def send(pid: int, number: signal.Signals) -> None:
    """A signal; nothing happens where the process is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def num_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@dataclass(frozen=True)
class Resident:
    """Memory of a process, in bytes. `shared`: its own KV pool and those of others that it has mapped."""

    private: int
    shared: int


def resident(pid: int) -> Resident:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if "kB" in value}
    return Resident((kib["RssAnon"] + kib["RssFile"]) << 10, kib["RssShmem"] << 10)


def _become(log: str, *words: str) -> None:
    from cli.main import main

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)):
        os.dup2(os.open(path, flags, 0o600), number)
    os.dup2(1, 2)
    sys.argv = ["baton", *words]
    main()


def _nurse() -> None:
    import coordinator.server  # noqa: F401 - what is slow to import, imported once

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children, and none stays as a zombie
    print(os.getpid(), flush=True)
    for line in sys.stdin:
        if pid := os.fork():
            print(pid, flush=True)
            continue
        status = 70
        try:
            _become(*json.loads(line))
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        finally:
            sys.stderr.flush()
            os._exit(status)


if __name__ == "__main__":
    _nurse()
