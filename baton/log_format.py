"""How lines of logs look: for people, or as JSON for programs. Neither has text of a prompt.

A record whose `extra` has `fields`, a dict or what makes one, says with them what its message says in words:
`request_id` and others.
"""

import json
import logging
import os
import time
import traceback
from datetime import UTC, datetime
from typing import Any

LOG_FORMAT_VARIABLE = "BATON_LOG_FORMAT"
"""`text` or `json`; in the environment, so that processes that this one starts have it."""


def log_format(process: str) -> logging.Formatter:
    if os.environ.get(LOG_FORMAT_VARIABLE) == "json":
        return JsonLines(process)
    return TextLines(f"%(asctime)s %(levelname)-7s {process} %(name)s: %(message)s")


class TextLines(logging.Formatter):
    """For people."""

    _second, _written = 0, ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """As logging has it; of all lines of a second, only the first takes the calendar."""
        second = int(record.created)
        if second != self._second:
            self._second, self._written = second, time.strftime(self.default_time_format, self.converter(second))
        return f"{self._written},{int(record.msecs):03d}"


class JsonLines(logging.Formatter):
    """One object a line. Of an exception it has no message, which might quote what it failed on."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds"), "level": record.levelname.lower(),
            "process": self._process, "part": record.name, "message": record.getMessage(),
        }  # fmt: skip
        fields = getattr(record, "fields", {})
        fields = fields() if callable(fields) else fields
        line |= {name: value for name, value in fields.items() if value not in (None, "")}
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = record.exc_info[0].__name__
            line["stack"] = "".join(traceback.format_tb(record.exc_info[2]))
        return json.dumps(line, default=str, ensure_ascii=False)
