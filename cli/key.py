"""`baton key create`: an API key of a tenant. The key is shown once; the `--keys` file gets its hash."""

import argparse
import fcntl
import os
import secrets
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from baton.errors import ConfigurationError
from baton.tls import check_secret
from coordinator.tenants.keys import SCOPES, check_name, digest_of, key_id, new_key, parse_keys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    create = parser.add_subparsers(dest="action", metavar="ACTION", required=True).add_parser(
        "create", help="make a key, print it once, and keep its hash"
    )
    create.add_argument("--tenant", required=True, metavar="NAME", help="whose key it is")
    create.add_argument(
        "--keys", default="", metavar="FILE",
        help="file of `baton coordinator --keys` to add it to, made where it is missing; default: print what to add",
    )  # fmt: skip
    create.add_argument("--days", type=float, default=0.0, help="days after which it expires; 0: never")
    create.add_argument("--note", default="", help="kept beside the hash, for people")
    create.add_argument(
        "--scopes", default="", help=f"of a tenant that the file does not have yet: some of {','.join(SCOPES)}"
    )


def run(arguments: argparse.Namespace) -> int:
    check_name(arguments.tenant, "--tenant")
    key = new_key()
    entry = entry_of(arguments.tenant, key, arguments.days, arguments.note)
    table = f"\n[tenants.{arguments.tenant}]\n"
    if arguments.scopes:
        table += f"scopes = [{', '.join(_quoted(scope.strip()) for scope in arguments.scopes.split(','))}]\n"
    if not arguments.keys:
        print(f"{key}\n\n# to add to the file of --keys, with [tenants.{arguments.tenant}] where it has none:\n{entry}")
        return 0
    add_to(Path(arguments.keys), arguments.tenant, table, entry, bool(arguments.scopes))
    print(f"key {key_id(digest_of(key))} of {arguments.tenant}; it is shown only now:", file=sys.stderr)
    print(key)
    return 0


def entry_of(tenant: str, key: str, days: float, note: str) -> str:
    """Lines of TOML. Raises ConfigurationError."""
    if not 0 <= days <= 36500:
        raise ConfigurationError(f"--days is {days:g}; it must be 0 to 36500")
    lines = ["", "[[keys]]", f'tenant = "{tenant}"', f'hash = "sha256:{digest_of(key).hex()}"']
    if days:
        lines.append(f"expires = {datetime.now(UTC) + timedelta(days=days):%Y-%m-%dT%H:%M:%SZ}")
    if note:
        lines.append(f"note = {_quoted(note)}")
    return "\n".join(lines) + "\n"


def add_to(path: Path, tenant: str, table: str, entry: str, table_asked: bool) -> None:
    """Append to the file, at once, whoever else does so; nothing of it is written anew. Raises ConfigurationError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(f"--keys {path} cannot be written: {error.strerror}") from error
    with os.fdopen(fd, "rb+", buffering=0) as file:
        check_secret("--keys", str(path))
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            old = file.read().decode()
            known = parse_keys(old).tenants if old.strip() else {}
            if tenant in known and table_asked:
                raise ConfigurationError(
                    f"{path} has tenant {tenant} already: change its scopes there, or leave --scopes out"
                )
            new = "" if old.strip() else f'secret = "{secrets.token_hex(32)}"  # never change it while requests run\n'
            new += "\n" if old and not old.endswith("\n") else ""
            new += ("" if tenant in known else table) + entry
            parse_keys(old + new)
        except (UnicodeDecodeError, ConfigurationError) as error:
            reason = "it is no UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
            raise ConfigurationError(f"--keys {path}: {reason}") from None
        data = new.encode()
        try:
            if os.write(fd, data) < len(data):
                raise OSError(0, "the disk took only a part of it")
        except OSError as error:
            os.ftruncate(fd, len(old.encode()))
            raise ConfigurationError(f"--keys {path} cannot be written: {error.strerror}") from error


def _quoted(text: str) -> str:
    """As a basic string of TOML. Raises ConfigurationError."""
    if not text.isprintable() or '"' in text or "\\" in text:
        raise ConfigurationError("write notes and scopes without quotation marks, backslashes and line ends")
    return f'"{text}"'
