"""A TOML file that operators edit while the coordinator runs: read at the start, and again when it changes.

A broken one leaves what was read before in force.
"""

import asyncio
import logging
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from baton.errors import ConfigurationError

T = TypeVar("T")
events = logging.getLogger("baton.events")
POLL_S = 1.0


class WatchedFile(Generic[T]):
    def __init__(
        self, flag: str, path: Path, parse: Callable[[str], T],
        poll_s: float | None = None, max_bytes: int = 1 << 16, secret: bool = False,
    ) -> None:  # fmt: skip
        """`parse` raises ConfigurationError; `poll_s` None: POLL_S; `secret`: a file that every user of this machine
        may read is broken.

        Raises ConfigurationError for a file that is broken at the start.
        """
        self._name = f"{flag} {path}"
        self._path = path
        self._parse = parse
        self._poll_s = poll_s
        self._max_bytes = max_bytes
        self._secret = secret
        self._read_state: _FileState | None = None
        self._last_state: _FileState | None = None
        self.trouble = ""
        """Why what is in force is older than the file."""
        try:
            self.content = self._read(self._state())
        except (OSError, ConfigurationError) as error:
            raise ConfigurationError(f"{self._name}: {_reason(error)}") from None

    def _state(self) -> "_FileState":
        # What a config map changes is a link on the way to the file: another inode, perhaps with an older time.
        info = self._path.stat()
        return _FileState(info.st_mtime_ns, info.st_ino, info.st_dev, info.st_size, info.st_mode)

    def _read(self, state: "_FileState") -> T:
        self._read_state = self._last_state = state
        if self._secret and state.mode & stat.S_IRWXO:
            raise ConfigurationError(f"every user of this machine may read it; say chmod 600 {self._path}")
        if state.num_bytes > self._max_bytes:
            raise ConfigurationError(f"it has {state.num_bytes} bytes; at most {self._max_bytes} are possible")
        try:
            text = self._path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ConfigurationError("it is no UTF-8 text") from None
        return self._parse(text)

    def _changed(self) -> T | None:
        """What it says now, if it is another file than the one read last and the same as at the last look: half of a
        file may say something else than the whole. Raises as `_read`."""
        before = self._last_state
        try:
            self._last_state = self._state()
        except OSError:
            self._last_state = self._read_state = None
            if before is None:
                return None
            raise
        if self._last_state == self._read_state or self._last_state != before:
            return None
        return self._read(self._last_state)

    async def watch(self, on_change: Callable[[T], None], on_error: Callable[[], None]) -> None:
        """Until cancelled. The disk may be slow: it is looked at in a thread."""
        while True:
            await asyncio.sleep(POLL_S if self._poll_s is None else self._poll_s)
            try:
                content = await asyncio.to_thread(self._changed)
            except (OSError, ConfigurationError) as error:
                self.trouble = _reason(error)
                events.warning("%s: %s; what was read before stays in force", self._name, self.trouble)
                on_error()
                continue
            if content is not None:
                self.content, self.trouble = content, ""
                events.info("%s was read again", self._name)
                on_change(content)


class _FileState(NamedTuple):
    mtime_ns: int
    inode: int
    device: int
    num_bytes: int
    mode: int


def _reason(error: OSError | ConfigurationError) -> str:
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)
