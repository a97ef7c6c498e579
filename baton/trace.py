"""Traces for people: the JSON form of Chrome's trace viewer, which ui.perfetto.dev opens as well.

    process "decode"      track "step loop"   |step______________________|
                                               |plan|run__________|apply|
                          track "kernels"           |linear|attention|…
    process "requests"    one row a request   |queued |first token       |

Times are `time.perf_counter_ns()`; a file begins at its earliest event. Spans of one track must nest: give every thread
a track of its own. What lasts beside others, such as requests, is `lasting`.
The format: "Trace Event Format" (Chromium).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton.files import replace_file

MAX_EVENTS = 500_000
"""More than viewers show at ease; what comes after is counted in `otherData` and left out."""


@dataclass(frozen=True, slots=True)
class Track:
    """A row of the viewer. `kind` becomes the category of its events."""

    process: int
    row: int
    kind: str


@dataclass
class Trace:
    """Collects events, then writes them once. Not thread-safe: record elsewhere, fill a trace afterwards."""

    about: dict[str, Any] = field(default_factory=dict)
    """Whatever a reader should know of the run; goes into the file."""
    _events: list[dict[str, Any]] = field(default_factory=list)
    _processes: dict[str, int] = field(default_factory=dict)
    _tracks: dict[tuple[str, str], Track] = field(default_factory=dict)
    _num_dropped: int = 0
    _num_lasting: int = 0

    def track(self, process: str, name: str, kind: str) -> Track:
        """The row of that name; rows are shown in the order in which they were first asked for."""
        known = self._tracks.get((process, name))
        if known is not None:
            return known
        number = self._processes.setdefault(process, len(self._processes) + 1)
        track = self._tracks[process, name] = Track(number, len(self._tracks) + 1, kind)
        return track

    def span(self, track: Track, name: str, start_ns: int, end_ns: int, **arguments: Any) -> None:
        """Something that the track did from start to end."""
        self._add(track, name, "X", start_ns, {"dur": (end_ns - start_ns) / 1000, "args": arguments})

    def instant(self, track: Track, name: str, at_ns: int, **arguments: Any) -> None:
        """Something that happened."""
        self._add(track, name, "i", at_ns, {"s": "t", "args": arguments})

    def lasting(
        self, track: Track, name: str, start_ns: int, end_ns: int, marks: dict[str, int], **arguments: Any
    ) -> None:
        """Something that lasts beside others of its kind, with moments (name -> time) in between."""
        self._num_lasting += 1
        id = {"id": self._num_lasting}
        self._add(track, name, "b", start_ns, {**id, "args": arguments})
        for mark, at_ns in marks.items():
            self._add(track, mark, "n", at_ns, {**id, "args": {}})
        self._add(track, name, "e", end_ns, {**id, "args": {}})

    def save(self, path: Path) -> None:
        """Raises ConfigurationError when the file cannot be written."""
        origin = min((event["ts"] for event in self._events), default=0)
        events = [{**event, "ts": (event["ts"] - origin) / 1000} for event in self._events]
        events.sort(key=lambda event: (event["ts"], -event.get("dur", 0.0)))
        about = {**self.about, "events left out": self._num_dropped}
        document = {"traceEvents": self._names() + events, "displayTimeUnit": "ms", "otherData": about}
        replace_file(path, json.dumps(document, separators=(",", ":")) + "\n")

    def _add(self, track: Track, name: str, phase: str, at_ns: int, more: dict[str, Any]) -> None:
        if len(self._events) >= MAX_EVENTS:
            self._num_dropped += 1
            return
        event = {"name": name, "cat": track.kind, "ph": phase, "ts": at_ns, "pid": track.process, "tid": track.row}
        self._events.append({**event, **more})

    def _names(self) -> list[dict[str, Any]]:
        """What the viewer calls processes and tracks, and in which order it shows them."""
        names: list[dict[str, Any]] = []
        for process, number in self._processes.items():
            names.append(_name(number, 0, "process_name", name=process))
            names.append(_name(number, 0, "process_sort_index", sort_index=number))
        for (_, name), track in self._tracks.items():
            names.append(_name(track.process, track.row, "thread_name", name=name))
            names.append(_name(track.process, track.row, "thread_sort_index", sort_index=track.row))
        return names


def _name(process: int, row: int, what: str, **arguments: Any) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": row, "args": arguments}
