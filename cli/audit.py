"""`baton audit verify`: whether every line of an audit log is there, and as it was written."""

import argparse
from pathlib import Path

from baton.errors import ConfigurationError
from coordinator.tenants.audit import verify
from coordinator.tenants.keys import MAX_FILE_BYTES, parse_keys
from coordinator.watched_file import WatchedFile

MAX_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    check = parser.add_subparsers(dest="action", metavar="ACTION", required=True).add_parser(
        "verify", help="look for lines that were taken out or changed"
    )
    check.add_argument("files", nargs="+", metavar="FILE", help="of --audit-log, the oldest first")
    check.add_argument("--keys", required=True, metavar="FILE", help="that was in force when the log was written")


def run(arguments: argparse.Namespace) -> int:
    keys = WatchedFile("--keys", Path(arguments.keys), parse_keys, max_bytes=MAX_FILE_BYTES, secret=True).content
    try:
        num_right, problems = verify(map(Path, arguments.files), keys.secret)
    except OSError as error:
        raise ConfigurationError(f"{error.filename} cannot be read: {error.strerror}") from error
    for problem in problems[:MAX_SHOWN]:
        print(problem)
    if len(problems) > MAX_SHOWN:
        print(f"and {len(problems) - MAX_SHOWN} more")
    print(f"{num_right} lines are right, {len(problems)} are not")
    return 1 if problems else 0
