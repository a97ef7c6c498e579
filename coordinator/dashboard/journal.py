"""The last lines of the event log, for whoever opens the dashboard after something has happened."""

import logging
from collections import deque
from typing import Any

MAX_LINES = 200
MAX_CHARACTERS = 300


class Journal(logging.Handler):
    """Keeps what `baton.events` said; a line that repeats the one before it is counted, not kept again."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[dict[str, Any]] = deque(maxlen=MAX_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        text, level = record.getMessage()[:MAX_CHARACTERS], record.levelname.lower()
        last = self._lines[-1] if self._lines else None
        if last is not None and last["text"] == text:
            last["at"], last["times"] = record.created, last["times"] + 1
        else:
            self._lines.append({"at": record.created, "level": level, "text": text, "times": 1})

    def lines(self, number: int) -> list[dict[str, Any]]:
        """The latest, newest first. JSON-ready: `at` is in Unix seconds."""
        return [dict(line) for line, _ in zip(reversed(self._lines), range(number), strict=False)]
