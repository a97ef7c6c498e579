"""What a transport says of one answer, and what it calls a failure."""

import time
from array import array
from dataclasses import dataclass, field
from typing import Protocol

from cli.bench.measuring import REFUSED

MAX_EXAMPLE = 200
"""Characters of a server's words that are kept as an example of an error."""


class AskError(Exception):
    """A request failed. `kind` counts it; `example`: in the server's words. `retry_after_s`: when to ask again, of a
    server that is overloaded and says so."""

    def __init__(self, kind: str, example: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(kind)
        self.kind = kind
        self.example = example[:MAX_EXAMPLE]
        self.retry_after_s = retry_after_s

    @property
    def is_refusal(self) -> bool:
        return self.kind == REFUSED


def http_kind(status: int) -> str:
    return REFUSED if status == 429 else f"HTTP {status}"


@dataclass(slots=True)
class Seen:
    """Of one answer, while it comes. Times are of `time.monotonic`, taken when bytes came, before they are parsed."""

    times: "array[float]" = field(default_factory=lambda: array("d"))
    """Of each event that brought something of the answer."""
    ended_at: float = 0.0
    """When the last of them came, or how it ended."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    counted: bool = False
    """The server said how many tokens there were."""
    finished: bool = False
    keep: bool = False
    """What the answer is made of, for the next turn."""
    texts: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)

    def event(self, now: float, is_end: bool) -> None:
        """`is_end` alone: it says how the answer ended, and brings nothing of it."""
        if not is_end:
            self.times.append(now)
        self.ended_at = now


class Transport(Protocol):
    """One server, as one process asks it."""

    reconnections: int

    @property
    def connections(self) -> int:
        """Opened so far."""

    async def ask(self, request: bytes, seen: Seen) -> None:
        """Send it, and read its answer to its end. Raises AskError. Cancelled, it ends the request."""

    async def close(self) -> None: ...


now = time.monotonic
