"""A real Slurm of one slurmctld and four slurmd on loopback, with a munge of its own, for tests.

Node n<k> is at 127.0.1.<k>, has 8 cores that are not there and two GPUs that are links to /dev/null.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.ports import free_port

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
INSTALLED = all(map(shutil.which, PROGRAMS))
MISSING = "slurmctld, slurmd, sbatch or munged is not installed: make system-packages"
NODES = ("n1", "n2", "n3", "n4")
START_TIMEOUT_S = 60.0

CONFIGURATION = """\
ClusterName=baton
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job may start after this many seconds; 120 by default.
AuthInfo=socket={run}/munge,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmctldPidFile={run}/slurmctld.pid
SlurmdPidFile={run}/%n.pid
SlurmdSpoolDir={run}/%n
StateSaveLocation={run}/state
SlurmctldLogFile={run}/slurmctld.log
SlurmdLogFile={run}/%n.log
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
KillWait=30
MinJobAge=300
SlurmdTimeout=30
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def wait_for(promise: Callable[[], bool], what: str, timeout_s: float = 30.0, log: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + timeout_s
    while not promise():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}\n{log()}"
        time.sleep(0.1)


class Slurm:
    """Runs from `start` to `stop`; Slurm's paths of sockets must be short, so its folder is one in /tmp."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "BATON"))},
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        control, *ports = (free_port() for _ in range(1 + len(NODES)))
        nodes = [
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.1.{number} Port={port} CPUs=8 "
            f"RealMemory=4000 Gres=gpu:2 State=UNKNOWN"
            for number, (name, port) in enumerate(zip(NODES, ports, strict=True), 1)
        ]
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=socket.gethostname(), port=control, user=getpass.getuser(), run=self.folder, nodes="\n".join(nodes)
            )
        )
        for number in range(2):
            (self.folder / f"nvidia{number}").symlink_to("/dev/null")
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-4] Name=gpu File={self.folder}/nvidia[0-1]\n")
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        self.folder.chmod(0o755)
        names = ("socket", "key-file", "pid-file", "seed-file", "log-file")
        files = ("munge", "munge.key", "munge.pid", "munge.seed", "munge.log")
        self._daemon(
            "munged", "--foreground", "--force",
            *(f"--{name}={self.folder / file}" for name, file in zip(names, files, strict=True)),
        )  # fmt: skip
        wait_for((self.folder / "munge").exists, "munged listens", START_TIMEOUT_S, self.log)
        self._daemon("slurmctld", "-D", "-c")
        for name in NODES:
            (self.folder / name).mkdir()
            self._daemon("slurmd", "-D", "-N", name)
        wait_for(lambda: self.run("sinfo", "-h", "-N", "-o", "%t").split() == ["idle"] * len(NODES), "nodes are idle",
                 START_TIMEOUT_S, self.log)  # fmt: skip

    def _daemon(self, *words: str) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            process = subprocess.Popen(
                words, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._daemons.append(process)

    def run(self, *words: str) -> str:
        """What a command of Slurm printed; empty if it failed, as all do while slurmctld starts."""
        found = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        return found.stdout.strip() if found.returncode == 0 else ""

    def pids(self, *words: str) -> list[int]:
        """Of the processes of its jobs, and its own, in whose command all of these words are."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_text().split("\0")
                if set(words) <= set(command):
                    environ = (process / "environ").read_text().split("\0")
                    found += [int(process.name)] if f"SLURM_CONF={self.env['SLURM_CONF']}" in environ else []
            except (OSError, ValueError):
                continue
        return found

    def log(self) -> str:
        """The end of what the daemons wrote."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in logs)

    def stop(self) -> None:
        """Every job, and then the daemons."""
        self.run("scancel", "--user", getpass.getuser())
        try:
            wait_for(lambda: not self.run("squeue", "-h", "-o", "%i"), "no job is left", 40, self.log)
        finally:
            for daemon in reversed(self._daemons):
                daemon.send_signal(signal.SIGTERM)
            for daemon in reversed(self._daemons):
                try:
                    daemon.wait(20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            for pid in self.pids():  # of jobs that did not end: nothing of them outlives the test
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(self.folder, ignore_errors=True)
