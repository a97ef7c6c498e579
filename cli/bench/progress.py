"""How far a run is, on a terminal: nothing where there is none."""

import sys
from collections import deque
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cli.bench.running import Standing

_RECENT = 200
"""Requests whose latencies are shown."""


class ProgressBar:
    """`requests` or `seconds` say when it ends; 0: they do not."""

    def __init__(self, requests: int, seconds: float) -> None:
        columns = [
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[seen]}"),
        ]  # fmt: skip
        self._progress = Progress(
            *columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
        )
        self._requests, self._seconds = requests, seconds
        total = float(requests) if requests else seconds or None
        self._task = self._progress.add_task("warming up", total=total, seen="")
        self._done = self._failed = 0
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, standing: Standing) -> None:
        self._done += sum(each.ok for each in standing.records)
        self._failed += sum(not each.ok for each in standing.records)
        self._recent.extend(1e3 * each.ttft for each in standing.records if each.ok)
        ended = self._done + self._failed
        completed = float(ended) if self._requests else min(standing.elapsed_s, self._seconds or standing.elapsed_s)
        seen = f"{ended / max(standing.elapsed_s, 1e-3):.1f} req/s, {standing.running} running"
        if standing.waiting:
            seen += f", {standing.waiting} waiting"
        if self._recent:
            seen += f", TTFT {sorted(self._recent)[len(self._recent) // 2]:.1f} ms"
        if self._failed:
            seen += f", [red]{self._failed} failed[/red]"
        drains = bool(self._seconds) and standing.elapsed_s > self._seconds
        description = "waiting for the last" if drains else "measuring"
        self._progress.update(self._task, completed=completed, seen=seen, description=description)
