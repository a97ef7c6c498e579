"""Which version of the model gets how much of the traffic: the file behind `--rollout`, and the choices that follow.

    salt = "any text"   # optional: mixed into the choice, so that no client can compute where its requests go
    [weights]           # of clients' requests; only their ratios count, and 0 means never
    v1 = 90
    v2 = 10
    [shadow]            # of clients' requests the share of which a copy runs there, for nobody but the metrics
    v3 = 0.05

Pure but for `RolloutFile`, which reads the file again when it changes.
"""

import asyncio
import logging
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import xxhash

from baton.config import check_version_label
from baton.errors import ConfigurationError

events = logging.getLogger("baton.events")
MAX_FILE_BYTES = 1 << 16
POLL_S = 1.0


@dataclass(frozen=True)
class Rollout:
    weights: Mapping[str, float] = field(default_factory=dict)
    shadow: Mapping[str, float] = field(default_factory=dict)
    salt: str = ""

    def forbids(self, version: str) -> bool:
        """Clients' requests never go there, whatever happens to the other versions."""
        return version in self.shadow or self.weights.get(version) == 0

    def pick(self, key: str, weights: Mapping[str, float]) -> str:
        """The version for `key` (a request's id or its user), of those in `weights`, all of them above 0.

        Weighted rendezvous hashing (Thaler and Ravishankar, 1998): each version's share is its weight's, the same key
        always gets the same version at every coordinator, a weight that grows only takes keys over, and the keys of a
        version that is left out are shared by the others.
        """
        return max(weights, key=lambda version: -weights[version] / math.log(self._uniform(key, version)))

    def wants_shadow(self, key: str, version: str) -> bool:
        return self._uniform(key, version, "shadow") < self.shadow[version]

    def _uniform(self, *parts: str) -> float:
        """Above 0 and below 1, a function of the parts and the salt."""
        number = xxhash.xxh3_64_intdigest("\0".join((self.salt, *parts)))
        return ((number >> 12) + 0.5) / 2**52


def parse_rollout(text: str) -> Rollout:
    """Raises ConfigurationError that says what to change."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"it is no TOML: {error}") from None
    if unknown := data.keys() - {"weights", "shadow", "salt"}:
        raise ConfigurationError(f"'{min(unknown)}' is not known; write [weights], [shadow] and salt")
    weights, shadow = _numbers(data, "weights", math.inf), _numbers(data, "shadow", 1.0)
    if not isinstance(salt := data.get("salt", ""), str):
        raise ConfigurationError("salt must be text in quotes")
    if weights and not any(weights.values()):
        raise ConfigurationError("every weight is 0; give at least one version a greater one")
    for version in shadow:
        if weights.get(version):
            raise ConfigurationError(
                f"version {version} has a weight and a shadow share, and copies must not be in the way of clients; "
                "leave one of them out"
            )
    return Rollout(weights, shadow, salt)


def _numbers(data: Mapping[str, object], name: str, most: float) -> dict[str, float]:
    table = data.get(name, {})
    if not isinstance(table, dict):
        raise ConfigurationError(f"{name} must be a table: [{name}], and under it lines like v1 = 1")
    for version, number in table.items():
        check_version_label(version, f"[{name}]")
        if (
            isinstance(number, bool)
            or not isinstance(number, int | float)
            or not 0 <= number <= most
            or number == math.inf
        ):
            limit = "0 or more" if most == math.inf else f"0 to {most:g}"
            raise ConfigurationError(f"{version} in [{name}] must be a number, {limit}")
    return {version: float(number) for version, number in table.items()}


class RolloutFile:
    """Read at the start, and again when it changes. A broken one leaves what was read before in force."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigurationError for a file that is broken at the start."""
        self._path = path
        self._read_state: _FileState | None = None
        self._last_state: _FileState | None = None
        self.trouble = ""
        """Why what is in force is older than the file."""
        try:
            self.rollout = self._read(self._state())
        except (OSError, ConfigurationError) as error:
            raise ConfigurationError(f"--rollout {path}: {_reason(error)}") from None

    def _state(self) -> "_FileState":
        # What a config map changes is a link on the way to the file: another inode, perhaps with an older time.
        info = self._path.stat()
        return _FileState(info.st_mtime_ns, info.st_ino, info.st_dev, info.st_size)

    def _read(self, state: "_FileState") -> Rollout:
        self._read_state = self._last_state = state
        if state.num_bytes > MAX_FILE_BYTES:
            raise ConfigurationError(f"it has {state.num_bytes} bytes; at most {MAX_FILE_BYTES} are possible")
        try:
            text = self._path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ConfigurationError("it is no UTF-8 text") from None
        return parse_rollout(text)

    def _changed(self) -> Rollout | None:
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

    async def watch(self, on_change: Callable[[Rollout], None], on_error: Callable[[], None]) -> None:
        """Until cancelled. The disk may be slow: it is looked at in a thread."""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                rollout = await asyncio.to_thread(self._changed)
            except (OSError, ConfigurationError) as error:
                self.trouble = _reason(error)
                events.warning("--rollout %s: %s; what was read before stays in force", self._path, self.trouble)
                on_error()
                continue
            if rollout is not None:
                self.rollout, self.trouble = rollout, ""
                weights, shadow = dict(rollout.weights), dict(rollout.shadow)
                events.info("--rollout %s: weights %s, shadow %s", self._path, weights, shadow)
                on_change(rollout)


class _FileState(NamedTuple):
    mtime_ns: int
    inode: int
    device: int
    num_bytes: int


def _reason(error: OSError | ConfigurationError) -> str:
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)
