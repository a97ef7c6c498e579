"""A folder of advisories answers as the API of OSV does, for audits where no network leads to one.

The folder is a checkout of PyPA's advisory database: vulns/NAME/ID.yaml, in OSV's schema.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import yaml
from packaging.version import InvalidVersion, Version

_MODIFIED: Final = re.compile(r"^modified: ['\"]?([\dT:.-]+)", re.MULTILINE)


class NoAdvisoriesError(Exception):
    """The folder is not such a checkout."""


class Advisories:
    """Raises NoAdvisoriesError."""

    def __init__(self, folder: Path) -> None:
        self._vulns = folder / "vulns"
        self._files = sorted(self._vulns.glob("*/*.yaml"))
        if not self._files:
            raise NoAdvisoriesError(f"{folder} has no vulns/NAME/ID.yaml; is it a checkout of pypa/advisory-database?")

    def newest(self) -> str:
        """The day when any of them was last changed: they know of nothing later."""
        texts = (file.read_text() for file in self._files)
        return max(match[1] for text in texts if (match := _MODIFIED.search(text)))[:10]

    def of(self, name: str, version: str) -> list[dict[str, Any]]:
        """Advisories, in OSV's schema, that concern this version of a package of PyPI, whose name is normalised."""
        if not re.fullmatch(r"[a-z0-9-]+", name):
            return []
        files = sorted((self._vulns / name).glob("*.yaml"))
        # As text, without dates of Python's, which JSON does not have.
        loaded = (yaml.load(file.read_text(), yaml.BaseLoader) for file in files)
        return [each for each in loaded if any(_concerns(it, version) for it in each.get("affected", ()))]

    @contextmanager
    def served(self) -> Iterator[str]:
        """The address to query, for as long as it lasts."""
        advisories = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                found = advisories.of(query["package"]["name"], query["version"])
                body = json.dumps({"vulns": found} if found else {}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: Any) -> None:
                """Nobody reads it."""

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_address[1]}/v1/query"
            finally:
                server.shutdown()
                thread.join()


def _concerns(affected: dict[str, Any], version: str) -> bool:
    if version in affected.get("versions", ()):
        return True
    ranges = (each["events"] for each in affected.get("ranges", ()) if each["type"] == "ECOSYSTEM")
    return any(_within(events, Version(version)) for events in ranges)


def _within(events: list[dict[str, str]], version: Version) -> bool:
    """OSV's rule: what the last event at or before this version says."""
    inside = False
    for event in sorted(events, key=lambda event: _version(next(iter(event.values())))):
        kind, said = next(iter(event.items()))
        at = _version(said)
        if kind == "introduced" and version >= at:
            inside = True
        elif (kind == "fixed" and version >= at) or (kind == "last_affected" and version > at):
            inside = False
    return inside


def _version(text: str) -> Version:
    """ "0" is before everything; what is no version is as if it said that."""
    try:
        return Version(text)
    except InvalidVersion:
        return Version("0.dev0")
