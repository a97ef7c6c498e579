"""Ports for processes that are told where to listen, and that come back there after their death."""

import contextlib
import itertools
import os
import random
import socket
from collections.abc import Iterator

FIRST, LAST = 20000, 32000
"""Below those that the kernel gives to outgoing connections, which would take one before its process does."""


def _of_this_runner() -> Iterator[int]:
    """Of several processes that run tests each has its own: what one finds free is not another's a moment later."""
    number, count = os.environ.get("PYTEST_XDIST_WORKER", "gw0"), os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")
    ports = list(range(FIRST + int(number.removeprefix("gw")), LAST, int(count)))
    random.SystemRandom().shuffle(ports)
    return itertools.cycle(ports)


_ports = _of_this_runner()


def free_port() -> int:
    """One that nobody listens on, at any address, and that was not given out for as long as there were others."""
    while True:
        port = next(_ports)
        with socket.socket() as taken, contextlib.suppress(OSError):
            taken.bind(("", port))
            return port
