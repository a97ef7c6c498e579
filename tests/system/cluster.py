"""What tests ask of a `baton serve` of their own. Every wait has a deadline, and the log is there when one passes."""

import json
import re
import time
import urllib.request
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any, Self

from benchmarks.serving import Serving

ELSEWHERE = ("--routing", "least_loaded")
"""Prompts go to prefill workers also where the decode worker would be as soon: a test sees all of the relay."""
UNREFUSED = ("--service-classes", "standard=0/0")
"""However long requests may have to wait while workers die."""


class Cluster(Serving):
    def __init__(self, *words: str, **others: Any) -> None:
        super().__init__(*(() if "--routing" in words else ELSEWHERE), *words, **others)

    def at(self, url: str) -> Self:
        """The same processes, asked at another coordinator."""
        other = copy(self)
        other.url = url
        return other

    def post(self, path: str, body: dict[str, Any], timeout_s: float = 120.0) -> dict[str, Any]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            result: dict[str, Any] = json.load(answer)
            return result

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of this name whose labels include the given ones."""
        total = 0.0
        for line in self.get("/metrics").splitlines():
            sample = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if sample and sample[1] == name:
                found = dict(re.findall(r'(\w+)="([^"]*)"', sample[2] or ""))
                if labels.items() <= found.items():
                    total += float(sample[3])
        return total

    def wait_for(self, promise: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not promise():
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout_s} s: {what}\n{self.log()}")
            time.sleep(0.05)

    def is_whole(self) -> bool:
        """Idle, and every block of every worker is free or cached."""
        return all(
            worker["running"] == worker["waiting"] == 0
            and worker["blocks"]["free"] + worker["blocks"]["cached"] == worker["blocks"]["total"]
            for worker in self.status()["workers"]
        )

    def pids(self) -> list[int]:
        """This command and every process that it started."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        children = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
        return [self.process.pid, *children]


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead but not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
