"""What every process of the system does about itself: logs, its parent, descriptors, and being asked to stop."""

import asyncio
import contextlib
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable

from baton.log_format import log_format


def log_to_stderr(name: str) -> None:
    """One line an event: time, level, process, part, message. Never text of a prompt."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(log_format(name))
    # No line says from where in the code it is, and each that is not asked for saves every request some time.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.basicConfig(handlers=[handler], level=os.environ.get("BATON_LOG_LEVEL", "INFO").upper())


def raise_descriptor_limit() -> int:
    """As far as this process may; each connection takes a descriptor. Returns how many there may be, -1 for any."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # the kernel may allow fewer than the limit says
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def watch_parent(parent_pid: int, on_exit: Callable[[], None]) -> None:
    """Call `on_exit` on the running loop when the process `parent_pid` is gone. 0 watches nobody.

    A pidfd, because the kernel's parent-death signal follows the thread that started the child, not its process.
    """
    if not parent_pid:
        return
    loop = asyncio.get_running_loop()
    try:
        pidfd = os.pidfd_open(parent_pid)
    except ProcessLookupError:
        loop.call_soon(on_exit)
        return

    def gone() -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        on_exit()

    loop.add_reader(pidfd, gone)


class Stop(asyncio.Event):
    by: signal.Signals | None = None
    """The signal that set it, if one did."""


def stop_signals() -> Stop:
    """An event that SIGTERM and SIGINT set. A SIGINT after that ends the process at once, as of somebody who waits.

    A SIGTERM says no more the second time: Slurm and systemd send it to a whole group, whose members pass it on.
    """
    stop = Stop()
    loop = asyncio.get_running_loop()

    def asked(number: signal.Signals) -> None:
        if stop.is_set():
            if number == signal.SIGINT:
                os._exit(128 + number)
            return
        stop.by = number
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked, number)
    return stop
