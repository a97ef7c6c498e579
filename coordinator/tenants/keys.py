"""The file behind `--keys`: tenants, their limits, and the digests of their keys.

    secret = "…"                    # salts and digests of prompts are made with it; the same at every coordinator

    [tenants.acme]                  # every line here may be left out
    scopes = ["infer", "pins"]
    requests_per_minute = 600
    weight = 2.0

    [[keys]]
    tenant = "acme"
    hash = "sha256:…"               # `baton key create` makes it
    expires = 2027-01-01T00:00:00Z  # may be left out

A key is KEY_BITS random bits, so its digest may be a fast one: what makes a digest of a password slow is there to make
guessing dear, and 2^256 guesses are out of reach at any price. A slow one would let strangers burn the coordinator's
time. A key is looked up by its digest: how long that takes says something of digests, which nobody can aim at.

Pure: `coordinator.watched_file` reads the file.
"""

import re
import secrets
import tomllib
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import blake2b, sha256
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from baton.errors import ConfigurationError

KEY_BITS = 256
PREFIX = "sk-baton-"
MAX_KEY_CHARACTERS = 128
MIN_SECRET_CHARACTERS = 32
MAX_FILE_BYTES = 8 << 20
ID_DIGITS = 12
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_HASH = re.compile(r"sha256:[0-9a-f]{64}")

Scope = Literal["infer", "pins", "operate"]
SCOPES: tuple[Scope, ...] = ("infer", "pins", "operate")
Limit = Annotated[int, Meta(ge=1, le=10**15)]
Price = Annotated[float, Meta(ge=0, le=1e9)]
S = TypeVar("S", bound=msgspec.Struct)


class Tenant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the file says of one, with the defaults of what it leaves out."""

    scopes: frozenset[Scope] = frozenset({"infer"})
    """infer: answers, tokens, models. pins: /v1/cache/pins. operate: /metrics, /status, /drain from anywhere, and
    everybody's usage and pins."""
    models: frozenset[str] = frozenset()
    """That it may use; empty: all."""
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    """Of prompts and of answers."""
    max_streams: Limit | None = None
    """At once."""
    priority: Annotated[int, Meta(ge=-1000, le=1000)] = 0
    """Greater ones come first at the workers."""
    weight: Annotated[float, Meta(ge=0.001, le=1e6)] = 1.0
    """Of its part of the workers' steps, among those of its priority."""
    kv_share: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Of a worker's KV blocks, what its running requests may hold there; 0: no bound."""
    cache_group: str = ""
    """Tenants of one group share cached KV; empty: with nobody."""
    price_input: Price = 0.0
    """Of a million tokens of prompts."""
    price_cached: Price | None = None
    """Of those that were found in a cache; None: as the others."""
    price_output: Price = 0.0


class _KeyEntry(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    tenant: str
    hash: str
    expires: datetime | None = None
    note: str = ""


class _File(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    secret: str
    tenants: dict[str, dict[str, Any]] = {}
    keys: list[dict[str, Any]] = []


@dataclass(frozen=True, slots=True)
class Key:
    tenant: str
    id: str
    """The beginning of its digest: names it in logs, and is of no use to anybody."""
    expires_at: float = float("inf")
    """Unix seconds."""


@dataclass(frozen=True, slots=True)
class Secret:
    """What others must be unable to compute is made with it: BLAKE2b with a key, another one for each purpose."""

    value: bytes = field(repr=False)

    def salt(self, tenant: str, cache_group: str, client_salt: str) -> str:
        """Of the KV cache, for requests of a tenant. What the client gave is mixed in, and replaces nothing."""
        owner = f"group\0{cache_group}" if cache_group else f"tenant\0{tenant}"
        return self.digest(b"salt", f"{owner}\0{client_salt}".encode()).hex()

    def opaque(self, tenant: str) -> str:
        """The name by which workers tell tenants apart."""
        return self.digest(b"tenant", tenant.encode())[:8].hex()

    def digest(self, purpose: bytes, data: bytes) -> bytes:
        """16 bytes. `purpose`: at most 10 bytes."""
        return blake2b(data, digest_size=16, key=self.value, person=b"baton-" + purpose).digest()


@dataclass(frozen=True)
class Keys:
    secret: Secret
    tenants: Mapping[str, Tenant]
    by_digest: Mapping[bytes, Key]


def new_key() -> str:
    return PREFIX + urlsafe_b64encode(secrets.token_bytes(KEY_BITS // 8)).rstrip(b"=").decode()


def digest_of(key: str) -> bytes:
    return sha256(key.encode()).digest()


def key_id(digest: bytes) -> str:
    return digest.hex()[:ID_DIGITS]


def check_name(name: str, what: str) -> None:
    """Raises ConfigurationError for what is no name of a tenant or a group of them."""
    if not _NAME.fullmatch(name) or name.startswith(PREFIX):
        raise ConfigurationError(
            f"{what} {_shown(name)} is no name: write 1 to 64 letters, digits, dashes and underscores"
        )


def parse_keys(text: str) -> Keys:
    """Raises ConfigurationError that says what to change and repeats no key."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigurationError(f"it is no TOML: {_clean(str(error))}") from None
    if "secret" not in data:
        raise ConfigurationError(
            'there is no secret; write secret = "…" above all tables, with at least '
            f"{MIN_SECRET_CHARACTERS} random characters (`openssl rand -hex 32` makes them)"
        )
    file = _convert(data, _File, "")
    if len(file.secret) < MIN_SECRET_CHARACTERS:
        raise ConfigurationError(f"the secret has {len(file.secret)} characters; give it {MIN_SECRET_CHARACTERS}")
    tenants = {name: _tenant(name, table) for name, table in file.tenants.items()}
    by_digest: dict[bytes, Key] = {}
    for number, table in enumerate(file.keys, 1):
        where = f"[[keys]] number {number}"
        digest, key = _key(where, table)
        if key.tenant not in tenants:
            raise ConfigurationError(f"{where} is of tenant {_shown(key.tenant)}: add [tenants.{key.tenant}]")
        if digest in by_digest:
            raise ConfigurationError(f"{where} has the hash of an earlier one; take one of them out")
        by_digest[digest] = key
    # Any length is good for BLAKE2b once it is digested.
    return Keys(Secret(sha256(file.secret.encode()).digest()), tenants, by_digest)


def _tenant(name: str, table: dict[str, Any]) -> Tenant:
    check_name(name, "tenant")
    where = f"[tenants.{name}]"
    tenant = _convert(table, Tenant, where)
    if tenant.cache_group:
        check_name(tenant.cache_group, f"{where} cache_group")
    if not tenant.scopes:
        raise ConfigurationError(f"{where} scopes is empty; name some of {', '.join(SCOPES)}, or leave it out")
    return tenant


def _key(where: str, table: dict[str, Any]) -> "tuple[bytes, Key]":
    entry = _convert(table, _KeyEntry, where)
    check_name(entry.tenant, f"{where} tenant")
    if not _HASH.fullmatch(entry.hash):
        raise ConfigurationError(
            f"{where} hash must be sha256: and 64 hexadecimal digits, not the key itself; `baton key create` makes it"
        )
    if entry.expires is not None and entry.expires.tzinfo is None:
        raise ConfigurationError(f"{where} expires needs a time zone, such as 2027-01-01T00:00:00Z")
    digest = bytes.fromhex(entry.hash.removeprefix("sha256:"))
    expires_at = entry.expires.timestamp() if entry.expires is not None else float("inf")
    return digest, Key(entry.tenant, key_id(digest), expires_at)


def _convert(data: Any, type: type[S], where: str) -> S:
    try:
        return msgspec.convert(data, type)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        name = path.removesuffix("`").lstrip(".")
    message = message.replace(" | null", "")
    for ours, toml in _WORDS.items():
        message = message.replace(f"`{ours}", f"`{toml}")
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", message, re.DOTALL):
        message = f"{_shown(unknown[1])} is not known here; known are {', '.join(type.__struct_fields__)}"
    elif missing := re.fullmatch(r"Object missing required field `(.*)`", message):
        message = f"{missing[1]} is missing"
    elif message.startswith("Invalid enum value"):
        message = f"there is no such scope; choose of {', '.join(SCOPES)}"
    raise ConfigurationError(": ".join(filter(None, (f"{where} {name}".strip(), message)))) from None


_WORDS = {"object": "table", "array": "list", "str": "text in quotes", "int": "whole number", "float": "number"}


def _shown(name: str) -> str:
    """As it may be repeated in a message: somebody may have pasted a key here."""
    return f"'{name}'" if _NAME.fullmatch(name) and not name.startswith(PREFIX) else "(not repeated here)"


def _clean(message: str) -> str:
    return re.sub(rf"{PREFIX}[\w-]*", "(a key)", message)[:300]
