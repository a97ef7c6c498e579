"""The file behind `--audit-log`: one line of JSON for each request of a tenant that has ended. Never text of a prompt.

    {"log":"5f0c…","n":0,"time":"2026-11-21T15:00:00.000Z","event":"opened","after":"","chain":"…"}
    {"log":"5f0c…","n":1,…,"event":"request","request":"cmpl-…","tenant":"acme","key":"0a1b2c3d4e5f","model":"demo",
     "version":"v1","input":7,"cached":0,"output":16,"outcome":"completed","prompts":["…"],"chain":"…"}

`chain` is a keyed digest of the line and of the `chain` before it (Schneier and Kelsey, 1999), so a line that was taken
out, changed or moved is seen by whoever has the secret of `--keys` (`verify`); only what is cut off at the end of the
last file is not. `log` names the writer, one for each time that a coordinator opened the file: several may share it.
`prompts` are keyed digests as well: two equal ones are equal prompts, and nobody can try out which.

Lines are written by a thread, each with one write. While the disk does not take them they wait; what is more than may
wait is dropped, counted, and a line says how many there were. Requests are served on: who would rather stop them has
`baton_audit_lines_total{event="dropped"}` to act on.
"""

import contextlib
import logging
import os
import queue
import re
import secrets
import stat
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from baton.errors import ConfigurationError
from coordinator.delivery import Request
from coordinator.tenants.accounts import Ended
from coordinator.tenants.keys import Secret

events = logging.getLogger("baton.events")
MAX_WAITING_LINES = 8192
RETRY_S = 0.5
CLOSE_S = 2.0
SAY_AGAIN_S = 60.0
_TAIL_BYTES = 1 << 16
_CHAIN = re.compile(rb'^(.*),"chain":"([0-9a-f]{32})"\}$', re.DOTALL)
_encode = msgspec.json.Encoder().encode


class _Head(msgspec.Struct):
    """What of a line says where it belongs."""

    log: str
    n: int
    after: str = ""


_decode = msgspec.json.Decoder(_Head).decode


class AuditLog:
    def __init__(self, path: Path, model: str, secret: Secret) -> None:
        """Raises ConfigurationError for a file that cannot be opened."""
        self._path = path
        self._model = model
        self.counts: Counter[str] = Counter({"written": 0, "failed": 0, "dropped": 0})
        """`dropped` belongs to the caller's thread, the others to the writer's."""
        self._queue: queue.Queue[dict[str, Any] | Secret] = queue.Queue(MAX_WAITING_LINES)
        self._secret = secret
        self._told = 0
        """Of those that were dropped."""
        self._closing = threading.Event()
        self._writer = _Writer(path, secret)
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def write(self, ended: Ended) -> None:
        """Never waits."""
        request, used = ended.request, ended.used
        fields = {
            "time": _now(), "event": "request", "request": request.id, "tenant": ended.tenant, "key": ended.key_id,
            "model": self._model, "version": request.version, "input": used.prompt, "cached": used.cached_prompt,
            "output": used.completion, "outcome": ended.outcome,
            # Made here, because a prompt that waited for the disk would take much more room than its digest.
            "prompts": [self._secret.digest(b"prompt", prompt).hex() for prompt in _prompts(request)],
        }  # fmt: skip
        try:
            self._queue.put_nowait(fields)
        except queue.Full:
            self.counts["dropped"] += 1

    def change_secret(self, secret: Secret) -> None:
        """What follows is chained anew with it."""
        self._secret = secret
        with contextlib.suppress(queue.Full):  # then nothing is written anyway, and the next file has it
            self._queue.put_nowait(secret)

    def close(self) -> None:
        """Write what waits, for up to CLOSE_S."""
        self._closing.set()
        self._thread.join(CLOSE_S)

    # The writer's thread

    def _run(self) -> None:
        self._write({"time": _now(), "event": "opened", "after": self._writer.after})
        while not (self._closing.is_set() and self._queue.empty()):
            try:
                item = self._queue.get(timeout=0.2)
            except queue.Empty:
                continue
            if isinstance(item, Secret):
                if item == self._writer.secret:
                    continue
                self._writer.begin(item)
                self._write({"time": _now(), "event": "opened", "after": self._writer.after})
                continue
            self._tell_dropped()
            self._write(item)
        self._tell_dropped()

    def _tell_dropped(self) -> None:
        if dropped := self.counts["dropped"] - self._told:
            self._told += dropped
            self._write({"time": _now(), "event": "dropped", "lines": dropped})

    def _write(self, fields: dict[str, Any]) -> None:
        """Until it is written, or nobody can wait any longer."""
        said_s = -SAY_AGAIN_S
        while True:
            try:
                if self._writer.moved():
                    self._writer.open()
                    self._writer.append({"time": _now(), "event": "opened", "after": self._writer.after})
                self._writer.append(fields)
                self.counts["written"] += 1
                return
            except OSError as error:
                self.counts["failed"] += 1
                if time.monotonic() - said_s >= SAY_AGAIN_S:
                    said_s = time.monotonic()
                    events.error("--audit-log %s cannot be written: %s; lines wait", self._path, error.strerror)
            if self._closing.wait(RETRY_S):
                return


class _Writer:
    """Appends chained lines to the file."""

    def __init__(self, path: Path, secret: Secret) -> None:
        """Raises ConfigurationError."""
        self._path = path
        self._fd = -1
        self.after = ""
        """The chain of what was written before this writer's first line."""
        self._chain = ""
        try:
            self.open()
        except OSError as error:
            raise ConfigurationError(f"--audit-log {path} cannot be written: {error.strerror}") from error
        self.begin(secret)

    def begin(self, secret: Secret) -> None:
        """A chain of its own."""
        self.secret = secret
        self.after = self._chain or self.after
        self._log, self._n, self._chain = secrets.token_hex(8), 0, ""

    def open(self) -> None:
        """Raises OSError, and then goes on with the file that was open."""
        fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        info = os.fstat(fd)
        tail = b""
        if stat.S_ISREG(info.st_mode):
            tail = os.pread(fd, _TAIL_BYTES, max(0, info.st_size - _TAIL_BYTES))
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._inode = fd, (info.st_dev, info.st_ino)
        self._torn = bool(tail) and not tail.endswith(b"\n")
        last = next((found[2].decode() for line in reversed(tail.split(b"\n")) if (found := _CHAIN.match(line))), "")
        if self._chain:
            self.begin(self.secret)
        else:
            self.after = last

    def moved(self) -> bool:
        """Somebody has put the file away."""
        try:
            info = os.stat(self._path)
        except FileNotFoundError:
            return True
        return (info.st_dev, info.st_ino) != self._inode

    def append(self, fields: dict[str, Any]) -> None:
        """Raises OSError where it is not, or not all, in the file."""
        body = _encode({"log": self._log, "n": self._n} | fields)[:-1]
        chain = _link(self.secret, self._chain, body)
        line = b'%s,"chain":"%s"}\n' % (body, chain.encode())
        data = b"\n" + line if self._torn else line  # what a full disk or a crash cut off stays a line of its own
        if (written := os.write(self._fd, data)) < len(data):
            self._torn = self._torn or written > 0
            raise OSError(0, "the disk took only a part of a line")
        self._torn = False
        self._n, self._chain = self._n + 1, chain


def verify(paths: Iterable[Path], secret: Secret) -> tuple[int, list[str]]:
    """The number of lines that are right, and what is wrong with the others. `paths`: oldest first.

    Raises OSError.
    """
    num_right, problems = 0, []
    heads: dict[str, tuple[int, str]] = {}
    """By writer: number of its last line, and its chain."""
    recent: deque[str] = deque(maxlen=4096)
    """Chains: another writer may have written on while one opened the file."""
    last = b""
    for path in paths:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                line, where = raw.rstrip(b"\n"), f"{path}:{number}"
                if not line or line == last:
                    continue  # a line that had lost nothing but its end was written again
                last = line
                try:
                    found = _CHAIN.match(line)
                    log, n, after = msgspec.structs.astuple(_decode(line if found else b""))
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                    problems.append(
                        f"{where}: no whole line: a crash or a full disk cut it off, or somebody changed it"
                    )
                    continue
                expected, chain = heads.get(log, (-1, ""))
                if found is None or _link(secret, chain if n else "", found[1]) != found[2].decode():
                    what = "was changed" if n == expected + 1 else f"does not follow line {expected} of its writer"
                    problems.append(f"{where}: {what}, or lines before it are missing, or the secret is another one")
                elif n == 0 and after and recent and after not in recent:
                    problems.append(f"{where}: lines before it are missing")
                else:
                    num_right += 1
                if found is not None:
                    heads[log] = (n, found[2].decode())
                    recent.append(found[2].decode())
    return num_right, problems


def _link(secret: Secret, before: str, body: bytes) -> str:
    return secret.digest(b"audit", before.encode() + body).hex()


def _prompts(request: Request) -> list[bytes]:
    return [first.packed_prompt for first in request.choices[:: request.form.choices_per_prompt]]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
