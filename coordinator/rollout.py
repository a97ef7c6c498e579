"""Which version of the model gets how much of the traffic: the file behind `--rollout`, and the choices that follow.

    salt = "any text"   # optional: mixed into the choice, so that no client can compute where its requests go
    [weights]           # of clients' requests; only their ratios count, and 0 means never
    v1 = 90
    v2 = 10
    [shadow]            # of clients' requests the share of which a copy runs there, for nobody but the metrics
    v3 = 0.05

Pure: `coordinator.watched_file` reads the file.
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field

import xxhash

from baton.config import check_version_label
from baton.errors import ConfigurationError


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
