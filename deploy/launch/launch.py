#!/usr/bin/env python3
"""Starts one process of Baton where it belongs on this host, and starts it again when it dies.

    .venv/bin/python deploy/launch/launch.py decode-1 --model /models/llama --discovery etcd://10.0.0.1:2379
                                             │        └─ flags of `baton decode`, before them those of $BATON_FLAGS
                                             │           and $BATON_DECODE_FLAGS
                                             └─ the worker that takes GPU 1 of this host; a task of Slurm says `decode`

1. Place: the GPU by number, the cores of its NUMA node, the RDMA card nearest to it (`host.py`).
2. Environment: CUDA_VISIBLE_DEVICES, UCX_NET_DEVICES, NCCL_SOCKET_IFNAME, NCCL_IB_HCA; what is set already stays.
3. Address: --host (of a coordinator --link-host), the address of this host on the network of coordinators or etcd, or
   of $BATON_INTERFACE.
4. The command is printed so that it can be repeated by hand, and run; --print ends here.
5. It died: started again after 1, 2, 4 ... 30 s, from 1 s again once it has lived for 30 s. It ended by itself with
   status 0, drained: so does this. Status 2, a flag or file is wrong: so does this, since no restart would help.
6. SIGTERM and SIGINT are passed on and its end is waited for: it drains. The limit on that is of whoever sent it.
"""

import argparse
import importlib.util
import logging
import os
import random
import re
import resource
import shlex
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from host import (
    SYSFS,
    Place,
    Problem,
    address_of,
    address_towards,
    allowed_cores,
    interface_of,
    nvidia_gpus,
    place,
    write_cpus,
)

log = logging.getLogger("launch")
KINDS = ("coordinator", "prefill", "decode", "mixed")
EXIT_CONFIGURATION = 2
FIRST_BACKOFF_S, MAX_BACKOFF_S = 1.0, 30.0
STOP = {signal.SIGTERM, signal.SIGINT}
RDMA_LANES = "shm,cma,nixl,tcp"


class Name(NamedTuple):
    kind: str
    rank: int
    """Among the workers of its kind on this host, which is the number of its GPU."""

    @classmethod
    def parse(cls, text: str, environ: Mapping[str, str]) -> "Name":
        match = re.fullmatch(r"([a-z]+)(?:-(\d+))?", text)
        if not match or match[1] not in KINDS:
            raise Problem(
                f"'{text}' is nothing to start; write one of {', '.join(KINDS)}, workers as decode-0, decode-1"
            )
        return cls(match[1], int(match[2] or environ.get("SLURM_LOCALID", "0")))


class Launch(NamedTuple):
    command: list[str]
    environment: dict[str, str]
    """What is added to that of this process."""
    cores: frozenset[int]

    def __str__(self) -> str:
        """To be pasted into a shell."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        if self.cores:
            words += ["taskset", "-c", write_cpus(self.cores)]
        return " ".join([*words, shlex.join(self.command)])


def plan(name: Name, flags: Sequence[str], environ: Mapping[str, str], sysfs: Path = SYSFS) -> Launch:
    """Raises Problem."""
    words = [*_words(environ, "BATON_FLAGS"), *_words(environ, f"BATON_{name.kind.upper()}_FLAGS"), *flags]
    asked = _asked(words)
    is_worker = name.kind != "coordinator"
    flag, given = ("--host", asked.host) if is_worker else ("--link-host", asked.link_host)
    host = given or _own_address(asked, environ)
    where = place(name.rank, environ, nvidia_gpus(), allowed_cores(), sysfs) if is_worker else Place()
    ours = [flag, host] if host and not given else []
    if is_worker:
        ours += ["--worker-id", _worker_id(name, environ)]
        if where.nic and not asked.tls_cert:
            ours += ["--lanes", RDMA_LANES]
    # Theirs last, as the last one counts.
    command = [sys.executable, "-P", "-m", "cli.main", name.kind, *ours, *words]
    added = _environment(where, interface_of(host) if host else None)
    kept = {key: value for key, value in added.items() if key.startswith("CUDA_") or key not in environ}
    return Launch(command, kept, where.cores if asked.cores is None else frozenset())


def _words(environ: Mapping[str, str], variable: str) -> list[str]:
    try:
        return shlex.split(environ.get(variable, ""))
    except ValueError as error:
        raise Problem(f"{variable} cannot be split into words ({error})") from error


def _asked(words: Sequence[str]) -> argparse.Namespace:
    """What was said about the things that are found out here otherwise."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--host", "--link-host", "--cores", "--discovery", "--coordinator", "--tls-cert"):
        parser.add_argument(flag)
    return parser.parse_known_args(list(words))[0]


def _own_address(asked: argparse.Namespace, environ: Mapping[str, str]) -> str | None:
    """None where nothing says which network: everything is on this host then."""
    if environ.get("BATON_INTERFACE"):
        return address_of(environ["BATON_INTERFACE"])
    first = re.match(r"(?:etcd://)?\[?(.+?)\]?:(\d+)(?:[,/]|$)", asked.discovery or asked.coordinator or "")
    return address_towards(first[1], int(first[2])) if first else None  # what is no address baton itself says better


def _worker_id(name: Name, environ: Mapping[str, str]) -> str:
    """The same after a restart. Several jobs of Slurm may have workers on one node."""
    node = environ.get("SLURMD_NODENAME") or socket.gethostname()
    job = f"-{environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in environ else ""
    return f"{name.kind}-{node}-{name.rank}{job}"


def _environment(where: Place, interface: str | None) -> dict[str, str]:
    found: dict[str, str] = {}
    if where.gpu:
        found["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # that of nvidia-smi, by which it was chosen
        found["CUDA_VISIBLE_DEVICES"] = where.gpu
    devices = [str(device) for device in (where.nic, interface) if device]
    if devices:
        found["UCX_NET_DEVICES"] = ",".join(devices)  # the interface as well: UCX connects over TCP
    if interface:
        found["NCCL_SOCKET_IFNAME"] = f"={interface}"
    if where.nic:
        found["NCCL_IB_HCA"] = f"={where.nic}"
    return found


def _prepare(launch: Launch) -> None:
    """What a child inherits. Memory then comes from the NUMA node of the cores that first touch it."""
    if launch.cores:
        os.sched_setaffinity(0, launch.cores)
    if "NCCL_IB_HCA" in launch.environment:
        _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
        if hard != resource.RLIM_INFINITY:
            log.warning("RDMA pins whole pools, and at most %d KiB may be locked: raise `ulimit -l`", hard >> 10)


def keep(launch: Launch) -> int:
    """Until it ends for good. Returns the exit status."""
    # Blocked, and taken one after the other below: none comes between a look and a wait.
    signal.pthread_sigmask(signal.SIG_BLOCK, {*STOP, signal.SIGCHLD})
    backoff_s = FIRST_BACKOFF_S
    while True:
        started_at = time.monotonic()
        # A process group of its own: a Ctrl-C at a terminal comes once, from here.
        words = [*launch.command, "--parent-pid", str(os.getpid())]
        child = os.posix_spawn(words[0], words, {**os.environ, **launch.environment}, setsigmask=[], setpgroup=0)
        status, stopped_by = _until_end(child)
        if stopped_by is not None:
            return 0 if status in (0, -stopped_by) else abs(status)
        if status == 0:
            log.info("it ended by itself with status 0, as when it was drained")
            return 0
        if status == EXIT_CONFIGURATION:
            log.error("it does not start with these flags and files, see above; change them: it is not started again")
            return EXIT_CONFIGURATION
        if time.monotonic() - started_at > MAX_BACKOFF_S:
            backoff_s = FIRST_BACKOFF_S
        # Not all workers that one thing killed at the same moment.
        pause_s = backoff_s * random.uniform(0.75, 1.25)
        log.warning("it died (%s); started again in %.1f s", _cause(status), pause_s)
        if _stopped_within(pause_s):
            return 0
        backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)


def _until_end(child: int) -> tuple[int, signal.Signals | None]:
    """Its status, negative for a signal, and the signal that it was sent from here, if one was."""
    stopped_by = None
    while True:
        number = signal.Signals(signal.sigwait({*STOP, signal.SIGCHLD}))
        if number != signal.SIGCHLD:
            stopped_by = number
            os.kill(child, number)
            continue
        while True:  # of a container this may be process 1, and inherits what others leave behind
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == child:
                return os.waitstatus_to_exitcode(status), stopped_by
            if pid == 0:
                break


def _stopped_within(seconds: float) -> bool:
    return signal.sigtimedwait(STOP, seconds) is not None


def _cause(status: int) -> str:
    return f"status {status}" if status > 0 else signal.Signals(-status).name


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="launch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("name", help=f"one of {', '.join(KINDS)}; workers with their number on this host: decode-1")
    parser.add_argument("--print", action="store_true", help="print the command and end")
    parser.add_argument("--sysfs", type=Path, default=SYSFS, help="read the host from another tree")
    arguments, flags = parser.parse_known_args(argv)
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format=f"%(asctime)s %(levelname)-7s {arguments.name} launch: %(message)s",
    )
    if importlib.util.find_spec("cli") is None:
        log.error("%s has no Baton: use the Python of its environment, .venv/bin/python", sys.executable)
        return EXIT_CONFIGURATION
    try:
        launch = plan(Name.parse(arguments.name, os.environ), flags, os.environ, arguments.sysfs)
    except Problem as error:
        log.error("%s", error)
        return EXIT_CONFIGURATION
    if arguments.print:
        print(launch)
        return 0
    log.info("%s", launch)
    _prepare(launch)
    return keep(launch)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
